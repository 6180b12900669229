"""--dry-run: the resolved configuration, the size of the space, and what the run would cost."""

import math
import time
from typing import Any

import torch
import yaml
from rich.console import Console

from minitron_search.architecture import Architecture, forward_flops
from minitron_search.config import Config
from minitron_search.families import sizes, sizes_of, weights
from minitron_search.precision import device, resolve
from minitron_search.search_space import COORDINATES, SearchSpace
from minitron_search.teacher import teacher_config
from minitron_search.trial_settings import correction_tokens

# Share of a large matrix product's speed that distilling SmolLM2 reaches here: 0.45 to 0.6 on two cores.
UTILISATION = 0.5
# Of the teacher's depth: a student with less of it has lost much of its depth. The papers give no number; what they
# call depth pruning keeps half (2408.11796: 16 of 32 layers), and their width pruning keeps every layer.
SHALLOW = 2 / 3


def dry_run(config: Config, space: SearchSpace, console: Console) -> None:
    console.print(yaml.safe_dump(config.dump(), sort_keys=False).rstrip(), markup=False)
    smallest, largest = space.smallest_and_largest()
    console.print(f"\nspace: {space.described(config.search.trials)}")
    anchors = [("anchor", anchor) for anchor in space.anchors]
    for name, architecture in (("teacher", space.teacher), ("smallest", smallest), ("largest", largest), *anchors):
        counted = space.measures(architecture)
        console.print(f"{name}: {architecture}: {counted.params:,} parameters, "
                      f"{counted.non_embedding_params:,} without embeddings")  # fmt: skip
    for line in forecast(config, space):
        console.print(line)
    if advice := intermediate_advice(config, space):
        console.print(advice)


def intermediate_advice(config: Config, space: SearchSpace) -> str | None:
    """What to say where candidates lose much of their depth and only logits are distilled (best practices 6 and 7)."""
    teacher = space.teacher.num_hidden_layers
    least = teacher - int(space.points[:, COORDINATES.index("drop_block_length")].max())
    if config.distillation.intermediate or least >= SHALLOW * teacher:
        return None
    return (f"advice: candidates keep as few as {least} of the teacher's {teacher} layers, under two thirds; where "
            "depth shrinks that much, intermediate states and the embedding help beside the logits: "
            "--distillation.intermediate auto --distillation.embedding true")  # fmt: skip


def forecast(config: Config, space: SearchSpace) -> list[str]:
    """Tokens, FLOPs, time and GPU-hours of search and retraining; on this machine, by a product timed now."""
    training = search_tokens(config)
    retraining = config.retraining.tokens * config.search.promote
    largest = space.smallest_and_largest()[1]
    student, teacher = (flops_per_token(space, config, a) for a in (largest, space.teacher))
    if config.distillation.teacher:
        other = teacher_config(config.distillation.teacher)
        teacher = forward_flops(weights(other), sizes(other), config.corpus.sequence_length)
    parallel = config.teacher.correction.parallel
    corrected = training + retraining if parallel else correction_tokens(config)
    live = parallel or config.distillation.teacher_cache == "off" or bool(config.distillation.intermediate)
    asked = training + retraining if live else max(config.search.rungs[-1], config.retraining.tokens)
    # backward costs twice forward; a cached teacher still costs its output head for every token
    head = 2 * space.teacher.hidden_size * space.config.vocab_size
    total = (training + retraining) * (3 * student + head) + (asked + 3 * corrected) * teacher
    speed = product_flops_per_second(resolve(config.precision)) * UTILISATION
    hours = total / speed / 3600
    where = "GPU-hours" if torch.cuda.is_available() else "hours on this machine's CPUs (0 GPU-hours)"
    return [
        f"search: at most {training:,} tokens ({config.search.trials} trials, rungs {list(config.search.rungs)})",
        f"retraining: {retraining:,} tokens",
        f"teacher: {asked:,} tokens, {'asked for every batch' if live else 'asked once'}",
        *([f"correction of the teacher: {corrected:,} tokens"] if corrected else []),
        f"FLOPs: {total:.3g}; at {speed / 1e9:,.0f} GFLOP/s that is {hours:.2f} {where}, scoring and start-up apart",
    ]


def search_tokens(config: Config) -> int:
    """Of a search whose every rung passes one trial in `reduction_factor` (ASHA passes a few more)."""
    tokens, trials, before = 0, config.search.trials * config.search.seeds, 0
    for rung in config.search.rungs:
        tokens += trials * (rung - before)
        trials, before = math.ceil(trials / config.search.reduction_factor), rung
    return tokens


def flops_per_token(space: SearchSpace, config: Config, architecture: Architecture) -> Any:
    return forward_flops(space.weights, sizes_of(space.config, architecture), config.corpus.sequence_length)


def product_flops_per_second(precision: str, size: int = 1024, seconds: float = 0.3) -> float:
    """Of a square matrix product on all of this machine's cores, or its GPU."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left = torch.randn(size, size, device=device(), dtype=dtype)
    left @ left
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        left @ left
        if left.is_cuda:
            torch.cuda.synchronize()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - began)
