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
    """A value to reach, and how far from it a candidate may be, as a share of it.

    target: a number, a share of what the teacher has, as in `67%`, or auto: two thirds of that in two digits.
    """

    target: Annotated[float | str, BeforeValidator(as_amount), Field(validate_default=True)] = "auto"
    tolerance: Share = 0.05

    @property
    def number(self) -> float:
        """The target of a configuration that leaves nothing to the teacher."""
        assert not isinstance(self.target, str), self.target
        return self.target


class MemoryTarget(Target):
    """Weights plus key-value cache, bytes, at two bytes an element."""

    batch_size: BatchSize = 1
    context_length: Context = 2048


class SpeedTarget(Target):
    """A budget on one forward pass of body and head over batch_size x context_length tokens (prefill).

    It is measured where trials run, on one-layer models of every width. Its target is a number.
    """

    batch_size: BatchSize = 1
    context_length: Context = 2048

    @field_validator("target")
    @classmethod
    def _the_teachers_speed_is_not_known(cls, target: float | str) -> float | str:
        if isinstance(target, str):
            raise ValueError("what the teacher reaches is not known before it is measured; valid: a number, as 900 "
                             "(milliseconds) or 2K (tokens per second)")  # fmt: skip
        return target


class Budget(Section):
    """The limits that a candidate meets, all of them at once.

    params, non_embedding_params: counts. memory_bytes: bytes. latency_ms: wall milliseconds of a forward pass.
    tokens_per_second: the tokens of that pass divided by its time. `auto` is `params` alone, derived.
    """

    params: Target | None = None
    non_embedding_params: Target | None = None
    memory_bytes: MemoryTarget | None = None
    latency_ms: SpeedTarget | None = None
    tokens_per_second: SpeedTarget | None = None

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
    """The values of one axis: `choices`, or a range.

    A range has `low`, `high` and either `step` (low, low + step, ... up to high) or `divisor` (its multiples from low
    to high). What is auto of low, high and step is derived; `auto` in the place of the mapping is all three.
    """

    low: Literal["auto"] | Size | None = None
    high: Literal["auto"] | Size | None = None
    step: Literal["auto"] | Size | None = None
    divisor: Size | None = None
    choices: Annotated[
        tuple[Size, ...], BeforeValidator(as_list), BeforeValidator(same_in_every_layer)
    ] | None = None  # fmt: skip

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
    """The contiguous block of layers that a candidate drops: its length; the search chooses where it starts.

    lengths: auto is derived.
    seeds: what the search proposes first for every length. sweep: the best block that the depth sweep found. bi: the
        block of least BI. one_by_one: the layers of least BI each, which need not be neighbours (ShortGPT,
        arXiv:2403.03853). laco: all layers but those that LaCo merges the others into (`pruning/laco.py`).
    """

    lengths: Annotated[
        Annotated[Literal["auto"], Tag("auto")] | Annotated[tuple[Layers, ...], Tag("list")],
        LIST_OR_AUTO, BeforeValidator(auto_or_list), Field(min_length=1),
    ] = (0,)  # fmt: skip
    seeds: Literal["none", "sweep", "bi", "one_by_one", "laco"] = "none"

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
    """The axes of the search. An axis that is left out keeps the teacher's value, or follows the axis that decides it.

    num_attention_heads alone drops heads inside every group (whole groups where a group is one head);
    num_key_value_heads alone drops whole groups. Where a family's heads make up hidden_size, either gives the other.
    `auto` is what a configuration that names no axis has: hidden_size, intermediate_size, num_attention_heads and
    drop_block, each derived.
    """

    hidden_size: Axis | None = None
    intermediate_size: Axis | None = None
    num_attention_heads: Axis | None = None
    num_key_value_heads: Axis | None = None
    drop_block: DropBlock | None = None

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        derived = ("hidden_size", "intermediate_size", "num_attention_heads", "drop_block")
        return dict.fromkeys(derived, "auto") if values == "auto" else values


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

    budget: Budget = Budget.model_validate("auto")
    axes: Axes = Axes.model_validate("auto")
    anchors: tuple[Anchor, ...] = ()
    deployable: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()

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
