"""Errors and tests of scores that were taken on the same windows and examples.

What is independent is a window (its tokens are not) and a pair of twin questions (its two are not): errors and tests
are over those.
"""

from collections.abc import Sequence

import numpy as np
import scipy  # its statistics only where they are asked for: half a second of every process

EXACT = 12  # up to this n every assignment of signs is tried, beyond it DRAWS random ones
DRAWS = 10_000
LEVEL = 0.05
# A percentile bootstrap of Kendall's tau covers 93 to 97% of the time from 8 on, whatever the tau, and 74% at 6 where
# the tau is high.
FEWEST_FOR_TAU = 8
RESAMPLES = 1_000
TOP = (1, 3, 5)


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of n > 1 values."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def mean_and_error(values: np.ndarray) -> tuple[float, float, int]:
    """Return (mean, its standard error, n); the error is nan for n = 1."""
    n = len(values)
    return float(values.mean()), standard_error(values) if n > 1 else float("nan"), n


def paired(better: np.ndarray, worse: np.ndarray) -> dict[str, float]:
    """Return the mean of worse - better over n pairs, its standard error, and the two-sided p of "no difference".

    p is Fisher's randomisation test over signs; the observed signs count as one of the draws, so that p is never 0.
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


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return Student's 95% interval of the mean of n > 1 values.

    It is no bootstrap: resampling a few windows makes the interval too narrow. Over 300 draws of a normal the
    percentile bootstrap, BCa and this one cover 74, 75 and 93% for n = 4, 88, 88 and 94% for 8, 92, 93 and 94% for 32;
    for an exponential, 89, 91 and 90% for 32.
    """
    half = float(scipy.stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * standard_error(values)
    return float(values.mean()) - half, float(values.mean()) + half


def compared(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return `paired` with `low` and `high`, the 95% interval of the mean of other - one."""
    low, high = interval(other - one) if len(one) > 1 else (float("nan"), float("nan"))
    return {**paired(one, other), "low": low, "high": high}


def over_seeds(differences: np.ndarray) -> dict[str, float]:
    """Return the mean of n > 1 differences, one a seed, with Student's interval and two-sided p. The signs of 2 to 5
    seeds could not reach p < 0.05 whatever they are; this assumes that seeds scatter normally."""
    mean, stderr, n = mean_and_error(differences)
    low, high = interval(differences)
    p = float(2 * scipy.stats.t.sf(abs(mean) / stderr, n - 1)) if stderr else float(mean == 0)
    return {"difference": mean, "stderr": stderr, "p": p, "n": n, "low": low, "high": high}


def clustered(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return one value of each cluster, scaled so that their mean is that of the n values: clusters are independent
    where the values inside one are not. clusters: (n,), equal numbers belong together."""
    _, place = np.unique(clusters, return_inverse=True)
    sums = np.bincount(place, weights=values)
    return sums * len(sums) / len(values)


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p of several tests, each corrected for there being several (Holm, 1979), in the order given."""
    adjusted, most = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        most = max(most, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = most
    return adjusted


def chance_bar(n: int, guess: float = 0.5) -> float:
    """Return the share of `n` questions that guessing passes at most one time in twenty, where a guess is right with
    probability `guess`. It is binomial: the sample's standard error is 0 for a handful that happen to be all right."""
    return float(scipy.stats.binom.ppf(1 - LEVEL, n, guess)) / n


def mcnemar(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Test which of two is right more often, over n examples (0 or 1): the exact two-sided p of "no difference" from
    the examples that only one of them gets right."""
    only_one, only_other = int((one > other).sum()), int((other > one).sum())
    p = float(scipy.stats.binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0
    return {"only_best": only_one, "only_other": only_other, "p": p, "n": len(one)}


def agreement(before: Sequence[float], after: Sequence[float], names: Sequence[str]) -> dict[str, object]:
    """Measure how well the order of n values predicted the order of n others, lower is better.

    Returns Kendall's tau-b and Spearman's rho with their p, None for n < 3, where agreement by chance cannot be told;
    tau's 95% interval over resampled names, None for n < `FEWEST_FOR_TAU`; whether the best stayed the best, and
    `regret`, how much worse than the best of `after` the best of `before` is there; `top`: `overlap` of the first 1, 3,
    5; and every pair whose order flipped, widest first.
    """
    one, other = np.asarray(before, float), np.asarray(after, float)
    flips = [
        (abs(other[i] - other[j]), names[i], names[j])
        for i in range(len(one)) for j in range(i)
        if (one[i] - one[j]) * (other[i] - other[j]) < 0
    ]  # fmt: skip
    result: dict[str, object] = {
        "n": len(one),
        "best_kept": bool(one.argmin() == other.argmin()),
        "regret": float(other[one.argmin()] - other.min()),
        "top": [overlap(one, other, k) for k in TOP if k < len(one)],
        "flips": [[a, b] for _, a, b in sorted(flips)[::-1]],
    }
    defined = len(one) > 2 and len(set(one)) > 1 and len(set(other)) > 1
    for name, test in (("kendall", scipy.stats.kendalltau), ("spearman", scipy.stats.spearmanr)):
        value, p = test(one, other) if defined else (None, None)
        result[name] = None if value is None else float(value)
        result[f"{name}_p"] = None if p is None else float(p)
    result["kendall_interval"] = tau_interval(one, other) if defined and len(one) >= FEWEST_FOR_TAU else None
    return result


def overlap(before: np.ndarray, after: np.ndarray, k: int) -> dict[str, float]:
    """Return how many of the k lowest of `before` are among the k lowest of `after`, how many chance would leave there,
    and the one-sided p of as many or more (hypergeometric)."""
    shared = len({*np.argsort(before, kind="stable")[:k]} & {*np.argsort(after, kind="stable")[:k]})
    p = float(scipy.stats.hypergeom.sf(shared - 1, len(before), k, k))
    return {"k": k, "shared": shared, "by_chance": k * k / len(before), "p": p}


def tau_interval(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Return the 2.5% and 97.5% quantile of Kendall's tau-b over resampled pairs."""
    signs = [np.sign(np.subtract.outer(values, values)) for values in (one, other)]
    generator, taus = np.random.default_rng(0), []
    for drawn in generator.integers(0, len(one), (RESAMPLES, len(one))):
        a, b = (sign[np.ix_(drawn, drawn)] for sign in signs)
        pairs = (a * a).sum() * (b * b).sum()
        if pairs:  # else every pair of this sample is a tie
            taus.append((a * b).sum() / pairs**0.5)
    return [float(value) for value in np.percentile(taus, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])]
