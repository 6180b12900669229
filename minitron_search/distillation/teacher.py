"""Where a distillation's teacher distribution comes from: the teacher itself, asked for every batch, or its cache."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from transformers import PreTrainedModel

from minitron_search.config.types import Precision
from minitron_search.distillation.teacher_cache import CacheReader, teacher_hidden
from minitron_search.losses.intermediate import recorded
from minitron_search.losses.output_loss import TopK
from minitron_search.models.output_head import OutputHead, frozen_head, output_head


class TeacherBatch(NamedTuple):
    """What the teacher says of n windows: its final normed hidden states (n, length, hidden), or the most probable
    tokens of every position, (n, length, k).

    states: by the number of the student's state that each is compared with (`intermediate_loss`), (n, length, hidden).
    """

    hidden: Tensor | None
    topk: TopK | None = None
    states: Mapping[int, Tensor] = {}


class Teacher(NamedTuple):
    """`ask(indices, tokens)`: windows (n,), their ids (n, length) -> what it says of them.

    `head` is None where it says more than hidden states. `forward_tokens()`: how many tokens it has put through the
    teacher itself. `reads`: asking is reading, which a thread may do ahead of the step. `correction`: what a checkpoint
    must hold of a teacher that is corrected meanwhile (`correction.Correcting`).
    """

    ask: Callable[[np.ndarray, np.ndarray], TeacherBatch]
    head: OutputHead | None
    forward_tokens: Callable[[], int]
    reads: bool = False
    correction: Stateful | None = None


def live_teacher(model: PreTrainedModel, precision: Precision, states: Mapping[int, int] | None = None) -> Teacher:
    """Runs `model` for every batch. `states`: which it gives besides (`intermediate_loss.state_map`), in the dtype of
    the products."""
    counted, states = [0], states or {}

    def ask(indices: np.ndarray, tokens: np.ndarray) -> TeacherBatch:
        counted[0] += tokens.size
        ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
        with recorded(model, set(states.values())) as found:
            hidden = teacher_hidden(model, ids, precision)
        return TeacherBatch(hidden, states={number: found[own].to(hidden.dtype) for number, own in states.items()})

    return Teacher(ask, frozen_head(output_head(model), precision), lambda: counted[0])


def cached_teacher(path: Path, head: OutputHead, precision: Precision) -> Teacher:
    """Reads the cache at `path`; `head` is the teacher's `output_head`, which a cache of hidden states needs."""
    reader = CacheReader(path)
    if reader.k is not None:
        return Teacher(
            lambda indices, tokens: TeacherBatch(None, reader.topk(indices, tokens)), None, lambda: 0, reads=True
        )
    return Teacher(
        lambda indices, tokens: TeacherBatch(reader.hidden(indices, tokens)), frozen_head(head, precision), lambda: 0,
        reads=True,
    )  # fmt: skip
