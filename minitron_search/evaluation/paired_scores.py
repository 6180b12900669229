"""Two architectures compared on the same windows, questions and seeds, from what their trials logged."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minitron_search.evaluation.statistics import clustered, compared, mcnemar, over_seeds
from minitron_search.records.metrics import METRICS, compared_metrics

Row = Mapping[str, Any]  # of the trials table
Scores = Mapping[tuple[str, int], Mapping[str, Any]]  # `RunDirectory.scores`


def by_architecture(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each architecture, in the order given."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["architecture"], []).append(row)
    return groups


def against(baseline: Sequence[Row], other: Sequence[Row], scores: Scores) -> dict[str, dict[str, Any]]:
    """Test `other` minus `baseline` (a row per seed each) on every metric: `statistics.compared` of means over the
    seeds that both have.

    Its noise is that of windows, or of twin questions: these very students on other text. Where the seeds differ,
    `over_seeds` has the noise of training: other students on this text. A difference to trust withstands both. `seeds`
    counts them. With one seed, the p of an accuracy is McNemar's, over questions. Returns {} where no seed is shared;
    a metric that an older version did not log is left out.
    """
    ours, theirs = (
        {row["seed"]: scores.get((row["trial"], row["rung"]), {}) for row in rows} for rows in (baseline, other)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    tests: dict[str, dict[str, Any]] = {}
    for metric in compared_metrics():
        values = METRICS[metric].values
        if not seeds or any(values not in logged[seed] for logged in (ours, theirs) for seed in seeds):
            continue
        a, b = (np.array([logged[seed][values] for seed in seeds], float) for logged in (ours, theirs))  # (seeds, n)
        test: dict[str, Any] = compared(*(units(metric, side.mean(0), ours[seeds[0]]) for side in (a, b)))
        if len(seeds) == 1 and _is_right_or_wrong(metric, a, b):  # means over several seeds are neither
            test |= mcnemar(a[0], b[0])
        test["seeds"] = len(seeds)
        seed_differences = (b - a).mean(1)
        if np.ptp(seed_differences) > 1e-12:  # an untrained trim is the same with every seed: no noise to measure
            test["over_seeds"] = over_seeds(seed_differences)
        tests[metric] = test
    return tests


def _is_right_or_wrong(metric: str, *values: np.ndarray) -> bool:
    return METRICS[metric].independent == "question" and set(np.unique(values)) <= {0.0, 1.0}


def units(metric: str, values: np.ndarray, scores: Mapping[str, Any]) -> np.ndarray:
    """Return what is independent among a metric's values: windows as they are, questions by their twin pairs."""
    if METRICS[metric].independent == "window" or "winogrande_twin" not in scores:
        return values
    return clustered(values, np.array(scores["winogrande_twin"]))


def pooled(rows: Sequence[Row], metric: str, scores: Scores) -> np.ndarray | None:
    """Return the independent values of a metric, each the mean over the seeds of `rows`, or None where a row logged
    none."""
    values = METRICS[metric].values
    logged = [scores.get((row["trial"], row["rung"]), {}) for row in rows]
    if any(values not in line for line in logged):
        return None
    return units(metric, np.mean([line[values] for line in logged], axis=0), logged[0])
