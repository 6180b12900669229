"""The depth sweep on Ray: split into pieces, every finished piece kept, killed sweeps resumed.

A piece is one chunk of windows (or of packed Winogrande rows) and some of the cuts. Its task writes it to
`depth_pieces/` in one rename, under a key made of all that its numbers depend on; a sweep first reads what is there
and asks only for the rest. A piece's numbers depend on neither the other cuts in it nor the number of workers: cuts
are computed one at a time, on a chunk that is always the same, with a fixed number of threads.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_search.cluster import session
from minitron_search.config.schema import Config, DepthConfig
from minitron_search.data.winogrande import PackedOptions, by_example
from minitron_search.depth import sweep as depth
from minitron_search.depth.recommendation import recommendation
from minitron_search.depth.sweep import TEACHER, Cut, Values
from minitron_search.models.architecture import digest, parameter_count
from minitron_search.models.families import sizes, weights
from minitron_search.models.layerwise import Walk
from minitron_search.planning.prepare import Prepared
from minitron_search.records.console import say
from minitron_search.records.directory import RunDirectory
from minitron_search.records.transfer import Depot

FORMULA = 1  # part of every key: raise it when the same inputs give other values
RESTARTS = 3  # of a piece whose process died
SAY_SECONDS = 20
TEXT, TAYLOR, CHOICES = "text", "taylor", "winogrande"
METRIC = {TEXT: "lm_loss", TAYLOR: "taylor", CHOICES: CHOICES}  # of a kind's cuts


@dataclass(frozen=True)
class Job:
    """What every piece of a sweep shares. `threads` and `device` are part of the key: they change rounding."""

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
    depot: Depot | None = None

    def chunks(self, kind: str) -> list[slice]:
        device = torch.device(self.device)
        if kind == CHOICES:
            return depth.winogrande_chunks(self.packed, device)
        return depth.text_chunks(self.windows, device)

    def key(self, kind: str, rows: slice) -> str:
        arrays = _row_arrays(self.packed) if kind == CHOICES else (self.windows,)
        content = hashlib.sha256(b"".join(np.ascontiguousarray(array[rows]).tobytes() for array in arrays))
        if kind == CHOICES:
            for array in (self.packed.column, self.packed.target, self.packed.option, self.packed.row - rows.start):
                content.update(np.ascontiguousarray(array[_scored(self.packed, rows)]).tobytes())
        made_from = [FORMULA, self.fingerprint, self.precision, self.device, self.threads, torch.__version__, kind]
        return digest([*made_from, content.hexdigest()])

    def cuts_at_once(self, kind: str, rows: slice) -> int:
        width = int(self.packed.row_lengths[rows.start]) if kind == CHOICES else self.windows.shape[1]
        return depth.cuts_at_once((rows.stop - rows.start) * width, self.hidden_size)


class Piece(NamedTuple):
    kind: str
    rows: slice
    cuts: tuple[Cut, ...]
    bi_blocks: tuple[Cut, ...]


def measure_depth(prepared: Prepared, resolved: str) -> None:
    """Write depth.parquet and depth.json."""
    job, workers = make_job(prepared, resolved)
    sweep(job, prepared.run, prepared.config.depth, workers)


def make_job(prepared: Prepared, resolved: str) -> tuple[Job, int]:
    """The job on this cluster, and how many pieces of it may run at once."""
    config = prepared.config
    cpus, gpus = config.resources.cpus_per_worker, worker_gpus(config)
    one = config.resources.model_copy(update={"workers_per_trial": 1, "gpus_per_worker": gpus})
    fitting = session.slots(one)
    workers = fitting if config.depth.workers == "auto" else min(config.depth.workers, fitting)
    element = 2 if resolved == "bfloat16" else 4
    job = Job(
        folder=prepared.teacher_folder,
        fingerprint=prepared.teacher_fingerprint,
        depth=prepared.teacher_config.num_hidden_layers,
        hidden_size=prepared.teacher_config.hidden_size,
        weight_bytes=element * parameter_count(weights(prepared.teacher_config), sizes(prepared.teacher_config)),
        precision=resolved,
        windows=prepared.corpus.validation,
        packed=prepared.packed,
        pieces=prepared.run.depth_pieces,
        threads=cpus,
        asks=one.of_worker(),
        device="cuda" if gpus else "cpu",
        weights=config.depth.weights,
        memory_bytes=min(
            node["Resources"].get("memory", float("inf")) / max(1, node["Resources"].get("CPU", 1) // cpus)
            for node in ray.nodes() if node["Alive"]
        ),
        depot=prepared.run.depot,
    )  # fmt: skip
    whole = _float32_bytes(job)
    if "taylor" in config.depth.metrics and job.device == "cpu" and whole > job.memory_bytes:
        raise ValueError(f"depth.metrics: taylor holds the teacher in float32, {whole / 1e9:.1f} GB, and a worker here "
                         f"has {job.memory_bytes / 1e9:.1f} GB; valid: metrics without taylor")  # fmt: skip
    return job, workers


def _float32_bytes(job: Job) -> float:
    return job.weight_bytes * 4 / (2 if job.precision == "bfloat16" else 4)


def worker_gpus(config: Config) -> float:
    return config.resources.gpus_per_worker or (1.0 if ray.cluster_resources().get("GPU") else 0.0)


def sweep(job: Job, run: RunDirectory, asked: DepthConfig, workers: int) -> None:
    """Every cut of `asked`, `workers` pieces at a time; what `job.pieces` holds already is not computed again."""
    began = time.monotonic()
    lengths = depth.in_layers(asked.lengths, job.depth)
    cuts = depth.blocks(lengths, job.depth)
    losses, choices = "lm_loss" in asked.metrics, "winogrande" in asked.metrics
    bi_blocks = cuts if set(depth.OF_STREAM) & set(asked.metrics) else []
    pool = _Pool(job, workers)
    say(f"depth: {len(cuts)} blocks of {', '.join(map(str, lengths))} layers, {workers} workers")

    text = [TEACHER, *cuts] if losses else []
    if losses or choices:  # the one-by-one sets are chosen by the LM loss without each single layer
        text += [cut for cut in depth.blocks([1], job.depth) if cut not in text]
    layers = depth.blocks([1], job.depth) if "taylor" in asked.metrics else []
    pool.complete({TEXT: (text, bi_blocks), TAYLOR: (layers, [])})
    lm_loss = read(job, TEXT).get("lm_loss", {})
    sets = {length: depth.one_by_one(lm_loss, length) for length in lengths} if losses or choices else {}
    chosen = list(dict.fromkeys(sets.values()))
    pool.complete({
        TEXT: (chosen if losses else [], []),
        CHOICES: ([TEACHER, *dict.fromkeys([*cuts, *chosen])] if choices else [], []),
    })  # fmt: skip

    values: Values = read(job, TEXT)
    if layers:
        of_layer = read(job, TAYLOR)["taylor"]
        values["taylor"] = {cut: sum((of_layer[layer,] for layer in cut[1:]), of_layer[cut[:1]]) for cut in cuts}
    for metric in ("lm_loss", *depth.OF_STREAM):
        if metric not in asked.metrics:
            values.pop(metric, None)
    if choices:
        values |= _choice_metrics(job)
    found = recommendation(values, lengths, job.depth, sets)
    run.write_depth(depth.table_rows(values, lengths, job.depth, sets))
    run.write_depth_recommendation(found)
    seconds = time.monotonic() - began
    run.event("depth_finished", pieces=pool.computed, seconds=seconds)
    say(f"depth: {pool.computed} pieces computed in {seconds:.0f} s")
    for line in found["words"]:
        say(f"depth: {line}")


class _Pool:
    """Runs pieces as Ray tasks, at most `workers` at a time."""

    def __init__(self, job: Job, workers: int):
        self.job, self.workers, self.computed = job, workers, 0
        if job.depot is not None:
            job.depot.put(job.folder)
        self.shared = ray.put(job)
        asked = dict(job.asks)
        cpus, gpus = asked.pop("CPU"), asked.pop("GPU", 0.0)
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=asked, max_retries=RESTARTS)(compute)

    def complete(self, wanted: dict[str, tuple[Sequence[Cut], Sequence[Cut]]]) -> None:
        """Compute what is not kept yet of kind -> (cuts, blocks whose BI is asked)."""
        waiting = deque(missing_pieces(self.job, wanted, self.workers))
        total, running, said = len(waiting), [], time.monotonic()  # type: ignore[var-annotated]
        while waiting or running:
            while waiting and len(running) < self.workers:
                running.append(self.task.remote(self.shared, waiting.popleft()))
            done, running = ray.wait(running, num_returns=1)
            for piece, values in ray.get(done):
                keep(self.job, piece, values)
            self.computed += len(done)
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(f"depth: {total - len(waiting) - len(running)} of {total} pieces")


def missing_pieces(
    job: Job, wanted: dict[str, tuple[Sequence[Cut], Sequence[Cut]]], workers: int
) -> list[Piece]:  # fmt: skip
    """By chunk, and by cut too where there are more workers than chunks or the cuts' streams need more memory."""
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
                asked, bi = tuple(left[part::parts]), bi_left if part == 0 else ()
                if asked or bi:
                    pieces.append(Piece(kind, rows, asked, bi))
    return pieces


