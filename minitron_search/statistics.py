"""Errors and tests of scores that were taken on the same windows and examples."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

EXACT = 12  # up to this n every assignment of signs is tried, beyond it DRAWS random ones
DRAWS = 10_000


def standard_error(values: np.ndarray) -> float:
    """Of the mean of n > 1 values."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def mean_and_error(values: np.ndarray) -> tuple[float, float, int]:
    """(mean, its standard error, n); the error is nan for n = 1."""
    n = len(values)
    return float(values.mean()), standard_error(values) if n > 1 else float("nan"), n


def paired(better: np.ndarray, worse: np.ndarray) -> dict[str, float]:
    """Mean of worse - better over n pairs, its standard error, and the two-sided p of "no difference".

    The observed signs count as one of the draws, so that p is never 0.
    """
    differences = worse - better
    mean, stderr, n = mean_and_error(differences)
    moving = differences[differences != 0]
    if len(moving) <= EXACT:
        signs = 1.0 - 2.0 * (np.arange(2 ** len(moving))[:, None] >> np.arange(len(moving)) & 1)
        p = float((np.abs(signs @ moving) >= abs(moving.sum()) * (1 - 1e-12)).mean())
    else:
        generator = np.random.default_rng(0)
        extreme = 0
        for _ in range(DRAWS // 500):  # in parts: 500 x n signs at once
            signs = generator.integers(0, 2, (500, len(moving)), dtype=np.int8) * 2.0 - 1.0
            extreme += int((np.abs(signs @ moving) >= abs(moving.sum()) * (1 - 1e-12)).sum())
        p = (extreme + 1) / (DRAWS + 1)
    return {"difference": mean, "stderr": stderr, "p": p, "n": n}


def mcnemar(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Which of two is right more often, n examples each (0 or 1): the exact two-sided p of "no difference" from the
    examples that only one of them gets right."""
    only_one, only_other = int((one > other).sum()), int((other > one).sum())
    p = float(stats.binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0
    return {"only_best": only_one, "only_other": only_other, "p": p, "n": len(one)}


def agreement(before: Sequence[float], after: Sequence[float], names: Sequence[str]) -> dict[str, object]:
    """How well the order of n values foretold the order of n others, lower is better: Kendall's tau-b and Spearman's
    rho with their p, whether the best stayed the best, and every pair whose order flipped, widest first. The
    correlations are None for n < 3, which cannot disagree with chance."""
    one, other = np.asarray(before, float), np.asarray(after, float)
    kept = bool(one.argmin() == other.argmin())
    flips = [
        (abs(other[i] - other[j]), names[i], names[j])
        for i in range(len(one)) for j in range(i)
        if (one[i] - one[j]) * (other[i] - other[j]) < 0
    ]  # fmt: skip
    found: dict[str, object] = {"n": len(one), "best_kept": kept, "flips": [[a, b] for _, a, b in sorted(flips)[::-1]]}
    for name, test in (("kendall", stats.kendalltau), ("spearman", stats.spearmanr)):
        defined = len(one) > 2 and len(set(one)) > 1 and len(set(other)) > 1
        value, p = test(one, other) if defined else (None, None)
        found[name] = None if value is None else float(value)
        found[f"{name}_p"] = None if p is None else float(p)
    return found
