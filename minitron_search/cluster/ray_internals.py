"""Hold every private name of Ray that this project uses, each with the reason for it.

All of them were checked with Ray 2.60.0. `tests/project/test_ray_internals.py` fails where another module uses one.
"""

import logging
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import ray
from ray._private import ray_constants, utils, worker
from ray._private.state import state
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # made by protobuf
from ray.util.placement_group import PlacementGroup

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

# Callbacks of a trainer, each with a process of its own that no group here has a use for (4 s of its start, 0.2 GiB):
# the manager of Ray Data's datasets, and a cleaner for groups whose controller died, which asks a dashboard that an
# embedded Ray does not have. `worker_groups.free_groups` cleans instead.
UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")


@contextmanager
def loopback_only() -> Iterator[None]:
    """Let a Ray that is started in the block, and whatever it starts, listen on the loopback interface alone.

    Ray does so where it takes a machine for one that is in no cluster, as macOS and Windows are: it has this constant,
    and a variable for its processes. Elsewhere it listens on every address, whatever ray.init is told: it turns a
    `_node_ip_address` of 127.0.0.1 into the address by which other machines reach this one.
    """
    with patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False):
        with patch.dict(os.environ, {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield


def in_worker() -> bool:
    """Return whether this process was started by Ray for a task or an actor. The public context does not tell."""
    return ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def draining_nodes() -> dict[str, int]:
    """Return the nodes that take no more work, by id, with their deadlines: Unix time in ms, 0 if there is none.

    The public list of nodes does not say which of them drain.
    """
    return state.get_draining_nodes()


class Placement(NamedTuple):
    """A place in the cluster that a worker group, or Tune for one of its trials, occupies or waits for."""

    group: PlacementGroup
    made_by_actor: bool  # else by the driver, as Tune's are
    maker_is_dead: bool
    is_removed: bool
    is_waiting: bool


def placements() -> list[Placement]:
    """Return all placement groups of the cluster. The public table does not say who made one, and whether it lives."""
    packed = state._connect_and_get_accessor().get_placement_group_table()
    return [_placement(PlacementGroupTableData.FromString(row)) for row in packed]


def _placement(row: Any) -> Placement:
    waiting = (PlacementGroupTableData.PENDING, PlacementGroupTableData.RESCHEDULING)
    return Placement(
        group=PlacementGroup(PlacementGroupID(row.placement_group_id)),
        made_by_actor=not ray.ActorID(row.creator_actor_id).is_nil(),
        maker_is_dead=row.creator_actor_dead,
        is_removed=row.state == PlacementGroupTableData.REMOVED,
        is_waiting=row.state in waiting,
    )


def placement_group_named(name: str) -> PlacementGroup:
    """Return the placement group that the public table lists under `name`. That table has no way back to the group."""
    return PlacementGroup(PlacementGroupID(bytes.fromhex(name)))


def torch_trainer(*arguments: Any, **settings: Any) -> "TorchTrainer":
    """Return a `TorchTrainer` without `UNUSED_CALLBACKS`, which no public setting leaves out."""
    from ray.train.torch import TorchTrainer  # 0.9 s of a processor, and only a group's owner needs it

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list:
            default = super()._create_default_callbacks()  # type: ignore[misc]  # Train V2's, chosen at import
            return [callback for callback in default if type(callback).__name__ not in UNUSED_CALLBACKS]

    return Trainer(*arguments, **settings)


def kept_actors() -> AbstractContextManager:
    """While the block runs, let Tune keep every process that a trial has left for the next trial.

    Between two rungs every trial has ended for a moment. Tune then ends all of its processes but one, each with its
    worker group, which takes 16 s to start again.
    """
    from ray.tune.execution import tune_controller
    from ray.tune.utils.object_cache import _ObjectCache

    class KeptActors(_ObjectCache):
        """The processes that Tune started: never more than ran at once."""

        def cache_object(self, key: Any, obj: Any) -> bool:
            self._cached_objects[key].append(obj)
            self._num_cached_objects += 1
            return True

        def flush_cached_objects(self, force_all: bool = False) -> Generator[Any, None, None]:
            if force_all:
                yield from super().flush_cached_objects(force_all=True)

    return patch.object(tune_controller, "_ObjectCache", KeptActors)


@contextmanager
def sigterm_left_alone() -> Iterator[None]:
    """While Ray starts, keep this process's own handler of SIGTERM.

    Ray sets two in a driver: its own ends the process without unwinding, and that of its C++ core, set while it
    connects, aborts with a stack. A signal that comes in between is held back until ours is there again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, connect = signal.getsignal(signal.SIGTERM), worker.connect

    def connect_with_ours_kept(*arguments: Any, **settings: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return connect(*arguments, **settings)
        finally:
            signal.signal(signal.SIGTERM, ours)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    with (
        patch.object(utils, "set_sigterm_handler", lambda handler: None),
        patch.object(worker, "connect", connect_with_ours_kept),
    ):
        yield


def reservable(memory: int) -> dict[str, Any]:
    """Return what tells ray.init how many bytes tasks may reserve: untold, it leaves out 30% for its object store, and
    what that holds here is a run's token ids."""
    return {"_memory": memory}


def quiet_start() -> None:
    """Silence the note, at every start of Ray, that its own authentication is on, as it should be."""
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def quiet_tune() -> None:
    """Silence two things that Tune says of every trial.

    It looks for result files that nobody here writes; and its controller prints thirty lines for a trial that fails,
    of which `tuner.Bookkeeping` says the one that tells why.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)
