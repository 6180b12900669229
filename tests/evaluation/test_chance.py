"""A metric on which the teacher is not clearly above chance is flagged: the bars are those of the textbook tests."""

import numpy as np
import pytest
from scipy import stats

from minitron_search.evaluation.chance import chances


def said_of(margins: np.ndarray, correct: int) -> dict[str, dict]:
    """Return what is said of a teacher with these margins, on questions without twins."""
    row = {"trial": "teacher", "rung": 0, "winogrande_acc": correct / len(margins), "winogrande_acc_stderr": 0.1,
           "winogrande_n": len(margins), "winogrande_margin": 0.0, "winogrande_margin_stderr": 0.0}  # fmt: skip
    return chances(row, {("teacher", 0): {"winogrande_margin": margins.tolist()}})


def test_a_margin_is_at_chance_where_students_one_sided_test_does_not_reject() -> None:
    draw, flagged = np.random.default_rng(0), 0
    for _ in range(200):
        margins = draw.normal(draw.uniform(-0.2, 1.2), 1.0, draw.integers(2, 12))
        found = said_of(margins, 1)["winogrande_margin"]
        by_scipy = stats.ttest_1samp(margins, 0, alternative="greater")
        error = margins.std(ddof=1) / np.sqrt(len(margins))
        assert found["bar"] == pytest.approx(stats.t.isf(0.05, len(margins) - 1) * error)
        assert found["value"] == pytest.approx(margins.mean()) and found["n"] == len(margins)
        assert found["at_chance"] == (by_scipy.pvalue >= 0.05)
        flagged += found["at_chance"]
    assert 20 < flagged < 180, "both answers are drawn"


def test_one_question_has_no_bar_and_is_at_chance() -> None:
    found = said_of(np.array([9.0]), 1)["winogrande_margin"]
    assert found["bar"] is None and found["at_chance"]


def test_an_accuracy_is_at_chance_up_to_the_most_that_a_coin_reaches_in_one_run_of_twenty() -> None:
    for n in (8, 20, 57, 200):
        for correct in range(n + 1):
            more_often = stats.binomtest(correct, n, 0.5, alternative="greater").pvalue < 0.05
            assert said_of(np.linspace(-1, 1, n), correct)["winogrande_acc"]["at_chance"] == (not more_often), (
                n,
                correct,
            )
