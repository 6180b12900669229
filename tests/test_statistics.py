"""Tests of pairs and of orders: exact where they can be, and right about chance."""

import itertools

import numpy as np
import pytest

from minitron_search.statistics import agreement, mcnemar


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


@pytest.mark.parametrize("n", [3, 4, 5])
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
