"""The command line: read flags and the configuration, then hand over to `minitron_search.commands`.

    python -m minitron_search.run [--config FILE] [--stages search,report] [--output DIR] [--resume] [--dry-run]
                                  [--KEY.SUBKEY VALUE ...]

Exit status: 0 done, 1 a stage failed, 2 the configuration or an input is wrong (nothing was written), 130
interrupted (`--resume` continues the run).
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

import tyro

from minitron_search.config.loading import is_ablation, load_config
from minitron_search.records.console import complain

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass
class Options:
    """Find the best smaller architecture inside a trained decoder LM, and prove it.

    Every key of the configuration is a flag too: --search.trials 16, --space.budget.params.target 90M.
    """

    config: Annotated[str | None, tyro.conf.arg(help="YAML file; without one, the embedded default")] = None
    stages: Annotated[str | None, tyro.conf.arg(help="which stages, as in importance,search,retrain,report")] = None
    output: Annotated[str | None, tyro.conf.arg(help="the run directory")] = None
    resume: Annotated[bool, tyro.conf.arg(help="continue the run in --output")] = False
    dry_run: Annotated[bool, tyro.conf.arg(help="say what would be done, and spend nothing")] = False


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status; what went wrong is one message on stderr."""
    options, overrides = parse_flags(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.config is not None and is_ablation(options.config):
            from minitron_search.commands import ablate

            return ablate(options.config, overrides, resume=options.resume, dry_run=options.dry_run)
        config = load_config(options.config, overrides)
        from minitron_search.ownership.owner import held

        with nullcontext() if options.dry_run else held(config.output) as hold:
            # only now: torch, transformers and Ray take seconds to import, and a misspelt key is told without them
            from minitron_search.commands import forecast, search

            return search(config, options.resume, hold) if hold else forecast(config, options.resume)
    except (ValueError, RuntimeError, OSError) as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("interrupted before anything was written", 130)


def parse_flags(arguments: list[str]) -> tuple[Options, list[str]]:
    """Return the options of the command, and the flags that set keys of the configuration."""
    options, overrides = tyro.cli(
        tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(Options),
        args=arguments,
        return_unknown_args=True,
        prog="python -m minitron_search.run",
    )
    for name in ("stages", "output"):
        if getattr(options, name) is not None:
            overrides += [f"--{name}", getattr(options, name)]
    return options, overrides
