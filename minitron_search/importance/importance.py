"""Importance of every width element, by one of several criteria, and BI of every block.

The criterion is `importance.method`. What needs data is a sum over calibration windows, computed in parts and added;
what needs weights is computed once from the sums (poster, "Importance Estimation & Ranking"; the baselines are those
that people compare with).

    activation  aggregated activations, the papers' own        activation_importance.py
    random      uniform scores                                 weight_importance.py
    magnitude   L2 norm of what an element owns                weight_importance.py
    wanda       |weight| x norm of the activations it meets    weight_importance.py
    taylor      |weight x gradient of the LM loss|             taylor.py
    pca         variance along the hidden states' principal components; MLP and heads by activation   rotation.py
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
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
from minitron_search.importance import activations as activation_importance
from minitron_search.importance import weights
from minitron_search.importance.activations import ActivationSums
from minitron_search.importance.pca import Covariance, principal_components
from minitron_search.importance.taylor import gradient_sums, taylor
from minitron_search.importance.weights import InputSquares, Scores
from minitron_search.models.device import autocast
from minitron_search.models.families import final_hidden
from minitron_search.pruning.rankings import Rankings

DEFAULT = ImportanceConfig()
TOKENS_AT_ONCE = 1024  # of whole windows, at least one: the residual stream before every layer is held for this many
ORDER = "ranking_"  # prefix of a composed ranking's tensors in the file


@dataclass(frozen=True)
class Importance:
    """hidden: (hidden_size,). mlp: (layers, intermediate_size). heads: (layers, num_attention_heads).
    hidden_per_norm: (norms, hidden_size), by activations whatever the method; activation's `hidden` is its sum.
    block_bi: (layers + 1, layers + 1), entry [i, j] = 1 - mean cosine between the residual stream before layer i
    and before layer j (after the last layer, before the final norm, for j = layers): the BI of block i..j-1.
    rotation: (hidden_size, hidden_size) where `hidden` is of the rotated teacher's channels: its columns are theirs.
    order: the ranking where it is composed over rounds (`rounds.py`); the scores are then the first round's.
    """

    hidden: Tensor
    hidden_per_norm: Tensor
    mlp: Tensor
    heads: Tensor
    block_bi: Tensor
    rotation: Tensor | None = None
    order: Rankings | None = None

    def rankings(self, key_value_heads: int) -> Rankings:
        return self.order or Rankings.of_scores(self.hidden, self.mlp, self.heads, key_value_heads)

    def layer_bi(self) -> Tensor:
        """(layers,): BI of each layer alone."""
        return torch.diagonal(self.block_bi, offset=1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by its name in the file."""
        found = {name: tensor for name in SCORES if (tensor := getattr(self, name)) is not None}
        order = {} if self.order is None else {ORDER + f.name: getattr(self.order, f.name) for f in fields(Rankings)}
        return found | order

    def save(self, path: Path, samples: int, asked: ImportanceConfig) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {"samples": samples, **asked.model_dump(exclude_none=True)}
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, temporary,
                  {name: str(value) for name, value in metadata.items()})  # fmt: skip
        temporary.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Importance":
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
        order = {name.removeprefix(ORDER): found.pop(name) for name in list(found) if name.startswith(ORDER)}
        return cls(**found, order=Rankings(**order) if order else None)


SCORES = tuple(field.name for field in fields(Importance) if field.name != "order")


@dataclass(frozen=True)
class Partial:
    """Sums over some of the samples; sums of disjoint samples add up. of_method: what the method adds to the
    activations: input squares by weight, gradient sums by slice, or the covariance."""

    activations: activation_importance.Partial
    of_method: dict[Any, Tensor]


def measure(
    teacher: PreTrainedModel,
    windows: np.ndarray,
    asked: ImportanceConfig = DEFAULT,
    *,
    seed: int = 0,
    precision: str = "float32",
    rows_at_once: int | None = None,
) -> Importance:
    """One round of importance of every width element and of every block, over calibration `windows` (samples,
    length). `seed` is read by method `random`; `taylor` needs float32 weights."""
    part = partial_sums(teacher, windows, asked, precision, rows_at_once)
    return combined([part], asked, seed, lambda: teacher)


def partial_sums(
    teacher: PreTrainedModel,
    windows: np.ndarray,
    asked: ImportanceConfig,
    precision: str,
    rows_at_once: int | None = None,
) -> Partial:
    """The sums of `windows` (samples, length), in one forward pass (and one backward, for `taylor`)."""
    device = teacher.device
    rows_at_once = rows_at_once or max(1, TOKENS_AT_ONCE // windows.shape[1])
    activations = ActivationSums(teacher, asked.batch, asked.sequence)
    inputs = InputSquares(teacher) if asked.method == "wanda" else None
    covariance = Covariance(teacher) if asked.method == "pca" else None
    with torch.no_grad(), ExitStack() as watching:
        for sums in (activations, inputs, covariance):
            if sums is not None:
                watching.enter_context(sums.watching(teacher))
        for first in range(0, len(windows), rows_at_once):
            rows = torch.from_numpy(windows[first : first + rows_at_once].astype(np.int64)).to(device)
            with autocast(precision, device):
                final = final_hidden(teacher, rows)
            activations.end_of_rows()
            if inputs is not None:
                inputs.end_of_rows(final)
    of_method: dict[Any, Tensor] = {}
    if inputs is not None:
        of_method = {name: total.cpu() for name, total in inputs.totals.items()}
    if covariance is not None:
        of_method = {"covariance": covariance.total.cpu()}
    if asked.method == "taylor":
        of_method = gradient_sums(teacher, windows, precision)
    return Partial(activations.partial(len(windows)), of_method)


def combined(
    parts: list[Partial], asked: ImportanceConfig, seed: int, teacher: Callable[[], PreTrainedModel]
) -> Importance:
    """The importance of all samples of `parts`, added in the order given. `teacher` gives the model that they were
    measured on, and is called by the methods that read its weights or shape."""
    by_activation = activation_importance.combined([part.activations for part in parts], asked.batch)
    sums = {
        key: sum((part.of_method[key] for part in parts[1:]), parts[0].of_method[key]) for key in parts[0].of_method
    }
    scores = Scores(by_activation.hidden_per_norm.sum(0), by_activation.mlp, by_activation.heads)
    rotation = None
    if asked.method == "pca":
        values, rotation = principal_components(sums["covariance"])
        scores = scores._replace(hidden=values)
    elif asked.method != "activation":
        model = teacher()
        parameters = dict(model.named_parameters())
        config = model.config

        def read(name: str) -> Tensor:
            return parameters[name].detach()

        if asked.method == "random":
            scores = weights.random(config, seed)
        elif asked.method == "magnitude":
            scores = weights.magnitude(config, read)
        elif asked.method == "wanda":
            scores = weights.wanda(config, read, sums)
        else:
            scores = taylor(config, sums, sum(part.activations.samples for part in parts))
    return Importance(
        **scores._asdict(),
        hidden_per_norm=by_activation.hidden_per_norm,
        block_bi=by_activation.block_bi,
        rotation=rotation,
    )
