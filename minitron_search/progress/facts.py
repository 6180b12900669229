"""Gather what the logs of a run say of its progress, line by line: no file and no clock is read here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from minitron_search.planning.workload import STAGE_OF
from minitron_search.records.lines import ENDED


class Mark(NamedTuple):
    """What a stage had done when it had taken so many seconds."""

    tokens: int
    scorings: int
    seconds: float


class Facts:
    """What the lines of events.jsonl, and of the trials' metrics.jsonl, have said so far. Nothing of it is unsaid by a
    later line but which stage and which trials run.

    begun: when each stage that runs began. spent: seconds of each stage before that. tried: trials that have ended at
    least once. reached: the tokens that each trial has trained on. rows: the last finished rung of each.
    marks: the tokens and scorings of each stage when they first and last grew, and how many seconds it had taken.
    """

    def __init__(self) -> None:
        self.began: float | None = None  # of this session
        self.earlier = 0.0  # seconds of the sessions before
        self.last = 0.0  # the time of the last line
        self.begun: dict[str, float] = {}
        self.spent: dict[str, float] = {}
        self.started: set[str] = set()
        self.finished: set[str] = set()
        self.over = False
        self.running: dict[str, None] = {}
        self.tried: set[str] = set()
        self.reached: dict[str, int] = {}
        self.speeds: dict[str, float] = {}
        self.rows: dict[str, Mapping[str, Any]] = {}
        self.scored: set[tuple[str, int]] = set()
        self.marks: dict[str, tuple[Mark, Mark]] = {}
        self._opened = False

    def open(self, now: float) -> None:
        """Begin a session: what an earlier one left running does not run any more."""
        for stage, began in self.begun.items():
            self.spent[stage] = self.spent.get(stage, 0.0) + max(0.0, self.last - began)
        if self.began is not None:
            self.earlier += max(0.0, self.last - self.began)
        self.began, self.begun, self.running, self.over, self._opened = now, {}, {}, False, True

    def event(self, event: Mapping[str, Any]) -> None:
        """Take in a line of events.jsonl."""
        kind, now = event["event"], event["time"]
        if kind == "run_started":
            if not self._opened:
                self.open(now)
            self._opened = False
        elif kind in ("stage_started", "stage_finished"):
            self._stage(kind, event["stage"], now)
        elif kind == "run_finished":
            self.over, self.begun, self.running = True, {}, {}
        elif kind == "trial_started":
            self.running[event["trial"]] = None
        elif kind in ENDED and isinstance(event.get("trial"), str):
            self.running.pop(event["trial"], None)
            self.tried.add(event["trial"])
        self.last = max(self.last, now)

    def _stage(self, kind: str, stage: str, now: float) -> None:
        if kind == "stage_started":
            self.begun[stage] = now
            self.started.add(stage)
            return
        self.spent[stage] = self.elapsed(stage, now)
        self.begun.pop(stage, None)
        self.finished.add(stage)

    def metric(self, trial: str, line: Mapping[str, Any], now: float) -> None:
        """Take in a line of a trial's metrics.jsonl, which was read at `now`."""
        kind = line["kind"]
        if not self.over:
            self.last = max(self.last, now)
        if kind == "step" and isinstance(line.get("tokens"), int):
            self._trained(trial, line["tokens"], 0, now)
            self.speeds[trial] = line.get("tokens_per_second", 0.0)
        elif kind == "rung":
            rung = line["rung"]
            is_new = (trial, rung) not in self.scored
            self.scored.add((trial, rung))
            self._trained(trial, line.get("tokens") or 0, int(is_new), now)
            if rung >= self.rows.get(trial, line)["rung"]:
                self.rows[trial] = line

    def _trained(self, trial: str, tokens: int, scorings: int, now: float) -> None:
        before = self.reached.get(trial, 0)
        self.reached[trial] = max(before, tokens)
        stage = STAGE_OF.get(arm_of(trial))
        if stage is not None and (tokens > before or scorings):
            last = self.marks[stage][1] if stage in self.marks else Mark(0, 0, 0.0)
            trained = last.tokens + self.reached[trial] - before
            mark = Mark(trained, last.scorings + scorings, self.elapsed(stage, now))
            self.marks[stage] = self.marks.get(stage, (mark, mark))[0], mark

    def elapsed(self, stage: str, now: float) -> float:
        """Return the seconds that a stage has taken in all sessions."""
        return self.spent.get(stage, 0.0) + max(0.0, now - self.begun.get(stage, now))


def arm_of(trial: str) -> str:
    """Return the arm that a trial's id begins with."""
    return trial.rpartition("-")[0]
