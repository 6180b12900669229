"""Run the stages, top to bottom: importance, depth, search, retrain, report."""

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from minitron_search.architecture_search.state import SearchState, make_trial
from minitron_search.cluster import session
from minitron_search.cluster.node_disks import connected, disconnect, free_checkpoints
from minitron_search.cluster.placement import on_all_cpus, resolved_precision
from minitron_search.cluster.tuner import run_search
from minitron_search.cluster.usage import Usage, watched_usage
from minitron_search.depth.layer_choice import read_merges
from minitron_search.evaluation.benchmarks import evaluate_all, models_of
from minitron_search.evaluation.chance import refuse_at_chance
from minitron_search.evaluation.evidence import evidence
from minitron_search.evaluation.lm_eval_run import evaluate
from minitron_search.evaluation.lm_eval_tasks import parse_tasks
from minitron_search.export import student_folder
from minitron_search.messages.console import console, say
from minitron_search.models.architecture import Architecture
from minitron_search.pipeline import retraining
from minitron_search.pipeline.correction import correct_teacher
from minitron_search.pipeline.depth import measure_depth
from minitron_search.pipeline.events import begin, stage
from minitron_search.pipeline.forecast import cluster_now, costs_of, foretell_resources, write_forecast
from minitron_search.pipeline.importance import measure_importance
from minitron_search.pipeline.latency import hold_to_speed
from minitron_search.pipeline.layer_seeds import layer_seeds
from minitron_search.pipeline.learning_rate import settle_rates
from minitron_search.pipeline.teacher import make_trial_inputs
from minitron_search.planning import memory
from minitron_search.planning.environment import environment
from minitron_search.planning.forecast import comparison, intermediate_advice, resources_comparison
from minitron_search.planning.prepare import Prepared
from minitron_search.planning.workload import spent
from minitron_search.progress.follow import Followed
from minitron_search.progress.live import shown
from minitron_search.progress.plan import plan_of
from minitron_search.records.directory import RunDirectory
from minitron_search.records.summary import harm_of, say_harm, summary_table, winner
from minitron_search.tracking.curves import tracked
from minitron_search.trials import runner, speed
from minitron_search.trials.generations import continuations
from minitron_search.trials.settings import (
    correction_tokens,
    distillation_settings,
    retraining_settings,
    untrained,
)
from minitron_search.trials.trial import Trial


def run_pipeline(prepared: Prepared, with_forecast: bool = True, since: float | None = None) -> None:
    """Run the configured stages; each reads what those before it left in the run directory.

    `with_forecast`: measure first how long the run will take. `since`: the Unix time at which the command began.
    """
    config, run_dir = prepared.config, prepared.run_dir
    began = time.monotonic()
    plan = plan_of(config, len(prepared.space), int(prepared.packed.row_lengths.sum()))
    with shown(Followed(plan, run_dir, since or time.time()).now):
        try:
            run_stages(prepared, with_forecast)
        except Exception as error:
            with suppress(OSError):  # of a disk that is full the message is what stopped the run
                if run_dir.config.exists():
                    run_dir.event("run_failed", message=session.message_of(error).strip().splitlines()[-1])
            raise
        shutil.rmtree(run_dir.scratch, ignore_errors=True)
        disconnect(run_dir)
        run_dir.event("run_finished", seconds=time.monotonic() - began)
    console.print(summary_table(run_dir, console.width))
    if best := winner(run_dir):
        say(best)
    for sentence in harm_of(run_dir):
        say(f"* {sentence}")
    if compared := comparison(run_dir):
        say(compared)
    if taken := resources_comparison(run_dir):
        say(taken)
    say(f"done in {(time.monotonic() - began) / 60:.1f} minutes: {config.output}")


def run_stages(prepared: Prepared, with_forecast: bool = True) -> None:
    """Join or start Ray for the stages that need it, and run them; then write the report."""
    config, run_dir = prepared.config, prepared.run_dir
    if not set(config.stages) & {"importance", "depth", "search", "retrain"}:
        begin_run(prepared)
    else:
        with session.joined():
            prepared = in_memory(prepared)
            session.wait_for_place(prepared.config.resources)
            prepared = replace(connected(prepared), precision=resolved_precision(config.precision))
            prepared, speeds = hold_to_speed(prepared)
            begin_run(prepared)
            with session.watched(run_dir), tracked(run_dir, config.name, config.trackers):
                with watched_usage(run_dir) as usage:
                    compute(prepared, speeds, with_forecast, usage)
    if "report" in config.stages:
        from analysis.report import write_report  # reads the run directory only; Plotly is not needed before

        say("report")
        say(f"report: {write_report(run_dir)}")


def in_memory(prepared: Prepared) -> Prepared:
    """Return `prepared`, whose workers ask for the memory that they are counted to hold."""
    costs, resources = costs_of(prepared), prepared.config.resources
    held = memory.worker(costs, workers=resources.workers_per_trial)
    resources = session.sized(resources, held, memory.certain(costs))
    return replace(prepared, config=prepared.config.model_copy(update={"resources": resources}))