def compute(job: Job, piece: Piece) -> tuple[Piece, dict[str, np.ndarray]]:
    """One piece."""
    if job.depot is not None:
        job.depot.fetch(job.folder)
    torch.set_num_threads(job.threads)
    found: Values
    if piece.kind == TEXT:
        walk = _walk(job.folder, job.precision, job.device, _streamed(job))
        found = depth.text_values(walk, job.windows[piece.rows], piece.cuts, piece.bi_blocks)
    elif piece.kind == TAYLOR:
        teacher = _teacher(job.folder, job.device)
        found = {"taylor": depth.taylor_values(teacher, job.windows[piece.rows], job.precision)}
    else:
        walk = _walk(job.folder, job.precision, job.device, _streamed(job))
        options = _options(job.packed, piece.rows)
        sums = depth.winogrande_values(walk, job.packed, piece.rows, piece.cuts)
        found = {CHOICES: {cut: values[options] for cut, values in sums.items()}}
    return piece, {f"{metric} {json.dumps(cut)}": array for metric, of in found.items() for cut, array in of.items()}


def keep(job: Job, piece: Piece, named: dict[str, np.ndarray]) -> None:
    """On disk when this returns."""
    job.pieces.mkdir(parents=True, exist_ok=True)
    path = job.pieces / f"{job.key(piece.kind, piece.rows)}-{digest(sorted(named))}.npz"
    temporary = path.with_name(f".{path.stem}.{os.getpid()}")
    with open(temporary, "wb") as file:
        np.savez(file, **named)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(job: Job, kind: str) -> Values:
    """Every value that all chunks have, chunks in order: a window's or, for Winogrande, (examples, 2) of a cut."""
    of_chunks = [(rows, _read_chunk(job, kind, rows)) for rows in job.chunks(kind)]
    found: Values = {}
    for metric in of_chunks[0][1]:
        shared = set.intersection(*(set(values.get(metric, {})) for _, values in of_chunks))
        found[metric] = {}
        for cut in sorted(shared):
            if kind != CHOICES:
                found[metric][cut] = np.concatenate([values[metric][cut] for _, values in of_chunks])
            else:
                whole = np.zeros(2 * len(job.packed.answers))
                for rows, values in of_chunks:
                    whole[_options(job.packed, rows)] = values[metric][cut]
                found[metric][cut] = whole.reshape(-1, 2)
    return found


