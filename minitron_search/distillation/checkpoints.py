"""Checkpoints of a training: weights, optimizer, and what must be the same to go on. Each is whole or not there.

Written and read with torch.distributed.checkpoint, under names: `student.<parameter>`, and `<moment>.<parameter>` of
the optimizer. One process writes replicas, every process its own shards; any number of processes of either strategy
reads either.
"""

import json
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from minitron_search.distillation.parallel import agreed, leads_node
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.training_log import TrainingLog
from minitron_search.records.transfer import Depot

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# What a continued run may change without changing the steps already taken.
FREE_ON_RESUME = {
    "total_tokens", "milestones", "checkpoint_tokens", "log_steps", "threads", "strategy", "gradient_checkpointing",
    "compile",
}  # fmt: skip


def latest_checkpoint(folder: Path, depot: Depot | None = None) -> Path | None:
    """The newest whole checkpoint that `train` wrote to `folder`, on whichever node; it is on this one now."""
    if depot is None or not depot.travels(folder):
        return max(folder.glob("step-????????"), default=None)
    newest = max((folder / name for name in depot.names(folder)), default=None)
    if newest is not None:
        depot.fetch(newest)
    return newest


def _fixed(settings: LoopSettings) -> dict[str, Any]:
    """The settings that a continued run must share; cosine depends on where it ends."""
    free = FREE_ON_RESUME - ({"total_tokens"} if settings.schedule == "cosine" else set())
    return {key: value for key, value in json.loads(json.dumps(asdict(settings))).items() if key not in free}


def save(
    folder: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer, settings: LoopSettings,
    step: int, losses: TrainingLog, teacher: Stateful | None = None, depot: Depot | None = None,
) -> None:  # fmt: skip
    """Appears whole or not at all. Called by every process of a sharded student, by one of a replicated one.
    `teacher`: one that is trained too, whole and alike in every process. `depot`: where the nodes' disks are their own.
    Of a sharded student each of them then puts there what its processes wrote, and keeps nothing: whoever goes on from
    it fetches it whole.

    One that is there is left: it is of the same step of the same training, and in the moment between its end and
    that of its successor there would be none.
    """
    if depot is not None and not depot.travels(folder):
        depot = None
    together = _is_sharded(student)
    apart = depot if together else None
    there = apart.has(folder) if apart is not None else folder.exists()
    if agreed(there) if together else there:
        return
    first = not together or dist.get_rank() == 0
    makes = first or (apart is not None and leads_node())
    partial = folder.with_name(f".{folder.name}.partial")
    if makes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if together:
        dist.barrier()
    dcp.save(_tensors(student, optimizer), checkpoint_id=partial, no_dist=not together)
    if first:
        if teacher is not None:
            torch.save(teacher.state_dict(), partial / "teacher.pt")
        state = {
            "step": step,
            "first_losses": losses.first,
            "last_loss": losses.last,
            "settings": _fixed(settings),
        }
        (partial / "state.json").write_text(json.dumps(state, indent=1))
    if makes and apart is not None:
        apart.put_files(folder, partial)
        shutil.rmtree(partial)
    elif makes:
        os.rename(partial, folder)
        if depot is not None:
            depot.put_files(folder)
    if together:
        dist.barrier()
    if first and depot is not None:
        depot.mark(folder)


def load(
    folder: Path,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    losses: TrainingLog,
    teacher: Stateful | None = None,
) -> int:
    """Steps already taken. Called by every process. Raises ValueError where `settings` are not those of the
    checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    for key, value in _fixed(settings).items():
        if state["settings"].get(key) != value:
            raise ValueError(
                f"{key}: {value!r}, but the checkpoint {folder} was trained with "
                f"{state['settings'].get(key)!r}; valid: the same, or a run that begins anew"
            )
    kept = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, parameter in student.named_parameters():
        if f"exp_avg.{name}" in kept:
            moments = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    dcp.load(_tensors(student, optimizer), checkpoint_id=folder, no_dist=not _is_sharded(student))
    if teacher is not None:
        teacher.load_state_dict(torch.load(folder / "teacher.pt", map_location=student.device, weights_only=True))
    losses.first, losses.last = state["first_losses"], state["last_loss"]
    return int(state["step"])


def load_weights(folder: Path, student: PreTrainedModel) -> None:
    """Put the weights of checkpoint `folder`, whoever wrote it, into a plain `student`."""
    dcp.load(_weights(student), checkpoint_id=folder, no_dist=True)


def keep_newest(folder: Path, depot: Depot | None = None) -> None:
    """Of those on this node and, with `depot`, of those there."""
    for old in sorted(folder.glob("step-????????"))[:-1]:
        shutil.rmtree(old)
    if depot is not None and depot.travels(folder):
        for name in depot.names(folder)[:-1]:
            depot.delete(folder / name)


def _is_sharded(student: PreTrainedModel) -> bool:
    return isinstance(next(student.parameters()), DTensor)


def _weights(student: PreTrainedModel) -> dict[str, Tensor]:
    # named_parameters lists tied weights once
    return {f"student.{name}": parameter.detach() for name, parameter in student.named_parameters()}


def _tensors(student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by name; not copies: what is loaded into them is loaded."""
    moments = {
        f"{moment}.{name}": value
        for name, parameter in student.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }
    return {**_weights(student), **moments}
