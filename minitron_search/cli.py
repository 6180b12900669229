"""The command: parse flags, prepare, run the pipeline, and turn what goes wrong into one message and an exit status.

    python -m minitron_search.run [--config FILE] [--stages search,report] [--output DIR] [--resume] [--dry-run]
                                  [--KEY.SUBKEY VALUE ...]

Exit status: 0 done, 1 a stage failed, 2 the configuration or an input is wrong (nothing was written), 130
interrupted (`--resume` goes on).
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import ray
import tyro

from minitron_search.ablation.definition import checked, is_ablation
from minitron_search.ablation.definition import load as load_ablation
from minitron_search.ablation.runner import dry_run as dry_run_ablation
from minitron_search.ablation.runner import prepare_ablation, run_ablation
from minitron_search.ablation.storage import put as put_ablation
from minitron_search.cluster import session
from minitron_search.config import loading
from minitron_search.models.device import release_memory
from minitron_search.pipeline.latency import held_here
from minitron_search.pipeline.stages import run_pipeline
from minitron_search.planning.forecast import dry_run
from minitron_search.planning.prepare import check, prepare
from minitron_search.records.bucket import mirror_of
from minitron_search.records.console import console, say
from minitron_search.records.directory import RunDirectory


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
    arguments = sys.argv[1:] if arguments is None else arguments
    options, overrides = tyro.cli(
        tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(Options),
        args=arguments,
        return_unknown_args=True,
        prog="python -m minitron_search.run",
    )
    for name in ("stages", "output"):
        if getattr(options, name) is not None:
            overrides += [f"--{name}", getattr(options, name)]
    try:
        if is_ablation(options.config):
            return ablate(options, overrides)
        config = loading.load_config(options.config, overrides)
        if options.dry_run:
            _, space = check(config, options.resume)
            space = held_here(config, space) if space.unmeasured else space
            dry_run(config, space, console)
            return 0
        say("preparing: teacher, text, Winogrande")
        prepared = prepare(config, options.resume)
        release_memory()
    except (ValueError, RuntimeError, OSError) as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain("interrupted before anything was written", 130)
    mirror = mirror_of(config.output, prepared.run)
    before = evaluations_failed(prepared.run)
    try:
        with mirror.kept(say) if mirror else nullcontext():
            run_pipeline(prepared)
    except session.UnfitError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain(
            f"interrupted; every finished row is kept. Continue with --output {config.output} --resume", 130
        )
    except (ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        return complain(f"{session.words_of(error)}\n{config.output} keeps what is finished; --resume continues it", 1)
    if failed := evaluations_failed(prepared.run) - before:
        return complain(f"{failed} of evaluation.tasks failed, the rest is done; --resume tries them again", 1)
    return 0


def evaluations_failed(run: RunDirectory) -> int:
    """So far."""
    return sum(event["event"] == "evaluation_failed" for event in run.events())


def ablate(options: Options, overrides: list[str]) -> int:
    """As `main`, of a YAML with arms: each is a run of its own. Raises what is wrong before anything is written."""
    assert options.config
    ablation = load_ablation(options.config, overrides)
    if options.dry_run:
        dry_run_ablation(ablation, checked(ablation, options.resume), console)
        return 0
    prepared = prepare_ablation(ablation, options.resume)
    again = f"continue with --output {ablation.output} --resume"
    try:
        failed = run_ablation(ablation, prepared, lambda arm: run_pipeline(arm, foretold=False))
        from analysis.ablation_report import write_ablation_report  # reads run directories only, as below

        say(f"report: {write_ablation_report(ablation.root)}")
        put_ablation(ablation)
    except session.UnfitError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain(f"interrupted; every finished row is kept; {again}", 130)
    except (ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        return complain(f"{session.words_of(error)}\n{again}", 1)
    return complain(f"failed: {', '.join(failed)}; {again}", 1) if failed else 0


def complain(problem: Exception | str, status: int) -> int:
    print(f"minitron_search: {problem}", file=sys.stderr)
    return status
