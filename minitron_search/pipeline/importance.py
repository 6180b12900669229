"""Measure importance: the teacher's pass over the calibration windows, placed on all CPUs of a node."""

import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minitron_search.cluster.placement import in_parts, on_all_cpus
from minitron_search.config.inputs import ImportanceConfig
from minitron_search.config.types import Precision
from minitron_search.importance.importance import Importance, ImportanceSums, combined, importance_sums
from minitron_search.importance.iterative import iterative_importance, smallest_widths
from minitron_search.importance.methods import method_of
from minitron_search.messages.console import say
from minitron_search.models import device
from minitron_search.models.architecture import Architecture
from minitron_search.models.loading import load_model
from minitron_search.planning import memory
from minitron_search.planning.checks import importance_seed
from minitron_search.planning.prepare import Prepared
from minitron_search.records import cache

PART = 8  # calibration windows a part: fixed, so that the sums do not depend on the number of tasks


def measure_importance(prepared: Prepared) -> None:
    """Write importance.safetensors, measured now or copied from the cache of the same inputs."""
    began = time.monotonic()
    kept = _cache_file(prepared)
    if not cache.make_once(kept, lambda into: _measure_into(into, kept, prepared)):
        say("importance: measured before on the same teacher, windows and settings")
    cache.replace(prepared.run_dir.importance, lambda into: shutil.copyfile(kept, into))
    prepared.run_dir.event("importance_finished", seconds=time.monotonic() - began)
    say(f"importance: {time.monotonic() - began:.0f} s")


def calibration_windows(prepared: Prepared) -> np.ndarray:
    """Return the windows that importance is measured on: (samples, length)."""
    windows, samples = prepared.corpus.calibration, prepared.config.importance.samples
    if samples is None:
        return windows
    drawn = np.random.default_rng(importance_seed(prepared.config)).choice(len(windows), samples, replace=False)
    return windows[np.sort(drawn)]


def _cache_file(prepared: Prepared) -> Path:
    """Return where importance is kept by everything that its values depend on."""
    config, windows = prepared.config, calibration_windows(prepared)
    settings = [
        config.importance.model_dump(),
        importance_seed(config),
        prepared.precision,
        _smallest(prepared).to_dict(),
    ]
    versions = [cache.FORMULA["importance"], torch.__version__]
    key = cache.content_id([*versions, prepared.pruned.fingerprint, windows, *settings])
    return cache.entry("importance", key, ".safetensors")


def _smallest(prepared: Prepared) -> Architecture:
    """Return the widths that the last round is measured at: the teacher's own if there is only one round."""
    config, teacher = prepared.config, prepared.space.teacher
    return smallest_widths(config.space.axes, teacher) if config.importance.rounds > 1 else teacher


def _measure_into(file: Path, kept: Path, prepared: Prepared) -> None:
    """Measure importance and write it to `file`, which becomes `kept`; models between rounds lie beside that."""
    config, windows = prepared.config.importance, calibration_windows(prepared)
    passes = "one teacher pass" if config.rounds == 1 else f"{config.rounds} rounds of one pass each"
    say(f"importance: {config.method}, {passes} over {len(windows)} windows")
    measured = partial(_measured, prepared, windows)
    scratch = kept.with_name(f".{kept.stem}.rounds")
    importance = iterative_importance(measured, prepared.pruned.folder, _smallest(prepared), config.rounds, scratch)
    importance.save(file, len(windows), config)


def _measured(prepared: Prepared, windows: np.ndarray, folder: Path) -> Importance:
    """Return the importance of the model in `folder`, measured by tasks on parts of the windows."""
    run_dir, config, precision = prepared.run_dir, prepared.config.importance, prepared.precision
    parts = [windows[first : first + PART] for first in range(0, len(windows), PART)]
    held = memory.teacher_task(prepared.pruned.config, method_of(config.method).gradients is not None)
    sums = in_parts(run_dir, _importance, parts, folder, config, precision, memory=held)
    return on_all_cpus(run_dir, _combined, sums, config, importance_seed(prepared.config), folder)


def _importance(
    parts: list[np.ndarray], folder: Path, config: ImportanceConfig, precision: Precision
) -> list[ImportanceSums]:  # fmt: skip
    dtype = method_of(config.method).dtype
    teacher = device.on_device(load_model(folder, dtype)).eval()
    return [importance_sums(teacher, windows, config, precision) for windows in parts]


def _combined(sums: list[ImportanceSums], config: ImportanceConfig, seed: int, folder: Path) -> Importance:
    return combined(sums, config, seed, lambda: load_model(folder))
