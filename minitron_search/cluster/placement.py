"""What is computed beside the trials (importance, the permuted teacher, its answers, its scores): on one node.

What is made there is read by the next that is made there. Where the nodes' disks are their own, `depot` brings the
folders among a function's arguments to that node, and takes to storage those that it made.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.config.types import Precision
from minitron_search.models import device
from minitron_search.records.transfer import Depot
from minitron_search.trials.inputs import TrialInputs

RETRIES = 1  # of what ran on a node that was lost: on another one, which fetches what it needs


def on_all_cpus(depot: Depot | None, function: Callable, *arguments: Any, kind: str | None = None) -> Any:
    """Run `function` as one Ray task on every CPU of the node, and on a GPU where it has one; `kind` of GPU, where one
    is asked for."""
    node = _workshop(kind)
    cpus, gpus = _cpus(node), min(1, int(node.get("GPU", 0)))

    def placed(*given: Any) -> Any:
        import torch

        torch.set_num_threads(cpus)
        return _with_folders(depot, function, given)

    return ray.get(_task(placed, node, cpus, gpus).remote(*_sent(depot, arguments)))


def in_parts(depot: Depot | None, function: Callable, parts: list, *arguments: Any) -> list:
    """`function(some of the parts, *arguments) -> a result for each`, spread over one-thread tasks, one for every
    CPU of the node (or its GPUs); the results in the order of `parts`.

    Processes of one thread, not threads of one process: beside any other load, two threads wait for the slower of
    them at every product (measured: 188 CPU-seconds for what takes 35 alone).
    """
    node = _workshop()
    gpus = int(node.get("GPU", 0))
    tasks = min(len(parts), gpus or _cpus(node))

    def placed(*given: Any) -> list:
        import torch

        torch.set_num_threads(1)
        _fetch(depot, given)
        return function(*given)

    task, sent = _task(placed, node, 1, 1 if gpus else 0), _sent(depot, arguments)
    found = ray.get([task.remote(parts[first::tasks], *sent) for first in range(tasks)])
    return [found[index % tasks][index // tasks] for index in range(len(parts))]


def at_the_workshop(depot: Depot | None, function: Callable, *arguments: Any) -> Any:
    """Run what only looks at the node's disk, or has others compute there."""
    placed = lambda *given: _with_folders(depot, function, given)  # noqa: E731
    return ray.get(_task(placed, _workshop(), 0, 0).remote(*_sent(depot, arguments)))


def resolved_precision(asked: str) -> Precision:
    """`precision.resolve` where the work is done: a cluster's head may be another machine."""
    node = _workshop()
    return ray.get(_task(device.resolve, node, 1, min(1, int(node.get("GPU", 0)))).remote(asked))


def _workshop(kind: str | None = None) -> dict[str, Any]:
    """The resources of the node, and its `id`: this one for a task, which is there already; else the one with the most
    GPUs, then CPUs, and of equals the first, which is the same as long as none of them goes."""
    context = ray.get_runtime_context()
    if context.worker.mode == ray.WORKER_MODE:
        here = context.get_node_id()
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


def _sent(depot: Depot | None, arguments: tuple) -> tuple:
    """`arguments`, once storage has the folders among them that are here."""
    if depot is not None:
        for folder in _folders(arguments):
            if folder.is_dir():
                depot.put(folder)
    return arguments


def _with_folders(depot: Depot | None, function: Callable, arguments: tuple) -> Any:
    _fetch(depot, arguments)
    found = function(*arguments)
    _sent(depot, (*arguments, found))
    return found


def _fetch(depot: Depot | None, arguments: tuple) -> None:
    """Those that storage has; the others are yet to be made."""
    if depot is not None:
        for folder in _folders(arguments):
            if not folder.exists() and depot.travels(folder) and depot.has(folder):
                depot.fetch(folder)


def _folders(values: Iterable[Any]) -> list[Path]:
    found: list[Path] = []
    for value in values:
        if isinstance(value, Path):
            found.append(value)
        elif isinstance(value, TrialInputs):
            found += value.folders()
        elif isinstance(value, tuple):
            found += _folders(value)
    return found
