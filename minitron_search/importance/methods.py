"""The methods that rank width elements, by the name that `importance.method` gives them.

What needs data is a sum over calibration windows, computed in parts and added; what needs weights is computed once
from the sums (poster, "Importance Estimation & Ranking"; the baselines are those that people compare with).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from minitron_search.importance import weights
from minitron_search.importance.activations import ActivationImportance
from minitron_search.importance.pca import Covariance, principal_components, rotated_config
from minitron_search.importance.taylor import gradient_sums, taylor
from minitron_search.importance.weights import InputSquares, Scores


class Sums(Protocol):
    """Running sums over samples, by any key, fed by hooks during the teacher's forward pass."""

    totals: dict[Any, Tensor]

    def watching(self, teacher: PreTrainedModel) -> AbstractContextManager[None]: ...

    def end_of_rows(self, final: Tensor) -> None:
        """Take the final hidden states (rows, length, hidden_size) of the pass that has just ended."""


@dataclass(frozen=True)
class Measured:
    """Everything that scores are made of.

    activations: aggregated over all samples. sums: the method's own, over all samples. samples: how many windows.
    teacher: gives the model that was measured; it is loaded for the methods that read its weights or shape.
    """

    activations: ActivationImportance
    sums: dict[Any, Tensor]
    samples: int
    seed: int
    teacher: Callable[[], PreTrainedModel]

    def weight(self, name: str) -> Tensor:
        return self.teacher().get_parameter(name).detach()


@dataclass(frozen=True)
class Method:
    """A way to score every hidden channel, neuron and head.

    sums: what it adds up during the forward pass, beside the activations. gradients: (teacher, windows, precision) ->
    what it adds up in a pass of its own, forward and backward, on float32 weights. rotates: its hidden axis is a
    rotation of the teacher's, which is what is trimmed then.
    """

    scores: Callable[[Measured], Scores]
    sums: Callable[[PreTrainedModel], Sums] | None = None
    gradients: Callable[[PreTrainedModel, np.ndarray, str], dict[Any, Tensor]] | None = None
    rotates: bool = False

    @property
    def dtype(self) -> torch.dtype | str:
        """Return the dtype to load the teacher in: gradients are of the weights' dtype."""
        return "auto" if self.gradients is None else torch.float32


def _activation(measured: Measured) -> Scores:
    scores = measured.activations
    return Scores(scores.hidden_per_norm.sum(0), scores.mlp, scores.heads)


def _random(measured: Measured) -> Scores:
    return weights.random(measured.teacher().config, measured.seed)


def _magnitude(measured: Measured) -> Scores:
    return weights.magnitude(measured.teacher().config, measured.weight)


def _wanda(measured: Measured) -> Scores:
    return weights.wanda(measured.teacher().config, measured.weight, measured.sums)


def _taylor(measured: Measured) -> Scores:
    return taylor(measured.teacher().config, measured.sums, measured.samples)


def _pca(measured: Measured) -> Scores:
    variances, rotation = principal_components(measured.sums["covariance"])
    return _activation(measured)._replace(hidden=variances, rotation=rotation)


METHODS: dict[str, Method] = {
    "activation": Method(_activation),  # aggregated activations, the papers' own
    "random": Method(_random),  # uniform scores
    "magnitude": Method(_magnitude),  # L2 norm of what an element owns
    "taylor": Method(_taylor, gradients=gradient_sums),  # |weight x gradient of the LM loss|
    "wanda": Method(_wanda, sums=InputSquares),  # |weight| x norm of the activations it meets
    # variance along the hidden states' principal components; neurons and heads by activation
    "pca": Method(_pca, sums=Covariance, rotates=True),
}


def method_of(name: str) -> Method:
    """Return the method of that name. Raises ValueError for a name that is not in `METHODS`."""
    if name not in METHODS:
        raise ValueError(f"importance.method: {name!r} is not valid; valid: {', '.join(METHODS)}")
    return METHODS[name]


def trimmed_config(name: str, teacher: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the model that students are cut from: the rotated teacher's where the method of that
    name rotates. Raises ValueError for an unknown name, and where a rotation would not be exact."""
    return rotated_config(teacher) if method_of(name).rotates else teacher
