"""Follow a run by its logs: of each only what was appended is read, and only the logs of trials that may have grown."""

import math
from pathlib import Path

from minitron_search.progress.facts import Facts
from minitron_search.progress.plan import Plan
from minitron_search.progress.state import Progress, progress
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import Log


class Followed:
    """A run whose progress can be asked for again and again. `began`: the Unix time at which this session began."""

    def __init__(self, plan: Plan, run_dir: RunDirectory | None, began: float):
        self.plan, self.run_dir, self.facts = plan, run_dir, Facts()
        self.forecast: dict[str, float] = {}
        self._last: Progress | None = None
        self._logs: dict[str, Log] = {}
        if run_dir is not None:
            self._events = Log(run_dir.events_log, run_dir.files)
            self._take_in(None)  # what earlier sessions have left
        self.facts.open(began)

    def now(self, now: float) -> Progress:
        """Return the progress at the Unix time `now`."""
        if self.run_dir is not None:
            self._take_in(now)
            if not self.plan.stages.keys() <= self.forecast.keys():
                self._read_forecast(self.run_dir)
        self._last = progress(self.plan, self.facts, self.forecast, now, self._last)
        return self._last

    def _take_in(self, now: float | None) -> None:
        """Read what is new: events, then the logs of the trials that run or ran; of all when a stage begins or ends.

        `now`: when it was written; None: when the last event was.
        """
        assert self.run_dir is not None
        events, trials = self._events.new(), set(self.facts.running)
        for event in events:
            self.facts.event(event)
            trials |= set(self.facts.running)
        if any(event["event"] in ("stage_started", "stage_finished", "run_finished") for event in events):
            trials |= set(self.run_dir.files.names(self.run_dir.root / "trials"))
        for trial in sorted(trials):
            if Path(trial).name != trial:  # no folder of this run
                continue
            log = self._logs.setdefault(trial, self.run_dir.follow(trial))
            for line in log.new():
                self.facts.metric(trial, line, self.facts.last if now is None else now)

    def _read_forecast(self, run_dir: RunDirectory) -> None:
        """Read forecast.json, which is there once the speed is measured; where it is damaged there is none."""
        try:
            stages = run_dir.read_forecast()
        except ValueError:
            return
        for name, about in stages.items():
            seconds = about.get("seconds") if isinstance(about, dict) else None
            if isinstance(seconds, int | float) and math.isfinite(seconds):
                self.forecast[name] = float(seconds)
