"""A candidate's shape: frozen, valid by construction, with its content id, parameters, memory and FLOPs.

A family lists its weights as (name, dimensions); every count here is a sum over that list, so the numbers are
those of the model that `from_pretrained` would build.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from minitron_search.records.cache import content_id

# Sizes may be numbers or arrays of numbers (one per architecture of a space): counts then are arrays too.
Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """The shape of a candidate inside a teacher.

    `layers` are the teacher's layers that are kept, in order. Query heads are kept evenly in every group:
    `num_attention_heads` is a multiple of `num_key_value_heads`. `head_dim` is the teacher's and never changes.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        assert min(self.hidden_size, self.intermediate_size, self.num_key_value_heads, len(self.layers)) >= 1
        assert self.num_attention_heads % self.num_key_value_heads == 0, self
        assert list(self.layers) == sorted(set(self.layers)), self

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def id(self) -> str:
        """Return the content id: equal shapes have equal ids on every machine. A search reads it often."""
        return content_id(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Architecture":
        return cls(**{**values, "layers": tuple(values["layers"])})

    @classmethod
    def of_trial(cls, description: Mapping[str, Any]) -> "Architecture":
        """Read it from what a trial's architecture.json holds."""
        return cls.from_dict({name: description[name] for name in cls.__dataclass_fields__})

    def dropped_block(self, teacher_layers: int) -> tuple[int, int] | None:
        """Return (start, length) of the contiguous block of teacher layers that is missing: (0, 0) where none is, None
        where the missing layers are not one block."""
        missing = sorted(set(range(teacher_layers)) - set(self.layers))
        if not missing:
            return 0, 0
        return (missing[0], len(missing)) if missing[-1] - missing[0] + 1 == len(missing) else None

    def __str__(self) -> str:
        heads = f"heads {self.num_attention_heads} in {self.num_key_value_heads} groups"
        return f"hidden {self.hidden_size}, mlp {self.intermediate_size}, {heads}, {self.num_hidden_layers} layers"


@dataclass(frozen=True)
class Weight:
    """One parameter tensor: its name, its dimensions by name, and the decoder layer it belongs to (or None).

    `embedding` is true for the input embedding and the output head. `matmul` is true for weights that multiply every
    token's activations (all matrices but those that are looked up, the input embedding and learned positions; a tied
    embedding is both, and counts as a product).
    """

    name: str
    dims: tuple[str, ...]
    layer: int | None
    embedding: bool
    matmul: bool


def parts(dim: str) -> list[str]:
    """Return the dimensions that a fused one (`query+key_value+key_value`, `family_tables.Family`) is made of."""
    return dim.replace("|", "+").split("+")


def dimension(sizes: Sizes, dim: str) -> Any:
    """Return the size of a dimension, fused or not."""
    return sum(sizes[part] for part in parts(dim))


def parameter_count(weights: Iterable[Weight], sizes: Sizes, *, embeddings: bool = True) -> Any:
    """Count parameters, tied embeddings once; `embeddings=False` leaves out input embedding and output head."""
    return _sum(weights, sizes, lambda weight: embeddings or not weight.embedding)


def memory_bytes(
    weights: Iterable[Weight], sizes: Sizes, batch_size: int, context_length: int, element_bytes: int = 2
) -> Any:
    """Return the bytes of weights and key-value cache for `batch_size` sequences of `context_length` tokens.

    Every layer keeps every position: where some attend through a sliding window (Gemma 2 and 3), a cache that drops
    what left the window takes less.
    """
    cache = 2 * sizes["layers"] * sizes["key_value"] * batch_size * context_length
    return element_bytes * (parameter_count(weights, sizes) + cache)


def forward_flops(weights: Iterable[Weight], sizes: Sizes, context_length: int) -> Any:
    """Return the floating-point operations of one token's forward pass: 2 per weight of every matrix product, and the
    two products of causal attention over half the context on average."""
    attention = 2 * sizes["layers"] * sizes["query"] * context_length
    return 2 * _sum(weights, sizes, lambda weight: weight.matmul) + attention


def _sum(weights: Iterable[Weight], sizes: Sizes, counted: Any) -> Any:
    """Sum the elements of the weights that are `counted`; layer 0 stands for every layer, since all have one shape."""
    total: Any = 0
    for weight in weights:
        if counted(weight) and weight.layer in (None, 0):
            elements = math.prod(np.asarray(dimension(sizes, dim), dtype=np.int64) for dim in weight.dims)
            total = total + elements * (1 if weight.layer is None else sizes["layers"])
    return int(total) if np.ndim(total) == 0 else total
