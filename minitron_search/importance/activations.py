"""Importance by activations, and BI of every block, both from one forward pass (2408.11796, section 2.2).

Forward passes only, sums in float32. Two aggregations, over positions and then over samples (best practice 2:
sequence = mean of absolute values, batch = L2).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minitron_search.models.families import decoder_layers, family_of, sizes


@dataclass(frozen=True)
class ActivationSums:
    """Sums over some of the samples; sums of disjoint samples add up.

    first, second: by (layer, module), sums over samples of s and of s^2, where s is a
    sample's aggregate over positions. cosines: (layers + 1, layers + 1), summed over positions.
    """

    norms: tuple[str, ...]
    first: dict[tuple[int, str], Tensor]
    second: dict[tuple[int, str], Tensor]
    cosines: Tensor
    positions: int
    samples: int


@dataclass(frozen=True)
class ActivationImportance:
    """Importance by activations. hidden_per_norm: (norms, hidden_size). mlp: (layers, intermediate_size). heads:
    (layers, num_attention_heads). block_bi: (layers + 1, layers + 1), as `Importance.block_bi`."""

    hidden_per_norm: Tensor
    mlp: Tensor
    heads: Tensor
    block_bi: Tensor


def activation_importance(parts: list[ActivationSums], batch: str) -> ActivationImportance:
    """Return the importance of all samples of `parts`, added in the order given."""
    samples, norms = sum(part.samples for part in parts), parts[0].norms
    cosines = sum((part.cosines for part in parts[1:]), parts[0].cosines)

    def over_samples(key: tuple[int, str]) -> Tensor:
        first = sum((part.first[key] for part in parts[1:]), parts[0].first[key])
        second = sum((part.second[key] for part in parts[1:]), parts[0].second[key])
        if batch == "l2":
            return second.sqrt()
        if batch == "variance":
            return second / samples - (first / samples).square()
        return first if batch == "l1" else first / samples

    def stacked(kind: str) -> Tensor:
        return torch.stack([over_samples((layer, kind)) for layer in range(len(cosines) - 1)])

    return ActivationImportance(
        hidden_per_norm=torch.cat([stacked(norm) for norm in norms]),
        mlp=stacked("mlp"),
        heads=stacked("heads"),
        block_bi=1 - cosines / sum(part.positions for part in parts),
    )


class ActivationHooks:
    """Running sums over samples, one entry per watched module, fed by hooks during the forward pass."""

    def __init__(self, teacher: PreTrainedModel, sequence: str):
        self.family = family_of(teacher.config)
        self.head_dim = sizes(teacher.config)["head_dim"]
        self.over_positions = _over_positions(sequence)
        self.first: dict[tuple[int, str], Tensor] = {}  # sum over samples of s, which no aggregation makes negative
        self.second: dict[tuple[int, str], Tensor] = {}  # sum over samples of s^2
        # the residual stream before each layer and after the last, (layers + 1, positions, hidden), of unit length: as
        # each passes by, it is scaled into place (measured: stacking and normalising afterwards takes five times this)
        self.stream = torch.empty(0)
        self.width, self.seen = (teacher.config.num_hidden_layers + 1, teacher.config.hidden_size), 0
        self.rows = 0  # samples in the forward pass under way
        self.cosines = torch.zeros(self.width[0], self.width[0], device=teacher.device)
        self.positions = 0

    @contextmanager
    def watching(self, teacher: PreTrainedModel) -> Iterator[None]:
        handles = []
        layers = decoder_layers(teacher)
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(self._layer_input, with_kwargs=True))
            for norm in () if self.family.readers else self.family.norms:
                handles.append(layer.get_submodule(norm).register_forward_hook(self._norm_output(index, norm)))
            read = {self.family.mlp_output: "mlp", self.family.attention_output: "heads"}
            for name, kind in (read | {name: name for name in self.family.readers}).items():
                handles.append(layer.get_submodule(name).register_forward_pre_hook(self._input(index, kind)))
        handles.append(layers[-1].register_forward_hook(self._last_output))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _norm_output(self, layer: int, norm: str):  # type: ignore[no-untyped-def]
        return lambda module, inputs, output: self._add((layer, norm), output)

    def _input(self, layer: int, kind: str):  # type: ignore[no-untyped-def]
        return lambda module, inputs: self._add((layer, kind), inputs[0])

    def _layer_input(self, module: nn.Module, inputs: tuple, arguments: dict) -> None:
        stream = inputs[0] if inputs else arguments["hidden_states"]
        self.rows = len(stream)
        self._add_stream(stream)

    def _last_output(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        self._add_stream(output[0] if isinstance(output, tuple) else output)

    def _add(self, key: tuple[int, str], x: Tensor) -> None:
        """Add activations x (batch, length, channels), or (batch * length, channels) as OPT has it."""
        x = x.float().view(self.rows, -1, x.shape[-1])
        if key[1] == "heads":  # a head's activation is its output vector: L2 over head_dim
            x = x.unflatten(-1, (-1, self.head_dim)).norm(dim=-1)
        samples = self.over_positions(x)
        self.first[key] = self.first.get(key, 0) + samples.sum(0)
        self.second[key] = self.second.get(key, 0) + samples.square().sum(0)

    def _add_stream(self, x: Tensor) -> None:
        x = x.float().flatten(0, 1)
        if self.seen == 0 and self.stream.shape[1:] != x.shape:
            layers, hidden = self.width
            self.stream = torch.empty(layers, len(x), hidden, device=x.device)
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
        torch.div(x, lengths, out=self.stream[self.seen])
        self.seen += 1

    def end_of_rows(self) -> None:
        assert self.seen == self.width[0], self.seen
        flat = self.stream.flatten(1)
        self.cosines += flat @ flat.T
        self.positions += self.stream.shape[1]
        self.seen = 0

    def sums(self, samples: int) -> ActivationSums:
        first, second = ({key: total.cpu() for key, total in sums.items()} for sums in (self.first, self.second))
        return ActivationSums(
            self.family.readers or self.family.norms, first, second, self.cosines.cpu(), self.positions, samples
        )


def _over_positions(sequence: str):  # type: ignore[no-untyped-def]
    """Return the aggregation over positions: (batch, length, channels) -> (batch, channels)."""
    return {
        "mean": lambda x: x.abs().sum(1) / x.shape[1],
        "l2": lambda x: x.norm(dim=1),
        "variance": lambda x: x.var(1, correction=0),
    }[sequence]
