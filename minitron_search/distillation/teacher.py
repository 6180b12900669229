"""Teacher sources: the teacher itself, asked for every batch, or a cache of its answers."""

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
from minitron_search.models.output_head import OutputHead, output_head


class TeacherBatch(NamedTuple):
    """A teacher's answer about n windows: its final normed hidden states (n, length, hidden), or the most probable
    tokens of every position, (n, length, k).

    states: what each of the student's states is compared with, by the student's number (`losses.intermediate`),
        (n, length, hidden).
    """

    hidden: Tensor | None
    topk: TopK | None = None
    states: Mapping[int, Tensor] = {}


class TeacherSource(NamedTuple):
    """Answers what a teacher says of windows.

    ask: `(indices, tokens) -> TeacherBatch`, of windows (n,) and their ids (n, length).
    head: None where the answers are more than hidden states.
    forward_tokens: returns how many tokens it has put through the teacher itself.
    reads: asking is reading, which a thread may do ahead of the step.
    correction: what a checkpoint must hold of a teacher that is corrected meanwhile (`correction.CorrectedTeacher`).
    """

    ask: Callable[[np.ndarray, np.ndarray], TeacherBatch]
    head: OutputHead | None
    forward_tokens: Callable[[], int]
    reads: bool = False
    correction: Stateful | None = None


def live_teacher(
    model: PreTrainedModel, precision: Precision, states: Mapping[int, int] | None = None
) -> TeacherSource:  # fmt: skip
    """Return a source that runs `model` for every batch.

    states: {student's state: the model's}, to answer with besides (`losses.intermediate.state_map`), in the dtype of
        the products.
    """
    forward_tokens, states = [0], states or {}

    def ask(indices: np.ndarray, tokens: np.ndarray) -> TeacherBatch:
        forward_tokens[0] += tokens.size
        ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
        with recorded(model, set(states.values())) as own:
            hidden = teacher_hidden(model, ids, precision)
        return TeacherBatch(hidden, states={number: own[other].to(hidden.dtype) for number, other in states.items()})

    return TeacherSource(ask, output_head(model).frozen(precision), lambda: forward_tokens[0])


def cached_teacher(path: Path, head: OutputHead, precision: Precision) -> TeacherSource:
    """Return a source that reads the cache at `path`; `head` is the teacher's, which hidden states need.

    Raises FileNotFoundError where no cache is.
    """
    reader = CacheReader(path)

    def ask(indices: np.ndarray, tokens: np.ndarray) -> TeacherBatch:
        if reader.k is None:
            return TeacherBatch(reader.hidden(indices, tokens))
        return TeacherBatch(None, reader.topk(indices, tokens))

    return TeacherSource(ask, head.frozen(precision) if reader.k is None else None, lambda: 0, reads=True)
