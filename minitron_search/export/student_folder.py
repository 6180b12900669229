"""Writing a student as a stock Hugging Face folder with its model card."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from minitron_search.distillation.checkpoints import CheckpointFolder, load_weights
from minitron_search.export.compatibility import complete, refusals
from minitron_search.export.model_card import Origin, model_card
from minitron_search.models.device import on_device
from minitron_search.teachers.sources import TOKENIZER_FILES
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.runner import initial_student
from minitron_search.trials.trial import Trial


def export(inputs: TrialInputs, trial: Trial, origin: Origin, teacher_folder: Path, folder: Path) -> None:
    """Write the retrained student of `trial` as a stock folder, which appears whole or not at all, with its card and
    the teacher's licence."""
    student = trained_student(inputs, trial)
    row = next(row for row in inputs.run_dir.metrics(trial.id) if row["kind"] == "rung")
    complete(student.config)
    card = model_card(origin, trial, row, refusals(student.config))
    write_folder(student, teacher_folder, folder, {**origin.files, "README.md": card})


def write_folder(model: PreTrainedModel, tokenizer: Path, folder: Path, texts: Mapping[str, str]) -> None:
    """Write a stock folder with the tokenizer of folder `tokenizer` and the files `texts`, by name; it appears whole or
    not at all."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for pattern in (*TOKENIZER_FILES, "generation_config.json"):
        for file in tokenizer.glob(pattern):
            shutil.copy(file, temporary)
    for name, text in texts.items():
        (temporary / name).write_text(text)
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
