"""Which architectures of a space the engines take that serve students: counted, or kept alone (`space.deployable`)."""

from collections.abc import Sequence

import numpy as np
from transformers import PretrainedConfig

from minitron_search.models.architecture import Architecture
from minitron_search.models.engines import ENGINES, Students, Verdict, engines_of, judge, students_of


def verdicts(config: PretrainedConfig, points: np.ndarray, engines: Sequence[str] = ()) -> list[Verdict]:
    """Return what each of `engines` (all, if it names none) takes of the points, rows of `SearchSpace.points`."""
    students = _students(config, points)
    return [judge(engine, students) for engine in engines_of(engines or tuple(ENGINES))]


def deployable(config: PretrainedConfig, points: np.ndarray, engines: Sequence[str]) -> np.ndarray:
    """Return the points that every engine of `engines` takes. Raises ValueError, with the reasons, where none is."""
    if not engines:
        return points
    judged = verdicts(config, points, engines)
    taken = np.logical_and.reduce([verdict.taken for verdict in judged])
    if not taken.any():
        raise ValueError(f"space.deployable: {', '.join(engines)}: nothing is left of the {len(points):,} "
                         f"architectures in budget: {'; '.join(map(str, judged))}; valid: axes with architectures that "
                         f"{'it takes' if len(engines) == 1 else 'they all take'}, or other engines")  # fmt: skip
    return points[taken]


def why_not(config: PretrainedConfig, architecture: Architecture, engines: Sequence[str]) -> str | None:
    """Return which of `engines` does not take the architecture, and why; None where they all do."""
    shape = np.array([[architecture.hidden_size, architecture.intermediate_size, architecture.num_attention_heads]])
    student = students_of(config, shape, [architecture.layers], np.zeros(1, int))
    for engine in engines_of(engines):
        if reason := judge(engine, student).reason:
            return f"{engine.name} does not take it: {reason}"
    return None


def _students(config: PretrainedConfig, points: np.ndarray) -> Students:
    depth = config.num_hidden_layers
    codes, which = np.unique(points[:, 4] * depth + points[:, 5], return_inverse=True)
    kept = []
    for length, start in (divmod(code, depth) for code in codes.tolist()):
        kept.append([layer for layer in range(depth) if not start <= layer < start + length])
    return students_of(config, points, kept, which)
