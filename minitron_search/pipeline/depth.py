"""The depth sweep on Ray: split into pieces, every finished piece kept, killed sweeps resumed.

A piece is one chunk of windows (or of packed Winogrande rows) and some of the cuts. Its task writes it to
`depth_pieces/` in one rename, under a key made of all that its numbers depend on; a sweep first reads what is there
and asks only for the rest. A piece's numbers depend on neither the other cuts in it nor the number of workers: cuts
are computed one at a time, on a chunk that is always the same, with a fixed number of threads.
"""

import time
from collections import deque
from collections.abc import Sequence

import ray

from minitron_search.cluster import session
from minitron_search.config.inputs import DepthConfig
from minitron_search.config.schema import Config
from minitron_search.depth import sweep as depth
from minitron_search.depth.pieces import (
    CHOICES,
    TAYLOR,
    TEXT,
    Job,
    _choice_metrics,
    compute,
    keep,
    missing_pieces,
    read,
)
from minitron_search.depth.recommendation import recommendation
from minitron_search.depth.sweep import TEACHER, Cut, Values
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, weights
from minitron_search.planning.prepare import Prepared
from minitron_search.records.console import say
from minitron_search.records.directory import RunDirectory

RESTARTS = 3  # of a piece whose process died
SAY_SECONDS = 20


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
