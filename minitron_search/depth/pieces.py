"""Split the sweep into pieces: what a worker computes at once, keeps on disk and never computes twice."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_search.data.winogrande_packing import PackedOptions
from minitron_search.depth import sweep as depth
from minitron_search.depth.sweep import Cut, Values
from minitron_search.evaluation.winogrande import by_example
from minitron_search.models.layerwise import LayerwiseModel
from minitron_search.records import cache
from minitron_search.records.cache import content_id
from minitron_search.records.transfer import NodeTransfer

TEXT, TAYLOR, CHOICES = "text", "taylor", "winogrande"


METRIC = {TEXT: "lm_loss", TAYLOR: "taylor", CHOICES: CHOICES}  # of a kind's cuts


@dataclass(frozen=True)
class Job:
    """The inputs that every piece of a sweep shares. `threads` and `device` are part of the key: they change
    rounding."""

    folder: Path
    fingerprint: str  # of the teacher's weights
    depth: int  # its layers
    hidden_size: int
    weight_bytes: int  # of the whole teacher, in the dtype it computes in
    precision: str
    windows: np.ndarray  # (n, length)
    packed: PackedOptions
    pieces: Path
    threads: int = 1
    asks: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1.0})  # of Ray, for a piece
    device: str = "cpu"
    weights: str = "auto"
    memory_bytes: float = float("inf")  # of one worker
    transfer: NodeTransfer | None = None

    def chunks(self, kind: str) -> list[slice]:
        device = torch.device(self.device)
        if kind == CHOICES:
            return depth.winogrande_chunks(self.packed, device)
        return depth.text_chunks(self.windows, device)

    def key(self, kind: str, rows: slice) -> str:
        arrays = _row_arrays(self.packed) if kind == CHOICES else (self.windows,)
        read = [array[rows] for array in arrays]
        if kind == CHOICES:
            scored = _scored(self.packed, rows)
            of_tokens = (self.packed.column, self.packed.target, self.packed.option, self.packed.row - rows.start)
            read += [array[scored] for array in of_tokens]
        content = content_id(b"".join(array.tobytes() for array in read), digits=64)
        settings = [self.fingerprint, self.precision, self.device, self.threads, torch.__version__, kind]
        return content_id([cache.FORMULA["depth_pieces"], *settings, content])

    def cuts_at_once(self, kind: str, rows: slice) -> int:
        width = int(self.packed.row_lengths[rows.start]) if kind == CHOICES else self.windows.shape[1]
        return depth.cuts_at_once((rows.stop - rows.start) * width, self.hidden_size)


class Piece(NamedTuple):
    kind: str
    rows: slice
    cuts: tuple[Cut, ...]
    bi_blocks: tuple[Cut, ...]


def missing_pieces(
    job: Job, wanted: dict[str, tuple[Sequence[Cut], Sequence[Cut]]], workers: int
) -> list[Piece]:  # fmt: skip
    """List the pieces that are not kept yet: by chunk, and by cut too where there are more workers than chunks or the
    cuts' streams need more memory."""
    pieces = []
    for kind, (cuts, bi_blocks) in wanted.items():
        chunks = job.chunks(kind) if cuts or bi_blocks else []
        for rows in chunks:
            known = _read_chunk(job, kind, rows)
            left = [cut for cut in dict.fromkeys(cuts) if cut not in known.get(METRIC[kind], {})]
            bi_left = tuple(
                cut for cut in bi_blocks if not all(cut in known.get(metric, {}) for metric in depth.OF_STREAM)
            )
            parts = max(-(-len(left) // job.cuts_at_once(kind, rows)), min(workers // len(chunks), len(left)), 1)
            if kind == TAYLOR:
                parts = 1  # one backward pass gives every layer's
            for part in range(parts):  # every parts-th: parts of equal work
                own, bi = tuple(left[part::parts]), bi_left if part == 0 else ()
                if own or bi:
                    pieces.append(Piece(kind, rows, own, bi))
    return pieces


def compute(job: Job, piece: Piece) -> tuple[Piece, dict[str, np.ndarray]]:
    """Compute one piece; return it with its arrays by name."""
    if job.transfer is not None:
        job.transfer.fetch(job.folder)
    torch.set_num_threads(job.threads)
    by_metric: Values
    if piece.kind == TEXT:
        model = _layerwise(job.folder, job.precision, job.device, _streamed(job))
        by_metric = depth.text_values(model, job.windows[piece.rows], piece.cuts, piece.bi_blocks)
    elif piece.kind == TAYLOR:
        teacher = _teacher(job.folder, job.device)
        by_metric = {"taylor": depth.taylor_values(teacher, job.windows[piece.rows], job.precision)}
    else:
        model = _layerwise(job.folder, job.precision, job.device, _streamed(job))
        options = _options(job.packed, piece.rows)
        sums = depth.winogrande_values(model, job.packed, piece.rows, piece.cuts)
        by_metric = {CHOICES: {cut: values[options] for cut, values in sums.items()}}
    return piece, {
        f"{metric} {json.dumps(cut)}": array for metric, of in by_metric.items() for cut, array in of.items()
    }


def keep(job: Job, piece: Piece, named: dict[str, np.ndarray]) -> None:
    """Write a piece's arrays; they are on disk when this returns."""

    def write(into: Path) -> None:
        with open(into, "wb") as file:
            np.savez(file, **named)  # type: ignore[arg-type]

    name = f"{job.key(piece.kind, piece.rows)}-{content_id(sorted(named))}.npz"
    cache.replace(job.pieces / name, write, durable=True)


def read(job: Job, kind: str) -> Values:
    """Return every value that all chunks have, chunks in order: by window or, for Winogrande, (examples, 2) of a
    cut."""
    of_chunks = [(rows, _read_chunk(job, kind, rows)) for rows in job.chunks(kind)]
    by_metric: Values = {}
    for metric in of_chunks[0][1]:
        shared = set.intersection(*(set(values.get(metric, {})) for _, values in of_chunks))
        by_metric[metric] = {}
        for cut in sorted(shared):
            if kind != CHOICES:
                by_metric[metric][cut] = np.concatenate([values[metric][cut] for _, values in of_chunks])
            else:
                whole = np.zeros(2 * len(job.packed.answers))
                for rows, values in of_chunks:
                    whole[_options(job.packed, rows)] = values[metric][cut]
                by_metric[metric][cut] = whole.reshape(-1, 2)
    return by_metric


def _read_chunk(job: Job, kind: str, rows: slice) -> Values:
    by_metric: Values = {}
    for path in sorted(job.pieces.glob(f"{job.key(kind, rows)}-*.npz")):
        with np.load(path) as arrays:
            for name in arrays.files:
                metric, _, layers = name.partition(" ")
                by_metric.setdefault(metric, {})[tuple(json.loads(layers))] = arrays[name]
    return by_metric


def _choice_metrics(job: Job) -> Values:
    both = {
        cut: by_example(values, job.packed.answers)
        for cut, values in read(job, CHOICES)[CHOICES].items()
    }  # fmt: skip
    return {
        "winogrande_acc": {cut: correct for cut, (correct, _) in both.items()},
        "winogrande_margin": {cut: margin for cut, (_, margin) in both.items()},
    }


@lru_cache(maxsize=1)
def _layerwise(folder: Path, precision: str, device: str, streamed: bool) -> LayerwiseModel:
    """Return the model, kept between the pieces that one process computes."""
    return LayerwiseModel(folder, precision, device, streamed)


@lru_cache(maxsize=1)
def _teacher(folder: Path, device: str) -> PreTrainedModel:
    """Return the whole model, float32, for a backward pass; kept between pieces too."""
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return torch.nn.Module.to(teacher, device).eval()


def _streamed(job: Job) -> bool:
    """Return True where weights are read layer by layer: by default, where they need over half of a worker's memory."""
    if job.weights != "auto":
        return job.weights == "streamed"
    have = torch.cuda.mem_get_info()[1] if job.device == "cuda" else job.memory_bytes
    return job.weight_bytes > have / 2


def _row_arrays(packed: PackedOptions) -> tuple[np.ndarray, ...]:
    return packed.input_ids, packed.position_ids, packed.subtree_end, packed.row_lengths


def _scored(packed: PackedOptions, rows: slice) -> np.ndarray:
    return (packed.row >= rows.start) & (packed.row < rows.stop)


def _options(packed: PackedOptions, rows: slice) -> Any:
    """Return the options scored in these rows: a tree is in one row, so no other rows score them."""
    return np.unique(packed.option[_scored(packed, rows)])
