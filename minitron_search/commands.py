"""What the command does once its configuration is read: search, forecast or ablate. Each returns an exit status.

Each raises ValueError, RuntimeError or OSError for what is wrong before anything is written.
"""

from contextlib import nullcontext

from ray.exceptions import RayError

from minitron_search.ablation.definition import Ablation, checked
from minitron_search.ablation.definition import load as load_ablation
from minitron_search.ablation.runner import dry_run as dry_run_ablation
from minitron_search.ablation.runner import prepare_ablation, run_ablation
from minitron_search.ablation.storage import put as put_ablation
from minitron_search.cluster import session
from minitron_search.config.schema import Config
from minitron_search.models.device import release_memory
from minitron_search.ownership.owner import Hold, held
from minitron_search.pipeline.latency import held_here
from minitron_search.pipeline.stages import run_pipeline
from minitron_search.planning.checks import check_stages
from minitron_search.planning.forecast import dry_run
from minitron_search.planning.prepare import check, prepare
from minitron_search.records.bucket import bucket_copy
from minitron_search.records.console import complain, console, say
from minitron_search.records.damage import mend
from minitron_search.records.directory import RunDirectory


def search(config: Config, resume: bool, hold: Hold) -> int:
    """Prepare a run, and run its stages to the end or to the first that fails. `hold`: of its output."""
    say("preparing: teacher, text, Winogrande")
    prepared = prepare(config, resume)
    release_memory()
    run_dir = prepared.run_dir
    run_dir.files = hold.files
    if resume:
        mend(run_dir)
        check_stages(run_dir, config)  # what was damaged is not there any more
    bucket = bucket_copy(config.output, run_dir, hold.check)
    failed_before = failed_evaluations(run_dir)
    try:
        with bucket.kept_up_to_date() if bucket else nullcontext():
            run_pipeline(prepared)
    except session.UnfitError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain(
            f"interrupted; every finished row is kept. Continue with --output {config.output} --resume", 130
        )
    except (ValueError, RuntimeError, OSError, RayError) as error:
        return complain(
            f"{session.message_of(error)}\n{config.output} keeps what is finished; --resume continues it", 1
        )
    if failed := failed_evaluations(run_dir) - failed_before:
        return complain(f"{failed} of evaluation.tasks failed, the rest is done; --resume tries them again", 1)
    return 0


def forecast(config: Config, resume: bool) -> int:
    """Print what a run would do and cost, and spend nothing."""
    _, space = check(config, resume)
    dry_run(config, held_here(config, space) if space.unmeasured else space, console)
    return 0


def ablate(file: str, overrides: list[str], *, resume: bool, dry_run: bool) -> int:
    """Run the arms of the ablation that `file` defines, one after another, or print what they would cost."""
    ablation = load_ablation(file, overrides)
    if dry_run:
        dry_run_ablation(ablation, checked(ablation, resume), console)
        return 0
    with held(ablation.output):
        return _ablate(ablation, resume)


def _ablate(ablation: Ablation, resume: bool) -> int:
    prepared = prepare_ablation(ablation, resume)
    again = f"continue with --output {ablation.output} --resume"
    try:
        failed = run_ablation(ablation, prepared, lambda arm: run_pipeline(arm, with_forecast=False))
        from analysis.ablation_report import write_ablation_report  # reads run directories only; Plotly is its own

        say(f"report: {write_ablation_report(ablation.root)}")
        put_ablation(ablation)
    except session.UnfitError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return complain(f"interrupted; every finished row is kept; {again}", 130)
    except (ValueError, RuntimeError, OSError, RayError) as error:
        return complain(f"{session.message_of(error)}\n{again}", 1)
    return complain(f"failed: {', '.join(failed)}; {again}", 1) if failed else 0


def failed_evaluations(run_dir: RunDirectory) -> int:
    """Return how many evaluations of this run have failed so far."""
    return sum(event["event"] == "evaluation_failed" for event in run_dir.events())
