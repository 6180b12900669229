"""Join or start Ray, and leave it: the one module that decides where a run's processes live."""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.cluster.ray_internals import (
    draining_nodes,
    loopback_only,
    quiet_start,
    reservable,
    sigterm_left_alone,
)
from minitron_search.config.training import ResourcesConfig
from minitron_search.messages import failures
from minitron_search.messages.console import say
from minitron_search.planning import memory
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import cache_folder

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
    # where a searcher proposes them Tune has one trial at a time wait for its process: slots would start one after
    # another (16 of them 29 rungs a minute for 49), and a cluster be asked for one node at a time; `tuner.Proposals`
    # hands out no more than there is room for
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the run directory is the truth; Tune's own state is never restored
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the objective is computed from the row, by `RungScheduler`
    "RAY_worker_niceness": "0",  # at Ray's 15 any other process of the machine starves a trial tenfold
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

START_ADVICE = (
    "RAY_ADDRESS unset, or of a cluster that runs; of an embedded Ray, RAY_TMPDIR in a short path such as /tmp, and a "
    "machine that is not busy with other work"
)
LOOK_S = 1.0
TRIAL_MEMORY = 2**20  # a Tune trial that only waits for its workers asks for no CPU; they ask for its memory too
PLACE_S, PROGRESS_S = 1200.0, 30.0  # a spot node is there in some ten minutes, where there is one


@contextmanager
def joined() -> Iterator[None]:
    """Join the cluster that `RAY_ADDRESS` names; without one, start Ray inside this process on all of this machine.

    An embedded Ray listens on loopback only and is gone when the block ends; a cluster is left as it was. A block
    inside another one changes nothing.
    """
    if ray.is_initialized():
        yield
        return
    quiet_start()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with nullcontext() if os.environ.get("RAY_ADDRESS") else loopback_only():
        with sigterm_left_alone(), failures.reading("Ray did not start", START_ADVICE):
            _start()
        try:
            yield
        finally:
            ray.shutdown()


def _start() -> None:
    """Join a cluster, or start Ray."""
    if os.environ.get("RAY_ADDRESS"):
        # caches are in the same place on every node, which is the driver's
        everywhere = {**ENVIRONMENT, "MINITRON_SEARCH_CACHE": str(cache_folder())}
        ray.init(logging_level=logging.WARNING, log_to_driver=False, runtime_env={"env_vars": everywhere})
    else:
        ray.init(
            address="local",
            include_dashboard=False,  # nothing here asks the state API: trials end themselves, none is killed
            logging_level=logging.WARNING,
            log_to_driver=False,
            **reservable(memory.reservable()),
        )


class UnfitError(ValueError):
    """The cluster cannot run the configuration; nothing was written."""


