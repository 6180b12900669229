"""Place what is computed beside the trials (importance, the permuted teacher, its outputs, its scores) on one node.

What one call makes there the next one reads. If the nodes' disks are their own, the run's `NodeTransfer` brings the
folders among a function's arguments to that node, and takes those that the function made to storage.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.cluster.ray_internals import in_worker
from minitron_search.config.types import Precision
from minitron_search.models import device
from minitron_search.records.directory import RunDirectory
from minitron_search.records.transfer import NodeTransfer
from minitron_search.trials.inputs import TrialInputs

RETRIES = 1  # of a task whose node was lost: on another node, which fetches what it needs


def on_all_cpus(run_dir: RunDirectory | None, function: Callable, *arguments: Any, kind: str | None = None) -> Any:
    """Return `function(*arguments)`, run as one Ray task on every CPU of the node, and on a GPU if it has one.

    `run_dir`: the run whose folders `function` reads and makes; None if it needs none. `kind`: of GPU, as in
    `resources.accelerator_type`.
    """
    node, transfer = _compute_node(kind), _transfer_of(run_dir)
    cpus, gpus = _cpus(node), min(1, int(node.get("GPU", 0)))

    def placed(*placed_arguments: Any) -> Any:
        import torch

        torch.set_num_threads(cpus)
        return _with_folders(transfer, function, placed_arguments)

    return ray.get(_task(placed, node, cpus, gpus).remote(*_put(transfer, arguments)))


def in_parts(
    run_dir: RunDirectory | None, function: Callable, parts: list, *arguments: Any, memory: int = 0
) -> list:  # fmt: skip
    """Return a result for each of `parts`, in their order, computed by one-thread tasks on every CPU (or GPU).

    `function(some of the parts, *arguments)` returns a list, a result for each part that it was given. `memory`: bytes
    that one task holds; no more tasks run than the node has memory for.

    Processes of one thread, not threads of one process: beside any other load, two threads wait for the slower of
    them at every product (measured: 188 CPU-seconds for what takes 35 alone).
    """
    node, transfer = _compute_node(), _transfer_of(run_dir)
    gpus = int(node.get("GPU", 0))
    tasks = min(len(parts), gpus or _cpus(node))
    if memory and "memory" in node:
        tasks = min(tasks, max(1, int(node["memory"] // memory)))

    def placed(*placed_arguments: Any) -> list:
        import torch

        torch.set_num_threads(1)
        _fetch(transfer, placed_arguments)
        return function(*placed_arguments)

    task, sent = _task(placed, node, 1, 1 if gpus else 0), _put(transfer, arguments)
    results = ray.get([task.remote(parts[first::tasks], *sent) for first in range(tasks)])
    return [results[index % tasks][index // tasks] for index in range(len(parts))]


def on_one_node(run_dir: RunDirectory | None, function: Callable, *arguments: Any) -> Any:
    """Return `function(*arguments)`, run on the same node and occupying none of its CPUs.

    For functions that only look at the node's disk, or that place tasks there themselves.
    """
    transfer = _transfer_of(run_dir)
    placed = lambda *placed_arguments: _with_folders(transfer, function, placed_arguments)  # noqa: E731
    return ray.get(_task(placed, _compute_node(), 0, 0).remote(*_put(transfer, arguments)))


def resolved_precision(precision: str) -> Precision:
    """Return what `auto` means on the node that computes: a cluster's head may be another machine."""
    node = _compute_node()
    return ray.get(_task(device.resolve, node, 1, min(1, int(node.get("GPU", 0)))).remote(precision))


def _compute_node(kind: str | None = None) -> dict[str, Any]:
    """Return the resources of the node, and its `id`.

    In a task it is the task's own. Else it is the one with the most GPUs, then CPUs, and of equals the first, which is
    the same one as long as no node goes.
    """
    if in_worker():
        here = ray.get_runtime_context().get_node_id()
        return {"id": here, **next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)}
    alive = [node for node in ray.nodes() if node["Alive"]]
    of_kind = [node for node in alive if f"accelerator_type:{kind}" in node["Resources"]]
    nodes = sorted(of_kind or alive, key=lambda node: node["NodeID"])
    best = max(nodes, key=lambda node: (node["Resources"].get("GPU", 0), node["Resources"].get("CPU", 0)))
    return {"id": best["NodeID"], **best["Resources"]}


def _cpus(node: dict[str, Any]) -> int:
    return max(1, int(node.get("CPU", 0)))


def _task(function: Callable, node: dict[str, Any], cpus: int, gpus: int) -> Any:
    place: Any = NodeAffinitySchedulingStrategy(node["id"], soft=True)
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy=place)(function)


def _transfer_of(run_dir: RunDirectory | None) -> NodeTransfer | None:
    return None if run_dir is None else run_dir.transfer


def _put(transfer: NodeTransfer | None, arguments: tuple) -> tuple:
    """Return `arguments`, once storage has the folders among them that are here."""
    if transfer is not None:
        for folder in _folders(arguments):
            if folder.is_dir():
                transfer.put(folder)
    return arguments


def _with_folders(transfer: NodeTransfer | None, function: Callable, arguments: tuple) -> Any:
    _fetch(transfer, arguments)
    result = function(*arguments)
    _put(transfer, (*arguments, result))
    return result


def _fetch(transfer: NodeTransfer | None, arguments: tuple) -> None:
    """Fetch the folders among `arguments` that storage has; the others are yet to be made."""
    if transfer is not None:
        for folder in _folders(arguments):
            if not folder.exists() and transfer.travels(folder) and transfer.has(folder):
                transfer.fetch(folder)


def _folders(values: Iterable[Any]) -> list[Path]:
    folders: list[Path] = []
    for value in values:
        if isinstance(value, Path):
            folders.append(value)
        elif isinstance(value, TrialInputs):
            folders += value.folders()
        elif isinstance(value, tuple):
            folders += _folders(value)
    return folders
