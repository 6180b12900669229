"""Read and write a run's logs, on the disk of one node, from all nodes of a cluster, through an actor there.

A run in storage has its working copy on the driver's node. Other nodes add a line to it now and then, and wait for
lines, so one actor answers all of them.
"""

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.records.logs import LOCAL, LocalFiles

Owner = tuple[Path, str] | None  # as `LocalFiles` has it


class KeptFiles(LocalFiles):
    """The files of this node. Sent to another node they arrive as `FarFiles`."""

    def __init__(self, actor: Any, node: str, owner: Owner = None):
        super().__init__(owner)
        self.actor, self.node = actor, node

    def __reduce__(self) -> tuple:
        return _files_on_this_node, (self.actor, self.node, self.owner)


class FarFiles:
    """The files of another node. A process that holds them ends with the actor, which ends with the driver."""

    def __init__(self, actor: Any, node: str, owner: Owner = None):
        self.actor, self.node, self.owner = actor, node, owner

    def __reduce__(self) -> tuple:
        return _files_on_this_node, (self.actor, self.node, self.owner)

    def check(self) -> None:
        ray.get(self.actor.check.remote())

    def poll_s(self, waited: float) -> float:
        """Return a tenth of the wait, in seconds: one actor, half a millisecond an answer, serves a cluster."""
        return min(2.0, max(0.1, 0.1 * waited))

    def append(self, path: Path, line: bytes, durable: bool) -> None:
        written = self.actor.append.remote(path, line, durable)
        if durable:  # else it is written before this process's next request
            ray.get(written)

    def replace(self, path: Path, content: bytes) -> None:
        ray.get(self.actor.replace.remote(path, content))

    def read(self, path: Path, offset: int = 0) -> bytes:
        return ray.get(self.actor.read.remote(path, offset))

    def names(self, folder: Path) -> list[str]:
        return ray.get(self.actor.names.remote(folder))


def keep_files(files: LocalFiles = LOCAL) -> KeptFiles:
    """Return `files` of the driver, which calls this, with the actor that serves them; it ends with the driver."""
    node = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(num_cpus=0)(LocalFiles).options(scheduling_strategy=place).remote(files.owner)
    return KeptFiles(actor, node, files.owner)


def _files_on_this_node(actor: Any, node: str, owner: Owner) -> KeptFiles | FarFiles:
    return (KeptFiles if ray.get_runtime_context().get_node_id() == node else FarFiles)(actor, node, owner)
