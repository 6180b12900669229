"""What is asked of the teacher before any candidate: its importance, and its outputs for every window, once."""

import time
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM

from minitron_search import config as configuration
from minitron_search import precision, teacher_cache
from minitron_search.architecture import digest
from minitron_search.cluster import in_parts, on_all_cpus
from minitron_search.console import say
from minitron_search.importance import Importance, Partial, combined, partial_sums
from minitron_search.loop_settings import Precision
from minitron_search.preparation import Prepared
from minitron_search.run_directory import RunDirectory
from minitron_search.trial_run import Materials
from minitron_search.trimming import load_teacher, permute_teacher

PART = 8  # calibration windows a part: fixed, so that the sums do not depend on the number of tasks


def measure_importance(prepared: Prepared, resolved: Precision) -> None:
    """Write importance.safetensors from one teacher pass over the calibration windows."""
    config = prepared.config
    say(f"importance: one teacher pass over {config.corpus.calibration_samples} windows")
    began = time.monotonic()
    asked = config.importance
    windows = prepared.corpus.calibration
    parts = [windows[first : first + PART] for first in range(0, len(windows), PART)]
    found = combined(in_parts(_importance, parts, prepared.teacher_folder, asked, resolved), asked.batch)
    found.save(prepared.run.importance, config.corpus.calibration_samples, asked.batch, asked.sequence)
    prepared.run.event("importance_finished", seconds=time.monotonic() - began)
    say(f"importance: {time.monotonic() - began:.0f} s")


def make_materials(prepared: Prepared, resolved: Precision) -> Materials:
    """The permuted teacher and what it says of every window, asked once."""
    run = prepared.run
    key = digest([prepared.teacher_fingerprint, importance_id(run)])
    folder = configuration.cache_folder() / "permuted" / key
    say("teacher: permuted by importance, and asked once for every window")
    began = time.monotonic()
    made, tokens = _materials(prepared, resolved, folder, key)
    run.event("teacher_asked", tokens=tokens, seconds=time.monotonic() - began)
    say(f"teacher: {tokens:,} tokens in {time.monotonic() - began:.0f} s")
    return made


def _importance(
    parts: list[np.ndarray], folder: Path, asked: configuration.ImportanceConfig, resolved: Precision
) -> list[Partial]:
    teacher = precision.on_device(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")).eval()
    return [partial_sums(teacher, windows, asked.batch, asked.sequence, resolved) for windows in parts]


def _hidden(parts: list[slice], file: Path, folder: Path, windows: np.ndarray, resolved: Precision) -> list[int]:
    teacher = precision.on_device(load_teacher(folder))
    return [teacher_cache.write_hidden(file, teacher, windows, [part], resolved) for part in parts]


def _materials(prepared: Prepared, resolved: Precision, folder: Path, key: str) -> tuple[Materials, int]:
    config, corpus = prepared.config, prepared.corpus
    found = Importance.load(prepared.run.importance)
    rankings = found.rankings(prepared.space.teacher.num_key_value_heads)
    stored = on_all_cpus(permute_teacher, prepared.teacher_folder, rankings, folder / "stored")
    computing = on_all_cpus(permute_teacher, prepared.teacher_folder, rankings, folder / resolved, resolved)
    tokens = 0

    def cache(name: str, windows: np.ndarray) -> Path:
        nonlocal tokens
        built = teacher_cache.ensure(
            lambda: precision.on_device(load_teacher(computing)),
            key,
            f"{corpus.id} {name}",
            windows,
            resolved,
            write=lambda file: in_parts(_hidden, teacher_cache.chunks(windows), file, computing, windows, resolved)[0],
        )
        tokens += built.teacher_tokens
        return built.path

    mode = teacher_cache.resolve_mode(
        config.distillation.teacher_cache,
        teacher_cache.cache_path(key, f"{corpus.id} train", corpus.train, resolved),
        teacher_cache.cache_bytes(corpus.train, prepared.teacher_config.hidden_size, resolved),
    )
    made = Materials(
        run=prepared.run,
        teacher_folder=stored,
        compute_folder=computing,
        train=corpus.train,
        validation=corpus.validation,
        packed=prepared.packed,
        train_cache=cache("train", corpus.train) if mode == "hidden" else None,
        validation_cache=cache("validation", corpus.validation),
        block_bi=found.block_bi.numpy(),
        precision=resolved,
    )
    return made, tokens


def importance_id(run: RunDirectory) -> str:
    return digest(run.importance.read_bytes().hex())
