"""Tests of pairs and of orders: exact where they can be, and right about chance."""

import itertools

import numpy as np
import pytest
from scipy import stats

from minitron_search.evaluation.statistics import (
    FEWEST_FOR_TAU,
    agreement,
    chance_bar,
    clustered,
    compared,
    holm,
    interval,
    mcnemar,
    over_seeds,
    overlap,
    paired,
    standard_error,
)
from tests.tiny import over


def test_mcnemar_counts_what_only_one_gets_right() -> None:
    one, other = np.array([1, 1, 1, 1, 0, 1]), np.array([1, 0, 0, 0, 0, 1])
    assert mcnemar(one, other) == {"only_best": 3, "only_other": 0, "p": 2 / 8, "n": 6}
    assert mcnemar(one, one)["p"] == 1.0
    swapped = mcnemar(other, one)
    assert (swapped["only_best"], swapped["only_other"], swapped["p"]) == (0, 3, 2 / 8)


def test_mcnemar_is_right_about_chance() -> None:
    draw = np.random.default_rng(0)
    found = [mcnemar(draw.integers(0, 2, 60), draw.integers(0, 2, 60))["p"] < 0.05 for _ in range(400)]
    assert np.mean(found) < 0.07  # exact, and so conservative


@over([3, 4, 5])
def test_agreement_is_kendalls_by_hand_and_names_the_flips(n: int) -> None:
    names = [f"a{index}" for index in range(n)]
    before = list(range(n))
    for after in itertools.permutations(range(n)):
        found = agreement(before, after, names)
        pairs = list(itertools.combinations(range(n), 2))
        flipped = {frozenset((names[i], names[j])) for i, j in pairs if after[i] > after[j]}
        assert {frozenset(flip) for flip in found["flips"]} == flipped  # type: ignore[attr-defined]
        assert found["kendall"] == pytest.approx(1 - 2 * len(flipped) / len(pairs))
        distance = sum((a - b) ** 2 for a, b in zip(before, after, strict=True))
        assert found["spearman"] == pytest.approx(1 - 6 * distance / (n * (n * n - 1)))
        assert found["best_kept"] == (after[0] == 0)


def test_two_say_only_whether_they_changed_places_and_equals_have_no_order() -> None:
    found = agreement([1.0, 2.0], [2.0, 1.0], ["a", "b"])
    assert found["kendall"] is found["spearman_p"] is None
    assert (found["best_kept"], found["flips"]) == (False, [["b", "a"]])
    assert agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], ["a", "b", "c"])["kendall"] is None


def test_a_paired_p_is_scipys_permutation_test() -> None:
    draw = np.random.default_rng(0)
    for n in (3, 7, 10):
        one, other = draw.normal(0, 1, n), draw.normal(0.5, 1, n)
        expected = stats.permutation_test((other - one,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert paired(one, other)["p"] == pytest.approx(expected.pvalue)
    one, other = draw.normal(0, 1, 40), draw.normal(0.4, 1, 40)  # of 2 ** 40 assignments, some
    assert paired(one, other)["p"] == pytest.approx(stats.ttest_rel(one, other).pvalue, abs=0.01)


@over([8, 12, 16])
def test_one_in_twenty_equals_is_called_different(n: int) -> None:
    draw = np.random.default_rng(n)
    text = draw.normal(4, 1, (400 if n <= 12 else 150, n))  # what windows differ by is in both
    found = [paired(of + draw.normal(0, 0.1, n), of + draw.normal(0, 0.1, n))["p"] < 0.05 for of in text]
    assert 0.02 < np.mean(found) < 0.085


@over([4, 8, 32])
def test_intervals_hold_the_truth_nineteen_times_in_twenty(n: int) -> None:
    draw = np.random.default_rng(n)
    found = [interval(draw.normal(2, 3, n)) for _ in range(1500)]
    assert np.mean([low <= 2 <= high for low, high in found]) == pytest.approx(0.95, abs=0.015)
    values = draw.normal(0, 1, n)
    assert interval(values) == pytest.approx(stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values)))


def test_a_standard_error_is_that_of_a_bootstrap_over_windows() -> None:
    values = np.random.default_rng(0).gamma(2, 1, 200)
    drawn = stats.bootstrap((values,), np.mean, n_resamples=4000, rng=np.random.default_rng(1), method="percentile")
    assert standard_error(values) == pytest.approx(drawn.standard_error, rel=0.05)
    assert interval(values) == pytest.approx(tuple(drawn.confidence_interval), rel=0.02)


