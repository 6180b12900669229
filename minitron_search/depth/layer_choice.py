"""Choose the layers that a search first proposes to drop, of every length: `space.axes.drop_block.seeds`."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_search.depth.sweep import Cut, block
from minitron_search.pruning.laco import Layer, Merged
from minitron_search.records import cache
from minitron_search.records.directory import RunDirectory, replace_text

MERGES = "layer_merge.json"  # in the run directory: what `collapsed` found, a stack for every length


def least_block(block_bi: Tensor, lengths: Iterable[int]) -> list[Cut]:
    """Return the block of least BI of every length, by `Importance.block_bi`; of equals the first."""
    depth, blocks = len(block_bi) - 1, []
    for length in lengths:
        values = [float(block_bi[start, start + length]) for start in range(depth - length + 1)]
        blocks.append(block(int(np.argmin(values)), length))
    return blocks


def least_layers(block_bi: Tensor, lengths: Iterable[int]) -> list[Cut]:
    """Return as many layers of least BI as each length says, wherever they are (ShortGPT, arXiv:2403.03853, section
    3.2)."""
    order = np.argsort(block_bi.diagonal(offset=1).numpy(), kind="stable").tolist()
    return [tuple(sorted(order[:length])) for length in lengths]


def merged_away(stacks: Iterable[Merged], depth: int) -> list[Cut]:
    """Return the layers, of the teacher's `depth`, that are merged into others in each of `stacks`."""
    return [tuple(layer for layer in range(depth) if layer not in stack) for stack in stacks]


def write_merges(run_dir: RunDirectory, inputs: list[Any], collapse: Callable[[], list[dict[int, Layer]]]) -> None:
    """Write what `collapse` makes of `inputs` into the run directory; it is computed once for all runs."""
    key = cache.content_id([cache.FORMULA["laco"], torch.__version__, *inputs])
    kept = cache.entry("laco", key, ".json")
    cache.make_once(kept, lambda into: into.write_text(json.dumps(collapse())), durable=True)
    replace_text(run_dir.root / MERGES, kept.read_text())


def read_merges(run_dir: RunDirectory) -> list[Merged]:
    """Read stacks of layers, one for every length; none where nothing was merged."""
    if not (run_dir.root / MERGES).exists():
        return []
    stacks = json.loads((run_dir.root / MERGES).read_text())
    return [{int(kept): {int(k): v for k, v in layer.items()} for kept, layer in stack.items()} for stack in stacks]


def merges_of(stacks: Iterable[Merged], layers: Iterable[int]) -> Merged:
    """Return how the layers of a student that keeps `layers` are made; {} where LaCo makes none that keeps these."""
    return next((stack for stack in stacks if set(stack) == set(layers)), {})
