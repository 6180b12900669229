"""Forecast what a run costs, stage by stage: tokens, FLOPs, hours, GPU-hours, money; --dry-run prints it."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from minitron_search.config.schema import Config
from minitron_search.models.architecture import parameter_count
from minitron_search.models.device import resolve
from minitron_search.models.families import sizes_of
from minitron_search.planning.calibration import Speed, measure, stated
from minitron_search.planning.workload import Costs, Work, option_tokens, workload
from minitron_search.records.directory import RunDirectory, stage_seconds
from minitron_search.search.deployable import verdicts
from minitron_search.search.schedule import gang_workers, search_phases
from minitron_search.search.space import COORDINATES, SearchSpace
from minitron_search.teachers.sources import teacher_config

# Of a worker group, from Ray's asking for it to its first step: processes, imports, the student. Of a trial inside a
# process of Tune: imports and the student.
START_UP_S = {"train": 16.0, "inline": 8.0}
# Of gradients between the processes of one machine without GPUs, by gloo: a step of 91.6M parameters on two of them
# takes 1.1 s longer than half a batch on one. GPUs send theirs while they compute.
EXCHANGE_BYTES_PER_SECOND = 0.33e9
# Of the teacher's depth: a student with less of it has lost much of its depth. The papers give no number; what they
# call depth pruning keeps half (2408.11796: 16 of 32 layers), and their width pruning keeps every layer.
SHALLOW = 2 / 3


class Machine(NamedTuple):
    """The hardware of a run: this machine, or all of a cluster."""

    cpus: float
    gpus: float
    nodes: int = 1


def this_machine() -> Machine:
    """Return this machine as one node."""
    return Machine(os.cpu_count() or 1, torch.cuda.device_count())


class Forecast(NamedTuple):
    """The cost of one stage.

    seconds: of wall time. gpus: how many it holds meanwhile. gpu_seconds: None if the time is that of a machine without
    those GPUs. price_per_hour, cost: money at the price given; None without a price, or if it is for GPU-hours that are
    not known.
    """

    tokens: int
    flops: float
    seconds: float
    gpus: float
    gpu_seconds: float | None
    price_per_hour: float | None
    cost: float | None
    basis: str


def dry_run(config: Config, space: SearchSpace, console: Console) -> None:
    """Print the configuration, the space and the forecast."""
    console.print(yaml.safe_dump(config.dump(), sort_keys=False).rstrip(), markup=False)
    smallest, largest = space.smallest_and_largest()
    console.print(f"\nspace: {space.described(config.search.trials)}")
    for line in deployability(space):
        console.print(line, markup=False, soft_wrap=True)
    anchors = [("anchor", anchor) for anchor in space.anchors]
    for name, architecture in (("teacher", space.teacher), ("smallest", smallest), ("largest", largest), *anchors):
        counted = space.measures(architecture)
        console.print(f"{name}: {architecture}: {counted.params:,} parameters, "
                      f"{counted.non_embedding_params:,} without embeddings")  # fmt: skip
    precision, machine = resolve(config.precision), this_machine()
    teaching = teaching_config(config, space)
    costs = Costs(config, space, teaching, precision, option_tokens(config.winogrande))
    at_once = fitting(config, machine) * config.resources.workers_per_trial
    speed = stated(config) or measure(config, costs, teaching.hidden_size, precision, at_once)
    by_stage = forecast(costs, speed, machine)
    console.print(table(by_stage))
    for line in (*explanation(costs, machine), f"time: {speed.basis}"):
        console.print(line, markup=False)
    if advice := intermediate_advice(config, space):
        console.print(advice)


def deployability(space: SearchSpace) -> list[str]:
    """Return how many of the architectures in budget each engine takes, and how many `space.deployable` leaves."""
    lines = [str(verdict) for verdict in verdicts(space.config, space.in_budget)]
    if space.engines:
        lines.append(
            f"space.deployable: {', '.join(space.engines)}: {len(space):,} of {len(space.in_budget):,} are left"
        )
    return lines


def teaching_config(config: Config, space: SearchSpace) -> PretrainedConfig:
    """Return the configuration of the model that students are distilled from."""
    return teacher_config(config.distillation.teacher) if config.distillation.teacher else space.config


def intermediate_advice(config: Config, space: SearchSpace) -> str | None:
    """Return advice if candidates lose much of their depth and only logits are distilled (best practices 6 and 7)."""
    teacher = space.teacher.num_hidden_layers
    least = teacher - int(space.points[:, COORDINATES.index("drop_block_length")].max())
    if config.distillation.intermediate or least >= SHALLOW * teacher:
        return None
    return (f"advice: candidates keep as few as {least} of the teacher's {teacher} layers, under two thirds; where "
            "depth shrinks that much, intermediate states and the embedding help beside the logits: "
            "--distillation.intermediate auto --distillation.embedding true")  # fmt: skip


def forecast(costs: Costs, speed: Speed, machine: Machine) -> dict[str, Forecast]:
    """Return the cost of every stage that costs anything, in order."""
    return {name: _stage(name, work, costs, speed, machine) for name, work in workload(costs).items()}


def fitting(config: Config, machine: Machine) -> int:
    """Return how many trials fit `machine` at once."""
    resources = config.resources
    fit = machine.cpus // (resources.workers_per_trial * resources.cpus_per_worker)
    if resources.gpus_per_worker:
        fit = min(fit, machine.gpus // (resources.workers_per_trial * resources.gpus_per_worker))
    return int(fit)


def trials_at_once(config: Config, machine: Machine) -> int:
    """Return how many trials of the search run at once.

    If not even one fits `machine`, another machine is meant: as many as `search.concurrency` says, or one.
    """
    concurrency, fit = config.search.concurrency, fitting(config, machine)
    most = max(1, fit) if concurrency == "auto" else min(concurrency, fit or concurrency)
    return min(most, config.search.trials * config.search.seeds)


def _stage(name: str, work: Work, costs: Costs, speed: Speed, machine: Machine) -> Forecast:
    config, resources = costs.config, costs.config.resources
    at_once = trials_at_once(config, machine) if name == "search" else 1
    fit = fitting(config, machine)
    if not fit and not speed.stated:  # all of this machine is one worker
        workers = at_once = 1
    elif name == "search":
        workers = at_once * resources.workers_per_trial
    elif name in ("retrain", "correction"):
        workers = 1 if resources.launcher == "inline" else gang_workers(config, max(1, fit))
    else:
        workers = max(1, fit) * resources.workers_per_trial
    gpus = workers * resources.gpus_per_worker
    if speed.stated:
        seconds = work.flops / (workers * speed.training)
    else:
        seconds = (work.training / (workers * speed.training) + work.forward / (workers * speed.scoring)
                   + work.scoring / (at_once * speed.scoring) + work.alone / speed.float32)  # fmt: skip
        if work.steps:
            seconds += START_UP_S[resources.launcher] + work.steps / at_once * _exchange(costs, workers // at_once)
    gpu_seconds: float | None = seconds * gpus
    if gpus and not fit and not speed.stated:
        gpu_seconds = None
    price = resources.price_per_hour
    priced = gpus if resources.gpus_per_worker else machine.nodes
    hourly = None if price is None or gpu_seconds is None else price * priced
    cost = None if hourly is None else hourly * seconds / 3600
    return Forecast(work.tokens, float(work.flops), seconds, gpus, gpu_seconds, hourly, cost, speed.basis)


def _exchange(costs: Costs, workers: int) -> float:
    """Return the seconds a step that the workers of one training wait for each other's gradients."""
    if workers == 1 or costs.config.resources.gpus_per_worker:
        return 0.0
    dims = sizes_of(costs.space.config, costs.space.typical())
    return 4 * parameter_count(costs.space.weights, dims) / EXCHANGE_BYTES_PER_SECOND


