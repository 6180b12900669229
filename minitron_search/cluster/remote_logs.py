"""A run's logs on the disk of one node of a cluster, read and written from all of them through an actor there.

A run in storage has its working copy on the driver's node. What other nodes add to it is a line now and then, and what
they wait for is a line too, so one actor answers all of them.
"""

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.records.logs import LocalFiles


class KeptFiles(LocalFiles):
    """This node's, which reach another node as `FarFiles`."""

    def __init__(self, desk: Any, node: str):
        self.desk, self.node = desk, node

    def __reduce__(self) -> tuple:
        return _seen_from_here, (self.desk, self.node)


class FarFiles:
    """Another node's. Whoever holds one ends with the actor, which ends with the driver."""

    def __init__(self, desk: Any, node: str):
        self.desk, self.node = desk, node

    def __reduce__(self) -> tuple:
        return _seen_from_here, (self.desk, self.node)

    def poll_s(self, waited: float) -> float:
        """A tenth of what it waited for: one actor, at half a millisecond an answer, has all trials of a cluster."""
        return min(2.0, max(0.1, 0.1 * waited))

    def append(self, path: Path, line: bytes, durable: bool) -> None:
        written = self.desk.append.remote(path, line, durable)
        if durable:  # else it is written before whatever this process asks for next
            ray.get(written)

    def replace(self, path: Path, content: bytes) -> None:
        ray.get(self.desk.replace.remote(path, content))

    def read(self, path: Path, offset: int = 0) -> bytes:
        return ray.get(self.desk.read.remote(path, offset))

    def names(self, folder: Path) -> list[str]:
        return ray.get(self.desk.names.remote(folder))


def keep_files() -> KeptFiles:
    """Of the driver, whose node this is; the actor ends with it."""
    node = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return KeptFiles(ray.remote(num_cpus=0)(LocalFiles).options(scheduling_strategy=place).remote(), node)


def _seen_from_here(desk: Any, node: str) -> KeptFiles | FarFiles:
    return (KeptFiles if ray.get_runtime_context().get_node_id() == node else FarFiles)(desk, node)
