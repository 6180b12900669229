"""The teacher's correction before distillation, placed like a retraining; its result is an artifact of the cache.

    <cache folder>/corrected/<id>/         a stock folder, float32, with correction.json: scores before and after
    <cache folder>/corrected/<id>.work/    while it is made: log, checkpoints; whoever wants it next goes on from there

The id is that of all that makes it, so that every run with the same teacher, text and settings finds it there.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from filelock import FileLock

from minitron_search.cluster.placement import on_all_cpus
from minitron_search.cluster.session import slots
from minitron_search.config.types import Precision
from minitron_search.distillation.correction import LORA_ALPHA, LORA_RANK, merged
from minitron_search.distillation.settings import Correction, LoopSettings
from minitron_search.distillation.teacher_cache import Request
from minitron_search.export import student_folder
from minitron_search.models.architecture import digest
from minitron_search.models.families import sizes, whole
from minitron_search.models.sources import fingerprint
from minitron_search.pipeline import retraining
from minitron_search.pipeline.teacher import asked_once, plain_copy
from minitron_search.planning.prepare import Prepared
from minitron_search.records.console import say
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import cache_folder
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.settings import correction, correction_settings
from minitron_search.trials.trial import Trial

FORMULA = 1  # part of the id: raise it when the same inputs give other weights
SCORES = ("lm_loss", "lm_loss_stderr", "lm_loss_n", "kl", "kl_stderr", "winogrande_acc", "winogrande_acc_stderr",
          "winogrande_margin", "winogrande_margin_stderr", "winogrande_n")  # fmt: skip


def correct_teacher(prepared: Prepared, resolved: Precision) -> Prepared:
    """`prepared` with the corrected model in the place of the one that teaches, and of the one that is pruned where
    the configuration says so; as it is where none is to be corrected before. Raises RuntimeError where the correction
    diverges."""
    asked, config = correction(prepared.config), prepared.config
    if asked is None or config.teacher.correction.parallel:
        return prepared
    settings = correction_settings(config, asked, resolved)
    resources = config.resources
    gangs = slots(resources)
    workers = 1 if resources.launcher == "inline" else retraining.gang(config, gangs).workers_per_trial
    model = prepared.teaching
    made_of = made_from(model.fingerprint, prepared.corpus.train, asked, settings, workers)
    folder = cache_folder() / "corrected" / digest(made_of)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        new = not folder.exists()
        if new:
            _make(prepared, asked, settings, resolved, gangs, folder, made_of)
    rows = json.loads((folder / "correction.json").read_text())
    before, after = rows["before"], rows["after"]
    prepared.run.event("teacher_corrected", id=folder.name, folder=str(folder), made_now=new, of=model.fingerprint,
                       **{name: rows[name] for name in ("method", "tokens", "seconds", "before", "after")})  # fmt: skip
    say(f"correction: LM loss {before['lm_loss']:.3f} +- {before['lm_loss_stderr']:.3f} -> {after['lm_loss']:.3f} "
        f"+- {after['lm_loss_stderr']:.3f} ({asked.method}, {rows['tokens']:,} tokens, {rows['seconds']:.0f} s"
        f"{'' if new else ', made before'}): {folder}")  # fmt: skip
    corrected = replace(model, folder=folder, fingerprint=fingerprint(folder))
    if config.prunes_corrected:
        return replace(prepared, teacher_folder=folder, teacher_fingerprint=corrected.fingerprint, corrected=folder)
    return replace(prepared, other=corrected, corrected=folder)


def made_from(
    model: str, windows: np.ndarray, asked: Correction, settings: LoopSettings, workers: int
) -> dict[str, Any]:
    """All that decides the weights of a corrected teacher: how many workers share a batch decides how sums round."""
    content = hashlib.sha256(np.ascontiguousarray(windows, dtype="<i4").tobytes()).hexdigest()
    return {
        "formula": FORMULA,
        "torch": torch.__version__,
        "teacher": model,
        "windows": [*windows.shape, content],
        "correction": asdict(asked),
        "lora": [LORA_RANK, LORA_ALPHA] if asked.method == "lora" else None,
        "settings": asdict(settings),
        "workers": workers,
    }


def _make(
    prepared: Prepared, asked: Correction, settings: LoopSettings, resolved: Precision, gangs: int, folder: Path,
    made_of: dict[str, Any],
) -> None:  # fmt: skip
    """Train, score before and after, and write `folder`."""
    model, depot = prepared.teaching, prepared.run.depot
    work = RunDirectory(folder.with_name(f"{folder.name}.work"), prepared.run.files, depot)
    shutil.rmtree(work.scratch, ignore_errors=True)  # of one that was killed
    say(f"correction: {asked.method}, {settings.total_tokens:,} tokens of the text that students are distilled on")
    key = digest([model.fingerprint, "as it is"])
    plain = cache_folder() / "permuted" / key / resolved
    computing = on_all_cpus(depot, plain_copy, model.folder, plain, resolved)
    dims, corpus = sizes(model.config), prepared.corpus
    asked_of = Request(key, f"{corpus.id} validation", corpus.validation, resolved, dims["hidden"], dims["vocab"])
    validation = asked_once(depot, asked_of, computing)
    layers = model.config.num_hidden_layers
    materials = ray.put(TrialInputs(
        run=work,
        teacher_folder=model.folder,
        compute_folder=computing,
        train=prepared.corpus.train,
        validation=prepared.corpus.validation,
        packed=prepared.packed,
        train_cache=None,
        validation_cache=validation.path,
        block_bi=np.zeros((layers + 1, layers + 1)),
        precision=resolved,
    ))  # fmt: skip
    trial = Trial(
        architecture=whole(model.config),
        arm="corrected",
        seed=asked.seed,
        proposal=-1,
        initialization=asked.initialization,
        settings=settings,
        score_precision="float32",
        counts={},
    )
    work.start_trial(trial.id, trial.describe())
    began = time.monotonic()
    retraining.retrain(prepared.config, trial, materials, gangs, say, work, what="correction")
    rows = {row["rung"]: row for row in work.metrics(trial.id) if row["kind"] == "rung"}
    before, after = ({name: rows[rung][name] for name in SCORES} for rung in (0, 1))
    about = {"method": asked.method, "tokens": rows[1]["tokens"], "seconds": time.monotonic() - began,
             "before": before, "after": after, "made_from": made_of}  # fmt: skip
    on_all_cpus(depot, _export, materials, trial, prepared.teacher_folder, folder, about)
    if depot is not None:
        depot.fetch(folder)
    shutil.rmtree(work.root)


def _export(materials: TrialInputs, trial: Trial, tokenizer: Path, folder: Path, about: dict[str, Any]) -> None:
    """Write `folder`, which appears whole or not at all."""
    model = merged(student_folder.trained_student(materials, trial))
    student_folder.write_folder(model, tokenizer, folder, {"correction.json": json.dumps(about, indent=1)})
