"""A Ray Train worker group that takes trials one after another.

Starting a group takes 10 to 20 CPU seconds (a controller, its helpers, a worker, each importing what it needs); a
short trial trains for no longer than that. So a group is started once for every trial slot, and handed the next
trial when it has ended one. Ray Train restarts a group that lost a worker, which then goes on with the trial it
had, from that trial's last checkpoint.

A group's folder is its mailbox: `00000-<trial>.job`, `00001-...`, each with a `.taken` and a `.done` beside it when it
has begun and ended, and `left` when the group takes no more. The folder above holds the groups of one stage, `closed`
when no more trials will come to any of them, and `wanted` while one of them waits for a place in the cluster: after the
loss of a node there may be none but that of a group that has nothing to do.
"""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private.state import state  # the public table does not say who made a placement group
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # made by protobuf
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from minitron_search.config.training import ResourcesConfig
from minitron_search.models.device import release_memory
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import Files
from minitron_search.trials.trial import Trial

WORKER_RESTARTS = 2  # of a group whose worker died
LOOK_S, QUIET_LOOKS = 0.2, 5
IDLE_S = 2.0  # without a trial, then a group gives its place to one that waits; between two trials are some 0.1 s


class Trainer(TorchTrainer):
    """Without two processes that every trainer starts and no group here has a use for (4 s of its start, 0.2 GiB):
    the manager of Ray Data's datasets, and a cleaner for groups whose controller died, which asks a dashboard that an
    embedded Ray has not. `free_groups` cleans instead."""

    def _create_default_callbacks(self) -> list:
        unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        default = super()._create_default_callbacks()  # type: ignore[misc]  # Train V2's, chosen at import
        return [callback for callback in default if type(callback).__name__ not in unused]


class WorkerGroup:
    """A trainer's `fit` in the background, fed through a folder. Its processes live as long as the one it is in."""

    def __init__(self, materials: ray.ObjectRef, run: RunDirectory, resources: ResourcesConfig, stage: str):
        name = uuid.uuid4().hex  # a name used before resumes that group, even one that has ended
        self.folder, self.files, self.jobs = run.scratch / "groups" / stage / name, run.files, 0
        trainer = Trainer(
            _worker,
            # a list hides the reference from Ray, which would otherwise ship the object to the controller
            train_loop_config={"materials": [materials], "folder": self.folder},
            scaling_config=ScalingConfig(
                num_workers=resources.workers_per_trial,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=resources.of_worker(),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=run.ray_storage,
                failure_config=FailureConfig(max_failures=WORKER_RESTARTS, controller_failure_limit=WORKER_RESTARTS),
            ),
        )
        self.ended = in_background(trainer.fit)

    def run(self, trial: Trial, *, decided: bool) -> bool:
        """Run one trial to its end; raises what ended the group before. False where the group had left: then the trial
        has not begun."""
        job = self.folder / f"{self.jobs:05d}-{trial.id}.job"
        self.jobs += 1
        self.files.replace(job, ray.cloudpickle.dumps((trial, decided)))
        done, began = job.with_suffix(".done").name, time.monotonic()
        while done not in self.files.names(self.folder):
            if self.ended.done():
                self.ended.result()
                return done in self.files.names(self.folder)
            time.sleep(self.files.poll_s(time.monotonic() - began))
        return True

    def close(self) -> None:
        """No trial will follow in any group of the stage; returns when this one has given back what it occupies."""
        self.files.replace(self.folder.parent / "closed", b"")
        self.ended.result()


def close_groups(run: RunDirectory, stage: str) -> None:
    """No trial will follow in any group of the stage."""
    run.files.replace(run.scratch / "groups" / stage / "closed", b"")


def _worker(config: dict[str, Any]) -> None:
    """Every job of the mailbox, in order, in every process of the group."""
    from minitron_search.trials.runner import run_to_end  # models are imported by the process that trains, and no other

    context = ray.train.get_context()
    rank, folder = context.get_world_rank(), config["folder"]
    materials = ray.get(config["materials"][0]).here()
    files = materials.run.files
    # a restarted group goes on with the job it had
    number = sum(name.endswith(".done") for name in files.names(folder))
    while job := next_job(files, folder, number, rank):
        trial, decided = ray.cloudpickle.loads(files.read(job))
        if rank == 0:
            materials.run.event("trial_placed", trial=trial.id, node=ray.util.get_node_ip_address())
        run_to_end(materials, trial, decided=decided, rank=rank, world_size=context.get_world_size())
        if rank == 0:
            files.replace(job.with_suffix(".done"), b"")
        release_memory()
        number += 1


def next_job(files: Files, folder: Path, number: int, rank: int) -> Path | None:
    """The file of job `number`, when it is there; None when no more will come, or another group is to have the place.
    The first process says which, and the others do as it does."""
    began = time.monotonic()
    while True:
        above = files.names(folder.parent)  # looked at first: `closed` is written after the last job
        if "left" in (names := files.names(folder)):
            return None
        suffix = ".taken" if rank else ".job"
        if found := [name for name in names if name.startswith(f"{number:05d}-") and name.endswith(suffix)]:
            job = (folder / found[0]).with_suffix(".job")
            files.replace(job.with_suffix(".taken"), b"")
            return job
        waited = time.monotonic() - began
        if rank == 0 and ("closed" in above or (waited > IDLE_S and "wanted" in above)):
            files.replace(folder / "left", b"")
        else:
            time.sleep(files.poll_s(waited))


def make_room(run: RunDirectory, stage: str) -> None:
    """Give back what is still occupied by every group whose controller was killed, or the process above it, however
    far its start had come: Ray ends such a group and keeps its placement until the job ends. Where a group waits for a
    place, those of the stage that have nothing to do hear of it."""
    wanted, waiting = run.scratch / "groups" / stage / "wanted", False
    for packed in state._connect_and_get_accessor().get_placement_group_table():
        about = PlacementGroupTableData.FromString(packed)
        if ray.ActorID(about.creator_actor_id).is_nil():  # one of the driver's, Tune's own
            continue
        if about.creator_actor_dead and about.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(about.placement_group_id)))
        elif about.state in (PlacementGroupTableData.PENDING, PlacementGroupTableData.RESCHEDULING):
            waiting = True
    if waiting and wanted.parent.exists():
        wanted.touch()
    elif not waiting:
        wanted.unlink(missing_ok=True)


def free_groups() -> None:
    """End what is left of every group of this job: Ray keeps what a group occupies when its controller is killed."""
    job, looks = ray.get_runtime_context().get_job_id(), 0
    while looks < QUIET_LOOKS:  # a controller may be starting its group again when it is killed
        held = [name for name, about in placement_group_table().items()
                if name.endswith(job) and about["state"] != "REMOVED"]  # fmt: skip
        for name in held:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
        looks = 0 if held else looks + 1
        time.sleep(LOOK_S)


def in_background(work: Callable[[], Any]) -> Future[None]:
    """Run in a thread that does not keep its process alive: Tune ends a trial by ending its process."""
    result: Future[None] = Future()

    def to_the_end() -> None:
        try:
            work()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(None)

    threading.Thread(target=to_the_end, daemon=True).start()
    return result
