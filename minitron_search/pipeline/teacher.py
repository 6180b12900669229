"""Make what every trial of a run reads, once: the permuted teacher, and its outputs for every window."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig

from minitron_search.cluster.placement import in_parts, on_all_cpus, on_one_node
from minitron_search.config.training import DistillationConfig
from minitron_search.config.types import Precision
from minitron_search.distillation import teacher_cache
from minitron_search.distillation.settings import CorrectionSettings
from minitron_search.distillation.teacher_cache import Built, Lost, Request
from minitron_search.evaluation.statistics import standard_error
from minitron_search.importance.importance import Importance
from minitron_search.importance.pca import rotate_teacher
from minitron_search.losses.output_loss import next_tokens, token_losses
from minitron_search.messages.console import say
from minitron_search.models import device
from minitron_search.models.loading import load_teacher
from minitron_search.models.output_head import output_head
from minitron_search.planning import memory
from minitron_search.planning.checks import train_request
from minitron_search.planning.models import Model, lines_up
from minitron_search.planning.prepare import Prepared
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import permute_teacher
from minitron_search.records import cache
from minitron_search.records.cache import content_id
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.settings import correction

UNPERMUTED = "as it is"  # in cache keys, instead of the id of an importance


class Permuted(NamedTuple):
    """A model whose axes are in the order of an importance, in a folder of the cache."""

    key: str  # the content id of the model in this order
    source: Path  # the model in its own order, rotated if importance is by PCA
    rankings: Rankings
    stored: Path  # the model in the new order, in the dtype it is stored in
    vocab_size: int | None = None  # the rows of its vocabulary that are kept; None: all


class Outputs(NamedTuple):
    """The caches of what the teacher says of the train and the validation windows, and an event's fields about them."""

    train: Path | None  # None: the teacher runs in every trial
    validation: Path
    fields: dict[str, Any]


def make_trial_inputs(prepared: Prepared) -> TrialInputs:
    """Return what every trial reads: the permuted teacher is made, and run once over every window."""
    run_dir = prepared.run_dir
    say("teacher: permuting by importance, and computing its outputs once for every window")
    began = time.monotonic()
    importance = Importance.load(run_dir.importance)
    pruned, teacher = permute_models(prepared, importance)
    computing = _in_precision(run_dir, teacher, prepared.precision)
    parallel = correction(prepared.config) if prepared.config.teacher.correction.parallel else None
    outputs = _cache_outputs(prepared, teacher.key, computing, parallel)
    run_dir.event("teacher_asked", **outputs.fields, seconds=time.monotonic() - began)
    say(f"teacher: {outputs.fields['tokens']:,} tokens in {time.monotonic() - began:.0f} s")
    inputs = TrialInputs(
        run_dir=run_dir,
        teacher_folder=pruned.stored,
        compute_folder=computing,
        train=prepared.corpus.train,
        validation=prepared.corpus.validation,
        packed=prepared.packed,
        train_cache=outputs.train,
        validation_cache=outputs.validation,
        block_bi=importance.block_bi.numpy(),
        precision=prepared.precision,
        parallel=parallel,
        parallel_folder=teacher.stored if parallel else None,
    )
    if prepared.distillation_teacher is not None:
        _log_distillation_teacher(run_dir, prepared.distillation_teacher, inputs)
    return inputs


