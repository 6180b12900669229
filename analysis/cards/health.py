"""What went wrong and what happened: checks, failed trials, incidents, unreadable artifacts, events."""

import datetime
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.outcome.summary import at_chance
from analysis.page import formatting as f
from analysis.page.card import Card
from analysis.page.tables import trial_link
from analysis.run_data import CONTROLS, RunData, candidates, last_rungs
from minitron_search.messages.escaping import in_html
from minitron_search.records.summary import against_trims

# Events that somebody should know of, each a line with its time; and which of them are no trouble.
INCIDENTS = ("run_failed", "trial_failed", "trial_restarted", "node_leaving", "node_lost", "node_joined",
             "storage_failed", "storage_back", "advice", "evaluation_failed", "tracker_failed",
             "checkpoint_damaged", "damage_mended", "above_trim")  # fmt: skip
CALM = ("node_joined", "storage_back", "advice")
LINES = 200  # of incidents; what is beyond is counted, and in the CSV


class Check(NamedTuple):
    """What was checked and what was found; `well` is None where it could not be checked."""

    name: str
    found: str
    well: bool | None


class HealthInfo(NamedTuple):
    """What the card shows. failed: (trial, message). incidents: time, event, what. events: a row per kind with count,
    first and last time."""

    statuses: dict[str, int]  # candidates of each
    checks: list[Check]
    failed: list[tuple[str, str]]
    problems: list[str]
    incidents: pd.DataFrame
    events: pd.DataFrame


def health_info(run: RunData) -> HealthInfo:
    last = last_rungs(run.trials)
    failed = [(row["trial"], row["message"]) for row in last.to_dict("records") if row["status"] == "failed"]
    events = pd.DataFrame(run.events, columns=["time", "event"])
    events["time"] = pd.to_numeric(events["time"], errors="coerce")
    kinds = events.groupby("event", sort=False)["time"].agg(count="size", first="min", last="max").reset_index()
    statuses = dict(Counter(candidates(last)["status"]))
    waiting = [described for trial, described in run.made.items() if trial not in set(last["trial"])]
    waiting = [described for described in waiting if described.get("arm") not in CONTROLS]  # in their first rung
    if waiting:
        statuses["running"] = statuses.get("running", 0) + len(waiting)
    lines = [(event.get("time"), event["event"], about(event)) for event in run.events if event["event"] in INCIDENTS]
    incidents = pd.DataFrame(lines, columns=["time", "event", "what"])
    return HealthInfo(statuses, checks(run, last, failed), failed, run.problems, incidents, kinds)


def about(event: dict[str, Any]) -> str:
    """Return the fields of an event besides its time and kind, in words."""
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))


def checks(run: RunData, last: pd.DataFrame, failed: list[tuple[str, str]]) -> list[Check]:
    """Check for failures, NaN losses, architectures trained twice, metrics at chance, killed sessions and unreadable
    artifacts."""
    trained = last[last["status"] != "failed"]
    nameless = trained.loc[~np.isfinite(trained["lm_loss"]), "trial"]
    steps = run.steps.loc[~np.isfinite(run.steps["loss"]), "trial"]
    counts = Counter(event["event"] for event in run.events)
    known = bool(len(last))
    return [
        Check("Failed trials", _of(len(failed), len(last), "trial"), not failed if known else None),
        Check("LM loss is not finite", f"{f.plural(len(nameless), 'trial')}{_named(nameless)}",
              not len(nameless) if known else None),
        Check("Training loss is not finite", f"{f.plural(len(steps), 'step')}{_named(steps.unique())}",
              not len(steps) if len(run.steps) else None),
        *_rate(run),
        _harm(run),
        _twice(run),
        _chance(run),
        Check("Restarted trials", f.plural(counts["trial_restarted"], "restart"), not counts["trial_restarted"]),
        Check("Hosts lost", f"{counts['node_lost']:,} lost, {counts['node_joined']:,} joined", not counts["node_lost"]),
        Check("Storage", _storage(counts), counts["storage_failed"] <= counts["storage_back"]),
        _sessions(counts),
        Check("Artifacts", f"{f.plural(len(run.problems), 'file')} could not be read", not run.problems),
    ]  # fmt: skip


def _of(count: int, total: int, noun: str) -> str:
    return f"{count:,} of {f.plural(total, noun)}"


def _named(trials: Any) -> str:
    names = list(trials)
    return f": {', '.join(map(str, names[:5]))}{', …' if len(names) > 5 else ''}" if names else ""


def _twice(run: RunData) -> Check:
    """Look for trials of one arm, architecture and seed: the same work, paid for again."""
    rows = [(trial.get("arm"), trial.get("architecture"), trial.get("seed")) for trial in run.made.values()]
    again = [(arm, name) for (arm, name, _), count in Counter(rows).items() if count > 1 and name]
    shapes = len({name for arm, name, _ in rows if arm not in CONTROLS and name})
    text = f"{len(again):,} of {f.plural(shapes, 'architecture')}{_named(f'{name} ({arm})' for arm, name in again)}"
    return Check("Architectures trained twice with one seed", text, not again if rows else None)


def _rate(run: RunData) -> list[Check]:
    """Say what `learning_rate: auto` became; nothing of a run that was given numbers."""
    event = next((event for event in run.events if event["event"] == "learning_rate"), None)
    if event is None:
        return []
    text, untrained = f"{event.get('rate')}, {event.get('how')}", event.get("untrained")
    tried = event.get("rates") or []
    if untrained is None:
        return [Check("Learning rate", text, True)]
    losses = ", ".join(f"{row['rate']:.2g}: {f.fixed(row['lm_loss'] or np.nan, 3)}" for row in tried)
    text += (f"; LM loss after {event['steps']} steps at {losses}; untrained {f.fixed(untrained, 3)}; "
             f"{event['share']:.1%} of the run’s training")  # fmt: skip
    return [Check("Learning rate", text, any((row["lm_loss"] or np.inf) < untrained for row in tried))]


