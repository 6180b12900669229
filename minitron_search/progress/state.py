"""Say how far a run is, how long it will take, and what its trials have reached: a pure function of plan and facts."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from minitron_search.planning.workload import STAGE_OF
from minitron_search.progress.facts import Facts, arm_of
from minitron_search.progress.plan import Plan

BEST = 3  # trials
ALMOST = 0.99  # the share of what has not said that it has ended
LEAST_LEFT = 0.25  # of its time so far: what a stage that takes longer than it should is taken to need still
UNDONE = 0.5  # of the forecast of the work that is left: no stage is taken to need less
LOGGED = set(STAGE_OF.values())  # the stages whose trials have logs
UNIT_S = 1e-3  # where there is no forecast: stages are weighed by it until one has been measured


class StageProgress(NamedTuple):
    """How far a stage is. left: None where nobody can foresee it."""

    name: str
    runs: bool
    share: float
    elapsed: float
    left: float | None


class TrialProgress(NamedTuple):
    """What a trial has reached. Loss and error are those of its last finished rung."""

    name: str
    runs: bool
    rung: int | None
    tokens: int
    loss: float | None
    error: float | None
    tokens_per_second: float | None


class Progress(NamedTuple):
    """How far a run is at one moment. left, ends_at: seconds, and a Unix time; None where no time can be told yet."""

    name: str
    stages: tuple[StageProgress, ...]
    tried: int
    trials: int
    running: tuple[TrialProgress, ...]
    best: tuple[TrialProgress, ...]
    elapsed: float
    left: float | None
    ends_at: float | None
    share: float
    over: bool


def progress(
    plan: Plan, facts: Facts, forecast: Mapping[str, float], now: float, before: Progress | None = None
) -> Progress:
    """Return the progress at the Unix time `now`.

    forecast: seconds of every stage; empty where there is none. before: the last progress that was shown, below which
    no share falls.
    """
    seconds = {name: forecast.get(name, 0.0 if forecast else units * UNIT_S) for name, units in plan.stages.items()}
    pace = _pace(plan, facts, seconds, bool(forecast), now)
    shown = {stage.name: stage.share for stage in before.stages} if before else {}
    stages = tuple(
        _stage(plan, facts, name, None if pace is None else pace * seconds[name], now, shown.get(name, 0.0))
        for name in plan.stages
    )
    elapsed = _elapsed(facts, now)
    least = before.share if before else 0.0
    if facts.over:
        left, share, ends_at = 0.0, 1.0, facts.last
    elif pace is None or not stages:
        left, share, ends_at = None, least, None
    else:
        left = sum(stage.left or 0.0 for stage in stages)
        share, ends_at = max(least, min(ALMOST, elapsed / max(elapsed + left, 1e-9))), now + left
    candidates = [trial for trial in facts.tried if arm_of(trial) == "search"]
    tried = max(len(candidates), before.tried if before else 0)
    return Progress(
        plan.name, stages, tried, max(plan.trials, tried), _running(facts), _best(plan, facts),
        max(elapsed, before.elapsed if before else 0.0), left, ends_at, share, facts.over,
    )  # fmt: skip


def _elapsed(facts: Facts, now: float) -> float:
    """Return the seconds of all sessions."""
    if facts.began is None:
        return 0.0
    return facts.earlier + max(0.0, (facts.last if facts.over else now) - facts.began)


def _measured(plan: Plan, facts: Facts, stage: str) -> tuple[float, float]:
    """Return the shares of a stage's trainings and scorings that were done when its logs first and last grew."""
    if not plan.stages[stage] or stage not in facts.marks:
        return 0.0, 0.0
    first, last = (
        min(ALMOST, (mark.tokens + mark.scorings * plan.scoring) / plan.stages[stage]) for mark in facts.marks[stage]
    )
    return first, last


def _is_past(plan: Plan, facts: Facts, stage: str) -> bool:
    """Return whether a stage has ended, or was left out: one that comes after it has begun."""
    names = list(plan.stages)
    return facts.over or stage in facts.finished or bool(facts.started & set(names[names.index(stage) + 1 :]))


