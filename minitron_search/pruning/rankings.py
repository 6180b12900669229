"""Rank the elements of each width axis: importance decides the order, trimming reads it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from minitron_search.models.architecture import Architecture, dimension, parts
from minitron_search.models.families import whole


@dataclass(frozen=True)
class Rankings:
    """One teacher's indices in descending importance.

    hidden: (hidden_size,), one order for the whole model (embedding, norms, projections, head).
    mlp: (layers, intermediate_size).
    groups: (layers, key-value heads), the order of whole groups.
    heads: (layers, key-value heads, query heads per group), the order inside each group; entry [l, g] holds
        positions inside group g of the teacher, not of the permuted one.
    """

    hidden: Tensor
    mlp: Tensor
    groups: Tensor
    heads: Tensor

    @classmethod
    def of_scores(cls, hidden: Tensor, mlp: Tensor, heads: Tensor, key_value_heads: int) -> "Rankings":
        """Rank by importance scores: hidden (hidden_size,), mlp (layers, neurons), heads (layers, query heads).

        Query heads are ranked inside their group; a group's importance is the sum of its heads'.
        """
        grouped = heads.view(len(heads), key_value_heads, -1)
        return cls(
            hidden=_descending(hidden),
            mlp=_descending(mlp),
            groups=_descending(grouped.sum(-1)),
            heads=_descending(grouped),
        )

    @classmethod
    def identity(cls, config: PretrainedConfig) -> "Rankings":
        """Return the order that the teacher already has: with it, trimming takes leading slices."""
        hidden, mlp, heads, key_value_heads = _ones(config)
        return cls.of_scores(hidden, mlp, heads, key_value_heads)

    @classmethod
    def random(cls, config: PretrainedConfig, seed: int) -> "Rankings":
        """Return a random order: the control that ignores importance (Figure 6 of the paper)."""
        generator = torch.Generator().manual_seed(seed)
        hidden, mlp, heads, key_value_heads = _ones(config)
        hidden, mlp, heads = (torch.rand(scores.shape, generator=generator) for scores in (hidden, mlp, heads))
        return cls.of_scores(hidden, mlp, heads, key_value_heads)

    def kept(self, architecture: Architecture, layer: int | None, dim: str, head_dim: int) -> Tensor | None:
        """Return the indices of dimension `dim`, of a weight in teacher layer `layer`, that `architecture` keeps, in
        order; None where the whole dimension is kept as it is (vocab, position, head_dim)."""
        if dim == "hidden":
            return self.hidden[: architecture.hidden_size]
        if dim in ("vocab", "position", "head_dim"):
            return None
        if len(parts(dim)) > 1:
            return self._fused(architecture, layer, dim, head_dim)
        assert layer is not None, f"dimension {dim} outside the decoder layers"
        if dim == "mlp":
            return self.mlp[layer, : architecture.intermediate_size]
        groups = self.groups[layer, : architecture.num_key_value_heads]
        if dim == "key_value":
            return _channels(groups, head_dim)
        assert dim == "query", dim
        group_size = self.heads.shape[-1]
        kept_per_group = architecture.num_attention_heads // architecture.num_key_value_heads
        heads = groups[:, None] * group_size + self.heads[layer, groups, :kept_per_group]
        return _channels(heads.flatten(), head_dim)

    def _fused(self, architecture: Architecture, layer: int | None, dim: str, head_dim: int) -> Tensor:
        """Do as `kept` for a dimension that holds several: one after another (+), or by group of heads (|)."""
        dims = {
            "mlp": self.mlp.shape[1],
            "query": self.heads[0].numel() * head_dim,
            "key_value": self.groups.shape[1] * head_dim,
            "head_dim": head_dim,
        }
        kept = [self.kept(architecture, layer, name, head_dim) for name in parts(dim)]
        places = apart(dim, torch.arange(dimension(dims, dim)), dims)
        chosen = [place[index] for place, index in zip(places, kept, strict=True)]
        if "|" not in dim:
            return torch.cat(chosen)
        return torch.cat([own.view(architecture.num_key_value_heads, -1) for own in chosen], dim=1).flatten()


def apart(dim: str, values: Tensor, dims: Mapping[str, int]) -> list[Tensor]:
    """Split `values` along a dimension into those that it is made of (`family_tables.Family`)."""
    lengths = [dims[name] for name in parts(dim)]
    if "|" not in dim:
        return list(values.split(lengths))
    groups = dims["key_value"] // dims["head_dim"]
    by_group = values.view(groups, -1).split([length // groups for length in lengths], dim=1)
    return [own.flatten() for own in by_group]


def _channels(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _descending(scores: Tensor) -> Tensor:
    return torch.argsort(scores, dim=-1, descending=True, stable=True)  # stable: ties keep the teacher's order


def _ones(config: PretrainedConfig) -> tuple[Tensor, Tensor, Tensor, int]:
    shape = whole(config)
    return (
        torch.ones(shape.hidden_size),
        torch.ones(shape.num_hidden_layers, shape.intermediate_size),
        torch.ones(shape.num_hidden_layers, shape.num_attention_heads),
        shape.num_key_value_heads,
    )
