"""Derive from the teacher what a space leaves to it: axes that prune any decoder, and a budget that they reach.

Heads and key-value groups are kept (moving a third of their parameters to the MLP costs SmolLM2 0.283 nats,
docs/concepts/search-space.md); hidden_size, intermediate_size and the depth shrink, in sizes that hardware likes. How
far they go follows from the budget: as the first of `REACHES` that leaves a choice.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from transformers import PretrainedConfig

from minitron_search.architecture_search.space import COUNTED, SearchSpace
from minitron_search.config.space import Axes, Axis, Budget, DropBlock, SpaceConfig, Target
from minitron_search.models.architecture import memory_bytes, parameter_count
from minitron_search.models.families import family_of, is_expressible, sizes, weights, whole

SHARE = Fraction(2, 3)  # of the teacher: what a budget that nobody gave asks for


class Reach(NamedTuple):
    """How far axes go: the least shares of hidden_size and intermediate_size, the largest of layers to drop."""

    hidden: Fraction
    mlp: Fraction
    depth: Fraction


# The first is what the embedded teacher's own axes are; the others are for budgets that it does not reach.
REACHES = (
    Reach(SHARE, Fraction(1, 2), Fraction(4, 15)),
    Reach(Fraction(1, 2), Fraction(1, 3), Fraction(1, 3)),
    Reach(Fraction(1, 3), Fraction(1, 4), Fraction(1, 2)),
    Reach(Fraction(1, 8), Fraction(1, 8), Fraction(3, 4)),
)
# Of families whose heads make up hidden_size: heads that are kept keep it too, as long as the rest reaches the budget.
HEADS_KEPT = Reach(Fraction(1), Fraction(1, 2), Fraction(1, 3))
# An axis has about so many steps between its whole size and nothing, each a power of two where the size allows it: with
# them the rule gives SmolLM2-135M's own steps of 64 and 128.
HIDDEN_STEPS, MLP_STEPS = 9, 12
LARGEST_STEP = 512
# A choice: twice as many architectures as a search tries unless told otherwise, of several shapes.
ENOUGH_POINTS, ENOUGH_SHAPES = 24, 6
ALL = 0.999  # of a count, as a tolerance: every shape that is not a thousandth of its teacher


def derived(
    space: SpaceConfig, teacher: PretrainedConfig, pruned: PretrainedConfig, own: SpaceConfig | None = None
) -> SpaceConfig:  # fmt: skip
    """Return the space with everything that was `auto`, or a share of the teacher's, in numbers.

    pruned: what candidates are cut from, which a rotation may have given a head of its own. own: where what is auto
    comes from instead of the rules. Raises ValueError where budgets cannot be met together, and as `SearchSpace` does
    for axes that were given.
    """
    counts = counts_of(teacher, space.budget)
    budget = in_numbers(space.budget, counts, own.budget if own else None)
    if own is not None:
        return space.model_copy(update={"budget": budget, "axes": _filled(space.axes, own.axes, pruned)})
    automatic = [name for name in COUNTED if (bound := getattr(space.budget, name)) and bound.target == "auto"]
    if not automatic and not any(map(_is_open, _given(space.axes).values())):
        return space.model_copy(update={"budget": budget})
    best, most = None, (-1, -1)
    for axes in _candidates(space.axes, pruned):
        reached = _Reached(axes, budget, pruned, counts)
        if reached.points() >= ENOUGH_POINTS and reached.shapes() >= ENOUGH_SHAPES:
            return space.model_copy(update={"budget": budget, "axes": axes})
        if best is None or not most[0] or (reached.points(), reached.shapes()) > most:
            best, most = reached, (reached.points(), reached.shapes())
    assert best is not None
    if not best.points() and automatic:
        budget = best.nearest(automatic)
    return space.model_copy(update={"budget": budget, "axes": best.axes})


def in_numbers(budget: Budget, counts: Mapping[str, int], own: Budget | None = None) -> Budget:
    """Return the budget with shares of the teacher's `counts`, and what is auto, in numbers. `own`: what is auto."""
    update = {}
    for name, share in shares(budget).items():
        bound, known = getattr(budget, name), own and getattr(own, name)
        if bound.target == "auto" and known:
            number = known.number
        else:
            exact = share * counts[name]
            number = two_digits(exact) if bound.target == "auto" else float(round(exact))
        update[name] = bound.model_copy(update={"target": number})
    return budget.model_copy(update=update)


