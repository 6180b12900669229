"""What every trial of a run reads, made once: the permuted teacher, and what it says of every window."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from minitron_search.cluster.placement import at_the_workshop, in_parts, on_all_cpus
from minitron_search.config.training import DistillationConfig
from minitron_search.config.types import Precision
from minitron_search.distillation import teacher_cache
from minitron_search.distillation.teacher_cache import Built, Lost, Request
from minitron_search.evaluation.statistics import standard_error
from minitron_search.importance.importance import Importance
from minitron_search.importance.pca import rotate_teacher
from minitron_search.losses.output_loss import next_tokens, token_losses
from minitron_search.models import device
from minitron_search.models.architecture import digest
from minitron_search.models.loading import load_teacher
from minitron_search.models.output_head import load_head
from minitron_search.planning.checks import train_request
from minitron_search.planning.prepare import Prepared, lines_up
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import permute_teacher
from minitron_search.records.console import say
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import cache_folder
from minitron_search.records.transfer import Depot
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.settings import correction


def make_materials(prepared: Prepared, resolved: Precision) -> TrialInputs:
    """The permuted teacher and what it says of every window, asked once."""
    run = prepared.run
    say("teacher: permuted by importance, and asked once for every window")
    began = time.monotonic()
    made, asked = _materials(prepared, resolved)
    run.event("teacher_asked", **asked, seconds=time.monotonic() - began)
    say(f"teacher: {asked['tokens']:,} tokens in {time.monotonic() - began:.0f} s")
    if prepared.other is not None:
        loss, stderr = on_all_cpus(run.depot, _teacher_loss, made)
        about = {"folder": str(prepared.other.folder), "fingerprint": prepared.other.fingerprint}
        run.event("taught_by", **about, lm_loss=loss, lm_loss_stderr=stderr, lm_loss_n=len(made.validation))
        say(f"teacher: students are distilled from {prepared.other.folder}, LM loss {loss:.3f} +- {stderr:.3f}")
    return made


def _materials(prepared: Prepared, resolved: Precision) -> tuple[TrialInputs, dict[str, Any]]:
    """And what was asked of the teacher, for the log."""
    config, corpus, distillation = prepared.config, prepared.corpus, prepared.config.distillation
    depot = prepared.run.depot
    found = Importance.load(prepared.run.importance)
    rankings = found.rankings(prepared.space.teacher.num_key_value_heads)
    order = importance_id(prepared.run)
    if distillation.initialization == "merged":  # layers add up element by element, as the teacher has them
        rankings, order = Rankings.identity(prepared.teacher_config), "as it is"
    key = digest([prepared.teacher_fingerprint, order])
    folder, teacher = cache_folder() / "permuted" / key, prepared.teacher_folder
    if found.rotation is not None:
        teacher = on_all_cpus(depot, rotate_teacher, teacher, found.rotation, folder / "rotated")
    pruned = stored = on_all_cpus(depot, permute_teacher, teacher, rankings, folder / "stored")
    corrected = correction(config) if config.teacher.correction.parallel else None
    if prepared.other is not None:
        alike = lines_up(prepared.other.config, prepared.teacher_config)
        key = digest([prepared.other.fingerprint, order if alike else "as it is"])
        folder, teacher = folder.with_name(key), prepared.other.folder
        if alike and found.rotation is not None:
            teacher = on_all_cpus(depot, rotate_teacher, teacher, found.rotation, folder / "rotated")
        if not alike:
            rankings = Rankings.identity(prepared.other.config)
        stored = on_all_cpus(depot, permute_teacher, teacher, rankings, folder / "stored")
    computing = stored  # one copy where it is stored in the dtype of the products
    if at_the_workshop(depot, _dtype, stored) != teacher_cache.DTYPES[resolved]:
        computing = on_all_cpus(depot, permute_teacher, teacher, rankings, folder / resolved, resolved)

    train = train_request(config, prepared.teaching.config, corpus, resolved, key)
    # what scores read is exact, whatever is kept for training
    validation = train._replace(data=f"{corpus.id} validation", windows=corpus.validation, k=None)
    # no cache holds intermediate states, or what a teacher will say once it is corrected
    of_head_alone = distillation.loss != "ce" and not distillation.intermediate and corrected is None
    mode, budget = at_the_workshop(depot, _mode, distillation, train) if of_head_alone else ("off", 0)
    asked: dict[str, Any] = {"tokens": 0, "teacher_cache": mode}
    if mode == "off" and distillation.teacher_cache == "auto" and of_head_alone:
        say(f"teacher: asked live; its hidden states need {teacher_cache.cache_bytes(train):,} bytes, and "
            f"distillation.teacher_cache_bytes allows {budget:,}")  # fmt: skip

    def cache(request: Request) -> Path:
        built = asked_once(depot, request, computing)
        asked["tokens"] += built.teacher_tokens
        if built.lost is not None:
            asked.update(topk=request.k, rest_mass=built.lost.rest_mass, kl_lost=built.lost.kl)
            say(f"teacher: its {request.k} most probable tokens leave {built.lost.rest_mass:.2%} of the probability "
                f"untold, {built.lost.kl:.3f} nats per token")  # fmt: skip
        return built.path

    made = TrialInputs(
        run=prepared.run,
        teacher_folder=pruned,
        compute_folder=computing,
        train=corpus.train,
        validation=corpus.validation,
        packed=prepared.packed,
        train_cache=None if mode == "off" else cache(train),
        validation_cache=cache(validation),
        block_bi=found.block_bi.numpy(),
        precision=resolved,
        parallel=corrected,
        parallel_folder=stored if corrected else None,
    )
    return made, asked


def asked_once(depot: Depot | None, request: Request, computing: Path) -> Built:
    """The cache of what the model in `computing` says, made now by tasks unless it is there."""
    return at_the_workshop(depot, _asked, teacher_cache.cache_path(request), computing, request)


def _asked(cache: Path, computing: Path, request: Request) -> Built:
    """On the node of the tasks, which write to one file; `cache` is where it will be."""
    parts = teacher_cache.parts(request.windows)
    return teacher_cache.ensure(request, lambda into: in_parts(None, _written, parts, into, computing, request))


def _mode(asked: DistillationConfig, train: Request) -> tuple[str, int]:
    """How the teacher is asked, and the bytes that a cache may have, on the disk of this node."""
    budget = teacher_cache.budget_bytes(asked.teacher_cache_bytes, teacher_cache.cache_path(train))
    return teacher_cache.resolve_mode(asked.teacher_cache, train, budget), budget


def _dtype(folder: Path) -> torch.dtype:
    return AutoConfig.from_pretrained(folder).dtype


def _written(parts: list[slice], into: Path, folder: Path, request: Request) -> list[Lost]:
    teacher = device.on_device(load_teacher(folder))
    return [teacher_cache.write_part(into, teacher, request, part) for part in parts]


def _teacher_loss(made: TrialInputs) -> tuple[float, float]:
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


def importance_id(run: RunDirectory) -> str:
    return digest(run.importance.read_bytes().hex())
