"""What pruning by importance is worth: every promoted candidate beside its controls (Figure 6 of 2408.11796)."""

import json
from collections.abc import Sequence
from typing import Any

from minitron_search.evaluation.paired_scores import Row, Scores, against, by_architecture
from minitron_search.records.directory import RunDirectory

CONTROL_NAMES = {
    "random_pruned": "random pruning of the same shape",
    "random_init": "random weights of the same shape",
    "untrained": "its untrained trim",
    "teacher": "the teacher",
}
AT_EQUAL_TOKENS = ("random_pruned", "random_init")


def controls(run_dir: RunDirectory, rows: Sequence[Row], scores: Scores) -> list[dict[str, Any]]:
    """Compare every promoted architecture, at its last rung, with its controls.

    Each entry has the `architecture`; the `candidate`: its trials, tokens, LM loss, margin and the precision it was
    scored in; and `controls`, those that have a row, in the order of `CONTROL_NAMES`: the same, and
    `against_candidate`, the paired differences, control minus candidate, over the seeds both have.

    The candidate was chosen by these windows and its controls were not, which flatters it a little.
    """
    promoted = [row for row in rows if row["arm"] == "search" and row["status"] == "promoted"]
    last = max((row["rung"] for row in promoted), default=0)
    entries = []
    for architecture, candidate in by_architecture(row for row in promoted if row["rung"] == last).items():
        beside = []
        for arm in CONTROL_NAMES:
            control = [
                row for row in rows
                if row["arm"] == arm and (arm == "teacher" or row["architecture"] == architecture)
                and (arm not in AT_EQUAL_TOKENS or row["rung"] == last)
            ]  # fmt: skip
            if control:
                tests = against(candidate, control, scores)
                beside.append({"arm": arm, **_described(run_dir, control), "against_candidate": tests})
        candidate_entry = _described(run_dir, candidate)
        entries.append({"architecture": architecture, "candidate": candidate_entry, "controls": beside})
    return entries


def _described(run_dir: RunDirectory, rows: Sequence[Row]) -> dict[str, Any]:
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("lm_loss", "winogrande_margin")}
    return {"trials": [row["trial"] for row in rows], "tokens": rows[0]["tokens"], **means,
            "precision": _precision(run_dir, rows[0]["trial"])}  # fmt: skip


def _precision(run_dir: RunDirectory, trial: str) -> str | None:
    """Return the precision a trial was scored in; None for a trial of an older version."""
    return json.loads((run_dir.trial(trial) / "architecture.json").read_text()).get("score_precision")
