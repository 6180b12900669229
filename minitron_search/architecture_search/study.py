"""The search as an Optuna study on disk, which optuna-dashboard opens while the search runs.

It is made from the observations and put in the place of the one before in one transaction: whoever has the file open
reads the one or the other. Nothing is read back from it.
"""

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.pool import StaticPool

from minitron_search.architecture_search.samplers import Observation, distributions_of, excess
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.records.metrics import METRICS

SHARE = 0.02  # of the time that a refresh may take; one that took a second is followed by none for fifty
PATIENCE = 1.0  # seconds to wait for a reader in the middle of a read
STATES = {
    "running": TrialState.RUNNING,
    "stopped": TrialState.PRUNED,
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
}


class LiveStudy:
    """study.db of a search in progress.

    Between refreshes it is kept in memory, where a running trial is brought up to date; when a finished one changes (a
    stopped trial was continued), all are made again. objectives: their names, in the order of `Observation.at`.
    """

    def __init__(self, path: Path, name: str, space: SearchSpace, objectives: Sequence[str]):
        self.path, self.name, self.space, self.objectives = path, name, space, tuple(objectives)
        self._rest_until = 0.0
        self._told: list[Observation] = []
        self._begin()

    def refresh(self, observed: Sequence[Observation], at_once: bool = False) -> bool:
        """Write the study, unless the last time cost too much to do it again now (`at_once`: even then) or a reader
        holds the file, and return whether it was written. Takes at most `SHARE` of a search's time."""
        began = time.monotonic()
        if began < self._rest_until and not at_once:
            return False
        try:
            self.write(observed)
            written = True
        except TimeoutError:
            written = False
        ended = time.monotonic()
        self._rest_until = ended + (ended - began) * (1 / SHARE - 1)
        return written

    def write(self, observed: Sequence[Observation]) -> None:
        """Write the study now. Raises TimeoutError when a reader holds the file for `PATIENCE` seconds.

        Stopped trials are pruned; constraints are shares of a budget (`excess`); values are the tables' own, so a
        margin is maximised. Rungs are intermediate values; with several objectives, where Optuna has none, a user
        attribute.
        """
        changed = [
            index for index, (old, new) in enumerate(zip(self._told, observed, strict=False))
            if old != new
        ]  # fmt: skip
        # an architecture is observed for good, and in its place
        if len(observed) < len(self._told) or any(self._told[index].state != "running" for index in changed):
            self._storage.engine.dispose()
            self._begin()
            changed = []
        for index in changed:
            self._update(index, self._trial(observed[index]))
        self._study.add_trials(self._trial(observation) for observation in observed[len(self._told) :])
        self._told = list(observed)
        connection = self._storage.engine.raw_connection()
        try:
            assert isinstance(connection.driver_connection, sqlite3.Connection)
            _replace(connection.driver_connection, self.path)
        finally:
            connection.close()

    def _begin(self) -> None:
        """Make an empty study in memory."""
        one_database = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
        self._storage = RDBStorage("sqlite:///:memory:", engine_kwargs=one_database)
        directions = [
            StudyDirection.MAXIMIZE if METRICS[objective].sign < 0 else StudyDirection.MINIMIZE
            for objective in self.objectives
        ]
        self._study = optuna.create_study(storage=self._storage, study_name=self.name, directions=directions)
        self._study.set_metric_names(list(self.objectives))
        self._distributions = distributions_of(self.space)
        self._told = []

    def _update(self, number: int, now: FrozenTrial) -> None:
        study_id = self._storage.get_study_id_from_name(self.name)
        running = self._storage.get_trial(self._storage.get_trial_id_from_study_id_trial_number(study_id, number))
        for name, value in now.user_attrs.items():
            if running.user_attrs.get(name) != value:
                self._storage.set_trial_user_attr(running._trial_id, name, value)
        for rung, value in now.intermediate_values.items():
            self._storage.set_trial_intermediate_value(running._trial_id, rung, value)
        if now.state.is_finished():
            self._storage.set_trial_state_values(running._trial_id, now.state, now.values)

    def _trial(self, observation: Observation) -> FrozenTrial:
        """Return an observation as a trial. A stopped trial is pruned at its last rung, so that its value is never
        taken for one at full tokens."""
        architecture, state = observation.architecture, STATES[observation.state]
        coordinates = self.space.coordinates(architecture)
        params = {name: value for name, value in coordinates.items() if name in self._distributions}
        signs = [METRICS[objective].sign for objective in self.objectives]
        rungs = [
            tuple(sign * value for sign, value in zip(signs, observation.at(rung), strict=True))
            for rung in range(len(observation.values))
        ]
        several = len(self.objectives) > 1
        by_name = {"rungs": [dict(zip(self.objectives, values, strict=True)) for values in rungs]} if several else {}
        measures = self.space.measures(architecture)
        return optuna.trial.create_trial(
            state=state,
            values=rungs[-1] if state is TrialState.COMPLETE else None,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            user_attrs={
                "architecture": architecture.id,
                **coordinates,
                "params": int(measures.params),
                "non_embedding_params": int(measures.non_embedding_params),
                "memory_bytes": int(measures.memory_bytes),
                "seeds": list(observation.seeds),
                **by_name,
            },
            intermediate_values={} if several else {rung: values[0] for rung, values in enumerate(rungs)},
            constraints=excess(self.space, architecture),
        )


def _replace(source: sqlite3.Connection, path: Path) -> None:
    """Copy a database over the one at `path` in one transaction: a copy that is cut off is rolled back."""
    deadline = time.monotonic() + PATIENCE

    def give_up(status: int, remaining: int, total: int) -> None:
        if status != sqlite3.SQLITE_DONE and time.monotonic() > deadline:
            raise TimeoutError(f"{path}: a reader did not let go of it within {PATIENCE:g} s")

    target = sqlite3.connect(path, timeout=0)
    try:
        source.backup(target, progress=give_up, sleep=0.02)
    finally:
        target.close()
