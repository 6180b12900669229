"""Run trials one after another in a Ray Train worker group.

Starting a group takes 10 to 20 CPU seconds (a controller, its helpers, a worker, each importing what it needs); a
short trial trains for no longer than that. So a group is started once for every trial slot, and handed the next
trial when it has ended one. Ray Train restarts a group that lost a worker, which then goes on with the trial it
had, from that trial's last checkpoint.

A group's folder is its mailbox: `00000-<trial>.job`, `00001-...`, each with a `.taken` and a `.done` beside it when it
has begun and ended, and `left` when the group takes no more. The folder above holds the groups of one stage, `closed`
when no more trials will come to any of them, and `wanted` while one of them waits for a place in the cluster: after the
loss of a node there may be no place but that of a group that has nothing to do.
"""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util.placement_group import placement_group_table, remove_placement_group

from minitron_search.cluster.ray_internals import placement_group_named, placements, torch_trainer
from minitron_search.config.training import ResourcesConfig
from minitron_search.models.device import release_memory
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import Files
from minitron_search.trials.trial import Trial

if TYPE_CHECKING:
    from minitron_search.trials.inputs import TrialInputs

WORKER_RESTARTS = 2  # of a group whose worker died
LOOK_S, QUIET_LOOKS = 0.2, 5
IDLE_S = 2.0  # without a trial, then a group gives its place to one that waits; between two trials are some 0.1 s


class WorkerGroup:
    """A trainer's `fit` in the background, fed through a folder. Its processes live as long as the one it is in."""

    def __init__(self, inputs: ray.ObjectRef, run_dir: RunDirectory, resources: ResourcesConfig, stage: str):
        name = uuid.uuid4().hex  # a name used before resumes that group, even one that has ended
        self.folder, self.files, self.jobs = stage_folder(run_dir, stage) / name, run_dir.files, 0
        trainer = torch_trainer(
            _worker,
            # a list hides the reference from Ray, which would otherwise ship the object to the controller
            train_loop_config={"inputs": [inputs], "folder": self.folder},
            scaling_config=ScalingConfig(
                num_workers=resources.workers_per_trial,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=resources.of_worker(),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=run_dir.ray_storage,
                failure_config=FailureConfig(
                    max_failures=WORKER_RESTARTS,
                    controller_failure_limit=WORKER_RESTARTS,  # type: ignore[call-arg]  # Train V2's, chosen at import
                ),
            ),
        )
        self.ended = in_background(trainer.fit)

    def run(self, trial: Trial, *, decided: bool) -> bool:
        """Run one trial to its end; return False if the group had left, and the trial has not begun.

        `decided`: the search says at every rung whether the trial goes on. Raises what ended the group.
        """
        job = self.folder / f"{self.jobs:05d}-{trial.id}.job"
        self.jobs += 1
        self.files.replace(job, ray.cloudpickle.dumps((trial, decided)))
        return self._wait_for(job.with_suffix(".done").name)

    def _wait_for(self, done: str) -> bool:
        """Wait for the file `done`; return False if the group ended without writing it."""
        began = time.monotonic()
        while done not in self.files.names(self.folder):
            if self.ended.done():
                self.ended.result()
                return done in self.files.names(self.folder)
            time.sleep(self.files.poll_s(time.monotonic() - began))
        return True

    def close(self) -> None:
        """Tell all groups of the stage that no trial will follow, and wait until this one has given back its place."""
        self.files.replace(self.folder.parent / "closed", b"")
        self.ended.result()


def stage_folder(run_dir: RunDirectory, stage: str) -> Path:
    """Return the folder above the mailboxes of a stage's groups."""
    return run_dir.scratch / "groups" / stage


def close_groups(run_dir: RunDirectory, stage: str) -> None:
    """Tell all groups of the stage that no trial will follow."""
    run_dir.files.replace(stage_folder(run_dir, stage) / "closed", b"")


def _worker(config: dict[str, Any]) -> None:
    """Do every job of the mailbox, in order: run in every process of the group."""
    context = ray.train.get_context()
    rank, folder = context.get_world_rank(), config["folder"]
    inputs: TrialInputs = ray.get(config["inputs"][0]).here()
    files = inputs.run_dir.files
    # a restarted group goes on with the job it had
    number = sum(name.endswith(".done") for name in files.names(folder))
    while job := next_job(files, folder, number, rank):
        _do(job, inputs, rank, context.get_world_size())
        release_memory()
        number += 1


def _do(job: Path, inputs: "TrialInputs", rank: int, world_size: int) -> None:
    from minitron_search.trials.runner import run_to_end  # models are imported by the process that trains, and no other

    files = inputs.run_dir.files
    trial, decided = ray.cloudpickle.loads(files.read(job))
    if rank == 0:
        inputs.run_dir.event("trial_placed", trial=trial.id, node=ray.util.get_node_ip_address())
    run_to_end(inputs, trial, decided=decided, rank=rank, world_size=world_size)
    if rank == 0:
        files.replace(job.with_suffix(".done"), b"")


def next_job(files: Files, folder: Path, number: int, rank: int) -> Path | None:
    """Return the file of job `number` when it is there; None if no job follows, or another group is to have the place.

    The process of rank 0 decides which, and the others do as it does.
    """
    began = time.monotonic()
    while True:
        above = files.names(folder.parent)  # looked at first: `closed` is written after the last job
        if "left" in (names := files.names(folder)):
            return None
        suffix = ".taken" if rank else ".job"
        if ready := [name for name in names if name.startswith(f"{number:05d}-") and name.endswith(suffix)]:
            job = (folder / ready[0]).with_suffix(".job")
            files.replace(job.with_suffix(".taken"), b"")
            return job
        waited = time.monotonic() - began
        if rank == 0 and ("closed" in above or (waited > IDLE_S and "wanted" in above)):
            files.replace(folder / "left", b"")
        else:
            time.sleep(files.poll_s(waited))


def make_room(run_dir: RunDirectory, stage: str) -> None:
    """Give back the place of every group that was killed, and ask idle groups for theirs while another one waits.

    A group counts as killed when its controller was, or the process above it, however far its start had come: Ray ends
    such a group and keeps its placement until the job ends.
    """
    waiting = False
    for placement in placements():
        if not placement.made_by_actor:  # Tune's own, made by the driver
            continue
        if placement.maker_is_dead and not placement.is_removed:
            remove_placement_group(placement.group)
        elif placement.is_waiting:
            waiting = True
    wanted = stage_folder(run_dir, stage) / "wanted"
    if waiting and wanted.parent.exists():
        wanted.touch()
    elif not waiting:
        wanted.unlink(missing_ok=True)


def free_groups() -> None:
    """Free the place of every group of this job: Ray keeps what a group occupies when its controller is killed."""
    job, looks = ray.get_runtime_context().get_job_id(), 0
    while looks < QUIET_LOOKS:  # a controller may be starting its group again when it is killed
        held = [name for name, row in placement_group_table().items()
                if name.endswith(job) and row["state"] != "REMOVED"]  # fmt: skip
        for name in held:
            remove_placement_group(placement_group_named(name))
        looks = 0 if held else looks + 1
        time.sleep(LOOK_S)


def in_background(work: Callable[[], Any]) -> Future[None]:
    """Run `work` in a thread that does not keep its process alive: Tune ends a trial by ending its process."""
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
