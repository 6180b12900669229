"""What went wrong and what happened: failed trials, unreadable artifacts, events."""

import datetime
import html
from collections import Counter
from typing import NamedTuple

import pandas as pd

from analysis import formatting as f
from analysis.run_data import CONTROLS, RunData, candidates, last_rungs


class HealthInfo(NamedTuple):
    """failed: (trial, message). events: a row per kind, its count and the times of the first and last."""

    statuses: dict[str, int]  # candidates of each
    failed: list[tuple[str, str]]
    problems: list[str]
    events: pd.DataFrame


def health_info(run: RunData) -> HealthInfo:
    last = last_rungs(run.trials)
    failed = [(row["trial"], row["message"]) for row in last.to_dict("records") if row["status"] == "failed"]
    events = pd.DataFrame(run.events, columns=["time", "event"])
    events["time"] = pd.to_numeric(events["time"], errors="coerce")
    kinds = events.groupby("event", sort=False)["time"].agg(count="size", first="min", last="max").reset_index()
    statuses = dict(Counter(candidates(last)["status"]))
    waiting = [made for trial, made in run.made.items() if trial not in set(last["trial"])]
    waiting = [made for made in waiting if made.get("arm") not in CONTROLS]  # in their first rung
    if waiting:
        statuses["running"] = statuses.get("running", 0) + len(waiting)
    return HealthInfo(statuses, failed, run.problems, kinds)


def span(events: pd.DataFrame) -> str:
    """`2025-03-01 10:20 UTC, 14 min` from the first to the last event; "" without events."""
    if events.empty or f.missing(events["first"].min()):
        return ""
    return f"{moment(events['first'].min())}, {f.duration(events['last'].max() - events['first'].min())}"


def moment(seconds: float) -> str:
    if f.missing(seconds):
        return f.MISSING
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def health_html(info: HealthInfo) -> str:
    parts = []
    if info.failed:
        rows = "".join(
            f'<tr><th scope="row">{html.escape(trial)}</th><td><pre>{html.escape(message) or f.MISSING}</pre></td></tr>'
            for trial, message in info.failed
        )
        parts.append(f'<h3>Failed trials</h3><div class="scroll"><table class="plain">{rows}</table></div>')
    else:
        parts.append("<p>No trial failed.</p>")
    if info.problems:
        lines = "".join(f"<li>{html.escape(problem)}</li>" for problem in info.problems)
        parts.append(f'<h3>Artifacts that could not be read</h3><ul class="warning">{lines}</ul>')
    if len(info.events):
        rows = "".join(
            f'<tr><th scope="row">{html.escape(str(kind))}</th><td class="number">{count:,}</td>'
            f"<td>{moment(first)}</td><td>{moment(last)}</td></tr>"
            for kind, count, first, last in info.events.itertuples(index=False)
        )
        parts.append(
            '<h3>Events</h3><div class="scroll"><table class="plain"><thead><tr><th scope="col">event</th>'
            '<th scope="col" class="number">count</th><th scope="col">first</th>'
            f'<th scope="col">last</th></tr>'
            f"</thead><tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)


def health_count(info: HealthInfo) -> str:
    statuses = ", ".join(f"{count} {status}" for status, count in info.statuses.items())
    return f"n = {f.plural(sum(info.statuses.values()), 'candidate')}{f' ({statuses})' if statuses else ''}."
