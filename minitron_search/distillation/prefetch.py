"""What the next batches need, read while the present one computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minitron_search.distillation.teacher import Teacher, TeacherBatch

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Part(NamedTuple):
    """The windows of one forward pass."""

    indices: np.ndarray  # (n,)
    tokens: np.ndarray  # (n, length)
    ids: Tensor  # `tokens`, int64, on the device
    said: TeacherBatch | None  # what the teacher says of them; None where it is not one that is asked ahead


def feed(
    parts: Iterable[np.ndarray], windows: np.ndarray, teacher: Teacher | None, device: torch.device
) -> Iterator[Part]:
    """The `parts`, indices (n,) into `windows`, in order. A live teacher is not asked: it computes, and belongs to
    the step."""

    def read(indices: np.ndarray) -> Part:
        tokens = windows[indices]
        said = teacher.ask(indices, tokens) if teacher and teacher.reads else None
        part = Part(indices, tokens, torch.from_numpy(tokens.astype(np.int64)), said)
        return tree_map_only(Tensor, Tensor.pin_memory, part) if device.type == "cuda" else part

    for part in ahead(read, parts):
        yield tree_map_only(Tensor, partial(_moved, device), part)


def ahead(load: Callable[[Item], Loaded], items: Iterable[Item]) -> Iterator[Loaded]:
    """`load(item)` of every item in order, each in a thread while the one before it is used. What it raises is
    raised where it would have been used."""
    coming: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(1, "feed") as thread:
        for item in items:
            coming.append(thread.submit(load, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _moved(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, non_blocking=True)  # from pinned memory a GPU copies by itself
