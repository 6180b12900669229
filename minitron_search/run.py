"""The command: importance -> depth -> search -> retrain -> report.

    python -m minitron_search.run [--config FILE] [--stages search,report] [--output DIR] [--resume] [--dry-run]
                                  [--KEY.SUBKEY VALUE ...]

Exit status: 0 done, 1 a stage failed, 2 the configuration or an input is wrong (nothing was written), 130
interrupted (`--resume` goes on).
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import ray  # noqa: E402
import tyro  # noqa: E402

from minitron_search.ablation.definition import (
    checked,
    is_ablation,  # noqa: E402
)
from minitron_search.ablation.definition import load as load_ablation  # noqa: E402
from minitron_search.ablation.runner import dry_run as dry_run_ablation  # noqa: E402
from minitron_search.ablation.runner import (
    prepare_ablation,
    run_ablation,  # noqa: E402
)
from minitron_search.ablation.storage import put as put_ablation  # noqa: E402
from minitron_search.cluster import session
from minitron_search.cluster.node_disks import (
    connected,
    disconnect,  # noqa: E402
)
from minitron_search.cluster.placement import (
    on_all_cpus,
    resolved_precision,  # noqa: E402
)
from minitron_search.cluster.tuner import run_search  # noqa: E402
from minitron_search.config import schema as configuration  # noqa: E402
from minitron_search.depth.layer_choice import least_block, least_layers, merged_away, read_merges, write_merges
from minitron_search.depth.recommendation import best_blocks  # noqa: E402
from minitron_search.depth.sweep import (
    Cut,
    block,  # noqa: E402
)
from minitron_search.distillation.settings import Precision  # noqa: E402
from minitron_search.evaluation.benchmarks import (
    evaluate_all,
    models_of,  # noqa: E402
)
from minitron_search.evaluation.chance import refuse_at_chance  # noqa: E402
from minitron_search.evaluation.evidence import evidence  # noqa: E402
from minitron_search.evaluation.lm_eval_run import evaluate  # noqa: E402
from minitron_search.evaluation.lm_eval_tasks import parse_tasks  # noqa: E402
from minitron_search.export.model_card import origin_of  # noqa: E402
from minitron_search.importance.importance import Importance  # noqa: E402
from minitron_search.models.architecture import Architecture  # noqa: E402
from minitron_search.models.memory import release_memory  # noqa: E402
from minitron_search.pipeline import retraining  # noqa: E402
from minitron_search.pipeline.correction import correct_teacher  # noqa: E402
from minitron_search.pipeline.depth import measure_depth  # noqa: E402
from minitron_search.pipeline.forecast import (
    costs_of,
    write_forecast,  # noqa: E402
)
from minitron_search.pipeline.importance import (
    calibration_windows,
    measure_importance,  # noqa: E402
)
from minitron_search.pipeline.latency import (
    held_here,
    hold_to_speed,  # noqa: E402
)
from minitron_search.pipeline.teacher import make_materials  # noqa: E402
from minitron_search.planning.forecast import (
    comparison,
    dry_run,
    intermediate_advice,  # noqa: E402
)
from minitron_search.planning.prepare import (
    Prepared,
    check,
    environment,
    prepare,  # noqa: E402
)
from minitron_search.planning.workload import spent  # noqa: E402
from minitron_search.pruning.laco import collapsed  # noqa: E402
from minitron_search.records.bucket import mirror_of  # noqa: E402
from minitron_search.records.console import (
    console,
    say,  # noqa: E402
)
from minitron_search.records.directory import RunDirectory  # noqa: E402
from minitron_search.records.summary import summary_table  # noqa: E402
from minitron_search.search.state import Search  # noqa: E402
from minitron_search.tracking.curves import tracked  # noqa: E402
from minitron_search.trials.settings import (
    correction_tokens,
    distillation_settings,
    make_trial,
    retraining_settings,
    untrained,
)


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
        config = configuration.load(options.config, overrides)
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
            run(prepared)
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
        failed = run_ablation(ablation, prepared, lambda arm: run(arm, foretold=False))
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


def run(prepared: Prepared, foretold: bool = True) -> None:
    """The pipeline. Each stage reads what those before it left in the run directory. Where it is not to be `foretold`,
    no forecast is measured."""
    config, run = prepared.config, prepared.run
    began = time.monotonic()
    try:
        stages(prepared, foretold)
    except (ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        with suppress(OSError):  # of a disk that is full the message is what stopped the run
            if run.config.exists():
                run.event("run_failed", message=session.words_of(error).strip().splitlines()[-1])
        raise
    shutil.rmtree(run.scratch, ignore_errors=True)
    disconnect(run)
    run.event("run_finished", seconds=time.monotonic() - began)
    console.print(summary_table(run))
    if compared := comparison(run):
        say(compared)
    say(f"done in {(time.monotonic() - began) / 60:.1f} minutes: {config.output}")


def begin_run(prepared: Prepared) -> None:
    config, run = prepared.config, prepared.run
    if not run.config.exists():
        run.write_config(config.dump())
    run.event("run_started", stages=list(config.stages))
    shutil.rmtree(run.scratch, ignore_errors=True)  # of a run that was killed


def stages(prepared: Prepared, foretold: bool = True) -> None:
    config, run = prepared.config, prepared.run
    if not set(config.stages) & {"importance", "depth", "search", "retrain"}:
        begin_run(prepared)
    else:
        with session.joined():
            session.wait_for_place(config.resources, say)
            prepared = connected(prepared)
            resolved = resolved_precision(config.precision)
            prepared, speeds = hold_to_speed(prepared, resolved)
            begin_run(prepared)
            with session.watched(run, say), tracked(run, config.name, config.trackers, say):
                compute(prepared, resolved, speeds, foretold)
    if "report" in config.stages:
        from analysis.report import write_report  # reads the run directory only; Plotly is not needed before

        say("report")
        say(f"report: {write_report(run)}")


def compute(prepared: Prepared, resolved: Precision, speeds: dict[str, Any], foretold: bool) -> None:
    """The stages that Ray runs. `speeds`: what was measured for budgets on speed."""
    config, run = prepared.config, prepared.run
    run.write_environment({**environment(prepared), "precision": resolved})
    if speeds and not run.latency.exists():
        run.write_latency(speeds)
        run.event("latency_measured", seconds=speeds["seconds"], on=speeds["on"])
    if foretold:
        write_forecast(prepared, resolved)
    if correction_tokens(config):
        with stage(run, "correction"):
            prepared = correct_teacher(prepared, resolved)
        run.write_environment({**environment(prepared), "precision": resolved})
    if "importance" in config.stages and not run.importance.exists():
        with stage(run, "importance"):
            measure_importance(prepared, resolved)
    if "depth" in config.stages and not run.depth_recommendation.exists():
        with stage(run, "depth"):
            measure_depth(prepared, resolved)
    if set(config.stages) & {"search", "retrain"}:
        search_and_retrain(prepared, resolved)


def search_and_retrain(prepared: Prepared, resolved: Precision) -> None:
    config, run, space = prepared.config, prepared.run, prepared.space
    if advice := intermediate_advice(config, space):
        run.event("advice", message=advice)
        say(advice)
    settings = distillation_settings(config, resolved)
    resources = config.resources
    teacher = make_trial(space, space.teacher, "teacher", config, untrained(settings))
    seeds = layer_seeds(prepared)
    with stage(run, "teacher"):
        materials = ray.put(replace(make_materials(prepared, resolved), merges=read_merges(run)))
        begin(run, [teacher])
        on_all_cpus(run.depot, retraining.score_now, materials, teacher)
    refuse_at_chance(run, teacher.id, config.search.objectives)

    space.anchors += space.largest_without(seeds)
    search = Search(run, config, space, settings)

    def computed(name: str) -> dict[str, float]:
        tokens, flops = spent(costs_of(prepared, resolved), run.rungs())[name]
        return {"tokens": tokens, "flops": flops}

    if "search" in config.stages:
        room = session.Room(config.search.concurrency, resources)
        say(f"search: {config.search.trials} of {len(space):,} legal architectures, {room()} trials at once")
        if config.search.trials >= len(space):
            say(f"search: the space is small: all {len(space):,} of its architectures are tried")
        with stage(run, "search", computed):
            best = run_search(search, materials, room, say)
    else:
        best = search.best()
    if "retrain" in config.stages:
        with stage(run, "retrain", computed):
            for rank, architecture in enumerate(best, 1):
                retrain(prepared, search, architecture, rank, materials)
        run.write_evidence(evidence(run, config.search.ranks_by))
        if config.evaluation.tasks:
            with stage(run, "evaluation"):
                evaluate_models(prepared, resolved, len(best))


def layer_seeds(prepared: Prepared) -> list[Cut]:
    """The layers that `space.axes.drop_block.seeds` says to drop first, of every length."""
    config, run, asked = prepared.config, prepared.run, prepared.config.space.axes.drop_block
    lengths = [length for length in asked.lengths if length] if asked else []
    if asked is None or asked.seeds == "none":
        return []
    if asked.seeds == "sweep":
        blocks = best_blocks(run.read_depth_recommendation(), config.search.ranks_by)
        return [block(start, length) for length, start in blocks.items()]
    if asked.seeds == "laco":
        windows = calibration_windows(prepared)
        collapse = partial(on_all_cpus, run.depot, collapsed, prepared.teacher_folder, windows, lengths)
        write_merges(run, [prepared.teacher_fingerprint, windows.tolist(), lengths], collapse)
        return merged_away(read_merges(run), prepared.teacher_config.num_hidden_layers)
    choose = least_block if asked.seeds == "bi" else least_layers
    return choose(Importance.load(run.importance).block_bi, lengths)


def retrain(prepared: Prepared, search: Search, architecture: Architecture, rank: int, materials: Any) -> None:
    config, run, space = prepared.config, prepared.run, prepared.space
    settings = retraining_settings(config, search.settings.precision)
    trial = make_trial(space, architecture, "retrained", config, settings)
    before = make_trial(space, architecture, "untrained", config, untrained(settings))
    begin(run, [trial, before])
    say(f"retrain: {architecture} on {config.retraining.tokens:,} tokens")
    run.event("trial_started", trial=trial.id)
    on_all_cpus(run.depot, retraining.score_now, materials, before)
    if not run.best(rank).exists():
        slots = session.slots(config.resources)  # nodes may have come and gone since the search began
        try:
            retraining.retrain(config, trial, materials, slots, say, run)
        except RuntimeError:  # one that diverged is a row that says so
            search.write_tables(promoted(run))
            raise
        sources = config.corpus.train, config.corpus.validation, config.winogrande.source
        origin = origin_of(config.teacher.model, taught_by(prepared), *sources)
        on_all_cpus(run.depot, retraining.export, materials, trial, origin, prepared.teacher_folder, run.best(rank))
        if run.depot is not None:
            run.depot.fetch(run.best(rank))
    run.event("trial_finished", trial=trial.id, status="complete")
    search.write_tables(promoted(run))
    say(f"retrain: {run.best(rank)}")


def promoted(run: RunDirectory) -> frozenset[str]:
    return frozenset(row["trial"] for row in run.read_trials() if row["status"] == "promoted")


def taught_by(prepared: Prepared) -> str:
    """To the reader of a model card: which model the student was distilled from."""
    model, asked = prepared.config.distillation.teacher, prepared.config.teacher.correction
    name = f"`{model}`" if model else "it"
    when = " in parallel" if asked.parallel else ""
    return name if asked.method == "none" else f"{name}, corrected{when} on the same text ({asked.method})"


def evaluate_models(prepared: Prepared, resolved: Precision, students: int) -> None:
    """lm-eval's tasks on the teacher, on every student in best/ and on the references, into evaluation.json. What
    fails is a line there and an event; the report says so, and `main` ends with 1."""
    run, asked = prepared.run, prepared.config.evaluation
    name = prepared.config.teacher.model + (", corrected" if prepared.teacher_folder == prepared.corrected else "")
    models = models_of(run, name, prepared.teacher_folder, students)
    compute = partial(on_all_cpus, run.depot, evaluate)
    evaluate_all(run, models, asked.references, parse_tasks(asked.tasks), resolved, asked.limit, compute, say)


@contextmanager
def stage(run: RunDirectory, name: str, computed: Callable[[str], dict[str, float]] | None = None) -> Iterator[None]:
    """Events around a stage; `computed(name)` says what it has trained and computed in all sessions so far."""
    run.event("stage_started", stage=name)
    yield
    run.event("stage_finished", stage=name, **(computed(name) if computed else {}))


def begin(run: Any, trials: list[Any]) -> None:
    for trial in trials:
        run.start_trial(trial.id, trial.describe())


def complain(problem: Exception | str, status: int) -> int:
    print(f"minitron_search: {problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
