"""Forecast what a run costs, stage by stage: tokens, FLOPs, hours, GPU-hours, money; --dry-run prints it."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from minitron_search.architecture_search.deployable import verdicts
from minitron_search.architecture_search.schedule import gang_workers, search_phases
from minitron_search.architecture_search.space import COORDINATES, SearchSpace
from minitron_search.config.schema import Config
from minitron_search.models.architecture import parameter_count
from minitron_search.models.device import resolve
from minitron_search.models.families import sizes_of
from minitron_search.planning import disk, memory
from minitron_search.planning.calibration import Speed, measure, stated
from minitron_search.planning.workload import Costs, Work, option_tokens, planned_probe, workload
from minitron_search.records.directory import RunDirectory, stage_seconds
from minitron_search.teachers.sources import teacher_config
from minitron_search.trials.learning_rate import MOST_RATES
from minitron_search.trials.settings import automatic_rates, rule_rate

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
    """The hardware of a run: this machine, or all of a cluster. `memory`: bytes that workers may have."""

    cpus: float
    gpus: float
    nodes: int = 1
    memory: float = math.inf


def this_machine() -> Machine:
    """Return this machine as one node."""
    return Machine(os.cpu_count() or 1, torch.cuda.device_count(), memory=memory.reservable())


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


def dry_run(config: Config, space: SearchSpace, console: Console, derived: Iterable[str] = ()) -> None:
    """Print the configuration, the space and the forecast. `derived`: lines on values that follow from the teacher."""
    console.print(yaml.safe_dump(config.dump(), sort_keys=False).rstrip(), markup=False)
    smallest, largest = space.smallest_and_largest()
    console.print(f"\nspace: {space.described(config.search.trials)}")
    for line in derived:
        console.print(f"derived: {line}", markup=False, highlight=False)
    if config.distillation.learning_rate == "auto" or config.retraining.learning_rate == "auto":
        console.print(learning_rate(config), markup=False, highlight=False)
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
    at_once = fitting(costs, machine) * config.resources.workers_per_trial
    speed = stated(config) or measure(config, costs, teaching.hidden_size, precision, at_once)
    by_stage = forecast(costs, speed, machine)
    console.print(table(by_stage))
    for line in (*explanation(costs, machine), f"time: {speed.basis}"):
        console.print(line, markup=False)
    for line in in_words(resources(costs, machine)):
        console.print(line, markup=False)
    if advice := intermediate_advice(config, space):
        console.print(advice)


def learning_rate(config: Config) -> str:
    """Return what `learning_rate: auto` will be."""
    rate = rule_rate(config.teacher.model)
    if not automatic_rates(config):
        return f"learning rate: {rate:g}, known for the embedded teacher"
    if probe := planned_probe(config):
        return (f"learning rate: the best that a probe finds in {probe.steps} steps of one candidate at up to "
                f"{MOST_RATES} rates around {rate:g}, which the teacher's size suggests; {probe.trained_tokens:,} "
                "tokens")  # fmt: skip
    return (f"learning rate: {rate:g}, by the teacher's size: the run is too short for a probe, or its students train "
            "on several workers")  # fmt: skip


def deployability(space: SearchSpace) -> list[str]:
    """Return how many of the architectures in budget each engine takes, and how many `space.deployable` leaves."""
    lines = [str(verdict) for verdict in verdicts(space.config, space.in_budget)]
    if space.engines:
        lines.append(
            f"space.deployable: {', '.join(space.engines)}: {len(space):,} of {len(space.in_budget):,} are left"
        )
    return lines


class Resources(NamedTuple):
    """What a run takes at its peak, and keeps, in bytes by what holds them; of one worker too."""

    memory: dict[str, int]
    worker: dict[str, int]
    disk: dict[str, int]
    kept: dict[str, int]


def resources(costs: Costs, machine: Machine) -> Resources:
    """Return what a run will take of memory and disk."""
    config, at_once = costs.config, trials_at_once(costs, machine)
    gang = 1 if config.resources.launcher == "inline" else gang_workers(config, max(1, fitting(costs, machine)))
    return Resources(
        memory=memory.run(costs, at_once, gang, int(machine.cpus)),
        worker=memory.worker(costs, costs.space.typical(), config.resources.workers_per_trial),
        disk={**disk.run_bytes(costs, at_once), **disk.cached(costs)},
        kept={**disk.kept(costs), **disk.cached(costs)},
    )


def in_words(taken: Resources) -> list[str]:
    """Return what a run will take of memory and disk, in lines, beside what is free; a line warns where it is more."""
    free = memory.free_for_run()
    lines = [f"memory: {memory.in_words(taken.memory)} at its peak, of {free / 1e9:.1f} GB free; "
             f"a worker: {memory.in_words(taken.worker)}"]  # fmt: skip
    if sum(taken.memory.values()) > free:
        lines.append("memory: warning: that is more than is free; the system may end processes of the run")
    return [*lines, f"disk: {disk.in_words(taken.disk)} at its peak, unless the cache has some of it already; "
                    f"{disk.in_words(taken.kept)} stay"]  # fmt: skip


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


def fitting(costs: Costs, machine: Machine) -> int:
    """Return how many trials fit `machine` at once, by its processors, its GPUs and its memory.

    One trial alone is tried whatever memory it is counted to need.
    """
    resources = costs.config.resources
    fit = machine.cpus // (resources.workers_per_trial * resources.cpus_per_worker)
    if resources.gpus_per_worker:
        fit = min(fit, machine.gpus // (resources.workers_per_trial * resources.gpus_per_worker))
    if machine.memory < math.inf and fit > 1:
        fit = min(fit, max(1, machine.memory // (resources.workers_per_trial * memory.of_worker(costs))))
    return int(fit)


def trials_at_once(costs: Costs, machine: Machine) -> int:
    """Return how many trials of the search run at once.

    If not even one fits `machine`, another machine is meant: as many as `search.concurrency` says, or one.
    """
    config, fit = costs.config, fitting(costs, machine)
    concurrency = config.search.concurrency
    most = max(1, fit) if concurrency == "auto" else min(concurrency, fit or concurrency)
    return min(most, config.search.trials * config.search.seeds)


def _stage(name: str, work: Work, costs: Costs, speed: Speed, machine: Machine) -> Forecast:
    config, resources = costs.config, costs.config.resources
    at_once = trials_at_once(costs, machine) if name == "search" else 1
    fit = fitting(costs, machine)
    if not fit and not speed.stated:  # all of this machine is one worker
        workers = at_once = 1
    elif name == "search":
        workers = at_once * resources.workers_per_trial
    elif name == "probe":
        workers = 1
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
        lines.append(f"search: {parts}; {trials_at_once(costs, machine)} trials at once")
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


def resources_comparison(run_dir: RunDirectory) -> str | None:
    """Return `forecast 5.10 GB of disk, taken 4.90 GB; ...`, the peaks over all sessions of a run; None where nothing
    was watched."""
    events = run_dir.events()
    expected = [event for event in events if event["event"] == "resources_forecast"]
    taken = [event for event in events if event["event"] == "resources_taken"]
    parts = []
    for name in ("disk", "memory"):
        peaks = [max((event[name] for event in found if name in event), default=0) for found in (expected, taken)]
        if all(peaks):
            parts.append(f"forecast {peaks[0] / 1e9:.2f} GB of {name}, taken {peaks[1] / 1e9:.2f} GB")
    return "; ".join(parts) or None
