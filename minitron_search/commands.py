"""What the command does once its configuration is read: search, forecast or ablate. Each returns an exit status.

Each raises what is wrong, and `BegunError` of it once a run has begun: `messages.failures` makes the message of it.
"""

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from minitron_search.ablation.continuing import begun_as
from minitron_search.ablation.definition import Ablation, checked
from minitron_search.ablation.definition import load as load_ablation
from minitron_search.ablation.runner import dry_run as dry_run_ablation
from minitron_search.ablation.runner import prepare_ablation, run_ablation
from minitron_search.ablation.storage import put as put_ablation
from minitron_search.cluster import session
from minitron_search.config.loading import changes, parse_config
from minitron_search.config.schema import Config
from minitron_search.messages.console import complain, console, say
from minitron_search.messages.failures import BegunError
from minitron_search.models.device import release_memory
from minitron_search.ownership.owner import Hold, held
from minitron_search.pipeline.latency import held_here
from minitron_search.pipeline.stages import run_pipeline
from minitron_search.planning.checks import check_stages, is_placement
from minitron_search.planning.forecast import dry_run
from minitron_search.planning.prepare import check_completed, check_texts, complete, prepare
from minitron_search.progress.follow import Followed
from minitron_search.progress.live import shown
from minitron_search.progress.plan import Plan
from minitron_search.records.bucket import bucket_copy
from minitron_search.records.damage import mend
from minitron_search.records.directory import ABLATION_FILE, RunDirectory


def search(config: Config, resume: bool, hold: Hold) -> int:
    """Prepare a run, and run its stages to the end or to the first that fails. `hold`: of its output."""
    began = time.time()
    with shown(Followed(Plan(config.name, {}), None, began).now):
        say("preparing: teacher, text, Winogrande")
        prepared = prepare(config, resume)
        release_memory()
    run_dir = prepared.run_dir
    run_dir.files = hold.files
    if resume and mend(run_dir):
        try:
            check_stages(run_dir, config)  # what was damaged is not there any more
        except ValueError as error:
            raise BegunError(None, wrote=True) from error
    bucket = bucket_copy(config.output, run_dir, hold.check)
    failed_before = failed_evaluations(run_dir)
    with continued_by(lambda: command_for(config, run_dir), run_dir.events_log):
        with bucket.kept_up_to_date() if bucket else nullcontext():
            run_pipeline(prepared, since=began)
    if failed := failed_evaluations(run_dir) - failed_before:
        return complain(f"{failed} of evaluation.tasks failed, the rest is done; tried again by: "
                        f"{command_for(config, run_dir)}", 1)  # fmt: skip
    return 0


def forecast(config: Config, resume: bool) -> int:
    """Print what a run would do and cost, and spend nothing."""
    config, derived = complete(config, resume)
    _, space = check_completed(config, resume)
    try:
        check_texts(config)
    except ValueError as error:
        say(f"a run would be refused: {error}")
    dry_run(config, held_here(config, space) if space.unmeasured else space, console, derived)
    return 0


def ablate(
    file: str | None, overrides: list[str], *, resume: bool, dry_run: bool, kept: str | None = None
) -> int:  # fmt: skip
    """Run the arms of an ablation, one after another, or print what they would cost.

    `file` defines it, or, of one that goes on, `kept`, the text of its ablation.json.
    """
    ablation = begun_as(kept, overrides) if kept is not None else load_ablation(str(file), overrides)
    if dry_run:
        dry_run_ablation(ablation, checked(ablation, resume), console)
        return 0
    with held(ablation.output):
        return _ablate(ablation, resume)


def _ablate(ablation: Ablation, resume: bool) -> int:
    prepared = prepare_ablation(ablation, resume)
    again = shlex.join(["python", "-m", "minitron_search.run", *in_output(ablation.output)])
    record = ablation.root / ABLATION_FILE
    with continued_by(lambda: again if record.exists() else None, record):
        failed = run_ablation(ablation, prepared, lambda arm: run_pipeline(arm, with_forecast=False))
        from analysis.ablation_report import write_ablation_report  # reads run directories only; Plotly is its own

        say(f"report: {write_ablation_report(ablation.root)}")
        put_ablation(ablation)
    return complain(f"failed: {', '.join(failed)}; continue with: {again}", 1) if failed else 0


@contextmanager
def continued_by(command: Any, log: Path) -> Iterator[None]:
    """While the block runs, let what stops it know the command that continues the run, and whether `log` was written.

    `command` returns it, or None where nothing was begun.
    """
    before = _state(log)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        message = session.message_of(error) if isinstance(error, Exception) else None
        raise BegunError(command(), _state(log) != before, message) from error


def command_for(config: Config, run_dir: RunDirectory) -> str | None:
    """Return the command that continues a run as this session ran it; None if there is no run to continue."""
    if not run_dir.config.exists():
        return None
    flags = []
    for key, _, value in changes(parse_config(run_dir.read_config()).dump(), config.dump()):
        if is_placement(key) and key != "output":
            flags += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(["python", "-m", "minitron_search.run", *in_output(config.output), *flags])


def in_output(output: str) -> list[str]:
    """Return the flags that continue what is in `output`."""
    return ["--output", output, "--resume"] if not output.startswith("-") else [f"--output={output}", "--resume"]


def failed_evaluations(run_dir: RunDirectory) -> int:
    """Return how many evaluations of this run have failed so far."""
    return sum(event["event"] == "evaluation_failed" for event in run_dir.events())


def _state(file: Path) -> tuple[int, int] | None:
    """Return what a file is told from a later state of it by; None if it is not there."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None