def _harm(run: RunData) -> Check:
    name = "Trained students above their untrained trims"
    tests = [test for test in against_trims(run.trials.to_dict("records"), run.scores) if test["trim"] is not None]
    if not tests:
        return Check(name, "no trained student has an untrained score beside it", None)
    above = [test for test in tests if test["clear"] or test["above"] and test["arm"] == "retrained"]
    named = _named(f"{test['trial']} (rung {test['rung']}, {test['difference']:+.3f})" for test in above)
    return Check(name, f"{_of(len(above), len(tests), 'rung')}{named}", not above)


def _chance(run: RunData) -> Check:
    name = "Metrics on which the teacher is at chance"
    metrics = at_chance(run)
    if metrics is None:
        return Check(name, "the teacher has not been scored on Winogrande", None)
    return Check(name, f"{', '.join(metrics)}: reported, but not ranked by" if metrics else "none", not metrics)


def _storage(counts: Counter) -> str:
    if not counts["storage_failed"]:
        return "no write failed"
    return f"{f.plural(counts['storage_failed'], 'outage')}, {counts['storage_back']:,} of them over"


def _sessions(counts: Counter) -> Check:
    """Count sessions. One that neither finished nor said why it failed was killed, or is at work at this moment."""
    begun, ended = counts["run_started"], counts["run_finished"] + counts["run_failed"]
    if not begun:
        return Check("Sessions", "none in the event log", None)
    text = f"{f.plural(begun, 'session')}, {counts['run_finished']:,} finished, {counts['run_failed']:,} failed"
    if begun > ended:
        text += f", {begun - ended:,} killed or still running"
    return Check("Sessions", text, not counts["run_failed"] and begun <= ended + 1)


def span(events: pd.DataFrame) -> str:
    """Return `2025-03-01 10:20 UTC, 14 min`, from the first to the last event; "" without events."""
    if events.empty or f.missing(events["first"].min()):
        return ""
    return f"{moment(events['first'].min())}, {f.duration(events['last'].max() - events['first'].min())}"


def moment(seconds: float) -> str:
    if f.missing(seconds):
        return f.MISSING
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


MARKS = {True: ("well", "ok"), False: ("look", "check this"), None: ("unknown", "not known")}


def health_html(info: HealthInfo) -> str:
    rows = "".join(
        f'<tr><th scope="row">{in_html(check.name)}</th><td><span class="mark {MARKS[check.well][0]}">'
        f"{MARKS[check.well][1]}</span></td><td>{in_html(check.found)}</td></tr>"
        for check in info.checks
    )
    parts = [f'<div class="scroll"><table class="plain">{rows}</table></div>']
    if info.failed:
        rows = "".join(
            f'<tr><th scope="row">{trial_link(trial)}</th><td><pre>{in_html(message) or f.MISSING}</pre></td></tr>'
            for trial, message in info.failed
        )
        parts.append(f'<h3>Failed trials</h3><div class="scroll"><table class="plain">{rows}</table></div>')
    if info.problems:
        lines = "".join(f"<li>{in_html(problem)}</li>" for problem in info.problems)
        parts.append(f'<h3>Artifacts that could not be read</h3><ul class="warning">{lines}</ul>')
    if len(info.incidents):
        rows = "".join(
            f'<tr><td>{moment(_seconds(time))}</td><th scope="row"{"" if kind in CALM else " class=trouble"}>'
            f"{in_html(str(kind))}</th><td><pre>{in_html(what)}</pre></td></tr>"
            for time, kind, what in info.incidents.head(LINES).itertuples(index=False)
        )
        more = len(info.incidents) - LINES
        rest = f"<p>{more:,} more are in the CSV.</p>" if more > 0 else ""
        parts.append(f'<h3>Incidents</h3><div class="scroll tall"><table class="plain">{rows}</table></div>{rest}')
    if len(info.events):
        rows = "".join(
            f'<tr><th scope="row">{in_html(str(kind))}</th><td class="number">{count:,}</td>'
            f"<td>{moment(first)}</td><td>{moment(last)}</td></tr>"
            for kind, count, first, last in info.events.itertuples(index=False)
        )
        parts.append(
            "<details><summary>All events by kind</summary>"
            '<div class="scroll"><table class="plain"><thead><tr><th scope="col">event</th>'
            '<th scope="col" class="number">count</th><th scope="col">first</th>'
            f'<th scope="col">last</th></tr>'
            f"</thead><tbody>{rows}</tbody></table></div></details>"
        )
    return "".join(parts)


def _seconds(time: Any) -> float:
    return float(time) if isinstance(time, int | float) else float("nan")


def health_count(info: HealthInfo) -> str:
    statuses = ", ".join(f"{count} {status}" for status, count in info.statuses.items())
    return f"n = {f.plural(sum(info.statuses.values()), 'candidate')}{f' ({statuses})' if statuses else ''}."


def health_card(run: RunData) -> Card:
    info = health_info(run)
    data = (("incidents", info.incidents),) if len(info.incidents) else ()
    return Card(
        "Health",
        "What was checked and what was found; then what failed and why, and every incident with its time. A run still "
        "in progress has running candidates.",
        health_count(info),
        health_html(info),
        data=data,
    )
