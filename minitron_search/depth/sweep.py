"""The contiguous-block sweep: what removing each block of layers does (2408.11796, section 2.2, Figures 8 and 9).

Exact and shared: a chunk of windows goes up the teacher once, and the model without layers i..i+b-1 takes the stream
that it needs before layer i and enters layer i+b. Every layer is visited once a chunk, by all cuts that
keep it, so one layer at a time has to be in memory. Cuts are computed one after another at each layer and never
stacked: a layer is as fast on a chunk of 1,024 tokens as on more (measured on a CPU: 22 us a token at 256, 1,024
and 8,192 tokens), and a cut's numbers do not depend on which others are computed beside it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minitron_search.data.winogrande_packing import PackedOptions
from minitron_search.evaluation.statistics import mean_and_error
from minitron_search.evaluation.winogrande import model_inputs, option_log_likelihoods
from minitron_search.importance import taylor
from minitron_search.losses.output_loss import token_losses
from minitron_search.models.layerwise import Inputs, LayerwiseModel

Cut = tuple[int, ...]  # the teacher's layers that are removed, in order; () is the teacher itself
Values = dict[str, dict[Cut, np.ndarray]]  # metric -> cut -> a value per window, or per Winogrande example

TEACHER: Cut = ()
OF_STREAM = ("bi", "angular")  # of the teacher's residual stream before and after a block
OF_BLOCKS = (*OF_STREAM, "taylor")  # metrics of a block inside the whole teacher: nothing is removed to take them
CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}  # through a layer at once; a GPU starves on fewer
STREAM_BYTES = 512 * 2**20  # residual streams of one chunk that are alive at once, over all cuts


def in_layers(lengths: Iterable[float] | Literal["auto"], depth: int) -> list[int]:
    """Return `depth.lengths` as numbers of layers, rising: below 1 a length is a fraction of the teacher's `depth`.

    auto: one, two, a quarter and a half of the layers, as far as they leave one. Raises ValueError for a length that
    leaves no layer.
    """
    if lengths == "auto":
        lengths = [length for length in (1, 2, round(depth / 4), depth // 2) if 0 < length < depth] or [1]
    layers = {max(1, round(length * depth)) if length < 1 else int(length) for length in lengths}
    if max(layers) >= depth:
        raise ValueError(f"depth.lengths: {max(layers)} of the teacher's {depth} layers; valid: at most {depth - 1}")
    return sorted(layers)


def block(start: int, length: int) -> Cut:
    """Return the block of `length` layers from `start` on."""
    return tuple(range(start, start + length))


def blocks(lengths: Iterable[int], depth: int) -> list[Cut]:
    """Return every block of every length, by start."""
    return sorted(block(start, length) for length in lengths for start in range(depth - length + 1))


def one_by_one(lm_loss: Mapping[Cut, np.ndarray], length: int) -> Cut:
    """Return the `length` layers whose removal alone raises the LM loss least (of equals the earlier): the dashed lines
    of Figures 8 and 9. `lm_loss` holds the windows' losses without each single layer."""
    order = sorted((float(values.mean()), cut[0]) for cut, values in lm_loss.items() if len(cut) == 1)
    return tuple(sorted(layer for _, layer in order[:length]))


