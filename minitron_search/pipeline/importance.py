"""The importance stage: the teacher's pass over the calibration windows, placed on all of the cluster's CPUs."""

import hashlib
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from minitron_search.cluster.placement import in_parts, on_all_cpus
from minitron_search.config.inputs import ImportanceConfig
from minitron_search.config.types import Precision
from minitron_search.importance.importance import Importance, Partial, combined, partial_sums
from minitron_search.importance.iterative import in_rounds, smallest_widths
from minitron_search.models import device
from minitron_search.models.architecture import digest
from minitron_search.planning.checks import importance_seed
from minitron_search.planning.prepare import Prepared
from minitron_search.records.console import say
from minitron_search.records.paths import cache_folder
from minitron_search.records.transfer import Depot

PART = 8  # calibration windows a part: fixed, so that the sums do not depend on the number of tasks
FORMULA = 1  # part of what kept importance is found by: raise it when the same inputs give other values


def measure_importance(prepared: Prepared, resolved: Precision) -> None:
    """Write importance.safetensors: one pass over the calibration windows a round, or what was kept of the same."""
    config, asked, teacher = prepared.config, prepared.config.importance, prepared.space.teacher
    began = time.monotonic()
    smallest = smallest_widths(config.space.axes, teacher) if asked.rounds > 1 else teacher
    windows = calibration_windows(prepared)
    content = hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()
    settings = [asked.model_dump(), importance_seed(config), resolved, smallest.to_dict()]
    key = digest([FORMULA, torch.__version__, prepared.teacher_fingerprint, content, list(windows.shape), *settings])
    kept = cache_folder() / "importance" / f"{key}.safetensors"
    if kept.exists():
        say("importance: measured before on the same teacher, windows and settings")
    else:
        passes = "one teacher pass" if asked.rounds == 1 else f"{asked.rounds} rounds, a pass each,"
        say(f"importance: {asked.method}, {passes} over {len(windows)} windows")
        measured = partial(_measured, prepared.run.depot, windows, asked, importance_seed(config), resolved)
        scratch = kept.with_name(f".{key}.{os.getpid()}")
        found = in_rounds(measured, prepared.teacher_folder, smallest, asked.rounds, scratch)
        found.save(kept, len(windows), asked)
    temporary = prepared.run.importance.with_name(f".{kept.name}")
    shutil.copyfile(kept, temporary)
    temporary.rename(prepared.run.importance)
    prepared.run.event("importance_finished", seconds=time.monotonic() - began)
    say(f"importance: {time.monotonic() - began:.0f} s")


def calibration_windows(prepared: Prepared) -> np.ndarray:
    """Those that importance is measured on: (samples, length)."""
    windows, asked = prepared.corpus.calibration, prepared.config.importance.samples
    if asked is None:
        return windows
    drawn = np.random.default_rng(importance_seed(prepared.config)).choice(len(windows), asked, replace=False)
    return windows[np.sort(drawn)]


def _measured(
    depot: Depot | None, windows: np.ndarray, asked: ImportanceConfig, seed: int, resolved: Precision, folder: Path
) -> Importance:
    """Of the model in `folder`, by tasks on parts of the windows."""
    parts = [windows[first : first + PART] for first in range(0, len(windows), PART)]
    sums = in_parts(depot, _importance, parts, folder, asked, resolved)
    return on_all_cpus(depot, _combined, sums, asked, seed, folder)


def _importance(parts: list[np.ndarray], folder: Path, asked: ImportanceConfig, resolved: Precision) -> list[Partial]:
    dtype = torch.float32 if asked.method == "taylor" else "auto"  # gradients are of the weights' dtype
    teacher = device.on_device(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)).eval()
    return [partial_sums(teacher, windows, asked, resolved) for windows in parts]


def _combined(sums: list[Partial], asked: ImportanceConfig, seed: int, folder: Path) -> Importance:
    return combined(sums, asked, seed, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
