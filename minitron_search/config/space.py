"""The section that says what is searched: budget, axes, anchors.

What is `auto` follows from the teacher (`architecture_search/default_space.py`); a run's configuration holds it in
numbers.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, field_validator, model_validator

from minitron_search.config.inputs import Section
from minitron_search.config.types import (
    LIST_OR_AUTO,
    MOST_WINDOW,
    Layers,
    Share,
    Size,
    as_list,
    as_number,
    auto_or_list,
    same_in_every_layer,
)

BatchSize = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=2**16)]


Context = Annotated[int, BeforeValidator(as_number), Field(ge=1, le=MOST_WINDOW)]


MOST_VALUES = 2**16  # of an axis: all of them are enumerated


MOST_AMOUNT = 1e18  # of a budget


def as_amount(value: Any) -> float | str:
    """Read a budget's number: `90M`, a share of what the teacher has (`67%`), or `auto`."""
    text = str(value).strip()
    if text == "auto":
        return text
    if share := re.fullmatch(r"([+-]?\d+\.?\d*|[+-]?\.\d+)\s*%", text):
        if not 0 < float(share[1]) < 100:
            raise ValueError("a share of the teacher's is above 0% and below 100%; valid: 67%, or a number such as 90M")
        return f"{float(share[1]):g}%"
    number = as_number(value)
    if not isinstance(number, int | float) or not 0 < number <= MOST_AMOUNT:  # NaN is in no range
        raise ValueError(f"not a number above 0 and at most {MOST_AMOUNT:g}; valid: 90M, 67% (of the teacher's) or "
                         "auto (two thirds of the teacher's)")  # fmt: skip
    return float(number)


class Target(Section):
    """A limit: a value to reach, and how far from it a candidate may be."""

    target: Annotated[Literal["auto"] | float | str, BeforeValidator(as_amount), Field(validate_default=True)] = "auto"
    """Value to reach: a number (90M), a share of the teacher's (67%), or auto: two thirds of the teacher's, in two
    digits. What is measured (latency_ms, tokens_per_second) takes a number only."""
    tolerance: Share = 0.05
    """How far from the target a candidate may be, as a share of the target."""

    @property
    def number(self) -> float:
        """The target of a configuration that leaves nothing to the teacher."""
        assert not isinstance(self.target, str), self.target
        return self.target


class MemoryTarget(Target):
    """A limit on bytes, which a batch of sequences takes."""

    batch_size: BatchSize = 1
    """Sequences that are held at once."""
    context_length: Context = 2048
    """Tokens of each sequence."""


class SpeedTarget(Target):
    """A limit on one forward pass of body and head over batch_size x context_length tokens (prefill)."""

    batch_size: BatchSize = 1
    """Sequences that are held at once."""
    context_length: Context = 2048
    """Tokens of each sequence."""

    @field_validator("target")
    @classmethod
    def _the_teachers_speed_is_not_known(cls, target: float | str) -> float | str:
        if isinstance(target, str):
            raise ValueError("what the teacher reaches is not known before it is measured; valid: a number, as 900 "
                             "(milliseconds) or 2K (tokens per second)")  # fmt: skip
        return target


class Budget(Section):
    """The limits that a candidate meets, all of them at once; it is inside one within tolerance x target. auto: params
    alone, derived."""

    params: Target | None = None
    """Parameters, tied embeddings counted once."""
    non_embedding_params: Target | None = Field(default=None, examples=[{"target": "70M", "tolerance": 0.05}])
    """Parameters without input embedding and output head."""
    memory_bytes: MemoryTarget | None = Field(
        default=None, examples=[{"target": "200M", "tolerance": 0.05, "batch_size": 1, "context_length": 2048}]
    )
    """Bytes of weights and key-value cache, at two bytes an element."""
    latency_ms: SpeedTarget | None = Field(
        default=None, examples=[{"target": 900, "tolerance": 0.1, "batch_size": 1, "context_length": 2048}]
    )
    """Milliseconds of one forward pass of body and head over batch_size x context_length tokens (prefill), measured
    once, where trials run, before anything else, on one-layer models of every width."""
    tokens_per_second: SpeedTarget | None = Field(
        default=None, examples=[{"target": "2K", "tolerance": 0.1, "batch_size": 1, "context_length": 2048}]
    )
    """Tokens per second of such a pass: its tokens divided by its time."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        return {"params": {}} if values == "auto" else values

    @model_validator(mode="after")
    def _something_is_asked(self) -> "Budget":
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError("space.budget: empty; valid: params: {target: 90M, tolerance: 0.05}")
        return self


DERIVED = ("low", "high", "step")  # the parts of an axis that may be auto


class Axis(Section):
    """The values of one axis: choices, or a range of low, high and either step or divisor. auto in the place of the
    mapping is low, high and step."""

    low: Literal["auto"] | Size | None = None
    """Least value of a range. auto: derived from the teacher."""
    high: Literal["auto"] | Size | None = None
    """Greatest value of a range. auto: derived from the teacher."""
    step: Literal["auto"] | Size | None = None
    """Distance of the values: low, low + step, ... up to high. auto: derived from the teacher."""
    divisor: Size | None = None
    """Instead of a step: the values are its multiples from low to high."""
    choices: Annotated[
        tuple[Size, ...], BeforeValidator(as_list), BeforeValidator(same_in_every_layer)
    ] | None = None  # fmt: skip
    """Instead of a range: the values themselves."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_given_goes_before_auto(cls, values: Any) -> Any:
        """Read `auto`; drop what choices or a divisor, as a flag adds them, leave nothing to derive of."""
        if values == "auto":
            return dict.fromkeys(DERIVED, "auto")
        if not isinstance(values, dict):
            return values
        over = DERIVED if values.get("choices") is not None else ("step",) if values.get("divisor") is not None else ()
        return {name: value for name, value in values.items() if not (name in over and value == "auto")}

    @property
    def open(self) -> bool:
        """Whether any part of it is left to the teacher."""
        return "auto" in (self.low, self.high, self.step)

    @model_validator(mode="after")
    def _range_or_choices(self) -> "Axis":
        ranged = (self.low, self.high, self.step, self.divisor)
        if self.choices is not None:
            if any(part is not None for part in ranged) or not self.choices:
                raise ValueError("takes either choices or a range; valid: choices: [6, 9], or low, high and step")
        elif self.low is None or self.high is None or (self.step is None) == (self.divisor is None):
            raise ValueError("a range is low, high and one of step and divisor; valid: "
                             "{low: 384, high: 576, step: 64}, or {low: 400, high: 576, divisor: 64}")  # fmt: skip
        elif isinstance(self.low, str) or isinstance(self.high, str):
            return self
        elif self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; valid: low at most {self.high}")
        elif self.step == "auto":
            return self
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
        assert isinstance(self.low, int) and isinstance(self.high, int)
        if self.divisor:
            first = math.ceil(self.low / self.divisor) * self.divisor
            return tuple(range(first, self.high + 1, self.divisor))
        assert isinstance(self.step, int)
        return tuple(range(self.low, self.high + 1, self.step))


