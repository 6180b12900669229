"""Stages and trials as events of the run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minitron_search.records.directory import RunDirectory


@contextmanager
def stage(run: RunDirectory, name: str, computed: Callable[[str], dict[str, float]] | None = None) -> Iterator[None]:
    """Events around a stage; `computed(name)` says what it has trained and computed in all sessions so far."""
    run.event("stage_started", stage=name)
    yield
    run.event("stage_finished", stage=name, **(computed(name) if computed else {}))


def begin(run: Any, trials: list[Any]) -> None:
    for trial in trials:
        run.start_trial(trial.id, trial.describe())
