"""A metric on which the teacher is not clearly above chance is flagged, and ranks nothing."""

from collections.abc import Iterable
from typing import Any

from scipy import stats

from minitron_search.evaluation.paired_scores import Row, Scores, pooled
from minitron_search.evaluation.statistics import LEVEL, chance_bar, mean_and_error
from minitron_search.records.directory import RunDirectory


def chances(teacher: Row, scores: Scores) -> dict[str, dict[str, Any]]:
    """Of the teacher's Winogrande accuracy and margin: value, standard error, n, the `bar` it must pass, at_chance.

    The bar is what chance alone passes one time in twenty: of accuracy `statistics.chance_bar`, of the margin
    Student's one-sided test of "its mean is 0", over twins.
    """
    acc, n = teacher["winogrande_acc"], teacher["winogrande_n"]
    margin, error, units = teacher["winogrande_margin"], teacher["winogrande_margin_stderr"], n
    if (values := pooled([teacher], "winogrande_margin", scores)) is not None:
        margin, error, units = mean_and_error(values)
    bar = float(stats.t.ppf(1 - LEVEL, units - 1)) * error if units > 1 else None
    return {
        "winogrande_acc": {"value": acc, "stderr": teacher["winogrande_acc_stderr"], "n": n, "bar": chance_bar(n),
                           "at_chance": not acc > chance_bar(n)},
        "winogrande_margin": {"value": margin, "stderr": error, "n": units, "bar": bar,
                              "at_chance": bar is None or not margin > bar},
    }  # fmt: skip


def refuse_at_chance(run: RunDirectory, teacher: str, objectives: Iterable[str]) -> None:
    """Raises ValueError where a search would rank by what trial `teacher`, which was scored, gets no better than by
    chance: before a trial is paid for."""
    lines = run.metrics(teacher)
    row = next(line for line in lines if line["kind"] == "rung")
    found = chances(row, {(teacher, line["rung"]): line for line in lines if line["kind"] == "scores"})
    for objective in objectives:
        if objective in found and found[objective]["at_chance"]:
            of = found[objective]
            raise ValueError(
                f"search.objective: {objective} would rank by chance: the teacher's own is {of['value']:.3f} +- "
                f"{of['stderr']:.3f} (n = {of['n']}), not clearly above 0 (one-sided, p < {LEVEL}); valid: lm_loss or "
                "kl, or more examples in winogrande.source"
            )
