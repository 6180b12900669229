"""Write stages and trials down as events of the run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from minitron_search.records.directory import RunDirectory
from minitron_search.trials.trial import Trial


@contextmanager
def stage(
    run_dir: RunDirectory, name: str, computed: Callable[[str], dict[str, float]] | None = None
) -> Iterator[None]:
    """Log the start and the end of a stage around the block.

    `computed(name)` returns what the stage has trained and computed in all sessions so far.
    """
    run_dir.event("stage_started", stage=name)
    yield
    run_dir.event("stage_finished", stage=name, **(computed(name) if computed else {}))


def begin(run_dir: RunDirectory, trials: Sequence[Trial]) -> None:
    """Write down what makes each of `trials`, before it runs."""
    for trial in trials:
        run_dir.start_trial(trial.id, trial.describe())
