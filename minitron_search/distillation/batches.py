"""Choose the windows that a training reads at each step: whole batches of an endless stream, shared by processes.

The stream is epoch after epoch, each a permutation made from (seed, epoch). Batch k is the same windows whatever the
number of processes, and every run with the same seed reads the same stream.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from minitron_search.distillation.settings import LoopSettings


class BatchPlan(NamedTuple):
    """How a training is cut into steps, and a step into processes and forward passes. Sizes are windows."""

    batch: int
    share: int  # of a batch, in each process
    micro_batch: int  # of a share, at most so many in one forward pass
    batch_tokens: int
    steps: int
    checkpoint_steps: int  # between checkpoints; 0: none
    milestones: dict[int, int]  # step -> tokens, as asked for

    def micro_batches(self, seed: int, windows: int, step: int, rank: int) -> list[np.ndarray]:
        """Return the indices (n,) of each forward pass of process `rank` in the step after `step` steps."""
        indices = stream(seed, windows, step * self.batch + rank * self.share, self.share)
        return [indices[start : start + self.micro_batch] for start in range(0, self.share, self.micro_batch)]


def batch_plan(settings: LoopSettings, length: int, world_size: int) -> BatchPlan:
    """Return the plan for windows of `length` tokens and `world_size` processes.

    Raises ValueError where the processes cannot share a batch equally.
    """
    batch = math.ceil(settings.batch_tokens / length)
    if batch % world_size:
        valid = math.ceil(batch / world_size) * world_size * length
        raise ValueError(
            f"distillation.batch_tokens: {settings.batch_tokens} is {batch} windows of {length} tokens, "
            f"which {world_size} processes cannot share equally; valid: {valid}"
        )
    share, tokens = batch // world_size, batch * length
    return BatchPlan(
        batch=batch,
        share=share,
        micro_batch=max(1, min(share, settings.micro_batch_tokens // length)),
        batch_tokens=tokens,
        steps=math.ceil(settings.total_tokens / tokens),
        checkpoint_steps=math.ceil((settings.checkpoint_tokens or 0) / tokens),
        milestones={math.ceil(milestone / tokens): milestone for milestone in sorted(settings.milestones)},
    )


def stream(seed: int, windows: int, start: int, count: int) -> np.ndarray:
    """Return the indices (count,) at places start..start+count-1 of the endless stream over `windows` windows."""
    places = np.arange(start, start + count)
    epochs = places // windows
    return np.array(
        [_epoch(seed, windows, epoch)[place % windows] for epoch, place in zip(epochs, places, strict=True)]
    )


@lru_cache(maxsize=2)
def _epoch(seed: int, windows: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)
