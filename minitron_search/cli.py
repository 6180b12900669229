"""The command line: read flags and the configuration, then hand over to `minitron_search.commands`.

    python -m minitron_search.run [--config FILE] [--stages search,report] [--output DIR] [--resume] [--dry-run]
                                  [--KEY.SUBKEY VALUE ...] [--help [SECTION | KEY]]

Exit status: 0 done, 1 a stage failed, 2 the configuration or an input is wrong (nothing was written), 130
interrupted and 143 terminated (`--resume` continues the run). Whatever fails is one message (`messages.failures`).
"""

import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from minitron_search.config.loading import check_ablation_keys, configured, is_ablation, load_config, pairs, yaml_values
from minitron_search.config.schema import Config
from minitron_search.messages.failures import reading, run_command
from minitron_search.options import Arguments, help_asked, run_parser
from minitron_search.records.paths import is_uri, located, working_folder

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status; what went wrong is one message on stderr."""
    return run_command(partial(command, sys.argv[1:] if arguments is None else arguments))


def command(arguments: list[str]) -> int:
    """Do what the arguments ask for; return the exit status, or raise what is wrong with them."""
    if (part := help_asked(arguments)) is not None:
        from minitron_search.usage import show_help  # tyro, which nothing else needs

        show_help(Arguments((run_parser(),)), part)
        return 0
    options, overrides = run_parser().parse_known_args(arguments)
    if options.resume and options.config is None:
        return resume(overrides, options.dry_run)
    if options.config is not None and is_ablation(options.config):
        check_ablation_keys(options.config, overrides)
        from minitron_search.commands import ablate

        return ablate(options.config, overrides, resume=options.resume, dry_run=options.dry_run)
    return run(load_config(options.config, overrides), options.resume, options.dry_run)


def run(config: Config, resumed: bool, dry_run: bool) -> int:
    """Run, or forecast, what is configured."""
    from minitron_search.ownership.owner import held

    with nullcontext() if dry_run else held(config.output) as hold:
        # only now: torch, transformers and Ray take seconds to import, and a misspelt key is told without them
        from minitron_search.commands import forecast, search

        return search(config, resumed, hold) if hold else forecast(config, resumed)


def resume(overrides: list[str], dry_run: bool) -> int:
    """Continue what the output holds, a run or an ablation, as it was configured, with overrides on top."""
    flags = dict(pairs(overrides))
    output = flags.get("output") or default_output(flags)
    if ablation := kept(output, "ablation.json"):
        from minitron_search.commands import ablate

        return ablate(None, overrides, resume=True, dry_run=dry_run, kept=ablation)
    values: dict[str, Any] = {}
    if text := kept(output, "config.yaml"):
        try:
            values = {**yaml_values(text, "it"), "output": output}
        except ValueError as error:
            from minitron_search.records.damage import config_damage  # pyarrow, as above

            raise config_damage(Path(output, "config.yaml"), str(error).partition("; valid")[0]) from None
    with reading(f"output: {output}/config.yaml", "the same command with --config"):
        config = configured(values, overrides)
    return run(config, True, dry_run)


def default_output(flags: dict[str, str]) -> str:
    """Return the run directory of the embedded default with these flags, without one for the output."""
    given = {key: flags[key] for key in ("name", "teacher.model") if flags.get(key)}
    return configured({}, [f"--{key}={value}" for key, value in given.items()]).output


def kept(output: str, name: str) -> str | None:
    """Return the text of a file of the run directory `output`, here or in storage; None if it is not there."""
    try:
        output = located(output)
    except ValueError as error:
        raise ValueError(f"output: {output!r} {error}") from None
    if is_uri(output):
        from minitron_search.records.bucket import stored_text  # pyarrow: half a second

        if (text := stored_text(output, name)) is not None:
            return text
    file = working_folder(output) / name
    with reading(f"output: {file}", "a run directory whose files can be read"):
        return file.read_text(encoding="utf-8") if file.is_file() else None
