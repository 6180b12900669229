"""Proposals of every recipe: all legal, in budget, no twins, and what each takes.

    python -m benchmarks.proposals [RECIPE.yaml ...] [--proposals 10000] [--samplers random tpe]

A space with fewer architectures is proposed whole, and said to be. Each proposal is observed with a loss made up from
its shape, so that a sampler has something to model. Legality and budget are checked without the search space: every
architecture by the parameter count of Llama's and Mistral's weights written out here, and `SAMPLE` of them by the stock
model of its configuration, read back from JSON and built without memory.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from minitron_search.architecture_search.samplers import Observation, propose
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import load_config
from minitron_search.config.space import Budget
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import student_config
from minitron_search.planning.prepare import check

RECIPES = Path(__file__).parents[1] / "search_spaces"
SAMPLE = 25  # architectures built, of each recipe and sampler
MOST_MS = 2.0  # of CPU time, which other processes of the machine change little


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, default=sorted(RECIPES.glob("*.yaml")))
    parser.add_argument("--proposals", type=int, default=10_000)
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    options = parser.parse_args()
    failed = False
    for recipe in options.recipes:
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(str(recipe), ["--output", f"{folder}/run", "--evaluation.tasks", "[]"])
            teacher, space = check(config, resume=False)
        outside = sum(anchor.id not in {a.id for a in space.architectures()} for anchor in space.anchors)
        print(f"{recipe.stem}: {space.grid_size:,} on the grid, {len(space):,} legal and in budget")
        for sampler in options.samplers:
            asked = min(options.proposals, len(space) + outside)
            whole = " (the whole space)" if asked < options.proposals else ""
            proposed, milliseconds = propose_many(space, sampler, asked)
            legal = [is_legal(teacher, architecture) for architecture in proposed]
            inside = [in_budget(teacher, config.space.budget, architecture) or architecture in space.anchors
                      for architecture in proposed]  # fmt: skip
            draw = np.random.default_rng(0).choice(len(proposed), min(SAMPLE, len(proposed)), replace=False)
            built = [is_stock(teacher, proposed[row]) for row in draw]
            twins = len(proposed) - len(set(proposed))
            failed |= not (all(legal) and all(inside) and all(built)) or twins > 0 or len(proposed) < asked
            failed |= milliseconds[0].mean() > MOST_MS
            print(f"  {sampler}: {len(proposed):,} proposed{whole}, {sum(legal):,} legal, {sum(inside):,} in budget or "
                  f"anchors, {twins} twins, {sum(built)} of {len(built)} built as counted; "
                  f"ms each: {summary(milliseconds[0])} of CPU, {summary(milliseconds[1])} of wall time",
                  flush=True)  # fmt: skip
    raise SystemExit(f"not all legal, in budget, without twins and under {MOST_MS:g} CPU ms each" if failed else 0)


def propose_many(space: SearchSpace, sampler: str, count: int) -> tuple[list[Architecture], np.ndarray]:
    """`count` proposals, each observed before the next, and milliseconds of each: (2, count), of CPU and wall time."""
    observed: list[Observation] = []
    times = []
    for _ in range(count):
        began = time.process_time(), time.perf_counter()
        architecture = propose(space, observed, sampler=sampler, seed=0)
        times.append((1e3 * (time.process_time() - began[0]), 1e3 * (time.perf_counter() - began[1])))
        if architecture is None:
            break
        observed.append(Observation(architecture, (made_up_loss(space.teacher, architecture),), "complete"))
    return [observation.architecture for observation in observed], np.array(times).T


def summary(milliseconds: np.ndarray) -> str:
    return f"{milliseconds.mean():.2f} (99th percentile {np.percentile(milliseconds, 99):.2f})"


def made_up_loss(teacher: Architecture, architecture: Architecture) -> float:
    """Smooth, least where no axis is cut much more than the others, and where blocks are dropped late."""
    kept = [
        architecture.hidden_size / teacher.hidden_size,
        architecture.intermediate_size / teacher.intermediate_size,
        architecture.num_attention_heads / teacher.num_attention_heads,
        architecture.num_hidden_layers / teacher.num_hidden_layers,
    ]
    start, length = architecture.dropped_block(teacher.num_hidden_layers)
    return 3 + sum((1 - share) ** 2 for share in kept) + 0.01 * length * (1 - start / teacher.num_hidden_layers)


def is_legal(teacher: PretrainedConfig, architecture: Architecture) -> bool:
    """Inside the teacher, heads evenly in its groups, one block of layers missing at most."""
    ratio = teacher.num_attention_heads // teacher.num_key_value_heads
    heads, groups, layers = architecture.num_attention_heads, architecture.num_key_value_heads, architecture.layers
    missing = sorted(set(range(teacher.num_hidden_layers)) - set(layers))
    return (
        1 <= architecture.hidden_size <= teacher.hidden_size
        and 1 <= architecture.intermediate_size <= teacher.intermediate_size
        and 1 <= groups <= teacher.num_key_value_heads
        and heads % groups == 0
        and 1 <= heads // groups <= ratio
        and set(layers) <= set(range(teacher.num_hidden_layers))
        and missing == list(range(missing[0], missing[0] + len(missing)) if missing else [])
    )


def parameters(teacher: PretrainedConfig, architecture: Architecture) -> tuple[int, int]:
    """(all, without embeddings) of a Llama or a Mistral without biases."""
    head_dim = getattr(teacher, "head_dim", None) or teacher.hidden_size // teacher.num_attention_heads
    hidden, query = architecture.hidden_size, architecture.num_attention_heads * head_dim
    key_value = architecture.num_key_value_heads * head_dim
    layer = 2 * hidden * query + 2 * hidden * key_value + 3 * hidden * architecture.intermediate_size + 2 * hidden
    body = architecture.num_hidden_layers * layer + hidden
    return body + teacher.vocab_size * hidden * (1 if teacher.tie_word_embeddings else 2), body


def in_budget(teacher: PretrainedConfig, budget: Budget, architecture: Architecture) -> bool:
    """By counts alone: no recipe here has a budget on speed, or on memory."""
    assert not (budget.memory_bytes or budget.latency_ms or budget.tokens_per_second)
    params, body = parameters(teacher, architecture)
    bounds = [(budget.params, params), (budget.non_embedding_params, body)]
    return all(abs(value - bound.number) <= bound.tolerance * bound.number for bound, value in bounds if bound)


def is_stock(teacher: PretrainedConfig, architecture: Architecture) -> bool:
    """Whether the configuration, as a stock library reads it, is of a model of the parameters counted here."""
    written = json.loads(student_config(teacher, architecture).to_json_string(use_diff=False))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[written["model_type"]](**written))
    return sum(parameter.numel() for parameter in model.parameters()) == parameters(teacher, architecture)[0]


if __name__ == "__main__":
    main()
