"""The stages, top to bottom: importance, depth, search, retrain, report."""

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from minitron_search.cluster import session
from minitron_search.cluster.node_disks import connected, disconnect
from minitron_search.cluster.placement import on_all_cpus, resolved_precision
from minitron_search.cluster.tuner import run_search
from minitron_search.config.types import Precision
from minitron_search.depth.layer_choice import read_merges
from minitron_search.evaluation.benchmarks import evaluate_all, models_of
from minitron_search.evaluation.chance import refuse_at_chance
from minitron_search.evaluation.evidence import evidence
from minitron_search.evaluation.lm_eval_run import evaluate
from minitron_search.evaluation.lm_eval_tasks import parse_tasks
from minitron_search.export import student_folder
from minitron_search.export.model_card import origin_of
from minitron_search.models.architecture import Architecture
from minitron_search.pipeline import retraining
from minitron_search.pipeline.correction import correct_teacher
from minitron_search.pipeline.depth import measure_depth
from minitron_search.pipeline.events import begin, stage
from minitron_search.pipeline.forecast import costs_of, write_forecast
from minitron_search.pipeline.importance import measure_importance
from minitron_search.pipeline.latency import hold_to_speed
from minitron_search.pipeline.layer_seeds import layer_seeds
from minitron_search.pipeline.teacher import make_materials
from minitron_search.planning.environment import environment
from minitron_search.planning.forecast import comparison, intermediate_advice
from minitron_search.planning.prepare import Prepared
from minitron_search.planning.workload import spent
from minitron_search.records.console import console, say
from minitron_search.records.directory import RunDirectory
from minitron_search.records.summary import summary_table
from minitron_search.search.state import Search, make_trial
from minitron_search.tracking.curves import tracked
from minitron_search.trials.settings import correction_tokens, distillation_settings, retraining_settings, untrained


def run_pipeline(prepared: Prepared, foretold: bool = True) -> None:
    """The pipeline. Each stage reads what those before it left in the run directory. Where it is not to be `foretold`,
    no forecast is measured."""
    config, run = prepared.config, prepared.run
    began = time.monotonic()
    try:
        run_stages(prepared, foretold)
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


def run_stages(prepared: Prepared, foretold: bool = True) -> None:
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
        on_all_cpus(run.depot, student_folder.export, materials, trial, origin, prepared.teacher_folder, run.best(rank))
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