def _read_chunk(job: Job, kind: str, rows: slice) -> Values:
    found: Values = {}
    for path in sorted(job.pieces.glob(f"{job.key(kind, rows)}-*.npz")):
        with np.load(path) as arrays:
            for name in arrays.files:
                metric, _, layers = name.partition(" ")
                found.setdefault(metric, {})[tuple(json.loads(layers))] = arrays[name]
    return found


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
def _walk(folder: Path, precision: str, device: str, streamed: bool) -> Walk:
    """Kept between the pieces that one process computes."""
    return Walk(folder, precision, device, streamed)


@lru_cache(maxsize=1)
def _teacher(folder: Path, device: str) -> PreTrainedModel:
    """Whole, float32, for a backward pass; kept as the walk is."""
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.nn.Module.to(teacher, device).eval()


def _streamed(job: Job) -> bool:
    """Automatic: where the teacher's weights would take more than half of what this worker may use."""
    if job.weights != "auto":
        return job.weights == "streamed"
    have = torch.cuda.mem_get_info()[1] if job.device == "cuda" else job.memory_bytes
    return job.weight_bytes > have / 2


def _row_arrays(packed: PackedOptions) -> tuple[np.ndarray, ...]:
    return packed.input_ids, packed.position_ids, packed.subtree_end, packed.row_lengths


def _scored(packed: PackedOptions, rows: slice) -> np.ndarray:
    return (packed.row >= rows.start) & (packed.row < rows.stop)


def _options(packed: PackedOptions, rows: slice) -> Any:
    """The options scored in these rows: a tree is in one row, so no other rows score them."""
    return np.unique(packed.option[_scored(packed, rows)])
