"""Run the depth sweep on Ray: split into pieces, every finished piece kept, killed sweeps resumed.

A piece is one chunk of windows (or of packed Winogrande rows) and some of the cuts. Its task writes it to
`depth_pieces/` in one rename, under a key made of everything that its numbers depend on; a sweep first reads what is
there and computes only the rest. A piece's numbers depend on neither the other cuts in it nor the number of workers:
cuts are computed one at a time, on a chunk that is always the same, with a fixed number of threads.
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
from minitron_search.messages.console import say
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, weights
from minitron_search.planning.prepare import Prepared
from minitron_search.records.directory import RunDirectory

RESTARTS = 3  # of a piece whose process died
SAY_SECONDS = 20


def measure_depth(prepared: Prepared) -> None:
    """Write depth.parquet and depth.json."""
    job, workers = make_job(prepared)
    sweep(job, prepared.run_dir, prepared.config.depth, workers)


def make_job(prepared: Prepared) -> tuple[Job, int]:
    """Return what every piece shares on this cluster, and how many pieces may run at once.

    Raises ValueError if a worker has too little memory for what the sweep measures.
    """
    config, pruned = prepared.config, prepared.pruned
    cpus, gpus = config.resources.cpus_per_worker, worker_gpus(config)
    worker = config.resources.model_copy(update={"workers_per_trial": 1, "gpus_per_worker": gpus})
    worker = worker.with_memory(0)  # a task holds what it is given, `memory_bytes`
    fitting = session.slots(worker)
    workers = fitting if config.depth.workers == "auto" else min(config.depth.workers, fitting)
    element = 2 if prepared.precision == "bfloat16" else 4
    job = Job(
        folder=pruned.folder,
        fingerprint=pruned.fingerprint,
        depth=pruned.config.num_hidden_layers,
        hidden_size=pruned.config.hidden_size,
        weight_bytes=element * parameter_count(weights(pruned.config), sizes(pruned.config)),
        precision=prepared.precision,
        windows=prepared.corpus.validation,
        packed=prepared.packed,
        pieces=prepared.run_dir.depth_pieces,
        threads=cpus,
        asks=worker.of_worker(),
        device="cuda" if gpus else "cpu",
        weights=config.depth.weights,
        memory_bytes=min(
            node["Resources"].get("memory", float("inf")) / max(1, node["Resources"].get("CPU", 1) // cpus)
            for node in ray.nodes() if node["Alive"]
        ),
        transfer=prepared.run_dir.transfer,
    )  # fmt: skip
    _check_memory(config.depth, job)
    return job, workers


def _check_memory(config: DepthConfig, job: Job) -> None:
    float32_bytes = job.weight_bytes * 4 / (2 if job.precision == "bfloat16" else 4)
    if "taylor" in config.metrics and job.device == "cpu" and float32_bytes > job.memory_bytes:
        raise ValueError(f"depth.metrics: taylor holds the teacher in float32, {float32_bytes / 1e9:.1f} GB, and a "
                         f"worker here has {job.memory_bytes / 1e9:.1f} GB; valid: metrics without taylor")  # fmt: skip


def worker_gpus(config: Config) -> float:
    """Return the GPUs of one worker: one if the cluster has any, though trials are configured to use none."""
    return config.resources.gpus_per_worker or (1.0 if ray.cluster_resources().get("GPU") else 0.0)


def sweep(job: Job, run_dir: RunDirectory, config: DepthConfig, workers: int) -> None:
    """Measure every block, and the sets of layers chosen one by one; write the tables and the recommendation.

    At most `workers` pieces run at a time. What `job.pieces` already holds is not computed again.
    """
    began = time.monotonic()
    lengths = depth.in_layers(config.lengths, job.depth)
    blocks = depth.blocks(lengths, job.depth)
    pool = _Pool(job, workers)
    say(f"depth: {len(blocks)} blocks of {', '.join(map(str, lengths))} layers, {workers} workers")
    _compute_blocks(pool, config, blocks)
    sets = _one_by_one_sets(job, config, lengths)
    _compute_sets(pool, config, blocks, sets)
    values = _read_values(job, config, blocks)
    advice = recommendation(values, lengths, job.depth, sets)
    run_dir.write_depth(depth.table_rows(values, lengths, job.depth, sets))
    run_dir.write_depth_recommendation(advice)
    seconds = time.monotonic() - began
    run_dir.event("depth_finished", pieces=pool.computed, seconds=seconds)
    say(f"depth: {pool.computed} pieces computed in {seconds:.0f} s")
    for line in advice["words"]:
        say(f"depth: {line}")


def _compute_blocks(pool: "_Pool", config: DepthConfig, blocks: list[Cut]) -> None:
    """Compute the metrics on text of every block, and those of single layers that the rest is made from."""
    depth_of = pool.job.depth
    text = [TEACHER, *blocks] if "lm_loss" in config.metrics else []
    if _removes_layers(config):  # the one-by-one sets are chosen by the LM loss without each single layer
        text += [cut for cut in depth.blocks([1], depth_of) if cut not in text]
    with_bi = blocks if set(depth.OF_STREAM) & set(config.metrics) else []
    layers = depth.blocks([1], depth_of) if "taylor" in config.metrics else []
    pool.complete({TEXT: (text, with_bi), TAYLOR: (layers, [])})


def _removes_layers(config: DepthConfig) -> bool:
    """Return whether the sweep scores models without their layers, rather than rating the layers' outputs alone."""
    return bool({"lm_loss", "winogrande"} & set(config.metrics))