def begin_run(prepared: Prepared) -> None:
    """Write down that the run begins, or goes on."""
    config, run_dir = prepared.config, prepared.run_dir
    if not run_dir.config.exists():
        run_dir.write_config(config.dump())
    run_dir.event("run_started", stages=list(config.stages))
    if run_dir.scratch.is_symlink() or run_dir.scratch.is_file():  # which rmtree would leave
        run_dir.scratch.unlink()
    shutil.rmtree(run_dir.scratch, ignore_errors=True)  # of a session that was killed


def compute(prepared: Prepared, speeds: dict[str, Any], with_forecast: bool, usage: Usage) -> None:
    """Run the stages that need Ray. `speeds`: what was measured for budgets on speed. `usage` is told what is read."""
    config, run_dir = prepared.config, prepared.run_dir
    write_environment(prepared)
    if speeds and not run_dir.latency.exists():
        run_dir.write_latency(speeds)
        run_dir.event("latency_measured", seconds=speeds["seconds"], on=speeds["on"])
    if with_forecast:
        write_forecast(prepared)
        foretell_resources(prepared, cluster_now())
    if correction_tokens(config):
        with stage(run_dir, "correction"):
            prepared = correct_teacher(prepared)
        write_environment(prepared)
    if "importance" in config.stages and not run_dir.importance.exists():
        with stage(run_dir, "importance"):
            measure_importance(prepared)
    if "depth" in config.stages and not run_dir.depth_recommendation.exists():
        with stage(run_dir, "depth"):
            measure_depth(prepared)
    if set(config.stages) & {"search", "retrain"}:
        search_and_retrain(prepared, usage)


def write_environment(prepared: Prepared) -> None:
    """Write environment.json: what would have to be the same for the same numbers."""
    prepared.run_dir.write_environment({**environment(prepared), "precision": prepared.precision})


def search_and_retrain(prepared: Prepared, usage: Usage) -> None:
    """Score the teacher, search, retrain the promoted candidates, and evaluate them."""
    config, run_dir, space = prepared.config, prepared.run_dir, prepared.space
    if advice := intermediate_advice(config, space):
        run_dir.event("advice", message=advice)
        say(advice)
    seeds = layer_seeds(prepared)
    with stage(run_dir, "teacher"):
        made = make_trial_inputs(prepared)
        usage.cached += made.folders()
        inputs = ray.put(replace(made, merges=read_merges(run_dir)))
        teacher = score_teacher(prepared, inputs)
    refuse_at_chance(run_dir, teacher.id, config.search.objectives)
    prepared = settle_rates(prepared, inputs)
    config = prepared.config
    space.anchors += space.largest_without(seeds)
    search = SearchState(run_dir, config, space, distillation_settings(config, prepared.precision))
    best = search_candidates(prepared, search, inputs) if "search" in config.stages else search.best()
    if "retrain" in config.stages:
        with stage(run_dir, "retrain", partial(tokens_and_flops, prepared)):
            for rank, architecture in enumerate(best, 1):
                promote(prepared, search, architecture, rank, inputs)
        run_dir.write_evidence(evidence(run_dir, config.search.ranks_by))
        if best and not run_dir.generations.exists():
            write_generations(prepared, best[0], inputs)
    measure_speeds(prepared, search, inputs)
    if "retrain" in config.stages and config.evaluation.tasks:
        with stage(run_dir, "evaluation"):
            evaluate_models(prepared, len(best))


def score_teacher(prepared: Prepared, inputs: ray.ObjectRef) -> Trial:
    """Score the pruned model; return the trial whose log holds its scores."""
    config, run_dir, space = prepared.config, prepared.run_dir, prepared.space
    settings = untrained(distillation_settings(config, prepared.precision))
    teacher = make_trial(space, space.teacher, "teacher", settings, seed=config.seed, initialization="pruned")
    begin(run_dir, [teacher])
    on_all_cpus(run_dir, runner.score_now, inputs, teacher)
    return teacher


def search_candidates(prepared: Prepared, search: SearchState, inputs: ray.ObjectRef) -> list[Architecture]:
    """Search on all of the cluster; return the promoted architectures, best first."""
    config, space = prepared.config, prepared.space
    room = session.Room(config.search.concurrency, config.resources)
    say(f"search: {config.search.trials} of {len(space):,} legal architectures, {room()} trials at once")
    if (asked := config.search.concurrency) != "auto" and asked > room():
        say(f"search.concurrency: warning: {asked} is more than the processors and the memory of this machine "
            f"hold; {room()} run at once; valid: at most {room()}")  # fmt: skip
    if config.search.trials >= len(space):
        say(f"search: the space is small: all {len(space):,} of its architectures are tried")
    with stage(prepared.run_dir, "search", partial(tokens_and_flops, prepared)):
        return run_search(search, inputs, room)


