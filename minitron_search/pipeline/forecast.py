"""Forecast a run that begins: its speed is measured in a Ray task with the CPUs, or the GPU, that trials will have."""

import math

import ray

from minitron_search.cluster.placement import on_all_cpus
from minitron_search.messages.console import say
from minitron_search.planning.calibration import Speed, measure, stated
from minitron_search.planning.forecast import Machine, fitting, forecast, in_words, resources
from minitron_search.planning.prepare import Prepared
from minitron_search.planning.workload import Costs, workload
from minitron_search.trials.settings import rule_rate, with_rate


def costs_of(prepared: Prepared) -> Costs:
    """Return what a token and a scoring of the run cost."""
    packed = int(prepared.packed.row_lengths.sum())
    return Costs(prepared.config, prepared.space, prepared.teacher.config, prepared.precision, packed)


def foretell_resources(prepared: Prepared, machine: Machine) -> None:
    """Say, and write down once, what the run will take of memory and disk."""
    run_dir, taken = prepared.run_dir, resources(costs_of(prepared), machine)
    if any(event["event"] == "resources_forecast" for event in run_dir.events()):
        return
    for line in in_words(taken):
        say(line)
    sums = {name: sum(parts.values()) for name, parts in (("memory", taken.memory), ("disk", taken.disk))}
    run_dir.event("resources_forecast", **sums, by=taken._asdict())


def cluster_now() -> Machine:
    """Return the hardware of the cluster as it is."""
    have = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return Machine(have.get("CPU", 1), have.get("GPU", 0), len(nodes), have.get("memory", math.inf))


def write_forecast(prepared: Prepared) -> None:
    """Write forecast.json. In a run that goes on, add the stages that it lacks and change none."""
    run_dir, costs = prepared.run_dir, costs_of(prepared)
    known = run_dir.read_forecast()
    if known.keys() >= workload(costs).keys():
        return
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    machine = cluster_now()
    largest = int(max(node["Resources"]["CPU"] for node in nodes))
    speed = stated(prepared.config) or _measured(prepared, costs, machine, largest)
    stages = {name: cost._asdict() for name, cost in forecast(costs, speed, machine).items()}
    run_dir.write_forecast({**stages, **known})
    seconds = sum(cost["seconds"] for cost in run_dir.read_forecast().values())
    say(f"forecast: {seconds / 60:.1f} min; {speed.basis}")


def _measured(prepared: Prepared, costs: Costs, machine: Machine, node_cpus: int) -> Speed:
    """Return the speed of one worker, while as many measure as share a node of `node_cpus` CPUs during the run."""
    config, resources = prepared.config, prepared.config.resources
    at_once = min(node_cpus // resources.cpus_per_worker, fitting(costs, machine) * resources.workers_per_trial)
    # a number here, where a relative teacher.model is found: a worker has another current folder
    config = with_rate(config, rule_rate(config.teacher.model))
    arguments = (config, costs, prepared.teacher.config.hidden_size, prepared.precision, at_once)
    return on_all_cpus(prepared.run_dir, measure, *arguments, kind=resources.accelerator_type)