def test_twins_are_one_draw_and_not_two() -> None:
    draw = np.random.default_rng(0)
    assert clustered(np.array([1.0, 2.0, 5.0, 4.0]), np.array([7, 3, 7, 3])).tolist() == [3.0, 3.0]
    uneven = clustered(np.array([1.0, 2.0, 6.0]), np.array([0, 0, 1]))
    assert uneven.mean() == pytest.approx(3.0) and len(uneven) == 2
    twin = np.repeat(np.arange(9), 2)
    tests = {"twins": [], "questions": []}  # type: ignore[var-annotated]
    for _ in range(300):
        shared = draw.normal(0, 1, 9).repeat(2)  # both twins agree
        difference = shared + draw.normal(0, 0.3, 18)
        by_twin = clustered(difference, twin)
        tests["twins"].append(paired(np.zeros(9), by_twin)["p"] < 0.05)
        tests["questions"].append(abs(difference.mean() / standard_error(difference)) > 2.1)
    assert np.mean(tests["twins"]) < 0.08 < 0.12 < np.mean(tests["questions"])


def test_what_is_compared_has_its_interval_and_one_pair_has_none() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(0, 1, 20), draw.normal(3, 1, 20)
    found = compared(one, other)
    assert found["low"] < found["difference"] < found["high"] and found["p"] < 0.001
    assert found["difference"] == pytest.approx((other - one).mean())
    assert np.isnan(compared(one[:1], other[:1])["low"])


def test_seeds_are_compared_by_a_paired_t_test() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(0, 1, 4), draw.normal(1, 1, 4)
    expected = stats.ttest_rel(other, one)
    found = over_seeds(other - one)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval()))
    assert (over_seeds(np.zeros(3))["p"], over_seeds(np.ones(3))["p"]) == (1.0, 0.0)


def test_holm_by_hand() -> None:
    assert holm([]) == []
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 0.04 * 1 comes after 0.03 * 2
    assert holm([0.9, 0.6]) == [1.0, 1.0]


@over([(4, 1), (5, 2), (6, 3), (5, 4)])
def test_overlap_is_that_of_every_order_by_brute_force(n: int, k: int) -> None:
    orders = [np.array(order, float) for order in itertools.permutations(range(n))]
    shared = np.array([len({*order.argsort()[:k]} & {*range(k)}) for order in orders])
    for order, of in list(zip(orders, shared, strict=True))[:: max(1, len(orders) // 30)]:
        found = overlap(np.arange(n, dtype=float), order, k)
        assert (found["shared"], found["by_chance"]) == (of, pytest.approx(shared.mean()))
        assert found["p"] == pytest.approx((shared >= of).mean())


def test_regret_is_what_the_early_choice_costs() -> None:
    found = agreement([1.0, 2.0, 3.0], [4.5, 4.0, 4.2], ["a", "b", "c"])
    assert found["regret"] == pytest.approx(0.5) and not found["best_kept"]
    assert agreement([1.0, 2.0], [1.0, 2.0], ["a", "b"])["regret"] == 0


def test_tau_has_an_interval_where_there_are_enough() -> None:
    draw = np.random.default_rng(0)
    truth = 2 / np.pi * np.arcsin(0.8)  # of a normal whose correlation is 0.8
    held = []
    for _ in range(40):
        one = draw.normal(0, 1, 12)
        low, high = agreement(one, 0.8 * one + 0.6 * draw.normal(0, 1, 12), list(map(str, one)))["kendall_interval"]  # type: ignore[misc]
        held.append(low <= truth <= high)
    assert np.mean(held) > 0.85
    few = list(range(FEWEST_FOR_TAU - 1))
    assert agreement(few, few, list(map(str, few)))["kendall_interval"] is None
    enough = list(range(FEWEST_FOR_TAU))
    assert agreement(enough, enough[::-1], list(map(str, enough)))["kendall_interval"] == [-1.0, -1.0]


@over([(50, 100, False), (58, 100, False), (59, 100, True), (2, 2, False)])
def test_an_accuracy_is_above_chance_from_where_a_coin_gets_one_time_in_twenty(right: int, n: int, above: bool) -> None:
    assert (right / n > chance_bar(n)) is above
    assert stats.binom.sf(right - 1, n, 0.5) <= 0.05 if above else stats.binom.sf(right - 1, n, 0.5) > 0.05