def blind_node(folder: Path) -> str | None:
    """Return the name of a node that does not see what is written to `folder` here; None if all nodes see it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return None
    look = ray.remote(num_cpus=0)(os.path.exists)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".shared-", dir=folder) as marker:
        seen = {
            node["NodeManagerHostname"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(marker.name)
            for node in nodes
        }
        blind = [name for name, visible in seen.items() if not ray.get(visible)]
    if is_new:
        folder.rmdir()
    return blind[0] if blind else None


def message_of(error: BaseException) -> str:
    """Return what `error` has to tell a user: of one in a task or a worker what was raised there.

    Ray's own message is a traceback.
    """
    inner = error
    while isinstance(inner, (RayTaskError, WorkerGroupError)):
        inner = inner.cause if isinstance(inner, RayTaskError) else next(iter(inner.worker_failures.values()))
    return in_short(failures.message_of(inner))


def in_short(message: str) -> str:
    """Return what Ray says of a process that it ended for want of memory, eight sentences about its settings, in a
    line; any other message as it is."""
    if "out of memory issue" in message:
        return "a process was ended because its node ran out of memory; a smaller search.concurrency helps"
    return message


@contextmanager
def watched(run_dir: RunDirectory) -> Iterator[None]:
    """While the block runs, log and say which nodes come and go.

    The events are `node_joined`, `node_leaving` (after a notice, as clusters/spot_notice.py gives it) and `node_lost`.
    """
    leaving: set[str] = set()
    over, known = threading.Event(), {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def look() -> None:
        nonlocal known
        while not over.wait(LOOK_S):
            nodes = {node["NodeID"]: node for node in ray.nodes()}
            alive = {name for name, node in nodes.items() if node["Alive"]}
            warned = {name for name in draining_nodes() if name in nodes} - leaving
            leaving.update(warned)
            changes = ("node_lost", known - alive), ("node_joined", alive - known), ("node_leaving", warned)
            for kind, changed in changes:
                for name in sorted(changed):
                    fields = _event_fields(nodes[name])
                    run_dir.event(kind, **fields)
                    say(f"cluster: {kind.replace('_', ' ')}: {fields['node']}")
            known = alive

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _event_fields(node: dict[str, Any]) -> dict[str, Any]:
    fields = {"node": node["NodeManagerAddress"], "node_id": node["NodeID"]}
    if not node["Alive"]:
        return {**fields, "message": node["DeathReasonMessage"]}
    return {**fields, **{name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")}}


def wait_for_place(resources: ResourcesConfig) -> None:
    """Wait until one trial fits: a cluster that scales from zero adds a node for what is requested.

    Raises UnfitError if none has come within `PLACE_S`, and at once if none can: an embedded Ray has this machine only.
    """
    if not os.environ.get("RAY_ADDRESS"):
        slots(resources)
        return
    wanted = placement_group([resources.of_worker()] * resources.workers_per_trial)
    began = time.monotonic()
    while not wanted.wait(PROGRESS_S):
        if time.monotonic() - began > PLACE_S:
            remove_placement_group(wanted)
            raise _unfit(resources, f"has found no place within {PLACE_S / 60:.0f} minutes, in")
        say(f"cluster: waiting for a place for {_described(resources)}")
    remove_placement_group(wanted)


def sized(resources: ResourcesConfig, held: Mapping[str, int], certain: int) -> ResourcesConfig:
    """Return `resources` whose workers ask for the memory that they are counted to hold, by what holds it.

    A worker that no node holds by that count asks for all that the largest one has, and a line warns of it: the count
    may be wrong. Raises UnfitError where not even `certain` bytes, which cannot be, are on this machine.
    """
    needed, asked = sum(held.values()), resources.of_worker()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max((node.get("memory", 0) for node in nodes if node.get("CPU", 0) >= asked["CPU"]), default=0)
    most = int(largest) - TRIAL_MEMORY
    if not os.environ.get("RAY_ADDRESS") and certain > (total := memory.this_host().total):
        raise UnfitError(f"resources: the weights, gradients and moments of the smallest student alone take "
                         f"{certain / 1e9:.1f} GB, and this machine has {total / 1e9:.1f} GB of memory; valid: a "
                         "smaller budget, or more memory")  # fmt: skip
    if largest and needed > most:
        say(f"memory: warning: a worker takes about {memory.in_words(held)}, and no node has more than "
            f"{most / 1e9:.1f} GB free for it: one runs at a time, and the system may end it")  # fmt: skip
        needed = most
    return resources.with_memory(needed)


def slots(resources: ResourcesConfig) -> int:
    """Return how many trials the cluster can run at once, as it is now.

    A worker has what it needs on one node; the workers of a trial may be on several. Raises UnfitError if not even one
    trial fits.
    """
    going = draining_nodes()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node.get("NodeID") not in going]
    worker = resources.of_worker()
    if "memory" in worker:
        worker["memory"] += TRIAL_MEMORY
    fitting = sum(_workers(node, worker) for node in nodes) // resources.workers_per_trial
    if fitting < 1:
        raise _unfit(resources, "does not fit")
    return fitting


def _workers(node: dict[str, float], worker: dict[str, float]) -> int:
    """Return how many workers fit a node: those that share a GPU are on one, a worker of several has whole ones."""
    fitting = min(int(node.get(name, 0) / share) for name, share in worker.items() if name != "GPU")
    if gpus := worker.get("GPU"):
        has = int(node.get("GPU", 0))
        fitting = min(fitting, has * int(1 / gpus + 1e-6) if gpus < 1 else int(has // gpus))  # 1 // 0.1 is 9
    return fitting


def _described(resources: ResourcesConfig) -> str:
    kind = f" of kind {resources.accelerator_type}" if resources.accelerator_type else ""
    memory_bytes = resources.of_worker().get("memory")
    and_memory = f" and {memory_bytes / 1e9:.1f} GB of memory" if memory_bytes else ""
    return (f"{resources.workers_per_trial} workers with {resources.cpus_per_worker} CPUs and "
            f"{resources.gpus_per_worker:g} GPUs{kind}{and_memory} each")  # fmt: skip


def _unfit(resources: ResourcesConfig, how: str) -> UnfitError:
    have = ray.cluster_resources()
    kinds = [name.partition(":")[2] for name in have if name.startswith("accelerator_type:")]
    gpus = f"{have.get('GPU', 0):g} GPUs{' of kind ' + ', '.join(kinds) if kinds else ''}"
    and_memory = f" and {have.get('memory', 0) / 1e9:.1f} GB" if "memory" in resources.of_worker() else ""
    cluster = f"the cluster's {have.get('CPU', 0):g} CPUs and {gpus}{and_memory}"
    return UnfitError(f"resources: a trial of {_described(resources)} {how} {cluster}; valid: fewer workers_per_trial, "
                      "cpus_per_worker or gpus_per_worker, or nodes that have them")  # fmt: skip


class Room:
    """The number of trials that may run at once, as nodes come and go.

    `concurrency`: `search.concurrency`. With "auto" it is as many as the cluster holds. A cluster that is given a
    number runs that many, because such a cluster adds nodes for the trials that wait for a place.
    """

    def __init__(self, concurrency: int | str, resources: ResourcesConfig):
        self.concurrency, self.resources = concurrency, resources
        self.looked, self.now = -LOOK_S, 1

    def __call__(self) -> int:
        if isinstance(self.concurrency, int) and os.environ.get("RAY_ADDRESS"):
            return self.concurrency
        if time.monotonic() - self.looked >= LOOK_S:
            self.looked = time.monotonic()
            with suppress(UnfitError):  # the nodes that held one have gone: it waits for others
                self.now = slots(self.resources)
        return self.now if self.concurrency == "auto" else min(int(self.concurrency), self.now)
