"""Checkpoints of a training: weights, optimizer, and what must be the same to go on. Each is whole or not there."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.stateful import Stateful
from transformers import PreTrainedModel

from minitron_search.loop_settings import LoopSettings
from minitron_search.training_log import TrainingLog

# What a continued run may change without changing the steps already taken.
FREE_ON_RESUME = {"total_tokens", "milestones", "checkpoint_tokens", "log_steps", "threads"}


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint that `train` wrote to `folder`."""
    return max(folder.glob("step-????????"), default=None)


def _fixed(settings: LoopSettings) -> dict[str, Any]:
    """The settings that a continued run must share; cosine depends on where it ends."""
    free = FREE_ON_RESUME - ({"total_tokens"} if settings.schedule == "cosine" else set())
    return {key: value for key, value in json.loads(json.dumps(asdict(settings))).items() if key not in free}


def save(
    folder: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer, settings: LoopSettings,
    step: int, losses: TrainingLog, teacher: Stateful | None = None,
) -> None:  # fmt: skip
    """Appears whole or not at all; one that is there is replaced. `teacher`: one that is trained too."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # named_parameters lists tied weights once
    weights = {name: p.detach().contiguous() for name, p in student.named_parameters()}
    save_file(weights, partial / "model.safetensors")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    if teacher is not None:
        torch.save(teacher.state_dict(), partial / "teacher.pt")
    state = {
        "step": step,
        "first_losses": losses.first,
        "last_loss": losses.last,
        "settings": _fixed(settings),
    }
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def load(
    folder: Path,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    losses: TrainingLog,
    teacher: Stateful | None = None,
) -> int:
    """Steps already taken. Raises ValueError where `settings` are not those of the checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    for key, value in _fixed(settings).items():
        if state["settings"].get(key) != value:
            raise ValueError(
                f"{key}: {value!r}, but the checkpoint {folder} was trained with "
                f"{state['settings'].get(key)!r}; valid: the same, or a run that begins anew"
            )
    load_weights(folder, student)
    kept = torch.load(folder / "optimizer.pt", map_location=student.device, weights_only=True)
    optimizer.load_state_dict(kept)
    if teacher is not None:
        teacher.load_state_dict(torch.load(folder / "teacher.pt", map_location=student.device, weights_only=True))
    losses.first, losses.last = state["first_losses"], state["last_loss"]
    return int(state["step"])


def load_weights(folder: Path, student: PreTrainedModel) -> None:
    """Put the weights of checkpoint `folder` into `student`."""
    weights = load_file(folder / "model.safetensors", device=str(student.device))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(weights[name])


def keep_newest(folder: Path) -> None:
    for old in sorted(folder.glob("step-????????"))[:-1]:
        shutil.rmtree(old)