def shares(budget: Budget) -> dict[str, Fraction]:
    """Return, for every budget that is not a number, the share of the teacher's count that it is."""
    bounds = {name: getattr(budget, name) for name in COUNTED}
    targets = {name: bound.target for name, bound in bounds.items() if bound and isinstance(bound.target, str)}
    return {name: SHARE if text == "auto" else Fraction(text.rstrip("%")) / 100 for name, text in targets.items()}


def counts_of(teacher: PretrainedConfig, budget: Budget) -> dict[str, int]:
    """Return what the budgets bound, of the teacher itself."""
    listed, dims, memory = weights(teacher), sizes(teacher), budget.memory_bytes
    batch_size, context_length = (memory.batch_size, memory.context_length) if memory else (1, 1)
    return {
        "params": parameter_count(listed, dims),
        "non_embedding_params": parameter_count(listed, dims, embeddings=False),
        "memory_bytes": memory_bytes(listed, dims, batch_size, context_length),
    }


def two_digits(number: Fraction | int) -> float:
    """Return a number rounded to two significant digits."""
    return float(f"{float(number):.1e}")


class _Reached:
    """What axes reach: every shape on them, and which of those are inside the budget."""

    def __init__(self, axes: Axes, budget: Budget, pruned: PretrainedConfig, counts: Mapping[str, int]):
        self.axes, self.budget, self.depth = axes, budget, pruned.num_hidden_layers
        bounds = {name: getattr(budget, name) for name in COUNTED}
        asked: dict[str, Target] = {name: bound for name, bound in bounds.items() if bound is not None}
        everything: dict[str, Any] = {
            name: bound.model_copy(update={"target": float(counts[name]), "tolerance": ALL})
            for name, bound in (asked or {"params": Target()}).items()
        }
        space = SearchSpace(SpaceConfig(budget=Budget(**everything), axes=axes), pruned)
        self.counts, self.lengths = counts, space.shapes[:, 4]
        self.counted = {name: np.asarray(values) for name, values in vars(space.counted()).items() if name in asked}
        self.inside = np.ones(len(space.shapes), dtype=bool)
        for name, bound in asked.items():
            self.inside &= np.abs(self.counted[name] - bound.number) <= bound.tolerance * bound.number

    def shapes(self) -> int:
        return int(self.inside.sum())

    def points(self) -> int:
        """Return the number of architectures: every shape with every start of its block."""
        starts = np.where(self.lengths > 0, self.depth - self.lengths + 1, 1)
        return int(starts[self.inside].sum())

    def nearest(self, automatic: list[str]) -> Budget:
        """Return the budget with the one number that nobody gave set to what is reached nearest to it."""
        if len(self.counted) > 1:
            told = " and ".join(f"{name} {getattr(self.budget, name).number:,.0f}" for name in self.counted)
            given = next((name for name in self.counted if name not in automatic), "params")
            raise ValueError(f"space.budget: nothing meets {told} together, of which {' and '.join(automatic)} is "
                             f"derived; valid: --space.budget '{{{given}: {{target: ...}}}}', which leaves the other "
                             "out")  # fmt: skip
        (name,) = automatic
        bound, values = getattr(self.budget, name), self.counted[name]
        smaller = values[values < self.counts[name]]
        if not len(smaller):
            return self.budget  # the teacher alone: its own refusal says what is reachable
        value = int(smaller[np.abs(smaller - bound.number).argmin()])
        rounded = two_digits(value)
        number = rounded if abs(value - rounded) <= bound.tolerance * rounded else float(value)
        return self.budget.model_copy(update={name: bound.model_copy(update={"target": number})})


def _candidates(asked: Axes, pruned: PretrainedConfig) -> Iterator[Axes]:
    """Yield the axes that are tried, from those that change least."""
    given = _given(asked)
    if not any(map(_is_open, given.values())):
        yield asked
        return
    closed = {name for name, axis in given.items() if not _is_open(axis)}
    made_of_heads = family_of(pruned).head_dim == "derived"
    kept = made_of_heads and asked.hidden_size == Axis.model_validate("auto")
    if kept:
        yield _filled(asked, _axes(pruned, HEADS_KEPT), pruned)
    if not (kept and {"num_attention_heads", "num_key_value_heads"} & closed):  # which hidden_size follows
        for reach in REACHES:
            yield _filled(asked, _axes(pruned, reach), pruned)