class DropBlock(Section):
    """The contiguous block of layers that a candidate drops; where it starts is free."""

    lengths: Annotated[
        Annotated[Literal["auto"], Tag("auto")] | Annotated[tuple[Layers, ...], Tag("list")],
        LIST_OR_AUTO, BeforeValidator(auto_or_list), Field(min_length=1),
    ] = (0,)  # fmt: skip
    """How many layers, as [0, 2, 4, 8]; 0: none. auto: derived from the teacher."""
    seeds: Literal["none", "sweep", "bi", "one_by_one", "laco"] = "none"
    """What the search proposes first, for every length. sweep: the best block that the depth stage found. bi: the block
    of least BI. one_by_one: the layers of least BI each, which need not be neighbours (ShortGPT, arXiv:2403.03853).
    laco: all layers but those that LaCo merges the others into."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        return {"lengths": "auto"} if values == "auto" else values

    @property
    def numbers(self) -> tuple[int, ...]:
        """The lengths of a configuration that leaves nothing to the teacher."""
        assert self.lengths != "auto"
        return self.lengths


class Axes(Section):
    """The axes of the search. One left out (null) keeps the teacher's value, or follows the axis that decides it; where
    a family's heads make up hidden_size, either gives the other. auto: hidden_size, intermediate_size,
    num_attention_heads and drop_block, each derived. auto in the place of one axis: its low, high and step."""

    hidden_size: Axis | None = None
    """Width of the hidden states."""
    intermediate_size: Axis | None = None
    """Width of the MLP."""
    num_attention_heads: Axis | None = None
    """Attention heads. Alone it drops heads inside every group of grouped-query attention, and whole groups where a
    group is one head. auto: none (of SmolLM2's 9, 6 or 9 can be kept)."""
    num_key_value_heads: Axis | None = Field(
        default=None, examples=[{**dict.fromkeys((*DERIVED, "divisor")), "choices": [2, 3]}]
    )
    """Key-value heads. Alone it drops whole groups."""
    drop_block: DropBlock | None = None

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        derived = ("hidden_size", "intermediate_size", "num_attention_heads", "drop_block")
        return dict.fromkeys(derived, "auto") if values == "auto" else values


class Anchor(Section):
    """An architecture that is always tried. What is left out keeps the teacher's value."""

    hidden_size: Size | None = None
    """Width of the hidden states."""
    intermediate_size: Size | None = None
    """Width of the MLP."""
    num_attention_heads: Size | None = None
    """Attention heads."""
    num_key_value_heads: Size | None = None
    """Key-value heads."""
    drop_block: tuple[Layers, Layers] | None = None
    """First layer of the block that is dropped, and how many layers it has."""


class SpaceConfig(Section):
    """What is searched: the legal architectures inside the budget, and those that are tried in any case. What is auto
    is derived from the teacher, printed, and in numbers in the run's config.yaml (docs/concepts/search-space.md)."""

    budget: Budget = Budget.model_validate("auto")
    axes: Axes = Axes.model_validate("auto")
    anchors: tuple[Anchor, ...] = Field(
        default=(),
        examples=[[{"hidden_size": 448, "intermediate_size": 1184, "num_attention_heads": 9, "num_key_value_heads": 3,
                    "drop_block": [20, 2]}]],
    )  # fmt: skip
    """Architectures that are always tried, first, in budget or not. What one leaves out keeps the teacher's value;
    drop_block is [start, length]."""
    deployable: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Engines, of vllm and llama.cpp: only architectures that all of them take are searched (docs/deploying.md). Empty:
    any."""

    @property
    def open(self) -> bool:
        """Whether any part of it is left to the teacher."""
        bounds = (getattr(self.budget, name) for name in Budget.model_fields)
        axes = (getattr(self.axes, name) for name in Axes.model_fields if name != "drop_block")
        return (
            any(isinstance(bound.target, str) for bound in bounds if bound is not None)
            or any(axis.open for axis in axes if axis is not None)
            or (self.axes.drop_block is not None and self.axes.drop_block.lengths == "auto")
        )
