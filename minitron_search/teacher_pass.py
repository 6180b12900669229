"""What is asked of the teacher before any candidate: its importance, and its outputs for every window, once."""

import hashlib
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_search import config as configuration
from minitron_search import precision, teacher_cache
from minitron_search.architecture import digest
from minitron_search.cluster import in_parts, on_all_cpus
from minitron_search.config import ImportanceConfig
from minitron_search.console import say
from minitron_search.distillation_loss import next_tokens, token_losses
from minitron_search.importance import Importance, Partial, combined, partial_sums
from minitron_search.loop_settings import Precision
from minitron_search.preparation import Prepared, importance_seed, lines_up
from minitron_search.rankings import Rankings
from minitron_search.rotation import rotate_teacher
from minitron_search.rounds import in_rounds, smallest_widths
from minitron_search.run_directory import RunDirectory
from minitron_search.scoring import standard_error
from minitron_search.teacher_cache import Built
from minitron_search.trial_run import Materials
from minitron_search.trial_settings import correction
from minitron_search.trimming import load_head, load_teacher, permute_teacher

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
    made, tokens = _materials(prepared, resolved, folder, key)
    run.event("teacher_asked", tokens=tokens, seconds=time.monotonic() - began)
    say(f"teacher: {tokens:,} tokens in {time.monotonic() - began:.0f} s")
    if prepared.other is not None:
        loss, stderr = on_all_cpus(_teacher_loss, made)
        about = {"folder": str(prepared.other.folder), "fingerprint": prepared.other.fingerprint}
        run.event("taught_by", **about, lm_loss=loss, lm_loss_stderr=stderr, lm_loss_n=len(made.validation))
        say(f"teacher: students are distilled from {prepared.other.folder}, LM loss {loss:.3f} +- {stderr:.3f}")
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


def _hidden(parts: list[slice], file: Path, folder: Path, windows: np.ndarray, resolved: Precision) -> list[int]:
    teacher = precision.on_device(load_teacher(folder))
    return [teacher_cache.write_hidden(file, teacher, windows, [part], resolved) for part in parts]


def _materials(prepared: Prepared, resolved: Precision, folder: Path, key: str) -> tuple[Materials, int]:
    config, corpus = prepared.config, prepared.corpus
    found = Importance.load(prepared.run.importance)
    rankings = found.rankings(prepared.space.teacher.num_key_value_heads)
    teacher = prepared.teacher_folder
    if found.rotation is not None:
        teacher = on_all_cpus(rotate_teacher, teacher, found.rotation, folder / "rotated")
    stored = on_all_cpus(permute_teacher, teacher, rankings, folder / "stored")
    asked, teaching_folder, teaching = correction(config), folder, prepared.teaching
    if prepared.other is not None:
        alike = lines_up(prepared.other.config, prepared.teacher_config)
        key = digest([prepared.other.fingerprint, importance_id(prepared.run) if alike else "as it is"])
        teaching_folder, teacher = folder.with_name(key), prepared.other.folder
        if alike and found.rotation is not None:
            teacher = on_all_cpus(rotate_teacher, teacher, found.rotation, teaching_folder / "rotated")
        if not alike:
            rankings = Rankings.identity(prepared.other.config)
    computing = on_all_cpus(permute_teacher, teacher, rankings, teaching_folder / resolved, resolved)
    parallel_folder = None
    if asked is not None and config.teacher.correction.parallel:
        parallel_folder = on_all_cpus(permute_teacher, teacher, rankings, teaching_folder / "stored")
    tokens = 0

    def cache(name: str, windows: np.ndarray) -> Path:
        nonlocal tokens
        built = hidden_states(computing, key, f"{corpus.id} {name}", windows, resolved)
        tokens += built.teacher_tokens
        return built.path

    mode = teacher_cache.resolve_mode(
        # no cache holds states, or what a teacher will say once it is corrected
        "off" if parallel_folder or config.distillation.intermediate else config.distillation.teacher_cache,
        teacher_cache.cache_path(key, f"{corpus.id} train", corpus.train, resolved),
        teacher_cache.cache_bytes(corpus.train, teaching.config.hidden_size, resolved),
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
        parallel=asked if parallel_folder else None,
        parallel_folder=parallel_folder,
    )
    return made, tokens


def _teacher_loss(made: Materials) -> tuple[float, float]:
    """LM loss of the model that teaches, nats per token, and its standard error over the validation windows."""
    windows = made.validation
    hidden = teacher_cache.CacheReader(made.validation_cache).hidden(np.arange(len(windows)), windows)
    targets = next_tokens(torch.from_numpy(windows.astype(np.int64)))
    head = load_head(made.compute_folder)
    ce = token_losses(hidden.flatten(0, 1), head, targets.flatten()).ce
    of_windows = ce.view(windows.shape)[:, :-1].double().mean(1).numpy()
    return float(of_windows.mean()), standard_error(of_windows)


def plain_copy(model: Path, folder: Path, dtype: str) -> Path:
    """The model of a stock folder as `load_teacher` and `load_head` read one: in `dtype`, in its own order."""
    return permute_teacher(model, Rankings.identity(AutoConfig.from_pretrained(model)), folder, dtype)


def hidden_states(computing: Path, key: str, data_id: str, windows: np.ndarray, resolved: Precision) -> Built:
    """The cache of what the model in `computing` says of `windows`, made now by tasks unless it is there."""
    return teacher_cache.ensure(
        lambda: precision.on_device(load_teacher(computing)),
        key,
        data_id,
        windows,
        resolved,
        write=lambda file: in_parts(_hidden, teacher_cache.chunks(windows), file, computing, windows, resolved)[0],
    )


def importance_id(run: RunDirectory) -> str:
    return digest(run.importance.read_bytes().hex())