def _one_by_one_sets(job: Job, config: DepthConfig, lengths: Sequence[int]) -> dict[int, Cut]:
    """Return, for every length, as many layers as each does the least damage without."""
    lm_loss = read(job, TEXT).get("lm_loss", {})
    return {length: depth.one_by_one(lm_loss, length) for length in lengths} if _removes_layers(config) else {}


def _compute_sets(pool: "_Pool", config: DepthConfig, blocks: list[Cut], sets: dict[int, Cut]) -> None:
    """Compute the LM loss without each set of layers, and Winogrande without each block and set."""
    chosen = list(dict.fromkeys(sets.values()))
    choices = [TEACHER, *dict.fromkeys([*blocks, *chosen])] if "winogrande" in config.metrics else []
    pool.complete({TEXT: (chosen if "lm_loss" in config.metrics else [], []), CHOICES: (choices, [])})


def _read_values(job: Job, config: DepthConfig, blocks: list[Cut]) -> Values:
    """Return the values of the configured metrics; a block's Taylor importance is the sum of its layers'."""
    values: Values = read(job, TEXT)
    if "taylor" in config.metrics:
        by_layer = read(job, TAYLOR)["taylor"]
        values["taylor"] = {cut: sum((by_layer[layer,] for layer in cut[1:]), by_layer[cut[:1]]) for cut in blocks}
    for metric in ("lm_loss", *depth.OF_STREAM):
        if metric not in config.metrics:
            values.pop(metric, None)
    if "winogrande" in config.metrics:
        values |= _choice_metrics(job)
    return values


class _Pool:
    """Runs pieces as Ray tasks, at most `workers` at a time."""

    def __init__(self, job: Job, workers: int):
        self.job, self.workers, self.computed = job, workers, 0
        if job.transfer is not None:
            job.transfer.put(job.folder)
        self.shared = ray.put(job)
        resources = dict(job.asks)
        cpus, gpus = resources.pop("CPU"), resources.pop("GPU", 0.0)
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=resources, max_retries=RESTARTS)(compute)

    def complete(self, wanted: dict[str, tuple[Sequence[Cut], Sequence[Cut]]]) -> None:
        """Compute what is not kept yet. `wanted`: for every kind of piece, (cuts, blocks whose BI is wanted)."""
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