def permute_models(prepared: Prepared, importance: Importance) -> tuple[Permuted, Permuted]:
    """Return the pruned model and the teacher, permuted alike if their shapes are alike; else the teacher is not.

    Of a teacher whose vocabulary is padded further than the pruned model's, the rows that both have are kept.
    """
    run_dir, rotation = prepared.run_dir, importance.rotation
    rankings = importance.rankings(prepared.space.teacher.num_key_value_heads)
    order = _order_id(run_dir, prepared.pruned)
    if prepared.config.distillation.initialization == "merged":  # layers add up element by element, in their own order
        rankings, order = Rankings.identity(prepared.pruned.config), UNPERMUTED
    pruned = _permuted(run_dir, prepared.pruned, rankings, order, rotation)
    teacher = prepared.distillation_teacher
    if teacher is None:
        return pruned, pruned
    shared = prepared.pruned.config.vocab_size
    if lines_up(teacher.config, prepared.pruned.config):
        return pruned, _permuted(run_dir, teacher, rankings, order, rotation, shared)
    return pruned, _permuted(run_dir, teacher, Rankings.identity(teacher.config), UNPERMUTED, None, shared)


def _permuted(
    run_dir: RunDirectory, model: Model, rankings: Rankings, order: str, rotation: Any, shared: int | None = None
) -> Permuted:
    rows = shared if shared is not None and shared < model.config.vocab_size else None
    key = content_id([model.fingerprint, order] if rows is None else [model.fingerprint, order, rows])
    folder, source = _permuted_folder(key), model.folder
    if rotation is not None:
        source = on_all_cpus(run_dir, rotate_teacher, source, rotation, folder / "rotated")
    stored = on_all_cpus(run_dir, permute_teacher, source, rankings, folder / "stored", "auto", rows)
    return Permuted(key, source, rankings, stored, rows)


def _permuted_folder(key: str) -> Path:
    return cache.entry("permuted", key)


def _in_precision(run_dir: RunDirectory, model: Permuted, precision: Precision) -> Path:
    """Return a permuted model in the dtype of the products: the stored one itself, if that is its dtype."""
    if on_one_node(run_dir, _dtype, model.stored) == teacher_cache.DTYPES[precision]:
        return model.stored
    folder = _permuted_folder(model.key) / precision
    return on_all_cpus(
        run_dir, permute_teacher, model.source, model.rankings, folder, precision, model.vocab_size
    )  # fmt: skip


def _cache_outputs(prepared: Prepared, key: str, computing: Path, parallel: CorrectionSettings | None) -> Outputs:
    """Run the teacher, which is in folder `computing`, over the windows whose outputs trials read from a cache."""
    corpus = prepared.corpus
    train = train_request(prepared.config, prepared.teacher.config, corpus, prepared.precision, key)
    # what scores read is exact, whatever is kept for training
    validation = train._replace(data=f"{corpus.id} validation", windows=corpus.validation, k=None)
    mode = _cache_mode(prepared, train, parallel)
    fields: dict[str, Any] = {"tokens": 0, "teacher_cache": mode}

    def cached(request: Request) -> Path:
        built = cache_outputs(prepared.run_dir, request, computing)
        fields["tokens"] += built.teacher_tokens
        if built.lost is not None:
            fields.update(topk=request.k, rest_mass=built.lost.rest_mass, kl_lost=built.lost.kl)
            say(f"teacher: its {request.k} most probable tokens leave out {built.lost.rest_mass:.2%} of the "
                f"probability, {built.lost.kl:.3f} nats per token")  # fmt: skip
        return built.path

    return Outputs(None if mode == "off" else cached(train), cached(validation), fields)


def _cache_mode(prepared: Prepared, train: Request, parallel: CorrectionSettings | None) -> str:
    """Return how the outputs for the train windows are kept: off, hidden or topk."""
    config, run_dir = prepared.config.distillation, prepared.run_dir
    # no cache holds intermediate states, or what a teacher will say once it is corrected
    if config.loss == "ce" or config.intermediate or parallel is not None:
        return "off"
    mode, budget = on_one_node(run_dir, _mode_and_budget, config, train)
    if mode == "off" and config.teacher_cache == "auto":
        say(f"teacher: runs in every trial; its hidden states need {teacher_cache.cache_bytes(train):,} bytes, and "
            f"distillation.teacher_cache_bytes allows {budget:,}")  # fmt: skip
    return mode


