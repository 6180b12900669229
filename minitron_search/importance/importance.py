"""Importance of every width element, by one of `methods.METHODS`, and BI of every block."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from minitron_search.config.inputs import ImportanceConfig
from minitron_search.importance.activations import ActivationHooks, ActivationSums, activation_importance
from minitron_search.importance.methods import Measured, method_of
from minitron_search.models.device import autocast
from minitron_search.models.families import final_hidden
from minitron_search.pruning.rankings import Rankings
from minitron_search.records import cache

DEFAULT = ImportanceConfig()
TOKENS_AT_ONCE = 1024  # of whole windows, at least one: the residual stream before every layer is held for this many
ORDER = "ranking_"  # prefix of a composed ranking's tensors in the file


@dataclass(frozen=True, repr=False)
class Importance:
    """Scores of every width element, and BI of every block.

    hidden: (hidden_size,). mlp: (layers, intermediate_size). heads: (layers, num_attention_heads).
    hidden_per_norm: (norms, hidden_size), by activations whatever the method; activation's `hidden` is its sum.
    block_bi: (layers + 1, layers + 1), entry [i, j] = 1 - mean cosine between the residual stream before layer i
    and before layer j (after the last layer, before the final norm, for j = layers): the BI of block i..j-1.
    rotation: (hidden_size, hidden_size) where `hidden` is of the rotated teacher's channels: its columns are theirs.
    order: the ranking where it is composed over rounds (`iterative.py`); the scores are then the first round's.
    """

    hidden: Tensor
    hidden_per_norm: Tensor
    mlp: Tensor
    heads: Tensor
    block_bi: Tensor
    rotation: Tensor | None = None
    order: Rankings | None = None

    def rankings(self, key_value_heads: int) -> Rankings:
        """Return the order of every width axis: the composed one, or that of the scores."""
        return self.order or Rankings.of_scores(self.hidden, self.mlp, self.heads, key_value_heads)

    def layer_bi(self) -> Tensor:
        """Return the BI of each layer alone, (layers,)."""
        return torch.diagonal(self.block_bi, offset=1)

    def __repr__(self) -> str:
        layers, neurons = self.mlp.shape
        bi = self.layer_bi()
        return (f"importance of {len(self.hidden)} hidden channels, {neurons} neurons and {self.heads.shape[1]} heads "
                f"in {layers} layers; BI of a layer {bi.min():.3f} (layer {bi.argmin()}) to {bi.max():.3f} "
                f"(layer {bi.argmax()})")  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by its name in the file."""
        scores = {name: tensor for name in SCORES if (tensor := getattr(self, name)) is not None}
        order = {} if self.order is None else {ORDER + f.name: getattr(self.order, f.name) for f in fields(Rankings)}
        return scores | order

    def save(self, path: Path, samples: int, config: ImportanceConfig) -> None:
        metadata = {"samples": samples, **config.model_dump(exclude_none=True)}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        texts = {name: str(value) for name, value in metadata.items()}
        cache.replace(path, lambda into: save_file(tensors, into, texts))

    @classmethod
    def load(cls, path: Path) -> "Importance":
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        order = {name.removeprefix(ORDER): tensors.pop(name) for name in list(tensors) if name.startswith(ORDER)}
        return cls(**tensors, order=Rankings(**order) if order else None)


SCORES = tuple(field.name for field in fields(Importance) if field.name != "order")


@dataclass(frozen=True)
class ImportanceSums:
    """Sums over some of the samples; sums of disjoint samples add up. of_method: what the method adds up itself (input
    squares by weight, gradient sums by slice, the covariance)."""

    activations: ActivationSums
    of_method: dict[Any, Tensor]


def measure(
    teacher: PreTrainedModel,
    windows: np.ndarray,
    config: ImportanceConfig = DEFAULT,
    *,
    seed: int = 0,
    precision: str = "float32",
    rows_at_once: int | None = None,
) -> Importance:
    """Return the importance of every width element and of every block, over calibration `windows` (samples, length), in
    one round. `seed` is read by method `random`; `taylor` needs float32 weights. Raises ValueError for an unknown
    method."""
    part = importance_sums(teacher, windows, config, precision, rows_at_once)
    return combined([part], config, seed, lambda: teacher)


def importance_sums(
    teacher: PreTrainedModel,
    windows: np.ndarray,
    config: ImportanceConfig,
    precision: str,
    rows_at_once: int | None = None,
) -> ImportanceSums:
    """Return the sums of `windows` (samples, length): one forward pass, and for `taylor` one forward and backward.

    `rows_at_once`: windows a pass; by default as many whole ones as hold `TOKENS_AT_ONCE` tokens.
    """
    method, device = method_of(config.method), teacher.device
    rows_at_once = rows_at_once or max(1, TOKENS_AT_ONCE // windows.shape[1])
    activations = ActivationHooks(teacher, config.sequence)
    own = None if method.sums is None else method.sums(teacher)
    with torch.no_grad(), activations.watching(teacher), nullcontext() if own is None else own.watching(teacher):
        for first in range(0, len(windows), rows_at_once):
            rows = torch.from_numpy(windows[first : first + rows_at_once].astype(np.int64)).to(device)
            with autocast(precision, device):
                final = final_hidden(teacher, rows)
            activations.end_of_rows()
            if own is not None:
                own.end_of_rows(final)
    totals = {} if own is None else own.totals
    if method.gradients is not None:
        totals = method.gradients(teacher, windows, precision)
    return ImportanceSums(activations.sums(len(windows)), {key: total.cpu() for key, total in totals.items()})


def combined(
    parts: list[ImportanceSums], config: ImportanceConfig, seed: int, teacher: Callable[[], PreTrainedModel]
) -> Importance:
    """Return the importance of all samples of `parts`, added in the order given. `teacher` gives the model that they
    were measured on, and is called at most once, by the methods that read its weights or shape."""
    activations = activation_importance([part.activations for part in parts], config.batch)
    sums = {
        key: sum((part.of_method[key] for part in parts[1:]), parts[0].of_method[key]) for key in parts[0].of_method
    }
    samples = sum(part.activations.samples for part in parts)
    scores = method_of(config.method).scores(Measured(activations, sums, samples, seed, functools.cache(teacher)))
    return Importance(**scores._asdict(), hidden_per_norm=activations.hidden_per_norm, block_bi=activations.block_bi)
