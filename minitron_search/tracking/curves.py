"""A run's trainings as they go, for the tools that people watch them with: TensorBoard always, W&B and MLflow if asked.

A trial's log is the truth. A thread of the driver reads what is new in all of them and tells it, so that a search, its
controls, a retraining and a run that goes on are told alike. Ray's own callbacks hear what Tune hears: rungs, but no
training loss and no retraining; and a trial that was stopped and goes on is one more run to them.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import Log
from minitron_search.tracking.tensorboard import EventFile, Point
from minitron_search.tracking.trackers import Tracker, tracker_of

LOOK_S = 5.0  # between two looks at the logs; TensorBoard's own are at least as far apart
TRAIN = ("loss", "lm_loss", "kl", "intermediate", "learning_rate", "gradient_norm", "tokens_per_second")
SCORES = ("lm_loss", "kl", "winogrande_acc", "winogrande_margin")


class Curve:
    """A trial's log as points. One that went on from a checkpoint has logged some steps twice, and is told of them
    once."""

    def __init__(self, run: RunDirectory, trial: str):
        self.trial, self.log = trial, run.follow(trial)
        self.about = json.loads((run.trial(trial) / "architecture.json").read_text())
        shown = {key: value for key, value in self.about.items() if isinstance(value, str | int | float)}
        self.file = EventFile(run.tensorboard(trial), shown, (f"validation/{name}" for name in SCORES))
        self._told = self.file.points  # by a session before this one
        self._step, self._rung = 0, -1

    def new(self) -> list[Point]:
        points = [point for line in self.log.new() if (point := self._point(line))]
        told = min(self._told, len(points))
        self._told -= told
        return points[told:]

    def _point(self, line: Mapping[str, Any]) -> Point | None:
        if line["kind"] == "step" and line["step"] > self._step:
            self._step = line["step"]
            return Point(line["tokens"], {f"train/{name}": line[name] for name in TRAIN if name in line})
        if line["kind"] == "rung" and line["rung"] > self._rung:
            self._rung = line["rung"]
            names = [name for score in SCORES for name in (score, f"{score}_stderr")]
            return Point(line["tokens"], {f"validation/{name}": line[name] for name in names})
        return None


class Tracking:
    """trackers: besides TensorBoard, which is told last: its file then says what all were told."""

    def __init__(self, run: RunDirectory, trackers: Sequence[Tracker], progress: Callable[[str], None]):
        self.run, self.trackers, self.progress = run, list(trackers), progress
        self._curves: dict[str, Curve] = {}
        self._open: set[str] = set()  # trials that trackers have a run of
        self._events = Log(run.events_log)
        self._events.new()  # of sessions before this one

    def look(self) -> None:
        """Tell what is new."""
        ended = {e["trial"]: e["event"] for e in self._events.new() if e["event"] in ("trial_finished", "trial_failed")}
        for log in sorted((self.run.root / "trials").glob("*/metrics.jsonl")):
            trial = log.parent.name
            if trial not in self._curves:
                self._curves[trial] = Curve(self.run, trial)
            curve = self._curves[trial]
            if points := curve.new():
                self._tell(partial(_points, trial, curve.about, points))
                self._open.add(trial)
                try:
                    curve.file.append(points)
                except OSError:
                    del self._curves[trial]  # it is read again from its file, and what that lacks is told again
                    raise
        for trial in self._open & ended.keys():
            self._end(trial, "FAILED" if ended[trial] == "trial_failed" else "FINISHED")

    def end(self, status: str) -> None:
        """Of the session: what is open ends with `status`."""
        self.look()
        for trial in sorted(self._open):
            self._end(trial, status)

    def _end(self, trial: str, status: str) -> None:
        self._open.remove(trial)
        self._tell(lambda tracker: tracker.end(trial, status))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                what(tracker)
            except Exception as error:  # theirs are of many kinds, and none is worth a run
                message = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.trackers.remove(tracker)
                self.run.event("tracker_failed", tracker=tracker.name, message=message)
                self.progress(f"trackers: {tracker.name} is told no more: {message}")


def _points(trial: str, about: Mapping[str, Any], points: Sequence[Point], tracker: Tracker) -> None:
    tracker.tell(trial, about, points)


@contextmanager
def tracked(
    run: RunDirectory, name: str, trackers: Sequence[str], progress: Callable[[str], None]
) -> Iterator[None]:  # fmt: skip
    """While the block runs, its trials are told to TensorBoard and to `trackers`, as trials of the run `name`."""
    tracking = Tracking(run, [tracker_of(each, name, run) for each in trackers], progress)
    over, said = threading.Event(), set[str]()

    def told(what: Callable[[], None]) -> None:
        """A disk that is full stops the run by itself; curves are not to take the place of what is said of it."""
        try:
            what()
        except OSError as error:
            if str(error) not in said:
                said.add(str(error))
                progress(f"tracking: {error}; tried again")

    def follow() -> None:
        while not over.wait(LOOK_S):
            told(tracking.look)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    finally:
        over.set()
        thread.join()
        told(partial(tracking.end, status))
