"""How sure the search may be of its winner, from what its trials logged: evidence.json.

Trials are compared pair by pair, on the same validation windows and Winogrande examples, and at equal tokens only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minitron_search.evaluation.chance import chances
from minitron_search.evaluation.controls import controls
from minitron_search.evaluation.evidence_sentences import words
from minitron_search.evaluation.paired_scores import Row, Scores, against, by_architecture, pooled
from minitron_search.evaluation.statistics import LEVEL, agreement, holm, mean_and_error
from minitron_search.records.directory import RunDirectory

SIGN = {"lm_loss": 1.0, "kl": 1.0, "winogrande_margin": -1.0}  # of an objective that is minimised
METRICS = ("lm_loss", "kl", "winogrande_margin", "winogrande_acc")


def evidence(run: RunDirectory, objective: str) -> dict[str, Any]:
    """What evidence.json holds.

    finalists -> of the last rung, best first: every architecture's mean over its seeds, its standard error over
    windows (twins, of a margin) and over seeds, and the paired tests of every metric against the best; seeds -> the
    standard deviation of one architecture's seeds, pooled, and its degrees of freedom; rungs -> how well each rung's
    order foretold the next, and the last one the retrained students'; at_chance -> whether the teacher is, by metric
    (null where there is none); controls -> what is beside the promoted; words: all in sentences.
    """
    rows = [row for row in run.read_trials() if row["lm_loss"] is not None]
    scores = run.scores()
    search = [row for row in rows if row["arm"] == "search" and row["status"] != "failed"]
    retrained = [row for row in rows if row["arm"] == "retrained"]
    teacher = next((row for row in rows if row["arm"] == "teacher"), None)
    last = [row for row in search if row["rung"] == max(row["rung"] for row in search)]
    found = {
        "objective": objective,
        "finalists": finalists(last, scores, objective),
        "seeds": seed_spread(last, objective),
        "rungs": _rungs(search, retrained, scores, objective),
        "at_chance": None if teacher is None else chances(teacher, scores),
        "controls": controls(run, rows, scores),
    }
    return {**found, "words": list(words(found))}


def finalists(rows: Sequence[Row], scores: Scores, objective: str) -> list[dict[str, Any]]:
    """The architectures of `rows`, a row per trial, of one rung, best first, as `evidence` gives them; those that were
    promoted are before the others, whose fewer seeds may flatter them.

    `<metric>_against_best` is `pairing.against`, a difference the other's minus the best's, with `p_holm`, corrected
    for as many others. The best was chosen by the same windows, so that its lead is a little flattered; what the
    correction does hold to is in `not_worse`.
    """
    by = by_architecture(rows)
    order = sorted(by, key=lambda name: (by[name][0].get("status") != "promoted", _mean(by[name], objective)))
    found = []
    for name in order:
        values = np.array([row[objective] for row in by[name]])
        over_units = pooled(by[name], objective, scores)
        about: dict[str, Any] = {
            "architecture": name,
            "trials": [row["trial"] for row in by[name]],
            objective: float(values.mean()),
            "stderr": None if over_units is None else mean_and_error(over_units)[1],
            "seeds": len(values),
            "error_over_seeds": mean_and_error(values)[1] if len(values) > 1 else None,
        }
        if name != order[0]:
            tests = against(by[order[0]], by[name], scores)
            about |= {f"{metric}_against_best": test for metric, test in tests.items()}
        found.append(about)
    for metric in METRICS:
        tested = [about[key] for about in found if (key := f"{metric}_against_best") in about]
        for test, p in zip(tested, holm([test["p"] for test in tested]), strict=True):
            test["p_holm"] = p
    return found


def not_worse(rows: Sequence[Row], scores: Scores, objective: str) -> list[str]:
    """The architectures of `rows` (of the last rung, a row per trial) that are not told apart from the best, best
    first: paired over windows on the seeds both have, at the 5% level after Holm's correction.

    The one that is best on all text of this kind is left out at most one time in forty, however many there are: among
    m that tie it must lose, by two-sided p < 0.05 / (m - 1), to one of m - 1 others. One without logged values is
    kept. `scores` are `RunDirectory.scores()`.
    """
    return [about["architecture"] for about in finalists(rows, scores, objective) if not is_worse(about, objective)]


def is_worse(about: dict[str, Any], objective: str) -> bool:
    test = about.get(f"{objective}_against_best")
    return test is not None and test["p_holm"] < LEVEL and SIGN[objective] * test["difference"] > 0


def seed_spread(rows: Sequence[Row], objective: str) -> dict[str, float] | None:
    """Of the objective at one rung; None where no architecture has two seeds."""
    of = [np.array([row[objective] for row in same]) for same in by_architecture(rows).values() if len(same) > 1]
    freedom = sum(len(values) - 1 for values in of)
    if not freedom:
        return None
    return {"sd": float((sum(((v - v.mean()) ** 2).sum() for v in of) / freedom) ** 0.5), "freedom": freedom}


def _rungs(
    search: Sequence[Row], retrained: Sequence[Row], scores: Scores, objective: str
) -> list[dict[str, Any]]:  # fmt: skip
    """The order of each rung against that of the next, over the architectures that reached both (`n`, of `before_n`)
    and the seeds that all of them ran with: a finalist's further seeds were not there to be ranked by.

    `regret` is tested on the same windows: `regret_p` is the p of "the early choice is as good as the best there".
    """
    everyone = by_architecture(search).values()
    shared = set.intersection(*({row["seed"] for row in rows} for rows in everyone)) if everyone else set()
    ranked = [row for row in search if row["seed"] in shared or not shared]
    levels = [
        (f"rung {rung}", by_architecture(row for row in ranked if row["rung"] == rung))
        for rung in sorted({row["rung"] for row in search})
    ]  # fmt: skip
    steps = list(zip(levels, levels[1:], strict=False))
    if retrained and search:  # whom to retrain was decided by every seed
        name, last = levels[-1][0], max(row["rung"] for row in search)
        chosen_by = by_architecture(row for row in search if row["rung"] == last)
        steps.append(((name, chosen_by), ("retrained", by_architecture(retrained))))
    found = []
    for (before, rows), (after, others) in steps:
        both = sorted(rows.keys() & others.keys())
        if len(both) > 1:
            one, other = ([_mean(of[name], objective) for name in both] for of in (rows, others))
            chosen, best = both[int(np.argmin(one))], both[int(np.argmin(other))]
            test = against(others[best], others[chosen], scores).get(objective) if chosen != best else None
            found.append({
                "before": before, "after": after, "before_n": len(rows), **agreement(one, other, both),
                "chosen": chosen, "best": best, "regret_p": test and test["p"],
            })  # fmt: skip
    return found


def _mean(rows: Sequence[Row], objective: str) -> float:
    return SIGN[objective] * sum(row[objective] for row in rows) / len(rows)
