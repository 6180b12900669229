"""Who may train past a rung, by what is written where the trial reads it: nobody before the whole rung is in (the
search then continues the best), or whom Ray Tune's ASHA or its Hyperband passes at once.

To Tune every trial goes on until it ends itself: none is ever killed, so a stopped trial has trained exactly as far as
its last row, and can go on from there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from minitron_search.search.state import Search
from minitron_search.trials.trial import Trial


def ruling(search: Search) -> "Ruling":
    """Hyperband is asynchronous, as ASHA is: a bracket for every rung but the last, and bracket s stops nobody before
    rung s (Li et al. 2020, arXiv:1810.05934, section 3.2)."""
    rungs, asked = len(search.settings.milestones), search.config.search
    made = Ruling(
        # Tune's own milestones are powers of the reduction factor: rung r is time factor ** r
        time_attr="rung_time", metric="objective", mode="min", grace_period=1,
        max_t=asked.reduction_factor ** max(rungs - 1, 1), reduction_factor=asked.reduction_factor,
        brackets=max(rungs - 1, 1) if asked.scheduler == "hyperband" else 1,
    )  # fmt: skip
    made.prepare(search)
    return made


class Ruling(ASHAScheduler):
    def prepare(self, search: Search) -> None:
        """Rule again, in the order of the first time, on what an interrupted search had ruled."""
        self.search = search
        ruled = sorted(
            (line["time"], rung, trial)
            for trial in search.trials
            for rung, line in search.run.decisions(trial).items()
            if rung in search.rows[trial] and not search.is_extra(search.trials[trial])
        )
        for _, rung, trial in ruled:
            if trial not in self._trial_info:
                self._assign(search.trials[trial])
            super().on_trial_result(None, _StandIn(trial), self._result(search.rows[trial][rung]))  # type: ignore[arg-type]

    def _assign(self, trial: Trial) -> None:
        """To a bracket, drawn for this proposal alone: the same after a resume."""
        with _numpy_seed([self.search.config.seed, trial.proposal]):
            super().on_trial_add(None, _StandIn(trial.id))  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        ours: Trial = trial.config["trial"]
        if ours.id not in self._trial_info and not self.search.is_extra(ours):
            self._assign(ours)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        ours: Trial = trial.config["trial"]
        rung = result["rung"]
        if rung < self.search.last_rung and rung not in self.search.decisions[ours.id]:
            self.search.decide(ours.id, rung, "continue" if self._passes(ours, result) else "stop")
        return TrialScheduler.CONTINUE

    def _passes(self, trial: Trial, result: dict[str, Any]) -> bool:
        asked = self.search.config.search
        alone = asked.trials == 1 and asked.tokens == "auto"  # its seeds are compared with nobody
        if self.search.is_extra(trial) or alone:
            return True
        if self.search.config.search.scheduler == "halving":
            return False
        action = super().on_trial_result(None, _StandIn(trial.id), self._result(result))  # type: ignore[arg-type]
        self.search.record(result)  # it runs, so that what it takes to the next rung is committed
        return action != TrialScheduler.STOP and self.search.affords()

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        pass  # the last result has been seen

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        pass

    def _result(self, row: dict[str, Any]) -> dict[str, Any]:
        factor = self.search.config.search.reduction_factor
        return {**row, "objective": self.search.objective(row), "rung_time": factor ** row["rung"]}


class _StandIn:
    """What ASHA needs of a trial: an id, ours, which outlives Tune's."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id


@contextmanager
def _numpy_seed(seed: list[int]) -> Iterator[None]:
    """ASHA draws a bracket from numpy's global generator."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(seed).generate_state(1))
    try:
        yield
    finally:
        np.random.set_state(before)
