"""The forecast of a run that begins: measured in a Ray task, which has the CPUs, or the GPU, that trials will have."""

import ray

from minitron_search.cluster.placement import on_all_cpus
from minitron_search.config.types import Precision
from minitron_search.planning.calibration import measure, stated
from minitron_search.planning.forecast import Machine, fitting, forecast
from minitron_search.planning.prepare import Prepared
from minitron_search.planning.workload import Costs, workload
from minitron_search.records.console import say


def costs_of(prepared: Prepared, resolved: Precision) -> Costs:
    packed = int(prepared.packed.row_lengths.sum())
    return Costs(prepared.config, prepared.space, prepared.teaching.config, resolved, packed)


def write_forecast(prepared: Prepared, resolved: Precision) -> None:
    """Write forecast.json; of a run that goes on, add the stages that it lacks and change none."""
    config, run, costs = prepared.config, prepared.run, costs_of(prepared, resolved)
    known, asked = run.read_forecast(), config.resources
    if known.keys() >= workload(costs).keys():
        return
    have = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    machine = Machine(have.get("CPU", 1), have.get("GPU", 0), len(alive))
    of_one = int(max(node["Resources"]["CPU"] for node in alive)) // asked.cpus_per_worker
    at_once = min(of_one, fitting(config, machine) * asked.workers_per_trial)
    speed = stated(config)
    if speed is None:
        hidden_size = prepared.teaching.config.hidden_size
        speed = on_all_cpus(
            run.depot, measure, config, costs, hidden_size, resolved, at_once, kind=asked.accelerator_type
        )
    found = {name: about._asdict() for name, about in forecast(costs, speed, machine).items()}
    run.write_forecast({**found, **known})
    seconds = sum(about["seconds"] for about in run.read_forecast().values())
    say(f"forecast: {seconds / 60:.1f} min; {speed.basis}")
