"""Importance in rounds: rank, trim towards the smallest candidate, rank what is left again (iterative importance,
arXiv:2407.14679: of k rounds, round i measures the model that is i/k of the way to the target).

A round orders only the elements that it still has; those that went before it keep their places behind them. So the
rounds together are one order of the teacher's elements, in which candidates nest: what is sliced everywhere is still
ranked once per run.
"""

import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from minitron_search.config.space import Axes
from minitron_search.importance.importance import Importance
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import is_expressible, student_config, whole
from minitron_search.models.loading import load_model, student_of
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import trimmed_weights

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def iterative_importance(
    measure: Callable[[Path], Importance], folder: Path, smallest: Architecture, rounds: int, scratch: Path
) -> Importance:
    """Return the importance of the teacher in `folder`, its order composed of `rounds` measurements.

    `measure` is given the folder of a model: the teacher's, then those of its trims, in `scratch`, which is removed. No
    two of them have the same name: another node may have kept one.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    first = measure(folder)
    key_value_heads = whole(config).num_key_value_heads
    order = first.rankings(key_value_heads)
    for done in range(1, rounds):
        size = after_round(config, smallest, done, rounds)
        try:
            of_trimmed = measure(_trimmed(folder, size, order, scratch / f"{done}-{uuid.uuid4().hex}"))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        order = composed(order, of_trimmed.rankings(size.num_key_value_heads), size)
    return first if rounds == 1 else replace(first, order=order)


def composed(order: Rankings, inner: Rankings, size: Architecture) -> Rankings:
    """Return `order` of the teacher with its first `size` elements of every axis ordered again by `inner`, the ranking
    of the model trimmed to `size` by `order`."""
    hidden, mlp, groups, heads = (tensor.clone() for tensor in (order.hidden, order.mlp, order.groups, order.heads))
    _reorder(hidden, inner.hidden)
    per_group = size.num_attention_heads // size.num_key_value_heads
    for layer in range(len(mlp)):
        for place, group in enumerate(groups[layer, : size.num_key_value_heads].tolist()):
            _reorder(heads[layer, group], inner.heads[layer, place, :per_group])
        _reorder(mlp[layer], inner.mlp[layer])
        _reorder(groups[layer], inner.groups[layer])
    return Rankings(hidden, mlp, groups, heads)


def after_round(config: PretrainedConfig, smallest: Architecture, done: int, rounds: int) -> Architecture:
    """Return the shape after `done` of `rounds` equal steps from the teacher to the widths of `smallest`, rounded to
    what the family's configuration can say. Raises ValueError where it can say none near it."""
    teacher = whole(config)
    size = {
        name: getattr(teacher, name) - done * (getattr(teacher, name) - getattr(smallest, name)) // rounds
        for name in WIDTHS
    }
    size["num_attention_heads"] = _whole_groups(teacher, size)
    for hidden in range(size["hidden_size"], teacher.hidden_size + 1):
        shape = replace(teacher, **{**size, "hidden_size": hidden})
        if is_expressible(config, shape):
            return shape
    raise ValueError(f"importance.rounds: {rounds}: no configuration of this {config.model_type} can say a hidden_size "
                     f"near {size['hidden_size']} with {size['num_attention_heads']} heads; valid: 1")  # fmt: skip


def smallest_widths(axes: Axes, teacher: Architecture) -> Architecture:
    """Return the least value of every width axis that is searched, the teacher's of the others."""
    widths = {name: getattr(teacher, name) for name in WIDTHS}
    for name in WIDTHS:
        axis = getattr(axes, name, None)
        if axis is not None:
            widths[name] = min(widths[name], *axis.values())
    widths["num_attention_heads"] = _whole_groups(teacher, widths)
    return replace(teacher, **widths)


def _whole_groups(teacher: Architecture, widths: Mapping[str, int]) -> int:
    """Return the query heads, rounded up to as many in every group, at most the teacher's."""
    groups, ratio = widths["num_key_value_heads"], teacher.num_attention_heads // teacher.num_key_value_heads
    return groups * min(ratio, -(-widths["num_attention_heads"] // groups))


def _reorder(order: Tensor, inner: Tensor) -> None:
    order[: len(inner)] = order[: len(inner)][inner]


def _trimmed(folder: Path, size: Architecture, order: Rankings, into: Path) -> Path:
    teacher = load_model(folder)
    state = {name: parameter.detach() for name, parameter in teacher.named_parameters()}
    kept = trimmed_weights(state.__getitem__, teacher.config, size, order)
    own = {name: tensor.contiguous() for name, tensor in kept.items()}
    student_of(student_config(teacher.config, size), own, teacher.dtype).save_pretrained(into)
    return into
