"""What a forward pass takes, for every architecture of a space, from models of one layer measured on the hardware.

    time(architecture) = ends(hidden_size) + layers x (mlp(hidden_size, intermediate_size) + heads(hidden_size, heads))

The latency table of hardware-aware search (ProxylessNAS, 1812.00332, section 3.3; Puzzle, 2411.19146, section 3):
decoder layers follow each other, so their times add up. Whole models measured beside the table say how well.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from minitron_search.config.types import Precision
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import decoder_layers, family_of, final_hidden, is_expressible, student_config
from minitron_search.models.output_head import output_head

# Sizes measured of an axis that has more; those between are interpolated. Products are linear in intermediate_size.
HIDDEN_SIZES, INTERMEDIATE_SIZES = 12, 5
ROUNDS, PASSES = 3, 2  # rounds over all models, so that a slow minute touches each of them; passes of each in a round
HEAD_ROWS = 512  # positions whose logits exist at once
SMALL_VOCAB = 64  # of models whose layers alone are timed

Widths = tuple[int, int, int, int]  # hidden_size, intermediate_size, num_attention_heads, num_key_value_heads


@dataclass(frozen=True)
class Pass:
    """One forward pass of body and head over batch_size x context_length tokens, none of them cached (prefill)."""

    batch_size: int
    context_length: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context_length


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of the parts of one pass.

    ends: everything but the layers (embedding, final norm, head), by hidden_size. mlp: a whole layer with the widest
    heads, by hidden_size and intermediate_size. heads: what other heads add to it (negative: less), by hidden_size,
    num_attention_heads and num_key_value_heads.
    """

    measured: Pass
    ends: Mapping[int, float]
    mlp: Mapping[tuple[int, int], float]
    heads: Mapping[tuple[int, int, int], float]

    def milliseconds(self, shapes: np.ndarray, layers: np.ndarray) -> np.ndarray:
        """Return the time of every shape, (n,) float64; linear between the sizes that were measured.

        shapes: (n, 4 or more), columns hidden_size, intermediate_size, num_attention_heads, num_key_value_heads;
        layers: (n,).
        """
        hidden, mlp = shapes[:, 0], shapes[:, 1]
        knots = np.array(sorted(self.ends))
        at = np.interp(hidden, knots, np.arange(len(knots)))
        below = np.floor(at).astype(int)
        above, share = np.minimum(below + 1, len(knots) - 1), at - below
        layer = np.stack([
            _interpolated(mlp, {key[1]: value for key, value in self.mlp.items() if key[0] == knot}) for knot in knots
        ])  # fmt: skip
        rows = np.arange(len(shapes))
        milliseconds = layer[below, rows] * (1 - share) + layer[above, rows] * share
        for heads in np.unique(shapes[:, 2:4], axis=0):
            of_these = (shapes[:, 2:4] == heads).all(1)
            by_hidden = {key[0]: value for key, value in self.heads.items() if key[1:] == tuple(heads)}
            milliseconds[of_these] += _interpolated(hidden[of_these], by_hidden)
        return layers * milliseconds + _interpolated(hidden, self.ends)

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.measured),
            "ends": [{"hidden_size": size, "milliseconds": ms} for size, ms in self.ends.items()],
            "mlp": [{"hidden_size": size, "intermediate_size": mlp, "milliseconds": ms}
                    for (size, mlp), ms in self.mlp.items()],
            "heads": [{"hidden_size": size, "num_attention_heads": heads, "num_key_value_heads": groups,
                       "milliseconds": ms} for (size, heads, groups), ms in self.heads.items()],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatencyTable":
        rows = {part: [tuple(row.values()) for row in values[part]] for part in ("ends", "mlp", "heads")}
        return cls(
            Pass(values["batch_size"], values["context_length"]),
            ends=dict(rows["ends"]),
            mlp={(size, mlp): ms for size, mlp, ms in rows["mlp"]},
            heads={(size, heads, groups): ms for size, heads, groups, ms in rows["heads"]},
        )


def models_of(config: PretrainedConfig, shapes: np.ndarray) -> list[Widths]:
    """Return the models to measure: for each hidden_size, first the widest of all, then every intermediate_size with
    its heads, and all heads with its intermediate_size."""
    hidden, heads = shapes[:, 0], shapes[:, 2:4]
    knots = set(_spread(np.unique(hidden), HIDDEN_SIZES).tolist())
    for pair in np.unique(heads, axis=0):  # each is measured with some hidden_size
        having = hidden[(heads == pair).all(1)].tolist()
        if knots.isdisjoint(having):
            knots.add(min(having))
    ends = [0, *sorted(knots), max(knots) + 1]
    models = []
    for below, size, above in zip(ends, ends[1:], ends[2:], strict=False):
        near = shapes[(hidden > below) & (hidden < above)]  # those between two sizes are interpolated from both
        mlps = _spread(np.unique(near[:, 1]), INTERMEDIATE_SIZES).tolist()
        expressible = [
            (query, groups) for query, groups in np.unique(near[:, 2:4], axis=0).tolist()
            if is_expressible(config, Architecture(size, mlps[-1], query, groups, (0,)))
        ]  # fmt: skip
        models += [(size, mlp, *expressible[-1]) for mlp in reversed(mlps)]
        models += [(size, mlps[-1], *pair) for pair in expressible[:-1]]
    return models


