"""One call from a model to its best trim for a budget: importance, the zero-token search, the trim."""

from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from minitron_search.api.model import Model, load
from minitron_search.api.pruning import measure_importance, trim
from minitron_search.api.shape import WIDTHS, Shape
from minitron_search.api.text import corpus
from minitron_search.architecture_search.default_space import derived
from minitron_search.architecture_search.samplers import Observation, propose
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.space import Budget, SpaceConfig, Target
from minitron_search.evaluation.scoring import lm_losses
from minitron_search.evaluation.statistics import mean_and_error
from minitron_search.models.device import resolve


def prune(
    model: "str | Path | PreTrainedModel | Model",
    params: float | str = "auto",
    *,
    text: str | Path = "docstrings",
    trials: int = 16,
    length: int = 256,
    calibration: int = 64,
    judged: int = 16,
    seed: int = 0,
) -> Model:
    """Return the best trim of a model within a budget, not trained; `.candidates` has all that were tried.

    Importance is measured on `calibration` windows of `text`; then TPE proposes `trials` shapes whose parameters are
    within 5% of `params` (90M, 67%; auto: two thirds), and each is scored untrained, by its LM loss on `judged` other
    windows, none of which is among the validation windows of `corpus(text, ...)`. What it says is which trim is best,
    not which student is after training: that is what a search asks.

    Raises ValueError for a budget that no shape meets, and a text that is too short.
    """
    teacher = load(model)
    asked = SpaceConfig(budget=Budget(params=Target(target=params)))
    space = SearchSpace(derived(asked, teacher.config, teacher.config), teacher.config)
    # not on the windows that `corpus` gives for validation: what selects is not what reports
    windows = corpus(text, teacher, length=length, calibration=calibration, tokens=judged * length, seed=seed)
    importance, resolved = measure_importance(teacher, windows.calibration), resolve("auto")
    rows: list[dict] = []
    observed: list[Observation] = []
    best: tuple[float, Model] | None = None
    for _ in range(trials):
        architecture = propose(space, observed, sampler="tpe", seed=seed)
        if architecture is None:
            break
        shape = Shape(architecture, teacher.config)
        student = trim(teacher, shape, importance)
        losses = lm_losses(student.model, windows.train, resolved)
        mean, error, n = mean_and_error(losses)
        observed.append(Observation(architecture, (mean,), "complete"))
        rows.append({**_described(shape), "lm_loss": mean, "lm_loss_stderr": error, "lm_loss_n": n})
        if best is None or mean < best[0]:
            best = mean, student
    assert best is not None
    chosen = best[1]
    chosen.candidates = pd.DataFrame(rows).sort_values("lm_loss", ignore_index=True)
    return chosen


def _described(shape: Shape) -> dict[str, object]:
    architecture = shape.architecture
    sizes = {name: getattr(architecture, name) for name in (*WIDTHS, "num_hidden_layers")}
    return {**sizes, "layers": np.array(architecture.layers), "params": shape.params}
