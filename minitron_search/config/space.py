"""The section that says what is searched: budget, axes, anchors."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from minitron_search.config.inputs import Section
from minitron_search.config.types import (
    MOST_WINDOW,
    Layers,
    Positive,
    Share,
    Size,
    as_list,
    as_number,
    same_in_every_layer,
)

BatchSize = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=2**16)]


Context = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=MOST_WINDOW)]


MOST_VALUES = 2**16  # of an axis: all of them are enumerated


class Target(Section):
    """A value to reach, and how far from it a candidate may be, as a share of it."""

    target: Annotated[Positive, Field(le=1e18)]
    tolerance: Share = 0.05


class MemoryTarget(Target):
    """Weights plus key-value cache, bytes, at two bytes an element."""

    batch_size: BatchSize = 1
    context_length: Context = 2048


class SpeedTarget(Target):
    """A budget on one forward pass of body and head over batch_size x context_length tokens (prefill).

    It is measured where trials run, on one-layer models of every width.
    """

    batch_size: BatchSize = 1
    context_length: Context = 2048


class Budget(Section):
    """The limits that a candidate meets, all of them at once.

    params, non_embedding_params: counts. memory_bytes: bytes. latency_ms: wall milliseconds of a forward pass.
    tokens_per_second: the tokens of that pass divided by its time.
    """

    params: Target | None = None
    non_embedding_params: Target | None = None
    memory_bytes: MemoryTarget | None = None
    latency_ms: SpeedTarget | None = None
    tokens_per_second: SpeedTarget | None = None

    @model_validator(mode="after")
    def _something_is_asked(self) -> "Budget":
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError("space.budget: empty; valid: params: {target: 90M, tolerance: 0.05}")
        return self


class Axis(Section):
    """The values of one axis: `choices`, or a range.

    A range has `low`, `high` and either `step` (low, low + step, ... up to high) or `divisor` (its multiples from low
    to high).
    """

    low: Size | None = None
    high: Size | None = None
    step: Size | None = None
    divisor: Size | None = None
    choices: Annotated[
        tuple[Size, ...], BeforeValidator(as_list), BeforeValidator(same_in_every_layer)
    ] | None = None  # fmt: skip

    @model_validator(mode="after")
    def _range_or_choices(self) -> "Axis":
        ranged = (self.low, self.high, self.step, self.divisor)
        if self.choices is not None:
            if any(part is not None for part in ranged) or not self.choices:
                raise ValueError("takes either choices or a range; valid: choices: [6, 9], or low, high and step")
        elif self.low is None or self.high is None or (self.step is None) == (self.divisor is None):
            raise ValueError("a range is low, high and one of step and divisor; valid: "
                             "{low: 384, high: 576, step: 64}, or {low: 400, high: 576, divisor: 64}")  # fmt: skip
        elif self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; valid: low at most {self.high}")
        elif (self.high - self.low) // (self.step or self.divisor or 1) >= MOST_VALUES:
            least = math.ceil((self.high - self.low + 1) / MOST_VALUES)
            raise ValueError(f"low {self.low} to high {self.high} in steps of {self.step or self.divisor} are more "
                             f"than {MOST_VALUES} values; valid: steps of at least {least}")  # fmt: skip
        elif self.divisor is not None and not self.values():
            raise ValueError(f"low {self.low} to high {self.high} holds no multiple of divisor {self.divisor}; "
                             f"valid: high at least {math.ceil(self.low / self.divisor) * self.divisor}")  # fmt: skip
        return self

    def values(self) -> tuple[int, ...]:
        """Return every value of the axis, in ascending order."""
        if self.choices is not None:
            return tuple(sorted(set(self.choices)))
        assert self.low and self.high
        if self.divisor:
            first = math.ceil(self.low / self.divisor) * self.divisor
            return tuple(range(first, self.high + 1, self.divisor))
        assert self.step
        return tuple(range(self.low, self.high + 1, self.step))


class DropBlock(Section):
    """The contiguous block of layers that a candidate drops: its length; the search chooses where it starts.

    seeds: what the search proposes first for every length. sweep: the best block that the depth sweep found. bi: the
        block of least BI. one_by_one: the layers of least BI each, which need not be neighbours (ShortGPT,
        arXiv:2403.03853). laco: all layers but those that LaCo merges the others into (`pruning/laco.py`).
    """

    lengths: Annotated[tuple[Layers, ...], BeforeValidator(as_list), Field(min_length=1)] = (0,)
    seeds: Literal["none", "sweep", "bi", "one_by_one", "laco"] = "none"


class Axes(Section):
    """The axes of the search. An axis that is left out keeps the teacher's value, or follows the axis that decides it.

    num_attention_heads alone drops heads inside every group (whole groups where a group is one head);
    num_key_value_heads alone drops whole groups. Where a family's heads make up hidden_size, either gives the other.
    """

    hidden_size: Axis | None = None
    intermediate_size: Axis | None = None
    num_attention_heads: Axis | None = None
    num_key_value_heads: Axis | None = None
    drop_block: DropBlock | None = None


class Anchor(Section):
    """An architecture that the search always evaluates. What is left out keeps the teacher's value."""

    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    drop_block: tuple[Layers, Layers] | None = None  # start, length


class SpaceConfig(Section):
    """What is searched: the legal architectures inside the budget, and those that are evaluated in any case.

    deployable: engines (vllm, llama.cpp); only architectures that all of them take are searched. Empty: any.
    """

    budget: Budget = Budget(params=Target(target=90e6, tolerance=0.05))
    axes: Axes = Axes(
        hidden_size=Axis(low=384, high=576, step=64),
        intermediate_size=Axis(low=768, high=1536, step=128),
        num_attention_heads=Axis(choices=(6, 9)),
        drop_block=DropBlock(lengths=(0, 2, 4, 8)),
    )
    anchors: tuple[Anchor, ...] = ()
    deployable: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
