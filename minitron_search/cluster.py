"""Joining or starting Ray, and leaving it: the one place that decides where a run's processes live."""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search import precision
from minitron_search.config import Resources
from minitron_search.loop_settings import Precision

# Set before Ray starts: read by the driver, and inherited by the processes of an embedded start.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # a Train controller sees a report, a finished worker or a dead one this much later; the default of 2 s costs
    # more than 6 s a trial
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1200",  # a group waits as long as a cluster takes to add a node
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the run directory is the truth; Tune's own state is never restored
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the objective is computed from the row, by `Ruling`
    "RAY_worker_niceness": "0",  # at Ray's 15 any other process of the machine starves a trial tenfold
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

LOOK_S = 1.0
PLACE_S, PROGRESS_S = 1200.0, 30.0  # a spot node is there in some ten minutes, where there is one


@contextmanager
def joined() -> Iterator[None]:
    """Join the cluster that `RAY_ADDRESS` names, else start Ray inside this process on all of this machine.

    An embedded Ray listens on loopback only and is gone when the block ends; a cluster is left as it was. Inside
    another such block it is the same.
    """
    if ray.is_initialized():
        yield
        return
    # Ray says at every start that its own authentication is on, as it should be
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
    else:
        ray.init(
            address="local",
            include_dashboard=False,  # nothing here asks the state API: trials end themselves, none is killed
            _node_ip_address="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()


class UnfitError(ValueError):
    """The cluster cannot run what was asked; nothing was written."""


def check_shared(folders: Mapping[str, Path]) -> None:
    """Every node of a cluster of several reads and writes the same files in these folders, by the key that names each.

    Raises UnfitError with the node that does not.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    look = ray.remote(num_cpus=0)(os.path.exists)
    for key, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".shared-", dir=folder) as marker:
            seen = {
                node["NodeManagerHostname"]: look.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ).remote(marker.name)
                for node in nodes
            }
            blind = [name for name, found in seen.items() if not ray.get(found)]
        if blind:
            if not any(folder.iterdir()):
                folder.rmdir()
            raise UnfitError(f"{key}: {folder} is on this machine alone: node {blind[0]} of the cluster's {len(nodes)} "
                             "does not see what is written there; valid: a folder that all nodes share (NFS, EFS, "
                             "Filestore), mounted at the same path")  # fmt: skip


class Membership:
    """Which nodes the cluster has; made when all of them are taken for granted."""

    def __init__(self) -> None:
        self.known = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.looked = time.monotonic()

    def changes(self) -> list[tuple[str, dict[str, Any]]]:
        """What became of it since the last call: `node_lost` or `node_joined`, and of whom. Looks once a second."""
        if time.monotonic() - self.looked < LOOK_S:
            return []
        self.looked = time.monotonic()
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        alive = {name for name, node in nodes.items() if node["Alive"]}
        lost = [("node_lost", _about(nodes[name])) for name in sorted(self.known - alive)]
        joined = [("node_joined", _about(nodes[name])) for name in sorted(alive - self.known)]
        self.known = alive
        return lost + joined


def _about(node: dict[str, Any]) -> dict[str, Any]:
    about = {"node": node["NodeManagerAddress"], "node_id": node["NodeID"]}
    if not node["Alive"]:
        return {**about, "message": node["DeathReasonMessage"]}
    return {**about, **{name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")}}


def wait_for_place(workers: int, cpus: int, gpus: float, progress: Callable[[str], None]) -> None:
    """Until one trial of `workers` workers fits: a cluster that scales from zero adds a node for what it is asked.

    Raises UnfitError where none has come within `PLACE_S`, or could: an embedded Ray has this machine and no other.
    """
    if not os.environ.get("RAY_ADDRESS"):
        slots(workers, cpus, gpus)
        return
    wanted = placement_group([{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * workers)
    began = time.monotonic()
    while not wanted.wait(PROGRESS_S):
        if time.monotonic() - began > PLACE_S:
            remove_placement_group(wanted)
            have = ray.cluster_resources()
            raise UnfitError(f"resources: no place for a trial of {workers} workers with {cpus} CPUs and {gpus:g} GPUs "
                             f"each within {PLACE_S / 60:.0f} minutes, in a cluster of {have.get('CPU', 0):g} CPUs and "
                             f"{have.get('GPU', 0):g} GPUs; valid: fewer workers_per_trial, cpus_per_worker or "
                             "gpus_per_worker, or nodes that have them")  # fmt: skip
        progress(f"cluster: waiting for a place for {workers} workers of {cpus} CPUs and {gpus:g} GPUs")
    remove_placement_group(wanted)


def slots(workers_per_trial: int, cpus_per_worker: int, gpus_per_worker: float) -> int:
    """How many trials of this size the cluster can run at once, as it is now.

    Raises UnfitError when not even one fits.
    """
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    fitting = cpus // (workers_per_trial * cpus_per_worker)
    if gpus_per_worker:
        fitting = min(fitting, gpus // (workers_per_trial * gpus_per_worker))
    if fitting < 1:
        raise UnfitError(
            f"resources: a trial of {workers_per_trial} workers with {cpus_per_worker} CPUs and "
            f"{gpus_per_worker:g} GPUs each does not fit the cluster's {cpus:g} CPUs and {gpus:g} GPUs; "
            "valid: fewer workers_per_trial, cpus_per_worker or gpus_per_worker"
        )
    return int(fitting)


class Room:
    """How many trials may run at once: as many as the cluster holds, as nodes come and go; on a cluster that was asked
    for a number, that many, since what waits for a place is what such a cluster adds nodes for."""

    def __init__(self, asked: int | str, resources: Resources):
        self.asked, self.resources = asked, resources
        self.looked, self.now = -LOOK_S, 1

    def __call__(self) -> int:
        if isinstance(self.asked, int) and os.environ.get("RAY_ADDRESS"):
            return self.asked
        if time.monotonic() - self.looked >= LOOK_S:
            self.looked, of = time.monotonic(), self.resources
            with suppress(UnfitError):  # the nodes that held one have gone: it waits for others
                self.now = slots(of.workers_per_trial, of.cpus_per_worker, of.gpus_per_worker)
        return self.now if self.asked == "auto" else min(int(self.asked), self.now)


def on_all_cpus(function: Any, *arguments: Any) -> Any:
    """Run `function` as one Ray task on every CPU of a node."""
    cpus = max(1, int(max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])))
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    def placed(*given: Any) -> Any:
        import torch

        torch.set_num_threads(cpus)
        return function(*given)

    return ray.get(ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(placed).remote(*arguments))


def in_parts(function: Any, parts: list, *arguments: Any) -> list:
    """`function(some of the parts, *arguments) -> a result for each`, spread over one-thread tasks, one for every
    CPU of a node (or its GPUs); the results in the order of `parts`.

    Processes of one thread, not threads of one process: beside any other load, two threads wait for the slower of
    them at every product (measured: 188 CPU-seconds for what takes 35 alone).
    """
    resources = max((node["Resources"] for node in ray.nodes() if node["Alive"]), key=lambda node: node.get("CPU", 0))
    gpus = int(resources.get("GPU", 0))
    tasks = min(len(parts), gpus or max(1, int(resources.get("CPU", 1))))

    def placed(*given: Any) -> list:
        import torch

        torch.set_num_threads(1)
        return function(*given)

    task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=1)(placed)
    found = ray.get([task.remote(parts[first::tasks], *arguments) for first in range(tasks)])
    return [found[index % tasks][index // tasks] for index in range(len(parts))]


def resolved_precision(asked: str) -> Precision:
    """`precision.resolve` where the work is done: a cluster's head may be another machine."""
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    return ray.get(ray.remote(num_cpus=1, num_gpus=gpus)(precision.resolve).remote(asked))
