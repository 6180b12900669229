"""The depth sweep in this process: what removing each contiguous block of layers does (2408.11796, Figures 8 and 9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from minitron_search.api.html import table
from minitron_search.api.model import Model, load
from minitron_search.depth.recommendation import recommendation
from minitron_search.depth.sweep import (
    TEACHER,
    Cut,
    blocks,
    in_layers,
    one_by_one,
    table_rows,
    text_chunks,
    text_values,
)
from minitron_search.models.device import device, resolve
from minitron_search.models.layerwise import LayerwiseModel


@dataclass(frozen=True, repr=False)
class Sweep:
    """What every block costs. `table`: a row for each block and metric, as in depth.parquet. `advice`: depth.json."""

    table: pd.DataFrame
    advice: dict[str, Any]

    def best(self, length: int) -> tuple[int, ...]:
        """Return the layers of the block of `length` whose removal raises the LM loss least. Raises ValueError for a
        length that was not swept."""
        found = self.advice["by_length"].get(str(length))
        if found is None:
            raise ValueError(f"length: {length} was not swept; valid: {', '.join(self.advice['by_length'])}")
        start = found["best"]["lm_loss"]["start"]
        return tuple(range(start, start + length))

    def __repr__(self) -> str:
        return "\n".join(self.advice["words"])

    def _repr_html_(self) -> str:
        rows = []
        for length, found in self.advice["by_length"].items():
            best = found["best"]["lm_loss"]
            layers = self.best(int(length))
            rows.append((length, f"{layers[0]}-{layers[-1]}", f"{best['value']:.4f}", f"{best['stderr']:.4f}"))
        return table(("layers dropped", "block", "LM loss", "standard error"), rows)


def sweep_depth(
    teacher: "Model | PreTrainedModel | str | Path",
    windows: np.ndarray,
    lengths: Sequence[float] | str = "auto",
    *,
    precision: str = "auto",
) -> Sweep:
    """Return the LM loss without each contiguous block of every length, and without as many layers chosen one by one.

    `windows` (n, length): tokens of validation text. `lengths`: of the blocks, in layers, or below 1 as shares of them.

    Raises ValueError for a length that leaves no layer.
    """
    model = load(teacher)
    depth = model.config.num_hidden_layers
    swept = in_layers("auto" if isinstance(lengths, str) else lengths, depth)
    layerwise = LayerwiseModel(model.folder(), resolve(precision), device())
    singles = blocks([1], depth)
    values = _values(layerwise, windows, [TEACHER, *dict.fromkeys([*singles, *blocks(swept, depth)])])
    sets = {length: one_by_one(values["lm_loss"], length) for length in swept}
    known = values["lm_loss"]
    values["lm_loss"] = (
        known | _values(layerwise, windows, [cut for cut in sets.values() if cut not in known])["lm_loss"]
    )
    rows = table_rows(values, swept, depth, sets)
    return Sweep(pd.DataFrame(rows), recommendation(values, swept, depth, sets))


def _values(layerwise: LayerwiseModel, windows: np.ndarray, cuts: list[Cut]) -> dict[str, dict[Cut, np.ndarray]]:
    """Return the LM loss of every window without each of `cuts`."""
    parts: dict[Cut, list[np.ndarray]] = {cut: [] for cut in cuts}
    if cuts:
        for rows in text_chunks(windows, layerwise.device):
            for cut, losses in text_values(layerwise, windows[rows], cuts)["lm_loss"].items():
                parts[cut].append(losses)
    return {"lm_loss": {cut: np.concatenate(losses) for cut, losses in parts.items()}}
