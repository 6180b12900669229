"""Hold the space to its budgets on speed, by a latency table that is measured once for a run, where trials run.

latency.json   where it was measured, the tables, and whole models beside the sums that stand for them
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from minitron_search.architecture_search.latency import LatencyTable, Pass, measure
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.cluster.placement import on_all_cpus
from minitron_search.cluster.session import UnfitError
from minitron_search.config.schema import Config
from minitron_search.config.training import ResourcesConfig
from minitron_search.config.types import Precision
from minitron_search.messages.console import say
from minitron_search.models.architecture import Architecture
from minitron_search.models.device import resolve
from minitron_search.planning.prepare import Prepared
from minitron_search.records.directory import RunDirectory


def hold_to_speed(prepared: Prepared) -> tuple[Prepared, dict[str, Any]]:
    """Return `prepared` with its space within the budgets on speed, and what was measured for them; {} without any.

    A run that goes on takes the tables it has, so that its space stays the same. Raises UnfitError, with the reachable
    range, if no architecture is within the budgets.
    """
    space, resources = prepared.space, prepared.config.resources
    if not space.unmeasured:
        return prepared, {}
    measured = prepared.run_dir.read_latency()
    if not measured:
        say(f"latency: measuring for {' and '.join(space.unmeasured)}")
        request = (*measured_models(space), prepared.precision, resources)
        measured = on_all_cpus(prepared.run_dir, measure_tables, *request, kind=resources.accelerator_type)
    try:
        return replace(prepared, space=held(space, measured)), measured
    except ValueError as error:
        raise UnfitError(error) from None


def held_here(config: Config, space: SearchSpace) -> SearchSpace:
    """Return the space within the budgets on speed, as this machine or the run to be continued has measured it."""
    measured = RunDirectory(config.output).read_latency()
    if not measured:
        say(f"latency: measuring for {' and '.join(space.unmeasured)}, on this machine")
        measured = measure_tables(*measured_models(space), resolve(config.precision), config.resources)
    return held(space, measured)


def held(space: SearchSpace, measured: dict[str, Any]) -> SearchSpace:
    """Return the space within the budgets on speed, and say what was measured and what it leaves of the space."""
    for table in measured["tables"]:
        whole = ", ".join(f"{row['summed_ms']:,.4g} summed and {row['measured_ms']:,.4g} measured"
                          for row in table["whole"])  # fmt: skip
        say(f"latency: {table['batch_size']} x {table['context_length']:,} tokens on {measured['on']}; "
            f"ms of whole models: {whole}")  # fmt: skip
    restricted = space.within([LatencyTable.from_dict(table) for table in measured["tables"]])
    say(f"latency: {len(restricted):,} of {len(space):,} architectures are within {' and '.join(space.unmeasured)}")
    return restricted


def measured_models(space: SearchSpace) -> tuple[PretrainedConfig, np.ndarray, list[Architecture], list[Pass]]:
    """Return what `measure_tables` needs of a space; its whole models are the smallest, the largest, the least deep."""
    shallow = space.shapes[space.shapes[:, 4].argmax()]
    wholes = dict.fromkeys([*space.smallest_and_largest(), space.architecture(shallow)])
    return space.config, space.shapes, list(wholes), list(dict.fromkeys(space.passes().values()))


def measure_tables(
    config: PretrainedConfig,
    shapes: np.ndarray,
    wholes: list[Architecture],
    passes: list[Pass],
    precision: Precision,
    resources: ResourcesConfig,
) -> dict[str, Any]:
    """Return what latency.json holds, measured in this process with a trial's threads, or on a GPU if trials have one.

    `wholes`: models that are measured beside the sums of their layers.
    """
    on_gpu = resources.gpus_per_worker > 0 and torch.cuda.is_available()
    threads, began = resources.cpus_per_worker, time.monotonic()
    tables = []
    for forward in passes:
        table, measured = measure(config, shapes, wholes, forward, precision, "cuda" if on_gpu else "cpu", threads)
        widths = np.array([
            (a.hidden_size, a.intermediate_size, a.num_attention_heads, a.num_key_value_heads) for a in wholes
        ])  # fmt: skip
        summed = table.milliseconds(widths, np.array([a.num_hidden_layers for a in wholes]))
        whole = [
            {**architecture.to_dict(), "summed_ms": summed_ms, "measured_ms": measured_ms}
            for architecture, summed_ms, measured_ms in zip(wholes, summed.tolist(), measured, strict=True)
        ]
        tables.append({**table.to_dict(), "whole": whole})
    return {
        "on": torch.cuda.get_device_name() if on_gpu else f"{threads} CPU thread{'s' if threads > 1 else ''}",
        "precision": precision,
        "seconds": time.monotonic() - began,
        "tables": tables,
    }
