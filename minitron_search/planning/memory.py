"""Count the memory that a run takes on its hosts, by what holds it, and find how much of it this machine has free.

Counted is what no file backs: the resident memory of a process less what it shares. The memory-mapped weights of a
teacher, its cache and the libraries are pages that the system drops when somebody needs the place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import PretrainedConfig

from minitron_search.architecture_search.schedule import batch_tokens
from minitron_search.depth.sweep import CHUNK_TOKENS as SWEPT_AT_ONCE
from minitron_search.depth.sweep import STREAM_BYTES, blocks, in_layers
from minitron_search.distillation.teacher_cache import FORWARD_TOKENS
from minitron_search.losses.output_loss import CHUNK_TOKENS, CPU_TILE_TOKENS
from minitron_search.models.architecture import Architecture, parameter_count
from minitron_search.models.families import sizes, sizes_of, vocabulary_tables, weights
from minitron_search.planning.workload import Costs
from minitron_search.trials.settings import distillation_settings

# Measured on two cores, SmolLM2 as the teacher, students of 91M.
WORKER = 360 * 10**6  # a process that has imported what a trial needs, and has trained nothing
BESIDE_WORKER = 780 * 10**6  # of a trial in a worker group: Tune's process (0.4 GB), the group's controller, an actor
DRIVER = 600 * 10**6  # with the text and the questions of the embedded teacher
RAY = 550 * 10**6  # its own processes on one machine
LEFT = 0.05  # of all memory: Ray ends processes where less is free
NO_LIMIT = 2**60  # a limit above it is none (version 1 of control groups writes 2**63 less a page)


class Host(NamedTuple):
    """The memory of this machine, or of the container that this process is in: bytes."""

    total: int
    free: int


def this_host(root: Path = Path("/")) -> Host:
    """Return the memory that this process may use: the machine's, or less where a control group (v1 or v2) limits it.

    What the group's processes have read from files is free: the system drops it first.
    """
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Host(total, free)


def _limits(root: Path) -> list[tuple[int, int]]:
    """Return (limit, used) of every control group that limits this process: its own, and those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for controllers, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        names = _V1 if controllers else _V2
        inside = base / path.strip("/")
        for folder in (inside, *(parent for parent in inside.parents if parent.is_relative_to(base))):
            try:
                limit = int((folder / names.limit).read_text())
                used = int((folder / names.used).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group in a container, or its limit is `max`
                continue
            if limit < NO_LIMIT:
                found.append((limit, used - sum(int(statistics.get(name, 0)) for name in names.files)))
    return found


class _Names(NamedTuple):
    limit: str
    used: str
    files: tuple[str, str]


_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def reservable() -> int:
    """Return the bytes that workers may have on this machine, beside the driver and Ray."""
    return max(2**20, int(free_for_run() - LEFT * this_host().total) - DRIVER - RAY)


def free_for_run() -> int:
    """Return the bytes that a run may have on this machine, with those that this process, its driver, has by now."""
    held = psutil.Process().memory_info()
    return this_host().free + held.rss - getattr(held, "shared", 0)


def worker(costs: Costs, shape: Architecture | None = None, workers: int = 1) -> dict[str, int]:
    """Return the bytes that one worker of a training holds at its peak, by what holds them.

    `shape`: of what is trained; the largest student of the space unless given. `workers`: of one training. The peak is
    in a forward pass whose batch has had one before: gradients, activations and the logits of a chunk are all there.
    """
    config, space = costs.config, costs.space
    shape = shape or space.smallest_and_largest()[1]
    dims = sizes_of(space.config, shape)
    parameters = parameter_count(space.weights, dims)
    settings = distillation_settings(config, "float32")
    share = workers if settings.shards(workers) else 1
    element = 2 if costs.precision == "bfloat16" else 4
    inside = parameter_count(space.weights, dims, embeddings=False)
    rounded = 2 * inside if costs.precision == "bfloat16" else 0
    micro = min(settings.micro_batch_tokens, batch_tokens(config) // workers)
    inline = config.resources.launcher == "inline"  # in the process of Tune
    processes = WORKER + (0 if inline else BESIDE_WORKER // workers)
    if config.resources.gpus_per_worker:  # what trains is on the GPU; the student is trimmed here
        return {"processes": processes, "weights": 4 * parameters}
    held = {
        "processes": processes,
        "weights": 4 * parameters // share,
        "gradients": 4 * parameters // share,
        "moments": 8 * parameters // share,
        "products": rounded,  # autocast keeps the weights it rounded
        "activations": micro * _activation_bytes(dims, element, settings.gradient_checkpointing),
        "logits": _logits_bytes(costs, dims["hidden"], element),
        "teacher": _teacher_bytes(costs, element),
    }
    # what the C library keeps of blocks that were freed: 0.2 GB of the 2.9 that a worker of 91M was measured to hold
    held["fragments"] = sum(held[name] for name in ("gradients", "products", "activations")) // 4
    return {name: size for name, size in held.items() if size}


def _activation_bytes(dims: Mapping[str, int], element: int, recomputed: bool) -> int:
    """Return the bytes that a token's forward pass leaves for the backward pass."""
    layers, hidden = dims["layers"], dims["hidden"]
    within = 30 * hidden + element * (4 * hidden + 4 * dims["mlp"] + 4 * dims["query"] + 4 * dims["key_value"])
    return 4 * hidden * layers + within if recomputed else within * layers


def _logits_bytes(costs: Costs, hidden: int, element: int) -> int:
    """Return what the output loss holds: the logits of a chunk, student's and teacher's, a tile of them in float32, and
    the gradient of the student's head, whose weight it has in the dtype of the products too."""
    vocabulary = costs.space.config.vocab_size
    heads = 1 if costs.config.distillation.loss == "ce" or costs.config.distillation.teacher_cache == "topk" else 2
    tile = 6 * CPU_TILE_TOKENS * 4
    rounded = element * hidden if element == 2 else 0
    return vocabulary * (heads * CHUNK_TOKENS * element + tile + 4 * hidden + rounded)


def _teacher_bytes(costs: Costs, element: int) -> int:
    """Return what a training holds of its teacher: the head, in the dtype of the products; one that is corrected
    meanwhile as a training does. One that runs in every trial is memory-mapped."""
    config, teacher = costs.config, costs.teacher_config
    if config.distillation.loss == "ce" and not config.distillation.intermediate:
        return 0
    head = element * teacher.vocab_size * teacher.hidden_size
    if config.teacher.correction.parallel:
        head += 16 * parameter_count(weights(teacher), sizes(teacher))
    return head


def of_worker(costs: Costs) -> int:
    """Return the bytes of one worker of the search."""
    return sum(worker(costs, workers=costs.config.resources.workers_per_trial).values())


def teacher_task(teacher: PretrainedConfig, gradients: bool = False, mapped: bool = False) -> int:
    """Return the bytes of a task that runs the teacher forward, and, for `gradients`, backward. `mapped`: on weights
    that all tasks of a node share."""
    dims = sizes(teacher)
    parameters = parameter_count(weights(teacher), dims)
    element = 2 if teacher.dtype == torch.bfloat16 else 4
    held = 0 if mapped else (8 if gradients else element) * parameters
    passed = FORWARD_TOKENS * _activation_bytes(dims, 4, recomputed=True)
    return WORKER + held + passed + (4 * dims["vocab"] * CHUNK_TOKENS if gradients else 0)


def sweep_task(costs: Costs) -> int:
    """Return the bytes of a task of the depth sweep: the teacher where it is not stored in the dtype of the products,
    the residual streams of a chunk's cuts, and its logits in a tile of float32."""
    if costs.config.resources.gpus_per_worker:
        return WORKER
    teacher, corpus, depth = costs.space.config, costs.config.corpus, costs.config.depth
    dims, element = sizes(teacher), 2 if costs.precision == "bfloat16" else 4
    tables = vocabulary_tables(weights(teacher))
    inside = parameter_count(weights(teacher), dims, embeddings=False)
    at_once = inside // dims["layers"] if depth.weights == "streamed" else inside
    copied = at_once + len(tables) * dims["vocab"] * dims["hidden"]
    held = 0 if teacher.dtype == (torch.bfloat16 if element == 2 else torch.float32) else element * copied
    held = max(held, 8 * parameter_count(weights(teacher), dims)) if "taylor" in depth.metrics else held
    chunk = min(SWEPT_AT_ONCE["cpu"], corpus.validation_samples * corpus.sequence_length)
    cuts = len(blocks(in_layers(depth.lengths, dims["layers"]), dims["layers"])) + dims["layers"]
    streams = min(STREAM_BYTES, cuts * chunk * dims["hidden"] * 4)
    logits = dims["vocab"] * (min(chunk, CHUNK_TOKENS) * element + 6 * CPU_TILE_TOKENS * 4)
    return WORKER + held + streams + logits


def run(costs: Costs, at_once: int, gang: int, tasks: int) -> dict[str, int]:
    """Return what the processes of a run hold at its peak, by kind.

    `at_once`: trials of the search. `gang`: workers of a retraining. `tasks`: processes that run the teacher.
    """
    config, typical = costs.config, costs.space.typical()
    of_trial = config.resources.workers_per_trial
    kinds = {f"{tasks} tasks with the teacher": tasks * teacher_task(costs.space.config, mapped=True)}
    if "depth" in config.stages:
        swept = tasks if config.depth.workers == "auto" else min(tasks, config.depth.workers)
        kinds[f"{swept} tasks of the depth sweep"] = swept * sweep_task(costs)
    if "search" in config.stages:
        one = sum(worker(costs, typical, of_trial).values())
        kinds[f"{at_once * of_trial} workers of the search"] = at_once * of_trial * one
    if "retrain" in config.stages:
        kinds[f"{gang} workers of the retraining"] = gang * sum(worker(costs, typical, gang).values())
    largest = max(kinds, key=lambda kind: kinds[kind])
    return {"driver": DRIVER, "Ray": RAY, largest: kinds[largest]}


def certain(costs: Costs) -> int:
    """Return the bytes below which not even the smallest student of the space trains: weights, gradients, moments."""
    smallest = min(costs.space.measures(shape).params for shape in costs.space.smallest_and_largest())
    share = costs.config.resources.workers_per_trial if costs.config.resources.strategy == "fsdp2" else 1
    return 16 * smallest // share


def in_words(parts: Mapping[str, int]) -> str:
    """Return `3.1 GB (weights 0.4, moments 0.7)`, the largest first; what is below 0.05 GB is not listed."""
    listed = sorted(((size, name) for name, size in parts.items() if size >= 5e7), reverse=True)
    inside = ", ".join(f"{name} {size / 1e9:.1f}" for size, name in listed)
    return f"{sum(parts.values()) / 1e9:.1f} GB" + (f" ({inside})" if inside else "")
