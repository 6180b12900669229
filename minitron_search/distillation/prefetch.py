"""Prefetching: what the next batch needs is read while the present one computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minitron_search.distillation.teacher import TeacherBatch, TeacherSource

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class MicroBatch(NamedTuple):
    """The windows of one forward pass."""

    indices: np.ndarray  # (n,)
    tokens: np.ndarray  # (n, length)
    ids: Tensor  # `tokens`, int64, on the device
    teacher: TeacherBatch | None  # None of a teacher that computes: it is asked in the step


def prefetch(
    indices: Iterable[np.ndarray], windows: np.ndarray, teacher: TeacherSource | None, device: torch.device
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of `windows` (rows, length) at each of `indices` (n,), in order, on `device`.

    A cached teacher is read in the same thread. A live one is not asked: it computes, and belongs to the step.
    """

    def read(rows: np.ndarray) -> MicroBatch:
        tokens = windows[rows]
        answer = teacher.ask(rows, tokens) if teacher and teacher.reads else None
        batch = MicroBatch(rows, tokens, torch.from_numpy(tokens.astype(np.int64)), answer)
        return tree_map_only(Tensor, Tensor.pin_memory, batch) if device.type == "cuda" else batch

    for batch in ahead(read, indices):
        yield tree_map_only(Tensor, partial(_moved, device), batch)


def ahead(load: Callable[[Item], Loaded], items: Iterable[Item]) -> Iterator[Loaded]:
    """Yield `load(item)` of every item in order, each loaded in a thread while the one before it is used.

    What `load` raises is raised where its result would have been used.
    """
    loading: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        for item in items:
            loading.append(thread.submit(load, item))
            if len(loading) > 1:
                yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()


def _moved(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, non_blocking=True)  # from pinned memory a GPU copies by itself
