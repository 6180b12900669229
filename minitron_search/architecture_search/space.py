"""Enumerate the legal architectures that the axes and the budget allow.

The space is enumerated: every shape on the axes' grid that a stock configuration can say and that is inside
the budget, times every place its dropped block may start. A proposal is always a member of that list.
"""

import copy
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from minitron_search.architecture_search.deployable import deployable, why_not
from minitron_search.architecture_search.latency import LatencyTable, Pass
from minitron_search.config.space import Anchor, Axis, SpaceConfig
from minitron_search.models.architecture import Architecture, memory_bytes, parameter_count
from minitron_search.models.engines import heads_follow_hidden
from minitron_search.models.families import family_of, sizes, sizes_of, weights, whole, why_not_expressible

# The coordinates of a point of the space, in this order; the first five make the shape.
COORDINATES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "drop_block_length",
    "drop_block_start",
)
WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads")
COUNTED = ("params", "non_embedding_params", "memory_bytes")
SPEEDS = ("latency_ms", "tokens_per_second")  # budgets on what has to be measured
DRAWS = 64  # at random, before what is free is listed


@dataclass(frozen=True)
class Measures:
    """What a budget bounds: counts of one architecture, or arrays of them."""

    params: Any
    non_embedding_params: Any
    memory_bytes: Any