def cache_outputs(run_dir: RunDirectory, request: Request, computing: Path) -> Built:
    """Return the cache of what the model in `computing` says, which tasks make now unless it exists."""
    return on_one_node(run_dir, _build_cache, teacher_cache.cache_path(request), computing, request)


def _build_cache(path: Path, computing: Path, request: Request) -> Built:
    """Build a cache on the node of the tasks that write it.

    `path` is that of the result: placing this function brings it here, and takes it to storage.
    """
    parts = teacher_cache.parts(request.windows)
    held = memory.teacher_task(AutoConfig.from_pretrained(computing, trust_remote_code=False), mapped=True)
    return teacher_cache.ensure(
        request, lambda into: in_parts(None, _write_parts, parts, into, computing, request, memory=held)
    )


def _mode_and_budget(config: DistillationConfig, train: Request) -> tuple[str, int]:
    """Return how the outputs are kept, and the bytes that a cache may have on the disk of this node."""
    budget = teacher_cache.budget_bytes(config.teacher_cache_bytes, teacher_cache.cache_path(train))
    return teacher_cache.resolve_mode(config.teacher_cache, train, budget), budget


def _dtype(folder: Path) -> torch.dtype:
    return AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype


def _write_parts(parts: list[slice], into: Path, folder: Path, request: Request) -> list[Lost]:
    teacher = device.on_device(load_teacher(folder))
    return [teacher_cache.write_part(into, teacher, request, part) for part in parts]


def _log_distillation_teacher(run_dir: RunDirectory, teacher: Model, inputs: TrialInputs) -> None:
    """Write down how well the model of `distillation.teacher` does itself."""
    loss, stderr = on_all_cpus(run_dir, _teacher_loss, inputs)
    fields = {"folder": str(teacher.folder), "fingerprint": teacher.fingerprint}
    run_dir.event("taught_by", **fields, lm_loss=loss, lm_loss_stderr=stderr, lm_loss_n=len(inputs.validation))
    say(f"teacher: students are distilled from {teacher.folder}, LM loss {loss:.3f} +- {stderr:.3f}")


def _teacher_loss(inputs: TrialInputs) -> tuple[float, float]:
    """Return the teacher's LM loss in nats per token, and its standard error over the validation windows."""
    windows = inputs.validation
    hidden = teacher_cache.CacheReader(inputs.validation_cache).hidden(np.arange(len(windows)), windows)
    targets = next_tokens(torch.from_numpy(windows.astype(np.int64)))
    head = output_head(inputs.compute_folder)
    ce = token_losses(hidden.flatten(0, 1), head, targets.flatten()).ce
    by_window = ce.view(windows.shape)[:, :-1].double().mean(1).numpy()
    return float(by_window.mean()), standard_error(by_window)


def unpermuted_copy(run_dir: RunDirectory, model: Model, precision: Precision) -> tuple[str, Path]:
    """Return (content id, folder) of a copy of a model in its own order, in the dtype of the products."""
    key = content_id([model.fingerprint, UNPERMUTED])
    return key, on_all_cpus(run_dir, _copy, model.folder, _permuted_folder(key) / precision, precision)


def _copy(model: Path, folder: Path, precision: Precision) -> Path:
    return permute_teacher(
        model, Rankings.identity(AutoConfig.from_pretrained(model, trust_remote_code=False)), folder, precision
    )


def _order_id(run_dir: RunDirectory, pruned: Model) -> str:
    """Return the content id of a run's importance: of its tensors, for the bytes of two files of them may differ.

    What an earlier version permuted goes by an id of the file's bytes, and is used again where it is kept.
    """
    of_bytes = content_id(run_dir.importance.read_bytes().hex())
    if _permuted_folder(content_id([pruned.fingerprint, of_bytes])).exists():
        return of_bytes
    return content_id({name: tensor.numpy() for name, tensor in Importance.load(run_dir.importance).tensors().items()})
