"""Checkpoints of a training: weights, optimizer, and what must be the same to go on. Each is whole or not there.

Written and read with torch.distributed.checkpoint, under names: `student.<parameter>`, and `<moment>.<parameter>` of
the optimizer. One process writes replicas, every process its own shards; any number of processes of either strategy
reads either.
"""

import json
import os
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from minitron_search.checkpoints.safe_reading import DamagedError, read_metadata, read_tensors
from minitron_search.checkpoints.writing import CheckpointWriter, told_by_the_system
from minitron_search.distillation.parallel import agreed, first_error, leads_node
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.training_log import TrainingLog
from minitron_search.records.logs import LOCAL, Files
from minitron_search.records.transfer import NodeTransfer

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# What a continued run may change without changing the steps already taken.
FREE_ON_RESUME = {
    "total_tokens", "milestones", "checkpoint_tokens", "log_steps", "threads", "strategy", "gradient_checkpointing",
    "compile",
}  # fmt: skip


class CheckpointFolder(NamedTuple):
    """One training's checkpoints: folders `step-00000012` of `path`, which `transfer` carries between nodes' disks.

    `files`: the run's, which know whether another process has taken it over: then nothing is written any more.
    """

    path: Path
    transfer: NodeTransfer | None = None
    files: Files = LOCAL

    def at(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.path / f"step-{step:08d}"

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint, on whichever node it was written; it is on this one now."""
        if self.transfer is None or not self.transfer.travels(self.path):
            return max(self.path.glob("step-????????"), default=None)
        newest = max((self.path / name for name in self.transfer.names(self.path)), default=None)
        if newest is not None:
            self.transfer.fetch(newest)
        return newest

    def keep_newest(self, rank: int = 0) -> None:
        """Delete all checkpoints but the newest; called by every process.

        The first process cleans up its disk and storage; with a `transfer` every node's first one cleans up its disk.
        """
        self.files.check()
        if rank == 0 or (self.transfer is not None and leads_node()):
            for old in sorted(self.path.glob("step-????????"))[:-1]:
                shutil.rmtree(old)
        if rank == 0 and self.transfer is not None and self.transfer.travels(self.path):
            for name in self.transfer.names(self.path)[:-1]:
                self.transfer.delete(self.path / name)

    def set_aside(self, damaged: Path, rank: int = 0) -> None:
        """Rename a damaged checkpoint, so that the one before is the newest; called by every process."""
        self.files.check()
        if rank == 0 or (self.transfer is not None and leads_node()):
            aside = damaged.with_name(f".{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            with suppress(FileNotFoundError):
                os.rename(damaged, aside)
        if rank == 0 and self.transfer is not None:
            self.transfer.delete(damaged)

    def free(self) -> None:
        """Delete all checkpoints, on this disk and in storage: nothing will go on from them.

        Whoever is killed in between leaves none that looks whole.
        """
        self.files.check()
        going = self.path.with_name(f".{self.path.name}.going")
        shutil.rmtree(going, ignore_errors=True)  # left by a process that was killed
        with suppress(FileNotFoundError):
            os.rename(self.path, going)
            shutil.rmtree(going)
        if self.transfer is not None and self.transfer.travels(self.path):
            for name in self.transfer.names(self.path):
                self.transfer.delete(self.path / name)


class TrainingState(NamedTuple):
    """What a checkpoint holds of a training, besides the step."""

    student: PreTrainedModel
    optimizer: torch.optim.Optimizer
    settings: LoopSettings
    losses: TrainingLog
    correction: Stateful | None = None  # of a teacher that is trained too, whole and alike in every process

    @property
    def sharded(self) -> bool:
        """Return whether each process holds a share of the student."""
        return isinstance(next(self.student.parameters()), DTensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return student and optimizer by name, not copies: what is loaded into them is loaded."""
        moments = {
            f"{moment}.{name}": value
            for name, parameter in self.student.named_parameters()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {**_weights(self.student), **moments}


def save_checkpoint(
    folder: Path, state: TrainingState, step: int, transfer: NodeTransfer | None = None, files: Files = LOCAL
) -> None:  # fmt: skip
    """Write a checkpoint, which appears whole or not at all.

    Called by every process of a sharded student, by one of a replicated one. `transfer`: given where the nodes have
    disks of their own. A checkpoint that is there is left: it is of the same step of the same training, and in the
    moment between its end and that of its successor there would be none. `files`: as in `CheckpointFolder`.
    """
    files.check()
    if transfer is not None and not transfer.travels(folder):
        transfer = None
    if not state.sharded:
        _save_replica(folder, state, step, transfer, files)
    elif transfer is None:
        _save_shards(folder, state, step, files)
    else:
        _save_shards_in_storage(folder, state, step, transfer)


def _save_replica(
    folder: Path, state: TrainingState, step: int, transfer: NodeTransfer | None, files: Files
) -> None:  # fmt: skip
    if folder.exists():
        return
    partial = _empty_partial(folder)
    dcp.save(state.tensors(), storage_writer=CheckpointWriter(partial), no_dist=True)
    files.check()  # writing may have taken minutes
    _write_state(partial, state, step)
    os.rename(partial, folder)
    if transfer is not None:
        transfer.put_files(folder)
        transfer.mark(folder)


def _save_shards(folder: Path, state: TrainingState, step: int, files: Files) -> None:
    """Write the shards of all processes to a disk that all of them see."""
    if agreed(folder.exists()):
        return
    first, partial = dist.get_rank() == 0, _partial(folder)
    if first:
        _empty_partial(folder)
    dist.barrier()
    dcp.save(state.tensors(), storage_writer=CheckpointWriter(partial), no_dist=False)
    files.check()
    if first:
        _write_state(partial, state, step)
        os.rename(partial, folder)
    dist.barrier()


def _save_shards_in_storage(folder: Path, state: TrainingState, step: int, transfer: NodeTransfer) -> None:
    """Put the shards of each node's processes into storage and keep none: a resumed training fetches all of them."""
    if agreed(transfer.has(folder)):
        return
    first, partial = dist.get_rank() == 0, _partial(folder)
    if first or leads_node():
        _empty_partial(folder)
    dist.barrier()
    dcp.save(state.tensors(), storage_writer=CheckpointWriter(partial), no_dist=False)
    if first:
        _write_state(partial, state, step)
    if first or leads_node():
        transfer.put_files(folder, partial)
        shutil.rmtree(partial)
    dist.barrier()
    if first:
        transfer.mark(folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _empty_partial(folder: Path) -> Path:
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    return partial


def _write_state(partial: Path, state: TrainingState, step: int) -> None:
    if state.correction is not None:
        with told_by_the_system(), open(partial / "teacher.pt", "wb") as file:
            torch.save(state.correction.state_dict(), file)
    content = {
        "step": step,
        "first_losses": state.losses.first,
        "last_loss": state.losses.last,
        "settings": _fixed(state.settings),
    }
    (partial / "state.json").write_text(json.dumps(content, indent=1))


def load_checkpoint(folder: Path, state: TrainingState) -> int:
    """Read checkpoint `folder` into `state` and return the steps already taken. Called by every process.

    Raises ValueError where the settings are not those of the checkpoint, and DamagedError, in every process alike,
    where it is not as it was written; `state` is then of no use.
    """
    checksums = state.losses.processes.rank == 0  # once: all read the same files
    try:
        content, described, damage = _read_state(folder), read_metadata(folder, checksums), None
    except DamagedError as error:
        damage = error
    _raise_alike(damage, folder, state)
    _check_settings(folder, content["settings"], state.settings)
    try:
        _read_into(folder, described, state)
    except DamagedError as error:
        damage = error
    _raise_alike(damage, folder, state)
    state.losses.first, state.losses.last = content["first_losses"], content["last_loss"]
    return int(content["step"])


def _raise_alike(damage: DamagedError | None, folder: Path, state: TrainingState) -> None:
    """Raise in every process what one of them has found."""
    message = None if damage is None else str(damage)
    if state.losses.processes.world_size > 1:
        message = first_error(message)
    if message is not None:
        raise DamagedError(f"the checkpoint {folder} is damaged: {message}") from damage


def _read_into(folder: Path, described: Metadata, state: TrainingState) -> None:
    kept = described.state_dict_metadata
    for name, parameter in state.student.named_parameters():
        if f"exp_avg.{name}" in kept:
            moments = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            state.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    read_tensors(folder, described, state.tensors(), alone=not state.sharded)
    if state.correction is not None:
        try:
            device = state.student.device
            state.correction.load_state_dict(torch.load(folder / "teacher.pt", map_location=device, weights_only=True))
        except (PermissionError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a file that is cut short torch raises almost anything
            raise DamagedError(f"teacher.pt cannot be read ({type(error).__name__})") from error


def _read_state(folder: Path) -> dict[str, Any]:
    """Return state.json. Raises DamagedError for one that is not as `_write_state` writes it."""
    try:
        content = json.loads((folder / "state.json").read_text())
        sound = (
            type(content["step"]) is int
            and isinstance(content["settings"], dict)
            and all(isinstance(loss, float) for loss in (*content["first_losses"], content["last_loss"]))
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"state.json cannot be read ({type(error).__name__}: {error})") from error
    if not sound:
        raise DamagedError("state.json does not describe a training")
    return content


def load_weights(folder: Path, student: PreTrainedModel) -> None:
    """Read the weights of checkpoint `folder`, whoever wrote it, into a plain `student`. Raises DamagedError."""
    try:
        read_tensors(folder, read_metadata(folder), _weights(student), alone=True)
    except DamagedError as error:
        raise DamagedError(f"the checkpoint {folder} is damaged: {error}; --resume makes it again") from error


def _check_settings(folder: Path, trained_with: dict[str, Any], settings: LoopSettings) -> None:
    for key, value in _fixed(settings).items():
        if trained_with.get(key) != value:
            raise ValueError(f"{key}: {value!r}, but the checkpoint {folder} was trained with "
                             f"{trained_with.get(key)!r}; valid: the same, or a new run")  # fmt: skip


def _fixed(settings: LoopSettings) -> dict[str, Any]:
    """Return the settings that a continued run must share; cosine depends on where it ends."""
    free = FREE_ON_RESUME - ({"total_tokens"} if settings.schedule == "cosine" else set())
    return {key: value for key, value in json.loads(json.dumps(asdict(settings))).items() if key not in free}


def _weights(student: PreTrainedModel) -> dict[str, Tensor]:
    # named_parameters lists tied weights once
    return {f"student.{name}": parameter.detach() for name, parameter in student.named_parameters()}