class SearchSpace:
    """The legal architectures of a space inside one teacher.

    points: (architectures, 6) int64, columns `COORDINATES`, in lexical order. in_budget: the same before
    `space.deployable`. grid_size: shapes and block starts on the grid before legality and budget. unmeasured: the
    budgets on speed, which hold nothing back until `within` is given what was measured.

    Raises ValueError where an axis exceeds the teacher, no head count is legal, no shape meets the budget, or the
    engines of `space.deployable` take none.
    """

    def __init__(self, space: SpaceConfig, config: PretrainedConfig):
        self.config, self.budget, self.engines = config, space.budget, space.deployable
        self.teacher = whole(config)
        self.weights = weights(config)
        depth = self.teacher.num_hidden_layers
        lengths = self._block_lengths(space)
        hidden_sizes, heads = self._widths(*(getattr(space.axes, name) for name in WIDTHS))
        intermediate_sizes = self._axis(space.axes.intermediate_size, "intermediate_size")
        starts = sum(depth - length + 1 if length else 1 for length in lengths)
        self.grid_size = starts * len(hidden_sizes) * len(intermediate_sizes) * len(heads)
        expressible = [
            (size, *pair) for size, pair in itertools.product(hidden_sizes, heads)
            if self._refusal(size, pair) is None
        ]  # fmt: skip
        if not expressible:
            raise ValueError("space.axes: no shape of the grid can be written as a stock configuration; "
                             f"{self._refusal(hidden_sizes[0], heads[0])}")  # fmt: skip
        self.unmeasured = tuple(name for name in SPEEDS if getattr(self.budget, name))
        for name in self.unmeasured:
            length, most = getattr(self.budget, name).context_length, getattr(config, "max_position_embeddings", None)
            if most and length > most:
                raise ValueError(f"space.budget.{name}.context_length: {length} is above the teacher's {most} "
                                 f"positions; valid: at most {most}")  # fmt: skip
        shapes = _grid(expressible, intermediate_sizes, lengths)
        measures = self._measures(shapes)
        self._keep(shapes, {name: np.asarray(getattr(measures, name)) for name in COUNTED})
        self.anchors = tuple(self._anchor(anchor) for anchor in space.anchors)

    def within(self, tables: Sequence[LatencyTable]) -> "SearchSpace":
        """Return the space of the architectures that also meet the budgets on speed, by a table of every pass they ask
        for.

        Raises ValueError, with the reachable range, where there is none.
        """
        restricted = copy.copy(self)
        restricted.unmeasured = ()
        speeds = {name: self.speed(name, tables) for name in self.unmeasured}
        restricted._keep(self.shapes, speeds)
        return restricted

    def speed(self, name: str, tables: Sequence[LatencyTable]) -> np.ndarray:
        """Return latency_ms or tokens_per_second of every row of `shapes`, as the budget asks for it: (n,) float64."""
        measured = self.passes()[name]
        (table,) = (table for table in tables if table.measured == measured)
        milliseconds = table.milliseconds(self.shapes, self.teacher.num_hidden_layers - self.shapes[:, 4])
        return milliseconds if name == "latency_ms" else 1e3 * measured.tokens / milliseconds

    def passes(self) -> dict[str, Pass]:
        """Return the pass that each budget on speed asks to measure."""
        bounds = {name: getattr(self.budget, name) for name in SPEEDS}
        return {name: Pass(bound.batch_size, bound.context_length) for name, bound in bounds.items() if bound}

    def described(self, trials: int) -> str:
        """Say how large the space is, which budgets are not measured yet, and whether `trials` are all of it."""
        size = f"{self.grid_size:,} architectures on the grid, {len(self):,} legal and in budget"
        if self.unmeasured:
            return f"{size}, {' and '.join(self.unmeasured)} not measured yet"
        if trials >= len(self):
            return f"{size}; the space is small: all {len(self):,} are tried"
        return size

    def __len__(self) -> int:
        return len(self.points)

    def architectures(self) -> Iterator[Architecture]:
        """Yield every legal architecture."""
        return (self.architecture(point) for point in self.points.tolist())

    def smallest_and_largest(self) -> tuple[Architecture, Architecture]:
        """Return the legal architectures of fewest and of most parameters."""
        params = np.asarray(self._measures(self.shapes).params)
        return tuple(  # type: ignore[return-value]
            self.architecture(self.shapes[index]) for index in (params.argmin(), params.argmax())
        )

    def typical(self) -> Architecture:
        """Return the legal architecture in the middle by parameters, which costs about what one of the space costs."""
        params = np.asarray(self._measures(self.points[:, :5]).params)
        return self.architecture(self.points[params.argsort(kind="stable")[len(params) // 2]].tolist())

    def varied(self) -> tuple[str, ...]:
        """Return the coordinates that vary. Key-value heads that the number of heads decides do not count as one; a
        block's start counts only among architectures that drop a block (`coordinates`)."""
        columns = {name: np.unique(self.points[:, axis]) for axis, name in enumerate(COORDINATES)}
        columns["drop_block_start"] = np.unique(self.points[self.points[:, 4] > 0, 5])
        if len(np.unique(self.points[:, 2:4], axis=0)) == len(columns["num_attention_heads"]):
            del columns["num_key_value_heads"]
        return tuple(name for name, seen in columns.items() if len(seen) > 1)

    def coordinates(self, architecture: Architecture) -> dict[str, int]:
        """Return those of `COORDINATES` that the architecture has: a block that is not there starts nowhere, and
        neither do dropped layers that are not one block."""
        block = architecture.dropped_block(self.teacher.num_hidden_layers)
        length = self.teacher.num_hidden_layers - architecture.num_hidden_layers
        return {
            "hidden_size": architecture.hidden_size,
            "intermediate_size": architecture.intermediate_size,
            "num_attention_heads": architecture.num_attention_heads,
            "num_key_value_heads": architecture.num_key_value_heads,
            "drop_block_length": length,
            **({"drop_block_start": block[0]} if block and length else {}),
        }

    def nearest(self, coordinates: Mapping[str, int], taken: Collection[str]) -> Architecture | None:
        """Return the legal architecture nearest to `coordinates` whose id is not in `taken`; None when all are taken.
        Coordinates that are left out do not count; a block's start counts only between two architectures that drop
        one."""
        distance = np.zeros(len(self.points))
        for name, value in coordinates.items():
            axis = COORDINATES.index(name)
            apart = ((self._columns[axis] - value) / self._span[axis]) ** 2
            if name == "drop_block_start":
                apart = apart * (self._columns[4] > 0) * (coordinates.get("drop_block_length") != 0)
            distance += apart
        looked_at, count = 0, 1
        while looked_at < len(self.points):  # the very nearest first, then more and more of them
            count = min(count, len(self.points))
            near = np.flatnonzero(distance <= np.partition(distance, count - 1)[count - 1])
            near = near[np.argsort(distance[near], kind="stable")]
            for row in near[looked_at:].tolist():
                if self._id(row) not in taken:
                    return self.architecture(self.points[row].tolist())
            looked_at, count = len(near), 32 * count
        return None

    def random(self, generator: np.random.Generator, taken: Collection[str]) -> Architecture | None:
        """Draw a legal architecture whose id is not in `taken`, uniformly among shapes, then among the starts of its
        block; None when all are taken.

        Drawn among points, few would keep every layer: no block has one place, a block of two some thirty.
        """
        shapes = generator.integers(len(self.shapes), size=DRAWS)
        for row in (self._first[shapes] + generator.integers(self._starts[shapes])).tolist():
            if self._id(row) not in taken:
                return self.architecture(self.points[row].tolist())
        free = [row for row in range(len(self.points)) if self._id(row) not in taken]
        return self.architecture(self.points[free[generator.integers(len(free))]].tolist()) if free else None

    def largest_without(self, cuts: Iterable[Collection[int]]) -> tuple[Architecture, ...]:
        """Return, for each cut (the teacher's layers to drop), the legal architecture of most parameters that drops as
        many layers, without those of the cut, where there is one."""
        params = np.asarray(self._measures(self.shapes).params)
        architectures = []
        for cut in sorted(map(sorted, cuts), key=len):
            legal = np.flatnonzero(self.shapes[:, 4] == len(cut))
            kept = tuple(layer for layer in range(self.teacher.num_hidden_layers) if layer not in cut)
            for row in legal[np.argsort(-params[legal], kind="stable")].tolist():
                shape = replace(self.architecture(self.shapes[row].tolist()), layers=kept)
                if why_not(self.config, shape, self.engines) is None:
                    architectures.append(shape)
                    break
        return tuple(architectures)

    def measures(self, architecture: Architecture) -> Measures:
        """Return what the budgets bound, for one architecture."""
        return self._measure(sizes_of(self.config, architecture))

    def counted(self) -> Measures:
        """Return what the budgets bound, of every row of `shapes`."""
        return self._measures(self.shapes)

    def _id(self, row: int) -> str:
        """Return the id of a point's architecture; kept, because making one takes longer than all else of a
        proposal."""
        if row not in self._ids:
            self._ids[row] = self.architecture(self.points[row].tolist()).id
        return self._ids[row]

    def architecture(self, point: Sequence[int]) -> Architecture:
        """Return the architecture of a row of `points`, or of `shapes`, whose block then starts at layer 0."""
        point = (*point, 0)[:6]
        hidden_size, intermediate_size, heads, key_value_heads, length, start = map(int, point)
        kept = tuple(layer for layer in range(self.teacher.num_hidden_layers) if not start <= layer < start + length)
        return Architecture(hidden_size, intermediate_size, heads, key_value_heads, kept)

    def _axis(self, axis: Axis | None, name: str) -> tuple[int, ...]:
        whole_size = getattr(self.teacher, name)
        values = axis.values() if axis else (whole_size,)
        if values[-1] > whole_size:
            raise ValueError(f"space.axes.{name}: {values[-1]} is above the teacher's {whole_size}; "
                             f"valid: at most {whole_size}")  # fmt: skip
        return values

    def _widths(
        self, hidden_size: Axis | None, heads: Axis | None, groups: Axis | None
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Return (hidden sizes, pairs of query and key-value heads).

        Where heads make up hidden_size, for the family or for an engine of `space.deployable`, the one that is left out
        follows the other.
        """
        hidden_sizes = self._axis(hidden_size, "hidden_size")
        if family_of(self.config).head_dim != "derived" and not heads_follow_hidden(self.config, self.engines):
            return hidden_sizes, self._heads(heads, groups)
        head_dim, full = sizes(self.config)["head_dim"], self.teacher
        per_group = full.num_attention_heads // full.num_key_value_heads
        step = head_dim if per_group == 1 else head_dim * full.num_key_value_heads  # a head of every group
        counts = tuple(size // head_dim for size in hidden_sizes
                       if size % step == 0 and size // head_dim <= full.num_attention_heads)  # fmt: skip
        if hidden_size and counts and not (heads or groups):
            heads = Axis(choices=counts)
        pairs = self._heads(heads, groups)
        following = {pair[0] * head_dim for pair in pairs if pair[0] * head_dim <= full.hidden_size}
        return hidden_sizes if hidden_size or not following else tuple(sorted(following)), pairs

    def _heads(self, heads: Axis | None, groups: Axis | None) -> tuple[tuple[int, int], ...]:
        """Return pairs of (query heads, key-value heads): every group that is kept keeps as many of its heads."""
        of_teacher = (self.teacher.num_attention_heads, self.teacher.num_key_value_heads)
        ratio = of_teacher[0] // of_teacher[1]
        head_counts = self._axis(heads, "num_attention_heads")
        group_counts = self._axis(groups, "num_key_value_heads")
        if heads is None:
            return tuple((ratio * count, count) for count in group_counts)
        if groups is None and ratio == 1:  # a head is a group
            return tuple((count, count) for count in head_counts)
        legal = tuple(
            pair for pair in itertools.product(head_counts, group_counts)
            if pair[0] % pair[1] == 0 and pair[0] <= ratio * pair[1]
        )  # fmt: skip
        if not legal:
            valid = sorted({count * per_group for count in group_counts for per_group in range(1, ratio + 1)})
            raise ValueError(f"space.axes.num_attention_heads: none of {list(head_counts)} is a multiple of "
                             f"{' or '.join(map(str, group_counts))} key-value heads with at most {ratio} to each, "
                             f"as the teacher has; valid: {valid}")  # fmt: skip
        return legal

    def _refusal(self, hidden_size: int, heads: tuple[int, int]) -> str | None:
        whole_depth = self.teacher.layers
        return why_not_expressible(
            self.config, Architecture(hidden_size, self.teacher.intermediate_size, *heads, whole_depth)
        )

    def _block_lengths(self, space: SpaceConfig) -> tuple[int, ...]:
        depth = self.teacher.num_hidden_layers
        lengths = tuple(sorted(set(space.axes.drop_block.numbers))) if space.axes.drop_block else (0,)
        if lengths[-1] >= depth:
            raise ValueError(f"space.axes.drop_block.lengths: {lengths[-1]} of the teacher's {depth} layers; "
                             f"valid: at most {depth - 1}")  # fmt: skip
        return lengths

    def _anchor(self, anchor: Anchor) -> Architecture:
        sizes_given = {name: getattr(anchor, name) for name in COORDINATES[:4]}
        axes = {name: Axis(choices=(value,)) if value else None for name, value in sizes_given.items()}
        intermediate_size = self._axis(axes["intermediate_size"], "intermediate_size")[0]
        hidden_sizes, pairs = self._widths(*(axes[name] for name in WIDTHS))
        hidden_size, heads = hidden_sizes[0], pairs[0]
        start, length = anchor.drop_block or (0, 0)
        if start + length > self.teacher.num_hidden_layers or length >= self.teacher.num_hidden_layers:
            raise ValueError(f"space.anchors: drop_block [{start}, {length}] leaves the teacher's "
                             f"{self.teacher.num_hidden_layers} layers; valid: start + length within them")  # fmt: skip
        refusal = self._refusal(hidden_size, heads)
        if refusal:
            raise ValueError(f"space.anchors: {refusal}")
        architecture = self.architecture((hidden_size, intermediate_size, *heads, length, start))
        if refusal := why_not(self.config, architecture, self.engines):
            raise ValueError(f"space.anchors: {architecture} with space.deployable {', '.join(self.engines)}: "
                             f"{refusal}; valid: an anchor that these engines take, or other engines")  # fmt: skip
        return architecture

    def _measures(self, shapes: np.ndarray) -> Measures:
        dims = sizes(self.config)
        return self._measure({
            **dims,
            "hidden": shapes[:, 0],
            "mlp": shapes[:, 1],
            "query": shapes[:, 2] * dims["head_dim"],
            "key_value": shapes[:, 3] * dims["head_dim"],
            "layers": dims["layers"] - shapes[:, 4],
        })  # fmt: skip

    def _measure(self, dims: Mapping[str, Any]) -> Measures:
        bound = self.budget.memory_bytes
        batch_size, context_length = (bound.batch_size, bound.context_length) if bound else (1, 2048)
        return Measures(
            params=parameter_count(self.weights, dims),
            non_embedding_params=parameter_count(self.weights, dims, embeddings=False),
            memory_bytes=memory_bytes(self.weights, dims, batch_size, context_length),
        )

    def _keep(self, shapes: np.ndarray, measured: Mapping[str, np.ndarray]) -> None:
        """Make the space of those shapes that meet the budgets `measured`; raises ValueError, with the reachable range,
        when none does."""
        inside = np.ones(len(shapes), dtype=bool)
        ranges = []
        for name, values in measured.items():
            bound = getattr(self.budget, name)
            if bound is not None:
                inside &= np.abs(values - bound.number) <= bound.tolerance * bound.number
                digits = 2 if name == "latency_ms" else 0
                ranges.append(f"space.budget.{name}: {bound.number:,.{digits}f} +- {bound.tolerance:.1%} asked, "
                              f"{values.min():,.{digits}f} to {values.max():,.{digits}f} reachable")  # fmt: skip
        if not inside.any():
            raise ValueError("no architecture on the axes' grid meets the budget; " + "; ".join(ranges)
                             + "; valid: a target in that range, a wider tolerance, or other axes")  # fmt: skip
        shapes = shapes[inside]
        self.in_budget = _with_starts(shapes, _start_counts(shapes, self.teacher.num_hidden_layers))
        self.points = deployable(self.config, self.in_budget, self.engines)
        self.shapes, self._starts = _shapes(self.points)
        self._first = np.cumsum(self._starts) - self._starts  # row of each shape's first point
        # nearness counts steps along each axis, so that a step of hidden_size weighs as one of heads
        self._span = np.maximum(self.points.max(0) - self.points.min(0), 1)
        self._columns = np.ascontiguousarray(self.points.T)
        self._ids: dict[int, str] = {}


def _grid(
    widths: Sequence[tuple[int, int, int]], intermediate_sizes: tuple[int, ...], lengths: tuple[int, ...]
) -> np.ndarray:
    """Return all shapes of the grid, (shapes, 5) int64, in lexical order. widths: (hidden_size, num_attention_heads,
    num_key_value_heads) each."""
    axes = np.array(widths), np.array(intermediate_sizes), np.array(lengths)
    which = np.meshgrid(*(np.arange(len(axis)) for axis in axes), indexing="ij")
    (hidden, *heads), mlp, length = (axis[index.ravel()].T for axis, index in zip(axes, which, strict=True))
    shapes = np.stack([hidden, mlp, *heads, length], axis=1).astype(np.int64)
    return shapes[np.lexsort(shapes.T[::-1])]


def _start_counts(shapes: np.ndarray, depth: int) -> np.ndarray:
    """Return at how many layers the block of each shape may start, (shapes,) int64; 1 where none is dropped."""
    return np.where(shapes[:, 4] > 0, depth - shapes[:, 4] + 1, 1)


def _with_starts(shapes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return every shape with every place where its block may start, (points, 6) int64; 0 where it drops none."""
    starts = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.column_stack([np.repeat(shapes, counts, axis=0), starts]).astype(np.int64)


def _shapes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shapes of `points`, (shapes, 5), and the number of points of each; both in the order of `points`."""
    first = np.flatnonzero(np.r_[True, (points[1:, :5] != points[:-1, :5]).any(1)])
    return points[first, :5], np.diff(np.r_[first, len(points)])


def counts(space: SearchSpace, architecture: Architecture) -> dict[str, int | None]:
    """Return the columns of the trials table that follow from an architecture alone: counts and axes. Dropped layers
    that are not one block have no start and no length."""
    measures = space.measures(architecture)
    start, length = architecture.dropped_block(space.teacher.num_hidden_layers) or (None, None)
    return {
        "params": measures.params,
        "non_embedding_params": measures.non_embedding_params,
        "memory_bytes": measures.memory_bytes,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "num_hidden_layers": architecture.num_hidden_layers,
        "drop_block_start": start,
        "drop_block_length": length,
    }
