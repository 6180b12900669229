"""Suggest a configuration for a model: what is derived from it, in numbers, with a comment for every choice.

Tokens follow the size of the student as the tutorial's do: 2M of 240M parameters to tell candidates apart, 100M to
retrain the best. Keys of GPUs are estimates: 16 bytes a parameter of the student in training (weights, gradients and
two moments in float32), 2 of the teacher, and a quarter of them for what is computed on the way.
"""

import json
import math

from minitron_search.api.shape import WIDTHS, Shape
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.config.space import Axis
from minitron_search.depth.sweep import in_layers
from minitron_search.planning.defaults import completed
from minitron_search.teachers.sources import teacher_config

SEARCH_SHARE, RETRAINING_SHARE = 0.01, 0.4  # tokens, of the student's parameters
WINDOWS = 1024  # tokens, where the model has as many positions
BATCH = 16  # windows
GPU_BYTES, ON_THE_WAY = 80e9, 1.25


def suggestion(model: str, params: str = "auto") -> str:
    """Return the YAML of a run that prunes `model` to `params` (4.5B, 67%; auto: two thirds).

    Raises ValueError for a model that cannot be read, and for a budget that no shape of it meets.
    """
    asked = loading.parse_config({"teacher": {"model": model}, "space": {"budget": {"params": {"target": params}}}})
    config, _ = completed(asked, None)
    teacher = teacher_config(model)
    shape = Shape.of(teacher)
    whole, inside = shape.params, shape.non_embedding_params
    bound = config.space.budget.params
    assert bound is not None
    student = int(bound.number)
    last, retrained = rounded(SEARCH_SHARE * student), rounded(RETRAINING_SHARE * student)
    length = min(WINDOWS, getattr(teacher, "max_position_embeddings", WINDOWS))
    lengths = in_layers("auto", teacher.num_hidden_layers)
    return "\n".join([
        f"# Suggested for {model}; every number may be changed, and every other key has its default.",
        f"name: {json.dumps(config.name)}",
        f"teacher: {{model: {json.dumps(model)}}}",
        f"  # {whole:,} parameters, {1 - inside / whole:.0%} of them embeddings, which shrink with hidden_size alone",
        "corpus:",
        "  # Put in the text that the teacher was trained on, or one near it: a file, a glob, or a Hub data set.",
        "  # The embedded text is too short for these tokens.",
        "  train: docstrings",
        "  validation: docstrings",
        f"  sequence_length: {length}  # of {getattr(teacher, 'max_position_embeddings', length):,} positions",
        "space:",
        "  budget:",
        f"    params: {{target: {student}, tolerance: {bound.tolerance:g}}}  # {student / whole:.0%} of the teacher's",
        "  axes:",
        *_axes(config, teacher.num_hidden_layers),
        f"depth: {{lengths: {lengths}}}  # one layer, two, a quarter and a half of the {teacher.num_hidden_layers}",
        f"search: {{trials: {config.search.trials}, rungs: [0, {rounded(last / 4)}, {last}], reduction_factor: 3}}"
        f"  # to {SEARCH_SHARE:.0%} of the student's parameters in tokens",
        f"retraining: {{tokens: {retrained}, warmup_steps: 100}}  # {RETRAINING_SHARE:.0%}; more helps as long as the "
        "loss falls",
        f"distillation: {{batch_tokens: {BATCH * length}, learning_rate: auto}}  # a probe of a few steps chooses it",
        *_gpus(whole, student),
        "",
    ])  # fmt: skip


def rounded(tokens: float) -> int:
    """Return a number of tokens with two digits, at least a thousand."""
    digits = 10 ** max(0, math.floor(math.log10(max(tokens, 1.0))) - 1)
    return max(1_000, round(tokens / digits) * digits)


def _axes(config: Config, depth: int) -> list[str]:
    axes, lines = config.space.axes, []
    for name in WIDTHS:
        axis: Axis | None = getattr(axes, name)
        if axis is not None:
            given = {key: value for key, value in axis.model_dump().items() if value is not None}
            inside = ", ".join(f"{key}: {json.dumps(value)}" for key, value in given.items())
            lines.append(f"    {name}: {{{inside}}}")
    if axes.num_attention_heads is None:
        lines.append(
            "    # attention heads are kept: a third of them, given to the MLP, cost 0.28 nats (docs/results.md)"
        )
    if axes.drop_block is not None:
        lines.append(f"    drop_block: {{lengths: {json.dumps(list(axes.drop_block.lengths))}}}  # of {depth} layers")
    return lines


def _gpus(teacher: int, student: int) -> list[str]:
    """Return what GPUs of 80 GB would need, as a comment: an estimate, and this machine may have none."""
    held = ON_THE_WAY * (16 * student + 2 * teacher)
    workers = max(1, math.ceil(held / (0.9 * GPU_BYTES)))
    strategy = f", workers_per_trial: {workers}, strategy: fsdp2" if workers > 1 else ""
    return [
        f"# An estimate for GPUs of {GPU_BYTES / 1e9:.0f} GB: a training holds about {held / 1e9:.0f} GB:",
        f"# resources: {{gpus_per_worker: 1, cpus_per_worker: 8{strategy}}}",
    ]
