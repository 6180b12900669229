"""Live training curves of a run: TensorBoard always, W&B and MLflow if the configuration names them.

A trial's log is the truth. A thread of the driver reads what is new in all logs and passes it on, so that a search, its
controls, a retraining and a resumed run are treated alike. Ray's own callbacks get only what Tune gets: rungs, but no
training loss and no retraining; and a trial that is stopped and resumed is a new run to them.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from minitron_search.messages.console import say
from minitron_search.messages.failures import first_line
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import Log
from minitron_search.records.metrics import METRICS, scored
from minitron_search.tracking.tensorboard import EventFile, Point
from minitron_search.tracking.trackers import Tracker, tracker_of

LOOK_S = 5.0  # between two reads of the logs; TensorBoard reads no more often
TRAIN = ("loss", "lm_loss", "kl", "intermediate", "learning_rate", "gradient_norm", "tokens_per_second")


class Curve:
    """A trial's log as points. A trial resumed from a checkpoint has logged some steps twice: each is one point."""

    def __init__(self, run_dir: RunDirectory, trial: str):
        self.trial, self.log = trial, run_dir.follow(trial)
        self.about = json.loads((run_dir.trial(trial) / "architecture.json").read_text())
        shown = {key: value for key, value in self.about.items() if isinstance(value, str | int | float)}
        self.file = EventFile(run_dir.tensorboard(trial), shown, (f"validation/{name}" for name in scored()))
        self._written = self.file.points  # before the run was resumed
        self._step, self._rung = 0, -1

    def new(self) -> list[Point]:
        """Return the points that were logged since the last call, but those that the event file holds."""
        points = [point for line in self.log.new() if (point := self._point(line))]
        known = min(self._written, len(points))
        self._written -= known
        return points[known:]

    def _point(self, line: Mapping[str, Any]) -> Point | None:
        if line["kind"] == "step" and line["step"] > self._step:
            self._step = line["step"]
            return Point(line["tokens"], {f"train/{name}": line[name] for name in TRAIN if name in line})
        if line["kind"] == "rung" and line["rung"] > self._rung:
            self._rung = line["rung"]
            names = [column for name in scored() for column in (name, METRICS[name].error)]
            return Point(line["tokens"], {f"validation/{name}": line[name] for name in names})
        return None


class Tracking:
    """What a run's trackers have been told.

    trackers: besides TensorBoard, which is told last: its file then says what all were told.
    """

    def __init__(self, run_dir: RunDirectory, trackers: Sequence[Tracker]):
        self.run_dir, self.trackers = run_dir, list(trackers)
        self._curves: dict[str, Curve] = {}
        self._open: set[str] = set()  # trials that trackers have a run of
        self._events = Log(run_dir.events_log)
        self._events.new()  # skips what was there before the run was resumed

    def look(self) -> None:
        """Read every log and tell the trackers what is new. Raises OSError where an event file cannot be written."""
        events = [event for event in self._events.new() if event["event"] in ("trial_finished", "trial_failed")]
        ended = {event["trial"]: event["event"] for event in events}
        for log in sorted((self.run_dir.root / "trials").glob("*/metrics.jsonl")):
            trial = log.parent.name
            if trial not in self._curves:
                self._curves[trial] = Curve(self.run_dir, trial)
            curve = self._curves[trial]
            if points := curve.new():
                self._tell(partial(_points, trial, curve.about, points))
                self._open.add(trial)
                try:
                    curve.file.append(points)
                except OSError:
                    del self._curves[trial]  # opened again, it tells again what its file lacks
                    raise
        for trial in self._open & ended.keys():
            self._end(trial, "FAILED" if ended[trial] == "trial_failed" else "FINISHED")

    def end(self, status: str) -> None:
        """Tell what is new, and end every open trial with `status`."""
        self.look()
        for trial in sorted(self._open):
            self._end(trial, status)

    def _end(self, trial: str, status: str) -> None:
        self._open.remove(trial)
        self._tell(lambda tracker: tracker.end(trial, status))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        """Call every tracker; one that fails is dropped."""
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # of any kind: none is worth a run
                message = first_line(error)
                self.trackers.remove(tracker)
                self.run_dir.event("tracker_failed", tracker=tracker.name, message=message)
                say(f"trackers: {tracker.name} is dropped: {message}")


def _points(trial: str, about: Mapping[str, Any], points: Sequence[Point], tracker: Tracker) -> None:
    tracker.tell(trial, about, points)


@contextmanager
def tracked(run_dir: RunDirectory, name: str, trackers: Sequence[str]) -> Iterator[None]:
    """Pass the trials of the block on to TensorBoard and to `trackers`, as trials of the run `name`."""
    tracking = Tracking(run_dir, [tracker_of(tracker, name, run_dir) for tracker in trackers])
    over, reported = threading.Event(), set[str]()

    def patiently(call: Callable[[], None]) -> None:
        """Report an OSError once and go on: a full disk stops the run by itself, and with a better message."""
        try:
            call()
        except OSError as error:
            if str(error) not in reported:
                reported.add(str(error))
                say(f"tracking: {error}; tried again")

    def follow() -> None:
        while not over.wait(LOOK_S):
            patiently(tracking.look)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    finally:
        over.set()
        thread.join()
        patiently(partial(tracking.end, status))