def text_chunks(windows: np.ndarray, device: torch.device) -> list[slice]:
    rows = max(1, CHUNK_TOKENS[device.type] // windows.shape[1])
    return [slice(first, min(first + rows, len(windows))) for first in range(0, len(windows), rows)]


def winogrande_chunks(packed: PackedOptions, device: torch.device) -> list[slice]:
    return packed.batches(CHUNK_TOKENS[device.type])


def cuts_at_once(chunk_tokens: int, hidden_size: int) -> int:
    """Return how many cuts may be computed together within `STREAM_BYTES`."""
    return max(1, STREAM_BYTES // (chunk_tokens * hidden_size * 4) - 1)


def text_values(
    model: LayerwiseModel, windows: np.ndarray, cuts: Sequence[Cut], bi_blocks: Sequence[Cut] = ()
) -> Values:
    """Return the LM loss of each of `cuts`, BI and angular distance of each of `bi_blocks`, on one chunk of `windows`
    (n, length).

    lm_loss: nats, the mean over the length - 1 next tokens of a window. bi: 1 - the mean over a window's positions
    of the cosine between the residual stream before and after the block, before the final norm (ShortGPT,
    arXiv:2403.03853). angular: the angle between the two at a window's last position, of pi (Gromov et al.,
    arXiv:2403.17887). All (n,) float64.
    """
    ids = torch.from_numpy(windows.astype(np.int64)).to(model.device)
    importance = _BlockImportance(bi_blocks)
    with model.computing():
        inputs = model.begin(ids)
        computed = {*cuts, TEACHER} if bi_blocks else {*cuts}  # a BI needs the teacher's stream after the block
        streams = without(model, inputs, computed, importance)
        losses = {}
        with model.head() as head:
            targets = ids[:, 1:].flatten()
            for cut in cuts:
                hidden = model.final_norm(streams.pop(cut)[:, :-1]).flatten(0, 1)
                ce = token_losses(hidden, head, targets).ce
                losses[cut] = ce.view(len(ids), -1).double().mean(1).cpu().numpy()
    return {"lm_loss": losses, **importance.values}


def taylor_values(teacher: PreTrainedModel, windows: np.ndarray, precision: str) -> dict[Cut, np.ndarray]:
    """Return `taylor.of_layers` of each single layer, (n,) nats a window; a block's is the sum of its layers'."""
    return {(layer,): column for layer, column in enumerate(taylor.of_layers(teacher, windows, precision).T)}


def winogrande_values(
    model: LayerwiseModel, packed: PackedOptions, rows: slice, cuts: Sequence[Cut]
) -> dict[Cut, np.ndarray]:
    """Return the log-likelihood (nats) of every option in `rows` under each cut, (2 * examples,), 0 for options in
    other rows.

    The options' common beginnings are computed once, and only positions that predict a scored token go through the
    output head.
    """
    with model.computing():
        ids, positions, mask = model_inputs(packed, rows, model.device)
        streams = without(model, model.begin(ids, positions, mask), set(cuts))
        log_likelihoods = {}
        with model.head() as head:
            for cut in cuts:
                hidden = model.final_norm(streams.pop(cut))
                log_likelihoods[cut] = option_log_likelihoods(packed, rows, hidden, head.logits)
    return log_likelihoods


def without(
    model: LayerwiseModel, inputs: Inputs, cuts: Iterable[Cut], watch: Callable[[int, Tensor], None] | None = None
) -> dict[Cut, Tensor]:
    """Return the residual stream after the last layer, before the final norm, of the model without each of `cuts`.

    Cuts are the leaves of a tree: those that have removed the same layers so far share one stream. `watch` is given
    the teacher's stream before every layer, and after the last, for as long as a cut still needs it.
    """
    streams = {TEACHER: inputs.stream}  # by the layers removed so far
    ahead = {TEACHER: sorted(cuts)}  # which cuts each of them leads to
    for index in range(len(model.layers)):
        if watch and TEACHER in streams:
            watch(index, streams[TEACHER])
        above: dict[Cut, Tensor] = {}
        with model.layer(index, inputs) as layer:
            for removed in list(streams):
                stream, leaves = streams.pop(removed), ahead.pop(removed)
                for gone, after in ((True, (*removed, index)), (False, removed)):
                    kept = [cut for cut in leaves if (index in cut) == gone]
                    if kept:
                        above[after], ahead[after] = stream if gone else layer(stream), kept
        streams = above
    if watch and TEACHER in streams:
        watch(len(model.layers), streams[TEACHER])
    return streams


class _BlockImportance:
    """Watches the teacher's stream; keeps it before each block until the end of the block."""

    def __init__(self, bi_blocks: Sequence[Cut]):
        self.ends: dict[int, list[Cut]] = {}
        for cut in bi_blocks:
            self.ends.setdefault(cut[-1] + 1, []).append(cut)
        self.last_use = {cut[0]: max(c[-1] + 1 for c in bi_blocks if c[0] == cut[0]) for cut in bi_blocks}
        self.before: dict[int, Tensor] = {}
        self.values: Values = {metric: {} for metric in OF_STREAM}

    def __call__(self, index: int, stream: Tensor) -> None:
        for cut in self.ends.get(index, ()):
            cosine = torch.cosine_similarity(self.before[cut[0]], stream, dim=-1)
            self.values["bi"][cut] = 1 - cosine.double().mean(1).cpu().numpy()
            self.values["angular"][cut] = _angle(self.before[cut[0]][:, -1], stream[:, -1])
        self.before = {start: x for start, x in self.before.items() if self.last_use[start] > index}
        if index in self.last_use:
            self.before[index] = stream


def _angle(x: Tensor, y: Tensor) -> np.ndarray:
    """Return the angle between vectors (n, hidden_size) as a share of pi, (n,) float64: by chords, which keep small
    angles exact."""
    x, y = (torch.nn.functional.normalize(side.double(), dim=-1) for side in (x, y))
    half = torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))
    return (2 * half / torch.pi).cpu().numpy()


def table_rows(values: Values, lengths: Sequence[int], depth: int, sets: Mapping[int, Cut]) -> list[dict[str, Any]]:
    """Return the rows of depth.parquet: every metric of the teacher, of every block, and of the one-by-one set of every
    length. value and stderr (nan for n = 1) are over the n windows, or over the n Winogrande examples."""
    kinds: list[tuple[str, Cut]] = [("teacher", TEACHER)]
    for length in lengths:
        kinds += [("contiguous", block(start, length)) for start in range(depth - length + 1)]
        kinds += [("one_by_one", sets[length])] if length in sets else []
    rows = []
    for metric, of_cut in values.items():
        for kind, cut in kinds:
            if cut in of_cut and not (kind == "one_by_one" and metric in OF_BLOCKS):
                mean, stderr, n = mean_and_error(of_cut[cut])
                rows.append({
                    "start": cut[0] if cut else 0, "length": len(cut), "metric": metric, "value": mean,
                    "stderr": stderr, "n": n, "kind": kind, "layers": ",".join(map(str, cut)),
                })  # fmt: skip
    return rows
