"""What is asked of the teacher before any candidate: its importance, and its outputs for every window, once."""

import hashlib
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_search import config as configuration
from minitron_search import precision, teacher_cache
from minitron_search.architecture import digest
from minitron_search.cluster import in_parts, on_all_cpus
from minitron_search.config import ImportanceConfig
from minitron_search.console import say
from minitron_search.importance import Importance, Partial, combined, partial_sums
from minitron_search.loop_settings import Precision
from minitron_search.preparation import Prepared, importance_seed, train_request
from minitron_search.rotation import rotate_teacher
from minitron_search.rounds import in_rounds, smallest_widths
from minitron_search.run_directory import RunDirectory
from minitron_search.teacher_cache import Lost, Request
from minitron_search.trial_run import Materials
from minitron_search.trimming import load_teacher, permute_teacher

PART = 8  # calibration windows a part: fixed, so that the sums do not depend on the number of tasks
FORMULA = 1  # part of what kept importance is found by: raise it when the same inputs give other values


def measure_importance(prepared: Prepared, resolved: Precision) -> None:
    """Write importance.safetensors: one pass over the calibration windows a round, or what was kept of the same."""
    config, asked, teacher = prepared.config, prepared.config.importance, prepared.space.teacher
    began = time.monotonic()
    smallest = smallest_widths(config.space.axes, teacher) if asked.rounds > 1 else teacher
    windows = prepared.corpus.calibration
    content = hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()
    settings = [asked.model_dump(), importance_seed(config), resolved, smallest.to_dict()]
    key = digest([FORMULA, torch.__version__, prepared.teacher_fingerprint, content, list(windows.shape), *settings])
    kept = configuration.cache_folder() / "importance" / f"{key}.safetensors"
    if kept.exists():
        say("importance: measured before on the same teacher, windows and settings")
    else:
        passes = "one teacher pass" if asked.rounds == 1 else f"{asked.rounds} rounds, a pass each,"
        say(f"importance: {asked.method}, {passes} over {len(windows)} windows")
        measured = partial(_measured, windows, asked, importance_seed(config), resolved)
        scratch = kept.with_name(f".{key}.{os.getpid()}")
        found = in_rounds(measured, prepared.teacher_folder, smallest, asked.rounds, scratch)
        found.save(kept, len(windows), asked)
    temporary = prepared.run.importance.with_name(f".{kept.name}")
    shutil.copyfile(kept, temporary)
    temporary.rename(prepared.run.importance)
    prepared.run.event("importance_finished", seconds=time.monotonic() - began)
    say(f"importance: {time.monotonic() - began:.0f} s")


def make_materials(prepared: Prepared, resolved: Precision) -> Materials:
    """The permuted teacher and what it says of every window, asked once."""
    run = prepared.run
    key = digest([prepared.teacher_fingerprint, importance_id(run)])
    folder = configuration.cache_folder() / "permuted" / key
    say("teacher: permuted by importance, and asked once for every window")
    began = time.monotonic()
    made, asked = _materials(prepared, resolved, folder, key)
    run.event("teacher_asked", **asked, seconds=time.monotonic() - began)
    say(f"teacher: {asked['tokens']:,} tokens in {time.monotonic() - began:.0f} s")
    return made


def _measured(windows: np.ndarray, asked: ImportanceConfig, seed: int, resolved: Precision, folder: Path) -> Importance:
    """Of the model in `folder`, by tasks on parts of the windows."""
    parts = [windows[first : first + PART] for first in range(0, len(windows), PART)]
    return on_all_cpus(_combined, in_parts(_importance, parts, folder, asked, resolved), asked, seed, folder)


def _importance(parts: list[np.ndarray], folder: Path, asked: ImportanceConfig, resolved: Precision) -> list[Partial]:
    dtype = torch.float32 if asked.method == "taylor" else "auto"  # gradients are of the weights' dtype
    teacher = precision.on_device(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)).eval()
    return [partial_sums(teacher, windows, asked, resolved) for windows in parts]


def _combined(sums: list[Partial], asked: ImportanceConfig, seed: int, folder: Path) -> Importance:
    return combined(sums, asked, seed, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


def _written(parts: list[slice], into: Path, folder: Path, request: Request) -> list[Lost]:
    teacher = precision.on_device(load_teacher(folder))
    return [teacher_cache.write_part(into, teacher, request, part) for part in parts]


def _materials(prepared: Prepared, resolved: Precision, folder: Path, key: str) -> tuple[Materials, dict[str, Any]]:
    """And what was asked of the teacher, for the log."""
    config, corpus = prepared.config, prepared.corpus
    found = Importance.load(prepared.run.importance)
    rankings = found.rankings(prepared.space.teacher.num_key_value_heads)
    teacher = prepared.teacher_folder
    if found.rotation is not None:
        teacher = on_all_cpus(rotate_teacher, teacher, found.rotation, folder / "rotated")
    stored = on_all_cpus(permute_teacher, teacher, rankings, folder / "stored")
    computing = stored  # one copy where it is stored in the dtype of the products
    if AutoConfig.from_pretrained(stored).dtype != teacher_cache.DTYPES[resolved]:
        computing = on_all_cpus(permute_teacher, teacher, rankings, folder / resolved, resolved)
    distillation = config.distillation
    train = train_request(config, prepared.teacher_config, corpus, resolved, key)
    # what scores read is exact, whatever is kept for training
    validation = train._replace(data=f"{corpus.id} validation", windows=corpus.validation, k=None)
    budget = teacher_cache.budget_bytes(distillation.teacher_cache_bytes, teacher_cache.cache_path(train))
    of_head_alone = distillation.loss != "ce" and not distillation.intermediate  # no cache holds intermediate states
    mode = teacher_cache.resolve_mode(distillation.teacher_cache, train, budget) if of_head_alone else "off"
    asked: dict[str, Any] = {"tokens": 0, "teacher_cache": mode}
    if mode == "off" and distillation.teacher_cache == "auto" and of_head_alone:
        say(f"teacher: asked live; its hidden states need {teacher_cache.cache_bytes(train):,} bytes, and "
            f"distillation.teacher_cache_bytes allows {budget:,}")  # fmt: skip

    def cache(request: Request) -> Path:
        parts = teacher_cache.parts(request.windows)
        built = teacher_cache.ensure(request, lambda into: in_parts(_written, parts, into, computing, request))
        asked["tokens"] += built.teacher_tokens
        if built.lost is not None:
            asked.update(topk=request.k, rest_mass=built.lost.rest_mass, kl_lost=built.lost.kl)
            say(f"teacher: its {request.k} most probable tokens leave {built.lost.rest_mass:.2%} of the probability "
                f"untold, {built.lost.kl:.3f} nats per token")  # fmt: skip
        return built.path

    made = Materials(
        run=prepared.run,
        teacher_folder=stored,
        compute_folder=computing,
        train=corpus.train,
        validation=corpus.validation,
        packed=prepared.packed,
        train_cache=None if mode == "off" else cache(train),
        validation_cache=cache(validation),
        block_bi=found.block_bi.numpy(),
        precision=resolved,
    )
    return made, asked


def importance_id(run: RunDirectory) -> str:
    return digest(run.importance.read_bytes().hex())