def measure_speeds(prepared: Prepared, search: SearchState, inputs: ray.ObjectRef) -> None:
    """Time every shape of the run that was not timed yet, on a node that has nothing else to do by now."""
    run_dir, resources = prepared.run_dir, prepared.config.resources
    if not (shapes := speed.unmeasured(run_dir)):
        return
    say(f"speed: {len(shapes)} shapes, one after another")
    with stage(run_dir, "speed"):
        arguments = (inputs, shapes, resources.cpus_per_worker)
        on_all_cpus(run_dir, speed.measure_speeds, *arguments, kind=resources.accelerator_type)
    search.write_tables(promoted(run_dir))


def tokens_and_flops(prepared: Prepared, stage_name: str) -> dict[str, float]:
    """Return what a stage has trained on and computed in all sessions so far."""
    tokens, flops = spent(costs_of(prepared), prepared.run_dir.rungs())[stage_name]
    return {"tokens": tokens, "flops": flops}


def promote(
    prepared: Prepared, search: SearchState, architecture: Architecture, rank: int, inputs: ray.ObjectRef
) -> None:  # fmt: skip
    """Retrain a promoted candidate in full and export it to best/, or best-`rank`/."""
    config, run_dir = prepared.config, prepared.run_dir
    trial, before = retrained_and_untrained(prepared, architecture)
    begin(run_dir, [trial, before])
    say(f"retrain: {architecture} on {config.retraining.tokens:,} tokens")
    run_dir.event("trial_started", trial=trial.id)
    on_all_cpus(run_dir, runner.score_now, inputs, before)
    if not run_dir.best(rank).exists():
        slots = session.slots(config.resources)  # nodes may have come and gone since the search began
        try:
            retraining.train_on_cluster(config, trial, inputs, slots, run_dir)
        except RuntimeError:  # a training that diverged is a row that says so
            search.write_tables(promoted(run_dir))
            raise
        export(prepared, trial, rank, inputs, say_harm(run_dir, trial.id, before.id))
    free_checkpoints(run_dir, [trial.id])  # best/ is whole
    run_dir.event("trial_finished", trial=trial.id, status="complete")
    search.write_tables(promoted(run_dir))
    say(f"retrain: {run_dir.best(rank)}")


def retrained_and_untrained(prepared: Prepared, architecture: Architecture) -> tuple[Trial, Trial]:
    """Return the trial that retrains a promoted candidate, and the one that scores its trim."""
    config = prepared.config
    settings = retraining_settings(config, prepared.precision)
    seed, initialization = config.seed, config.distillation.initialization
    trial, before = (
        make_trial(prepared.space, architecture, arm, loop, seed=seed, initialization=initialization)
        for arm, loop in (("retrained", settings), ("untrained", untrained(settings)))
    )
    return replace(trial, stored=prepared.stored), before


def write_generations(prepared: Prepared, architecture: Architecture, inputs: ray.ObjectRef) -> None:
    """Write generations.json: what the teacher, the trim and the student in best/ write after the same words."""
    run_dir = prepared.run_dir
    trial, before = retrained_and_untrained(prepared, architecture)
    ids = on_all_cpus(run_dir, continuations, inputs, before, run_dir.best(1))
    seconds = ids.pop("seconds")
    texts = {name: prepared.tokenizer.batch_decode(of_prompts) for name, of_prompts in ids.items()}
    run_dir.write_generations({**texts, "student": trial.id})
    run_dir.event("generations_written", seconds=seconds)


def export(prepared: Prepared, trial: Trial, rank: int, inputs: ray.ObjectRef, harm: str | None) -> None:
    """Write the retrained student as a stock folder with its model card, on the driver's node. `harm`: what the card
    says of a student that its training made no better."""
    run_dir = prepared.run_dir
    folder = run_dir.best(rank)
    on_all_cpus(run_dir, student_folder.export, inputs, trial, prepared.origin, folder, harm)
    if run_dir.transfer is not None:
        run_dir.transfer.fetch(folder)


def promoted(run_dir: RunDirectory) -> frozenset[str]:
    """Return the ids of the trials that the search promoted."""
    return frozenset(row["trial"] for row in run_dir.read_trials() if row["status"] == "promoted")


def evaluate_models(prepared: Prepared, students: int) -> None:
    """Run lm-eval's tasks on the teacher, on every student in best/ and on the references, into evaluation.json.

    A task that fails is a line there and an event; the report says so, and the command ends with status 1.
    """
    run_dir, config, pruned = prepared.run_dir, prepared.config.evaluation, prepared.pruned
    name = prepared.config.teacher.model + (", corrected" if pruned.folder == prepared.corrected else "")
    models = models_of(run_dir, name, pruned.folder, students)
    tasks, compute_task = parse_tasks(config.tasks), partial(on_all_cpus, run_dir, evaluate)
    evaluate_all(run_dir, models, config.references, tasks, prepared.precision, config.limit, compute_task)
