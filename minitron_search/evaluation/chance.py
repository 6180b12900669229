"""Flag every metric on which the teacher is not clearly above chance; such a metric ranks nothing."""

from collections.abc import Iterable
from typing import Any

import scipy  # its statistics only where they are asked for: half a second of every process

from minitron_search.evaluation.paired_scores import Row, Scores, pooled
from minitron_search.evaluation.statistics import LEVEL, chance_bar, mean_and_error
from minitron_search.records.directory import RunDirectory


def chances(teacher: Row, scores: Scores) -> dict[str, dict[str, Any]]:
    """Test the teacher's Winogrande accuracy and margin against chance: value, stderr, n, the `bar` to pass, at_chance.

    Chance alone passes the bar one time in twenty: for the accuracy it is `statistics.chance_bar`, for the margin
    Student's one-sided test of "its mean is 0", over twin pairs.
    """
    acc, n = teacher["winogrande_acc"], teacher["winogrande_n"]
    margin, error, pairs = teacher["winogrande_margin"], teacher["winogrande_margin_stderr"], n
    if (values := pooled([teacher], "winogrande_margin", scores)) is not None:
        margin, error, pairs = mean_and_error(values)
    bar = float(scipy.stats.t.ppf(1 - LEVEL, pairs - 1)) * error if pairs > 1 else None
    return {
        "winogrande_acc": {"value": acc, "stderr": teacher["winogrande_acc_stderr"], "n": n, "bar": chance_bar(n),
                           "at_chance": not acc > chance_bar(n)},
        "winogrande_margin": {"value": margin, "stderr": error, "n": pairs, "bar": bar,
                              "at_chance": bar is None or not margin > bar},
    }  # fmt: skip


def refuse_at_chance(run_dir: RunDirectory, teacher: str, objectives: Iterable[str]) -> None:
    """Refuse, before a trial is paid for, a search that would rank by a metric on which the teacher is at chance.

    teacher: the id of its trial, which was scored. Raises ValueError.
    """
    lines = run_dir.metrics(teacher)
    row = next(line for line in lines if line["kind"] == "rung")
    tested = chances(row, {(teacher, line["rung"]): line for line in lines if line["kind"] == "scores"})
    for objective in objectives:
        if objective in tested and tested[objective]["at_chance"]:
            test = tested[objective]
            raise ValueError(
                f"search.objective: {objective} would rank by chance: the teacher's is {test['value']:.3f} +- "
                f"{test['stderr']:.3f} (n = {test['n']}), which is not clearly above 0 (one-sided, p < {LEVEL}); "
                "valid: lm_loss or kl, or more examples in winogrande.source"
            )
