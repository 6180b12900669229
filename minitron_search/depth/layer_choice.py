"""Which layers a search first proposes to drop, of every length: `space.axes.drop_block.seeds`."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_search.depth.sweep import Cut, block
from minitron_search.models.architecture import digest
from minitron_search.pruning.laco import FORMULA, Layer, Merged
from minitron_search.records.directory import RunDirectory, replace_text
from minitron_search.records.paths import cache_folder

MERGES = "layer_merge.json"  # in the run directory: what `collapsed` found, a stack for every length


def least_block(block_bi: Tensor, lengths: Iterable[int]) -> list[Cut]:
    """Of every length the block of least BI, by `Importance.block_bi`; of equals the first."""
    depth, found = len(block_bi) - 1, []
    for length in lengths:
        values = [float(block_bi[start, start + length]) for start in range(depth - length + 1)]
        found.append(block(int(np.argmin(values)), length))
    return found


def least_layers(block_bi: Tensor, lengths: Iterable[int]) -> list[Cut]:
    """Of every length so many layers of least BI each, wherever they are (ShortGPT, arXiv:2403.03853, section 3.2)."""
    order = np.argsort(block_bi.diagonal(offset=1).numpy(), kind="stable").tolist()
    return [tuple(sorted(order[:length])) for length in lengths]


def merged_away(stacks: Iterable[Merged], depth: int) -> list[Cut]:
    """The layers, of the teacher's `depth`, that are merged into others in each of `stacks`."""
    return [tuple(layer for layer in range(depth) if layer not in stack) for stack in stacks]


def write_merges(run: RunDirectory, made_from: list[Any], collapse: Callable[[], list[dict[int, Layer]]]) -> None:
    """What `collapse` makes of `made_from`, into the run directory; found once for all runs."""
    kept = cache_folder() / "laco" / f"{digest([FORMULA, torch.__version__, *made_from])}.json"
    if not kept.exists():
        replace_text(kept, json.dumps(collapse()))
    replace_text(run.root / MERGES, kept.read_text())


def read_merges(run: RunDirectory) -> list[Merged]:
    """Stacks of layers, one for every length; none where nothing was merged."""
    if not (run.root / MERGES).exists():
        return []
    stacks = json.loads((run.root / MERGES).read_text())
    return [{int(kept): {int(k): v for k, v in layer.items()} for kept, layer in stack.items()} for stack in stacks]


def merges_of(stacks: Iterable[Merged], layers: Iterable[int]) -> Merged:
    """How the layers of a student that keeps `layers` are made; {} where LaCo makes none that keeps these."""
    return next((stack for stack in stacks if set(stack) == set(layers)), {})