def measure(
    config: PretrainedConfig,
    shapes: np.ndarray,
    wholes: Sequence[Architecture],
    measured: Pass,
    precision: Precision,
    device: str,
    threads: int,
) -> tuple[LatencyTable, list[float]]:
    """Measure the table of pass `asked` for the architectures `shapes` (n, 4 or more) inside the teacher `config`, and
    the milliseconds of the whole models `wholes`, with which its sums are to be compared.

    Weights are random, in `precision`; `threads` count on a CPU. Every time is the median over rounds.
    """
    models, kinds = models_of(config, shapes), _kinds(config)
    layers, counts = tuple(first for first, _ in kinds), [count for _, count in kinds]
    widest: dict[int, Widths] = {}
    for widths in models:
        widest.setdefault(widths[0], widths)
    layer: dict[Widths, list[float]] = {widths: [] for widths in models}
    ends: dict[int, list[float]] = {size: [] for size in widest}
    whole: list[list[float]] = [[] for _ in wholes]
    with threads_of(threads):
        for _ in range(ROUNDS):
            for widths in models:
                model = build(config, Architecture(*widths, layers), precision, device, SMALL_VOCAB)
                for _, by_layer in _passes(model, measured, head=False):
                    layer[widths].append(float(np.average(by_layer, weights=counts)))
            for size, widths in widest.items():
                model = build(config, Architecture(*widths, layers), precision, device)
                ends[size] += [total - sum(by_layer) for total, by_layer in _passes(model, measured)]
            for architecture, times in zip(wholes, whole, strict=True):
                times += [total for total, _ in _passes(build(config, architecture, precision, device), measured)]
    table = table_of(
        measured,
        {size: median(times) for size, times in ends.items()},
        {widths: median(times) for widths, times in layer.items()},
    )
    return table, [median(times) for times in whole]


def table_of(measured: Pass, ends: Mapping[int, float], layer: Mapping[Widths, float]) -> LatencyTable:
    """Return the table made of the milliseconds of one layer of every model of `models_of`, in its order."""
    mlp, heads, widest = {}, {}, dict[int, Widths]()
    for widths, milliseconds in layer.items():
        size, intermediate_size, query, groups = widths
        first = widest.setdefault(size, widths)
        if widths[2:] == first[2:]:
            mlp[size, intermediate_size] = milliseconds
        if intermediate_size == first[1]:
            heads[size, query, groups] = milliseconds - layer[first]
    return LatencyTable(measured, ends, mlp, heads)


def build(
    config: PretrainedConfig, architecture: Architecture, precision: Precision, device: str, vocab: int | None = None
) -> PreTrainedModel:
    """Return the stock model of `architecture` with random weights; with `vocab`, of another vocabulary."""
    student = student_config(config, architecture)
    if vocab is not None:
        student.vocab_size, student.pad_token_id = vocab, None
    with torch.random.fork_rng(), torch.device(device):
        return AutoModelForCausalLM.from_config(
            student, dtype=getattr(torch, precision), trust_remote_code=False
        ).eval()


@contextmanager
def threads_of(threads: int) -> Iterator[None]:
    """Compute with so many threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _passes(model: PreTrainedModel, measured: Pass, head: bool = True) -> list[tuple[float, list[float]]]:
    """Measure the milliseconds of each of `PASSES` passes, and of its layers one by one; one more pass before them
    warms up."""
    ids = torch.randint(model.config.vocab_size, (measured.batch_size, measured.context_length), device=model.device)
    marks = _Marks(model.device)
    hooks = [
        hook
        for layer in decoder_layers(model)
        for hook in (layer.register_forward_pre_hook(marks), layer.register_forward_hook(marks))
    ]
    passes = []
    with torch.inference_mode():
        for _ in range(1 + PASSES):
            marks()
            _forward(model, ids, head)
            marks()
            times = marks.milliseconds()
            passes.append((times[-1], [end - start for start, end in zip(times[1:-1:2], times[2:-1:2], strict=True)]))
    for hook in hooks:
        hook.remove()
    return passes[1:]


def _forward(model: PreTrainedModel, ids: Tensor, head: bool) -> None:
    hidden = final_hidden(model, ids)
    if head:
        for rows in hidden.flatten(0, 1).split(HEAD_ROWS):
            output_head(model).logits(rows)


class _Marks:
    """The moments of a pass on the device that computes it; a hook of the layers."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", list[Any]()

    def __call__(self, *_: Any) -> None:
        if self.on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self.marks.append(mark)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the time of every mark since the first, and forget them."""
        marks, self.marks = self.marks, []
        if not self.on_gpu:
            return [1e3 * (mark - marks[0]) for mark in marks]
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(mark) for mark in marks]


def _kinds(config: PretrainedConfig) -> list[tuple[int, int]]:
    """Return (its first layer, how many there are) of every kind of layer, such as one that attends through a window.
    Which of them a candidate drops does not count: its layers take the teacher's mean."""
    per_layer = [getattr(config, key, None) for key in family_of(config).per_layer]
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for layer in range(config.num_hidden_layers):
        kinds.setdefault(tuple(values and values[layer] for values in per_layer), []).append(layer)
    return [(layers[0], len(layers)) for layers in kinds.values()]


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the values, first and last among them."""
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).round().astype(int)]


def _interpolated(at: np.ndarray, known: Mapping[int, float]) -> np.ndarray:
    sizes = sorted(known)
    return np.interp(at, sizes, [known[size] for size in sizes])