def _pace(plan: Plan, facts: Facts, seconds: Mapping[str, float], is_forecast: bool, now: float) -> float | None:
    """Return the seconds that one second of the forecast takes, by all that was measured so far.

    A forecast weighs as much as all of what it foresees, so that one short stage that was far off does not decide.
    Without one it is None until some training was measured.
    """
    taken = foreseen = sum(seconds.values()) if is_forecast else 0.0
    for name in plan.stages if is_forecast else LOGGED & plan.stages.keys():
        elapsed, (_, share) = facts.elapsed(name, now), _measured(plan, facts, name)
        if name in facts.finished and elapsed:
            taken, foreseen = taken + elapsed, foreseen + seconds[name]
        elif share:
            taken, foreseen = taken + facts.marks[name][1].seconds, foreseen + share * seconds[name]
    return taken / foreseen if foreseen else None


def _stage(plan: Plan, facts: Facts, name: str, expected: float | None, now: float, least: float) -> StageProgress:
    elapsed, runs = facts.elapsed(name, now), name in facts.begun
    others = [stage for stage in plan.stages if stage != name]
    if name == "report" and not facts.over and not facts.begun and all(_is_past(plan, facts, s) for s in others):
        elapsed, runs = max(0.0, now - facts.last), bool(facts.started)  # it writes no event
    if _is_past(plan, facts, name):
        return StageProgress(name, runs, 1.0, elapsed, 0.0)
    first, share = _measured(plan, facts, name)
    if expected is None or (not plan.stages[name] and not expected):
        return StageProgress(name, runs, max(least, share), elapsed, None)
    if name in LOGGED:
        left = _left_of(facts, name, first, share, expected, elapsed)
    else:
        left = max(expected - elapsed, LEAST_LEFT * elapsed)
        share = elapsed / (elapsed + left) if elapsed else 0.0
    return StageProgress(name, runs, max(least, min(ALMOST, share)), elapsed, left)


def _left_of(facts: Facts, name: str, first: float, share: float, expected: float, elapsed: float) -> float:
    """Return the seconds that a stage whose trainings are logged still needs: by its forecast, and the more of it is
    done the more by its speed since the first line of a log. What came before that line is start-up."""
    left, since = (1 - share) * expected, elapsed
    if share:
        begun, last = facts.marks[name]
        since = elapsed - last.seconds
        if share > first:
            weight = math.sqrt(share - first)
            measured = (1 - share) * (last.seconds - begun.seconds) / (share - first)
            left = weight * measured + (1 - weight) * left
    return max(left - since, UNDONE * (1 - share) * expected, LEAST_LEFT * since)


def _running(facts: Facts) -> tuple[TrialProgress, ...]:
    return tuple(_trial(facts, trial) for trial in facts.running)


def _best(plan: Plan, facts: Facts) -> tuple[TrialProgress, ...]:
    """Return the best candidates of the highest rung that any has finished."""
    rows = {trial: row for trial, row in facts.rows.items() if arm_of(trial) == "search"}
    highest = max((row["rung"] for row in rows.values()), default=0)
    scored = {
        trial: plan.sign * row[plan.ranks_by]
        for trial, row in rows.items()
        if row["rung"] == highest and isinstance(row.get(plan.ranks_by), int | float)
    }
    ranked = sorted((trial for trial, value in scored.items() if math.isfinite(value)), key=lambda t: scored[t])
    return tuple(_trial(facts, trial) for trial in ranked[:BEST])


def _trial(facts: Facts, trial: str) -> TrialProgress:
    row = facts.rows.get(trial, {})
    return TrialProgress(
        trial, trial in facts.running, row.get("rung"), facts.reached.get(trial, 0), row.get("lm_loss"),
        row.get("lm_loss_stderr"), facts.speeds.get(trial),
    )  # fmt: skip
