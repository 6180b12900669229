"""Decide who may train past a rung, as Ray Tune's scheduler: successive halving, ASHA or Hyperband.

Under halving nobody passes before the whole rung is in; the search then continues the best. ASHA and Hyperband decide
at once. A decision is written where the trial reads it. To Tune every trial goes on until it ends itself: none is ever
killed, so a stopped trial has trained exactly as far as its last row, and can go on from there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from minitron_search.architecture_search.state import SearchState
from minitron_search.trials.trial import Trial


def rung_scheduler(search: SearchState) -> "RungScheduler":
    """Return the scheduler of `search`, which has decided again what an interrupted search had decided.

    Hyperband is asynchronous, as ASHA is: a bracket for every rung but the last, and bracket s stops nobody before
    rung s (Li et al. 2020, arXiv:1810.05934, section 3.2).
    """
    rungs, settings = len(search.settings.milestones), search.config.search
    scheduler = RungScheduler(
        # Tune's own milestones are powers of the reduction factor: rung r is time factor ** r
        time_attr="rung_time", metric="objective", mode="min", grace_period=1,
        max_t=settings.reduction_factor ** max(rungs - 1, 1), reduction_factor=settings.reduction_factor,
        brackets=max(rungs - 1, 1) if settings.scheduler == "hyperband" else 1,
    )  # fmt: skip
    scheduler.replay(search)
    return scheduler


class RungScheduler(ASHAScheduler):
    """Tune's ASHA over the rungs of one search, which records every decision in the run directory."""

    def replay(self, search: SearchState) -> None:
        """Take on `search`: hear the rungs that an interrupted search had decided on, in their order."""
        self.search = search
        self.in_brackets: set[str] = set()  # trials that ASHA knows
        decided = sorted(
            (line["time"], rung, trial)
            for trial in search.trials
            for rung, line in search.run.decisions(trial).items()
            if rung in search.rows[trial] and not search.is_extra(search.trials[trial])
        )
        for _, rung, trial in decided:
            if trial not in self.in_brackets:
                self._assign(search.trials[trial])
            super().on_trial_result(None, _AshaTrial(trial), self._result(search.rows[trial][rung]))  # type: ignore[arg-type]

    def _assign(self, trial: Trial) -> None:
        """Put a trial into a bracket, drawn for its proposal alone: the same one after a resume."""
        self.in_brackets.add(trial.id)
        with _numpy_seed([self.search.config.seed, trial.proposal]):
            super().on_trial_add(None, _AshaTrial(trial.id))  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put a trial of the search into a bracket; controls and further seeds are compared with nobody."""
        ours: Trial = trial.config["trial"]
        if ours.id not in self.in_brackets and not self.search.is_extra(ours):
            self._assign(ours)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record whether a trial may train past the rung of `result`, unless that is decided."""
        ours: Trial = trial.config["trial"]
        rung = result["rung"]
        if rung < self.search.last_rung and rung not in self.search.decisions[ours.id]:
            self.search.decide(ours.id, rung, "continue" if self._passes(ours, result) else "stop")
        return TrialScheduler.CONTINUE

    def _passes(self, trial: Trial, result: dict[str, Any]) -> bool:
        settings = self.search.config.search
        alone = settings.trials == 1 and settings.tokens == "auto"  # its seeds are compared with nobody
        if self.search.is_extra(trial) or alone:
            return True
        if settings.scheduler == "halving":
            return False
        action = super().on_trial_result(None, _AshaTrial(trial.id), self._result(result))  # type: ignore[arg-type]
        self.search.record(result)  # it runs, so that what it takes to the next rung is committed
        return action != TrialScheduler.STOP and self.search.affords()

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Do nothing: the last result has been seen."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: a trial that went is continued under the same id."""

    def _result(self, row: dict[str, Any]) -> dict[str, Any]:
        factor = self.search.config.search.reduction_factor
        return {**row, "objective": self.search.objective(row), "rung_time": factor ** row["rung"]}


class _AshaTrial:
    """The part of a Tune trial that ASHA reads: an id. Ours outlives Tune's."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id


@contextmanager
def _numpy_seed(seed: list[int]) -> Iterator[None]:
    """Seed numpy's global generator, from which ASHA draws a bracket, while the block runs."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(seed).generate_state(1))
    try:
        yield
    finally:
        np.random.set_state(before)
