"""Two architectures on the same windows, examples and seeds, from what their trials logged."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minitron_search.evaluation.statistics import clustered, compared, mcnemar, over_seeds

Row = Mapping[str, Any]
Scores = Mapping[tuple[str, int], Mapping[str, Any]]  # `RunDirectory.scores`
OF_WINDOWS = ("lm_loss", "kl")


def by_architecture(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["architecture"], []).append(row)
    return found


def against(one: Sequence[Row], other: Sequence[Row], scores: Scores) -> dict[str, dict[str, Any]]:
    """By metric, `other` minus `one` (a row per seed each): `statistics.compared` of means over the seeds both have.

    That is noise of windows, or of twin questions: these very students on other text. Where seeds differ, `over_seeds`
    is the noise of training: other students on this text. A difference to be trusted withstands both. `seeds` says
    how many. Of accuracy, one seed's p is McNemar's, over questions. Empty where they share no seed; a metric that an
    older version did not log is left out.
    """
    ours, theirs = ({row["seed"]: scores.get((row["trial"], row["rung"]), {}) for row in rows} for rows in (one, other))
    seeds = sorted(ours.keys() & theirs.keys())
    found: dict[str, dict[str, Any]] = {}
    for metric, name in (("lm_loss", "lm_loss"), ("kl", "kl"), ("winogrande_margin", "winogrande_margin"),
                         ("winogrande_acc", "winogrande_correct")):  # fmt: skip
        if not seeds or any(name not in of[seed] for of in (ours, theirs) for seed in seeds):
            continue
        a, b = (np.array([of[seed][name] for seed in seeds], float) for of in (ours, theirs))  # (seeds, n)
        mean_a, mean_b = (units(metric, values.mean(0), ours[seeds[0]]) for values in (a, b))
        test: dict[str, Any] = compared(mean_a, mean_b)
        if metric == "winogrande_acc" and len(seeds) == 1:  # of several seeds they are no more 0 or 1
            test |= mcnemar(a[0], b[0])
        test["seeds"] = len(seeds)
        apart = (b - a).mean(1)
        if np.ptp(apart) > 1e-12:  # an untrained trim is the same with every seed: nothing of theirs to measure
            test["over_seeds"] = over_seeds(apart)
        found[metric] = test
    return found


def units(metric: str, values: np.ndarray, scores: Mapping[str, Any]) -> np.ndarray:
    """What of a metric's values is independent: windows as they are, Winogrande examples by twins."""
    if metric in OF_WINDOWS or "winogrande_twin" not in scores:
        return values
    return clustered(values, np.array(scores["winogrande_twin"]))


def pooled(rows: Sequence[Row], metric: str, scores: Scores) -> np.ndarray | None:
    """Independent values of a metric, each the mean over the seeds of `rows`; None where one logged none."""
    logged = [scores.get((row["trial"], row["rung"]), {}) for row in rows]
    if any(metric not in of for of in logged):
        return None
    return units(metric, np.mean([of[metric] for of in logged], axis=0), logged[0])
