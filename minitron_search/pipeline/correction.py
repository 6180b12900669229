"""Correct the teacher before distillation: placed like a retraining, its result an artifact of the cache.

    <cache folder>/corrected/<id>/         a stock folder, float32, with correction.json: scores before and after
    <cache folder>/corrected/<id>.work/    while it is made: log, checkpoints; the next process that needs it continues

The id is that of everything it is made from, so that every run with the same teacher, text and settings finds it.
"""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from minitron_search.architecture_search.state import make_trial
from minitron_search.cluster import session
from minitron_search.cluster.placement import on_all_cpus
from minitron_search.cluster.session import slots
from minitron_search.distillation.correction import LORA_ALPHA, LORA_RANK, merged
from minitron_search.distillation.settings import CorrectionSettings, LoopSettings
from minitron_search.distillation.teacher_cache import Request
from minitron_search.export import student_folder
from minitron_search.messages.console import say
from minitron_search.models.families import sizes, whole
from minitron_search.pipeline import retraining
from minitron_search.pipeline.forecast import costs_of
from minitron_search.pipeline.teacher import cache_outputs, unpermuted_copy
from minitron_search.planning import memory
from minitron_search.planning.prepare import Prepared
from minitron_search.records import cache
from minitron_search.records.cache import content_id
from minitron_search.records.directory import RunDirectory
from minitron_search.records.metrics import score_columns
from minitron_search.teachers.sources import fingerprint
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.settings import correction, correction_settings
from minitron_search.trials.trial import Trial


def correct_teacher(prepared: Prepared) -> Prepared:
    """Return `prepared` with the corrected model as its teacher.

    It takes the place of the pruned model too if the configuration says so. Nothing changes if no correction before
    distillation is configured. Raises RuntimeError if the correction diverges.
    """
    config, method = prepared.config, correction(prepared.config)
    if method is None or config.teacher.correction.parallel:
        return prepared
    held = memory.worker(costs_of(prepared), prepared.space.teacher)
    config = config.model_copy(update={"resources": session.sized(config.resources, held, 0)})
    settings = correction_settings(config, method, prepared.precision)
    gangs = slots(config.resources)
    workers = 1 if config.resources.launcher == "inline" else retraining.gang(config, gangs).workers_per_trial
    content = made_from(prepared.teacher.fingerprint, prepared.corpus.train, method, settings, workers)
    folder = cache.entry("corrected", content_id(content))
    with cache.lock(folder):
        is_new = not cache.is_whole(folder)
        if is_new:
            _make(replace(prepared, config=config), method, settings, gangs, folder, content)
            cache.list_contents(folder, folder)
    _announce(prepared, method, folder, is_new)
    corrected = replace(prepared.teacher, folder=folder, fingerprint=fingerprint(folder))
    if config.prunes_corrected:
        return replace(prepared, pruned=corrected, corrected=folder)
    return replace(prepared, distillation_teacher=corrected, corrected=folder)


def _announce(prepared: Prepared, method: CorrectionSettings, folder: Path, is_new: bool) -> None:
    record = json.loads((folder / "correction.json").read_text())
    before, after = record["before"], record["after"]
    fields = {name: record[name] for name in ("method", "tokens", "seconds", "before", "after")}
    prepared.run_dir.event("teacher_corrected", id=folder.name, folder=str(folder), made_now=is_new,
                           of=prepared.teacher.fingerprint, **fields)  # fmt: skip
    say(f"correction: LM loss {before['lm_loss']:.3f} +- {before['lm_loss_stderr']:.3f} -> {after['lm_loss']:.3f} "
        f"+- {after['lm_loss_stderr']:.3f} ({method.method}, {record['tokens']:,} tokens, {record['seconds']:.0f} s"
        f"{'' if is_new else ', found in the cache'}): {folder}")  # fmt: skip


def made_from(
    teacher: str, windows: np.ndarray, method: CorrectionSettings, settings: LoopSettings, workers: int
) -> dict[str, Any]:
    """Return everything that decides the weights of a corrected teacher.

    `teacher`: its content id. `windows`: (n, length). `workers` share a batch: their number decides how sums round.
    """
    content = content_id(np.ascontiguousarray(windows, dtype="<i4").tobytes(), digits=64)
    return {
        "formula": cache.FORMULA["corrected"],
        "torch": torch.__version__,
        "teacher": teacher,
        "windows": [*windows.shape, content],
        "correction": asdict(method),
        "lora": [LORA_RANK, LORA_ALPHA] if method.method == "lora" else None,
        "settings": asdict(settings),
        "workers": workers,
    }


def _make(
    prepared: Prepared,
    method: CorrectionSettings,
    settings: LoopSettings,
    gangs: int,
    folder: Path,
    content: dict[str, Any],
) -> None:
    """Train, score before and after, and write `folder`."""
    run_dir = prepared.run_dir
    work = RunDirectory(folder.with_name(f"{folder.name}.work"), run_dir.files, run_dir.transfer)
    shutil.rmtree(work.scratch, ignore_errors=True)  # of a process that was killed
    say(f"correction: {method.method}, {settings.total_tokens:,} tokens of the text that students are distilled on")
    inputs = ray.put(_trial_inputs(prepared, work))
    trial = make_trial(
        None,
        whole(prepared.teacher.config),
        "corrected",
        settings,
        seed=method.seed,
        initialization=method.initialization,
    )
    work.start_trial(trial.id, trial.describe())
    began = time.monotonic()
    retraining.train_on_cluster(prepared.config, trial, inputs, gangs, work, what="correction")
    rows = {row["rung"]: row for row in work.metrics(trial.id) if row["kind"] == "rung"}
    before, after = ({name: rows[rung][name] for name in score_columns()} for rung in (0, 1))
    record = {"method": method.method, "tokens": rows[1]["tokens"], "seconds": time.monotonic() - began,
              "before": before, "after": after, "made_from": content}  # fmt: skip
    files = dict(prepared.origin.files.contents)
    on_all_cpus(run_dir, _export, inputs, trial, files, folder, record)
    if run_dir.transfer is not None:
        run_dir.transfer.fetch(folder)
    shutil.rmtree(work.root)


def _trial_inputs(prepared: Prepared, work: RunDirectory) -> TrialInputs:
    """Return what the correction reads: it starts from the teacher, and is scored against the teacher's outputs."""
    teacher, corpus, precision = prepared.teacher, prepared.corpus, prepared.precision
    key, computing = unpermuted_copy(prepared.run_dir, teacher, precision)
    dims, layers = sizes(teacher.config), teacher.config.num_hidden_layers
    request = Request(key, f"{corpus.id} validation", corpus.validation, precision, dims["hidden"], dims["vocab"])
    return TrialInputs(
        run_dir=work,
        teacher_folder=teacher.folder,
        compute_folder=computing,
        train=corpus.train,
        validation=corpus.validation,
        packed=prepared.packed,
        train_cache=None,
        validation_cache=cache_outputs(prepared.run_dir, request, computing).path,
        block_bi=np.zeros((layers + 1, layers + 1)),
        precision=precision,
    )


def _export(inputs: TrialInputs, trial: Trial, files: dict[str, bytes], folder: Path, record: dict[str, Any]) -> None:
    """Write `folder`, which appears whole or not at all."""
    model = merged(student_folder.trained_student(inputs, trial))
    about = json.dumps(record, indent=1).encode()
    student_folder.write_folder(model, {**files, "correction.json": about}, folder)