def _given(axes: Axes) -> dict[str, Axis | DropBlock]:
    return {name: axis for name in Axes.model_fields if (axis := getattr(axes, name)) is not None}


def _is_open(axis: Axis | DropBlock) -> bool:
    return axis.lengths == "auto" if isinstance(axis, DropBlock) else axis.open


def _axes(pruned: PretrainedConfig, reach: Reach) -> Axes:
    """Return all axes that the rules derive: those of heads are left out, which keeps them."""
    teacher, depth = whole(pruned), pruned.num_hidden_layers
    most = float(reach.depth * depth)
    lengths = {0, *(round(most * share) for share in (0.25, 0.5, 1.0))}
    hidden = None
    if reach.hidden < 1:
        hidden = _sizes(teacher.hidden_size, reach.hidden, _unit(pruned), HIDDEN_STEPS)
    return Axes(
        hidden_size=hidden,
        intermediate_size=_sizes(teacher.intermediate_size, reach.mlp, 1, MLP_STEPS),
        drop_block=DropBlock(lengths=tuple(sorted(length for length in lengths if length < depth))),
    )


def _unit(pruned: PretrainedConfig) -> int:
    """Return what every legal hidden_size is a multiple of, as long as heads and groups are kept, or follow it."""
    teacher = whole(pruned)
    if family_of(pruned).head_dim == "derived":
        groups = teacher.num_key_value_heads if teacher.num_key_value_heads < teacher.num_attention_heads else 1
        return sizes(pruned)["head_dim"] * groups
    smaller = replace(teacher, hidden_size=teacher.hidden_size - 1) if teacher.hidden_size > 1 else teacher
    return 1 if is_expressible(pruned, smaller) else teacher.num_attention_heads


def _sizes(size: int, least: Fraction, unit: int, steps: int) -> Axis | None:
    """Return the sizes of an axis from `least` of a size up to it; None where there is no other than the size itself.

    They are multiples of a power of two and of `unit`: the largest of at most size / steps, or one down to a quarter of
    it that divides the size.
    """
    powers = [2**power for power in range(LARGEST_STEP.bit_length())]
    fitting = sorted({step for step in (math.lcm(unit, power) for power in powers) if step * steps <= size}) or [unit]
    step = next((step for step in reversed(fitting) if size % step == 0 and 4 * step >= fitting[-1]), fitting[-1])
    low = math.ceil(least * size / step) * step
    if low >= size:
        low = (size - 1) // step * step
    if low < 1:
        return None
    if (size - low) % step == 0:
        return Axis(low=low, high=size, step=step)
    return Axis(choices=(*range(low, size, step), size))


def _filled(asked: Axes, known: Axes, pruned: PretrainedConfig) -> Axes:
    """Return the axes with what is auto taken from those that are known."""
    teacher = whole(pruned)
    update: dict[str, Any] = {}
    for name in Axes.model_fields:
        axis, other = getattr(asked, name), getattr(known, name)
        if isinstance(axis, DropBlock):
            lengths = other.lengths if other else (0,)
            update[name] = axis.model_copy(update={"lengths": lengths}) if axis.lengths == "auto" else axis
        elif axis is not None and axis.open:
            update[name] = _filled_axis(name, axis, other, getattr(teacher, name))
    return asked.model_copy(update=update)


def _filled_axis(name: str, asked: Axis, known: Axis | None, size: int) -> Axis | None:
    if (asked.low, asked.high, asked.step) == ("auto", "auto", "auto"):
        return known
    values = known.values() if known else (size,)
    steps = np.diff(values)
    parts: dict[str, Any] = {
        "low": values[0] if asked.low == "auto" else asked.low,
        "high": values[-1] if asked.high == "auto" else asked.high,
        "divisor": asked.divisor,
        "step": int(steps.min()) if asked.step == "auto" and len(steps) else asked.step,
    }
    if parts["step"] == "auto":
        parts["step"] = 1
    try:
        return Axis(**parts)
    except ValidationError as error:
        raise ValueError(f"space.axes.{name}: {error.errors()[0]['ctx']['error']}") from None