def table(stages: Mapping[str, Forecast]) -> Table:
    """Return the forecast as a table, a row a stage and one for all of them."""
    shown = Table(title="forecast", box=SIMPLE_HEAD)
    priced = any(cost.cost is not None for cost in stages.values())
    for name in ("", "tokens", "FLOPs", "hours", "GPU-hours", *(["money at the price given"] if priced else [])):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, cost in {**stages, "in all": total(stages)}.items():
        money = [_shown(cost.cost)] if priced else []
        gpu_hours = None if cost.gpu_seconds is None else cost.gpu_seconds / 3600
        shown.add_row(name, f"{cost.tokens:,}" if name != "in all" else "", f"{cost.flops:.3g}",
                      _shown(cost.seconds / 3600), _shown(gpu_hours), *money)  # fmt: skip
    return shown


def total(stages: Mapping[str, Forecast]) -> Forecast:
    """Return the sums over all stages; None where a part is not known."""

    def added(name: str) -> Any:
        values = [getattr(cost, name) for cost in stages.values()]
        return None if None in values else sum(values)

    bases = {cost.basis: None for cost in stages.values()}
    return Forecast(added("tokens"), added("flops"), added("seconds"), 0, added("gpu_seconds"), None, added("cost"),
                    "; ".join(bases))  # fmt: skip


def explanation(costs: Costs, machine: Machine) -> list[str]:
    """Return what the numbers assume, in lines."""
    config, lines = costs.config, []
    if "search" in config.stages:
        phases = search_phases(config, min(config.search.trials, len(costs.space)))
        parts = ", ".join(f"{phase.trials} x {phase.tokens:,} tokens" for phase in phases)
        lines.append(f"search: {parts}; {trials_at_once(config, machine)} trials at once")
    teacher = "runs for every batch" if costs.live else "runs once for every window"
    if set(config.stages) & {"search", "retrain"}:
        lines.append(f"teacher: {teacher}; students are of {costs.space.typical()}, the typical size")
    if config.evaluation.tasks:
        lines.append("evaluation.tasks come on top")
    return lines


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def comparison(run_dir: RunDirectory) -> str | None:
    """Return `forecast 9 min, spent 12 min`, over the stages that have run; None if none of them was forecast."""
    forecasts, seconds = run_dir.read_forecast(), stage_seconds(run_dir.events())
    stages = [name for name in forecasts if name in seconds]
    if not stages:
        return None
    expected = sum(forecasts[name]["seconds"] for name in stages) / 60
    taken = sum(seconds[name] for name in stages) / 60
    return f"forecast {expected:.1f} min, spent {taken:.1f} min ({', '.join(stages)})"
