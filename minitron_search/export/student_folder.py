"""Writing a student as a stock Hugging Face folder with its model card."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from minitron_search.distillation.checkpoints import CheckpointFolder, load_weights
from minitron_search.export.compatibility import complete, renamed
from minitron_search.export.model_card import Origin, model_card
from minitron_search.export.teacher_files import write_files
from minitron_search.models.device import on_device
from minitron_search.models.engines import refusals
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.runner import initial_student
from minitron_search.trials.trial import Trial


def export(inputs: TrialInputs, trial: Trial, origin: Origin, folder: Path, harm: str | None = None) -> None:
    """Write the retrained student of `trial` as a stock folder, which appears whole or not at all, with its card, the
    teacher's tokenizer and the teacher's licence; its weights in the dtype that they were scored in. `harm`: a sentence
    for the card of a student that its training made no better."""
    student = trained_student(inputs, trial).to(getattr(torch, trial.stored))
    row = next(row for row in inputs.run_dir.metrics(trial.id) if row["kind"] == "rung")
    complete(student.config)
    teacher = AutoConfig.from_pretrained(inputs.teacher_folder, trust_remote_code=False)
    card = model_card(origin, trial, row, refusals(student.config), renamed(teacher, student.config), harm)
    write_folder(student, {**origin.files.contents, "README.md": card.encode()}, folder)


def write_folder(model: PreTrainedModel, files: Mapping[str, bytes], folder: Path) -> None:
    """Write a stock folder with other files beside the weights, by name; it appears whole or not at all, and whoever
    may enter the folder that it is in may read it."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    write_files(temporary, files)
    temporary.chmod(0o755)
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def trained_student(inputs: TrialInputs, trial: Trial) -> PreTrainedModel:
    """Return the student of a finished trial, from its last checkpoint, on the device of the run."""
    student = initial_student(inputs, trial)
    run_dir = inputs.run_dir
    checkpoint = CheckpointFolder(run_dir.checkpoint(trial.id), run_dir.transfer).latest()
    assert checkpoint is not None, trial.id
    load_weights(checkpoint, student)
    return on_device(student).eval()
