"""How sure the search may be of its winner, from what its trials logged: evidence.json.

Trials are compared pair by pair, on the same validation windows and Winogrande examples, and at equal tokens only.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minitron_search.run_directory import RunDirectory
from minitron_search.statistics import agreement, mcnemar, mean_and_error, paired
from minitron_search.winogrande import chance_bar

Row = Mapping[str, Any]
SIGN = {"lm_loss": 1.0, "kl": 1.0, "winogrande_margin": -1.0}  # of an objective that is minimised
LEVEL = 0.05


def evidence(run: RunDirectory, objective: str) -> dict[str, Any]:
    """What evidence.json holds.

    finalists -> of the last rung, best first: every architecture's mean over its seeds, the spread of its seeds, and
    the paired tests of LM loss and accuracy (McNemar) against the best; rungs -> how well each rung's order foretold
    the next, and the last one the retrained students'; at_chance: whether the teacher's Winogrande accuracy is (null
    where there is none); words: all in sentences.
    """
    rows = [row for row in run.read_trials() if row["lm_loss"] is not None]
    search = [row for row in rows if row["arm"] == "search" and row["status"] != "failed"]
    teacher = next((row for row in rows if row["arm"] == "teacher"), None)
    at_chance = None if teacher is None else bool(teacher["winogrande_acc"] <= chance_bar(teacher["winogrande_n"]))
    finalists = _finalists(run, search, objective)
    rungs = _rungs(search, [row for row in rows if row["arm"] == "retrained"], objective)
    return {
        "objective": objective,
        "finalists": finalists,
        "rungs": rungs,
        "at_chance": at_chance,
        "words": list(_words(finalists, rungs, at_chance)),
    }


def _finalists(run: RunDirectory, search: Sequence[Row], objective: str) -> list[dict[str, Any]]:
    if not search:
        return []
    last = max(row["rung"] for row in search)
    by_architecture = _by_architecture(row for row in search if row["rung"] == last)
    order = sorted(by_architecture, key=lambda name: _mean(by_architecture[name], objective))
    scores = run.scores()
    listed = {name: _pooled(scores, by_architecture[name]) for name in order}
    found = []
    for name in order:
        rows = by_architecture[name]
        values = np.array([row[objective] for row in rows])
        about: dict[str, Any] = {
            "architecture": name,
            "trials": [row["trial"] for row in rows],
            objective: float(values.mean()),
            "seeds": len(rows),
            "error_over_seeds": mean_and_error(values)[1] if len(rows) > 1 else None,
        }
        if name != order[0] and listed[name] and listed[order[0]]:
            best, other = listed[order[0]], listed[name]
            about["lm_loss_against_best"] = paired(best["lm_loss"], other["lm_loss"])
            if len(rows) == len(by_architecture[order[0]]) == 1:  # accuracies of several seeds are no more 0 or 1
                about["accuracy_against_best"] = mcnemar(best["winogrande_correct"], other["winogrande_correct"])
        found.append(about)
    return found


def _rungs(search: Sequence[Row], retrained: Sequence[Row], objective: str) -> list[dict[str, Any]]:
    """The order of each rung against that of the next, over the architectures that reached both."""
    if not search:
        return []
    levels = [
        (f"rung {rung}", _by_architecture(row for row in search if row["rung"] == rung))
        for rung in sorted({row["rung"] for row in search})
    ]  # fmt: skip
    if retrained:
        levels.append(("retrained", _by_architecture(retrained)))
    found = []
    for (before, rows), (after, others) in zip(levels, levels[1:], strict=False):
        both = sorted(rows.keys() & others.keys())
        if len(both) > 1:
            one, other = ([_mean(of[name], objective) for name in both] for of in (rows, others))
            found.append({"before": before, "after": after, **agreement(one, other, both)})
    return found


def _words(finalists: list[dict[str, Any]], rungs: list[dict[str, Any]], at_chance: bool | None) -> Iterable[str]:
    if at_chance:
        yield "Winogrande accuracy is at chance for this teacher: it is reported and ranks nothing."
    tested = [(about["architecture"], about["lm_loss_against_best"]) for about in finalists[1:]
              if "lm_loss_against_best" in about]  # fmt: skip
    if tested:
        tied = [name for name, test in tested if test["p"] >= LEVEL]
        names = f": {', '.join(tied)}" if tied else ""
        yield (f"Of {len(tested)} others at the last rung, {len(tested) - len(tied)} differ from "
               f"{finalists[0]['architecture']} in LM loss on the same windows (paired, p < {LEVEL}); "
               f"{len(tied)} do not{names}.")  # fmt: skip
    elif finalists:
        yield f"One architecture reached the last rung: {finalists[0]['architecture']} was compared with none there."
    for of in rungs:
        tau = "" if of["kendall"] is None else f", Kendall's tau {of['kendall']:.2f} (p {of['kendall_p']:.2g})"
        kept = "the best stayed the best" if of["best_kept"] else "the best changed"
        flips = len(of["flips"])
        yield (f"{of['before']} to {of['after']}, {of['n']} architectures: {kept}, {flips} "
               f"{'pair' if flips == 1 else 'pairs'} of {of['n'] * (of['n'] - 1) // 2} flipped{tau}.")  # fmt: skip


def _by_architecture(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["architecture"], []).append(row)
    return found


def _mean(rows: list[Row], objective: str) -> float:
    return SIGN[objective] * sum(row[objective] for row in rows) / len(rows)


def _pooled(scores: Mapping[tuple[str, int], Mapping[str, list[float]]], rows: list[Row]) -> dict[str, np.ndarray]:
    """Of every window and example, the mean over seeds; nothing where a trial of an older version logged none."""
    of_rows = [scores.get((row["trial"], row["rung"])) for row in rows]
    if any(of is None for of in of_rows):
        return {}
    return {name: np.mean([of[name] for of in of_rows if of], axis=0) for name in ("lm_loss", "winogrande_correct")}
