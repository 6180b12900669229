"""How sure the search may be of its winner, from what its trials logged: evidence.json.

Trials are compared pair by pair, on the same validation windows and Winogrande questions, and at equal tokens only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minitron_search.evaluation.chance import chances
from minitron_search.evaluation.controls import controls
from minitron_search.evaluation.evidence_sentences import sentences
from minitron_search.evaluation.paired_scores import Row, Scores, against, by_architecture, pooled
from minitron_search.evaluation.statistics import LEVEL, agreement, holm, mean_and_error
from minitron_search.records.directory import RunDirectory
from minitron_search.records.metrics import METRICS, scored
from minitron_search.records.summary import against_trims


def evidence(run_dir: RunDirectory, objective: str) -> dict[str, Any]:
    """Return what evidence.json holds.

    finalists: the architectures of the last rung, best first: each one's mean over its seeds, its standard error over
    windows (twin pairs, for a margin) and over seeds, and the paired tests of every metric against the best; seeds: the
    standard deviation between the seeds of one architecture, pooled, and its degrees of freedom; rungs: how well each
    rung's order predicted the next one's, and the last one that of the retrained students; at_chance: whether the
    teacher is, by metric (null without a teacher); controls: what stands beside the promoted; against_trims: every
    trained rung and retraining against its untrained trim (`summary.against_trims`); words: all of it in sentences.
    """
    rows = [row for row in run_dir.read_trials() if row["lm_loss"] is not None]
    scores = run_dir.scores()
    search = [row for row in rows if row["arm"] == "search" and row["status"] != "failed"]
    retrained = [row for row in rows if row["arm"] == "retrained"]
    teacher = next((row for row in rows if row["arm"] == "teacher"), None)
    last = [row for row in search if row["rung"] == max(row["rung"] for row in search)]
    entries = {
        "objective": objective,
        "finalists": finalists(last, scores, objective),
        "seeds": seed_spread(last, objective),
        "rungs": _rung_agreement(search, retrained, scores, objective),
        "at_chance": None if teacher is None else chances(teacher, scores),
        "controls": controls(run_dir, rows, scores),
        "against_trims": against_trims(rows, scores),
    }
    return {**entries, "words": list(sentences(entries))}


def finalists(rows: Sequence[Row], scores: Scores, objective: str) -> list[dict[str, Any]]:
    """Compare the architectures of one rung (a row per trial), best first, as `evidence` gives them. Promoted ones come
    before the others, whose fewer seeds may flatter them.

    `<metric>_against_best` is `paired_scores.against`, the other's minus the best's, with `p_holm`, which is corrected
    for as many others. The best was chosen by the same windows, so its lead is a little flattered; `not_worse` says
    what the correction does guarantee.
    """
    groups = by_architecture(rows)
    promoted = {name for name, same in groups.items() if same[0].get("status") == "promoted"}
    order = sorted(groups, key=lambda name: (name not in promoted, _mean(groups[name], objective)))
    entries = []
    for name in order:
        values = np.array([row[objective] for row in groups[name]])
        independent = pooled(groups[name], objective, scores)
        entry: dict[str, Any] = {
            "architecture": name,
            "trials": [row["trial"] for row in groups[name]],
            objective: float(values.mean()),
            "stderr": None if independent is None else mean_and_error(independent)[1],
            "seeds": len(values),
            "error_over_seeds": mean_and_error(values)[1] if len(values) > 1 else None,
        }
        if name != order[0]:
            tests = against(groups[order[0]], groups[name], scores)
            entry |= {f"{metric}_against_best": test for metric, test in tests.items()}
        entries.append(entry)
    for metric in scored():
        tested = [entry[key] for entry in entries if (key := f"{metric}_against_best") in entry]
        for test, p in zip(tested, holm([test["p"] for test in tested]), strict=True):
            test["p_holm"] = p
    return entries


def not_worse(rows: Sequence[Row], scores: Scores, objective: str) -> list[str]:
    """Return the architectures of the last rung (a row per trial) that cannot be told apart from the best, best first:
    paired over windows on the seeds both have, at the 5% level after Holm's correction.

    The one that is best on all text of this kind is left out at most one time in forty, however many there are: among
    m that tie it must lose, by two-sided p < 0.05 / (m - 1), to one of m - 1 others. One without logged values is
    kept. `scores` are `RunDirectory.scores()`.
    """
    return [entry["architecture"] for entry in finalists(rows, scores, objective) if not _is_worse(entry, objective)]


def _is_worse(finalist: dict[str, Any], objective: str) -> bool:
    test = finalist.get(f"{objective}_against_best")
    return test is not None and test["p_holm"] < LEVEL and METRICS[objective].sign * test["difference"] > 0


def seed_spread(rows: Sequence[Row], objective: str) -> dict[str, float] | None:
    """Return the pooled standard deviation of the objective between seeds at one rung, and its degrees of freedom, or
    None where no architecture has two seeds."""
    groups = [np.array([row[objective] for row in same]) for same in by_architecture(rows).values() if len(same) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None
    return {"sd": float((sum(((v - v.mean()) ** 2).sum() for v in groups) / freedom) ** 0.5), "freedom": freedom}


def _rung_agreement(
    search: Sequence[Row], retrained: Sequence[Row], scores: Scores, objective: str
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare the order of each rung with that of the next, over the `n` architectures (of `before_n`) that reached
    both, and over the seeds that all of them ran with: a finalist's further seeds were not there to be ranked by.

    `regret` is tested on the same windows: `regret_p` is the p of "the early choice is as good as the best there".
    """
    groups = by_architecture(search).values()
    shared = set.intersection(*({row["seed"] for row in rows} for rows in groups)) if groups else set()
    ranked = [row for row in search if row["seed"] in shared or not shared]
    levels = [
        (f"rung {rung}", by_architecture(row for row in ranked if row["rung"] == rung))
        for rung in sorted({row["rung"] for row in search})
    ]  # fmt: skip
    steps = list(zip(levels, levels[1:], strict=False))
    if retrained and search:  # which ones to retrain was decided by every seed
        name, last = levels[-1][0], max(row["rung"] for row in search)
        chosen_by = by_architecture(row for row in search if row["rung"] == last)
        steps.append(((name, chosen_by), ("retrained", by_architecture(retrained))))
    entries = []
    for (before, earlier), (after, later) in steps:
        both = sorted(earlier.keys() & later.keys())
        if len(both) > 1:
            first, second = ([_mean(rows[name], objective) for name in both] for rows in (earlier, later))
            chosen, best = both[int(np.argmin(first))], both[int(np.argmin(second))]
            test = against(later[best], later[chosen], scores).get(objective) if chosen != best else None
            entries.append({
                "before": before, "after": after, "before_n": len(earlier), **agreement(first, second, both),
                "chosen": chosen, "best": best, "regret_p": test and test["p"],
            })  # fmt: skip
    return entries


def _mean(rows: Sequence[Row], objective: str) -> float:
    """Return the mean of the objective, so that lower is better."""
    return METRICS[objective].sign * sum(row[objective] for row in rows) / len(rows)
