"""Run the search's trials with Ray Tune, slot by slot; then promote the best."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.error import TuneError
from ray.tune.search import Searcher

from minitron_search.architecture_search.schedule import candidate_trials, search_phases
from minitron_search.architecture_search.state import SearchState
from minitron_search.architecture_search.study import LiveStudy
from minitron_search.cluster import session
from minitron_search.cluster.launchers import tune_function
from minitron_search.cluster.node_disks import free_checkpoints
from minitron_search.cluster.ray_internals import kept_actors, quiet_tune
from minitron_search.cluster.schedulers import rung_scheduler
from minitron_search.cluster.session import TRIAL_MEMORY
from minitron_search.cluster.worker_groups import close_groups, free_groups, make_room
from minitron_search.evaluation.evidence import evidence
from minitron_search.messages.console import say
from minitron_search.models.architecture import Architecture
from minitron_search.records.damage import CheckpointDamage
from minitron_search.records.summary import harm_of, say_harm
from minitron_search.trials.trial import Trial

TRIAL_RESTARTS = 1  # of a trial whose process died
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or a user's share of it
# What a user reads of a decision; `complete` is the last rung.
DECISIONS = {"stop": "stopped", "continue": "continues", "complete": "complete"}


def run_search(search: SearchState, inputs: ray.ObjectRef, room: Callable[[], int]) -> list[Architecture]:
    """Run what is left of the search, `room()` trials at once; return the promoted architectures, best first.

    `inputs`: the `TrialInputs` of every trial. Raises KeyboardInterrupt after Ctrl-C, with every finished row kept, and
    OSError if nothing can be written.
    """
    study = LiveStudy(search.run.study, search.config.name, search.space, search.config.search.objectives)
    first = search.next_trial()
    if first is not None:
        proposals = Proposals(search, first, room)
        _run_to_the_end(_tuner(search, inputs, proposals, study))
        free_groups()
        if not proposals.ended:
            raise KeyboardInterrupt  # Tune returns quietly when it is interrupted
    best = _promote_the_best(search, study)
    free_checkpoints(search.run, search.all_trials())
    return best


def _tuner(search: SearchState, inputs: ray.ObjectRef, proposals: "Proposals", study: LiveStudy) -> tune.Tuner:
    config, run_dir = search.config, search.run
    resources: dict[str, float] = {"memory": TRIAL_MEMORY}
    if config.resources.launcher == "inline":
        resources = config.resources.of_worker()
    return tune.Tuner(
        tune.with_resources(tune_function(inputs, run_dir, config.resources), resources),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=rung_scheduler(search),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_id_of,
            trial_dirname_creator=_id_of,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=run_dir.ray_storage,
            failure_config=tune.FailureConfig(max_failures=TRIAL_RESTARTS),
            callbacks=[Bookkeeping(search, study)],
            verbose=0,
        ),
    )


def _run_to_the_end(tuner: tune.Tuner) -> None:
    quiet_tune()
    try:
        with kept_actors():
            tuner.fit()
    except TuneError as error:
        raise _cause_of(error) from None


def _promote_the_best(search: SearchState, study: LiveStudy) -> list[Architecture]:
    best = search.best()
    chosen = {architecture.id for architecture in best}
    promoted = frozenset(t.id for t in search.trials.values() if t.architecture.id in chosen)
    for architecture in best:
        search.run.event("promoted", architecture=architecture.id)
    search.write_tables(promoted)
    search.run.write_evidence(evidence(search.run, search.config.search.ranks_by))
    for sentence in harm_of(search.run):
        say(f"search: {sentence}")
    study.refresh(search.observed(), at_once=True)
    return best


class Proposals(Searcher):
    """Hands Tune the search's next trial. If that depends on trials that are running, Tune asks again."""

    def __init__(self, search: SearchState, first: Trial, room: Callable[[], int]):
        super().__init__(metric="objective", mode="min")
        self.search, self.ahead, self.room, self.ended = search, [first], room, False
        self.freed: set[str] = set()  # trials that have no checkpoint any more

    def suggest(self, trial_id: str) -> Any:
        if not self.ahead and len(self.search.alive) >= self.room():
            return None
        self._free()
        trial = self.ahead.pop() if self.ahead else self.search.next_trial()
        if trial is None and not self.search.alive:
            self.ended = True
            close_groups(self.search.run, "search")
            return Searcher.FINISHED
        if trial is None:
            return None
        return {"trial": trial}

    def _free(self) -> None:
        """Delete the checkpoints of trials that have ended for good since the last time."""
        spent = self.search.spent() - self.freed
        if spent:
            free_checkpoints(self.search.run, sorted(spent), on_nodes=False)  # at the end, once for all
            self.freed |= spent

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # the tables know

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a search is rebuilt from its tables")


class Bookkeeping(tune.Callback):
    """Tables, events and a line of progress for everything that happens to a trial."""

    def __init__(self, search: SearchState, study: LiveStudy):
        self.search, self.study = search, study
        self._damage = CheckpointDamage(search.run)
        self.began = 0.0  # when the first training began: rungs at 0 tokens come before
        self.tokens = 0  # trained on since then, by all trials together

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours: Trial = trial.config["trial"]
        self.search.run.event("trial_started", trial=ours.id)
        say(f"{self._place(ours)} starts: {ours.architecture}")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "trial" not in result:
            return
        ours: Trial = trial.config["trial"]
        self._damage.say_new()
        row = self.search.record(result)
        self.search.write_tables()
        self.study.refresh(self.search.observed())
        self.search.run.event("rung_finished", trial=ours.id, rung=row["rung"], tokens=row["tokens"])
        decision = DECISIONS[self.search.decisions[ours.id].get(row["rung"], "complete")]
        at = f"after {row['tokens']:,} tokens" if row["tokens"] else "untrained"
        say(
            f"{self._place(ours)} rung {row['rung']}, {at}: LM loss {row['lm_loss']:.3f} "
            f"+- {row['lm_loss_stderr']:.3f}, KL {row['kl']:.3f}: {decision}{self._pace(row)}"
        )
        say_harm(self.search.run, ours.id, ours.id)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours: Trial = trial.config["trial"]
        self.search.alive.remove(ours.id)
        self.search.read_failures()
        self.search.run.event("trial_finished", trial=ours.id, status=self.search.status(ours.id))
        self.search.write_tables()
        if ours.id in self.search.failures:
            say(f"{self._place(ours)} failed: {self.search.failures[ours.id]}")

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        # at every step, some ten a second: Ray ends a group a while after it was killed
        make_room(self.search.run, "search")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours: Trial = trial.config["trial"]
        message = _cause(trial)
        if any(os.strerror(full) in message for full in FULL):  # not the trial's fault: it would fail again, as others
            raise OSError(f"{message}; {ours.id} could not go on")
        self.search.run.event("trial_restarted", trial=ours.id, message=message)
        say(f"{self._place(ours)} starts again: {message}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours: Trial = trial.config["trial"]
        message = _cause(trial)
        self.search.alive.remove(ours.id)
        self.search.failures[ours.id] = message
        self.search.run.event("trial_failed", trial=ours.id, message=message)
        self.search.write_tables()
        say(f"{self._place(ours)} failed: {message}")

    def _pace(self, row: dict[str, Any]) -> str:
        """Return the training speed of all trials together and the time left at it, if no trial takes more or less."""
        if not row["tokens"]:
            return ""
        if not self.tokens:
            self.began = time.monotonic() - row["seconds"]
        before = self.search.rows[row["trial"]].get(row["rung"] - 1, {"tokens": 0})
        self.tokens += row["tokens"] - before["tokens"]
        speed = self.tokens / (time.monotonic() - self.began)
        return f" ({speed:.0f} tokens/s over all trials, about {self._tokens_left() / speed / 60:.0f} min left)"

    def _tokens_left(self) -> int:
        phases = search_phases(self.search.config, self.search.config.search.trials)
        planned = sum(phase.trials * phase.tokens for phase in phases)
        reached = (max((row["tokens"] for row in rows.values()), default=0) for rows in self.search.rows.values())
        return max(0, planned - sum(reached))

    def _place(self, trial: Trial) -> str:
        """Return how many candidates were tried, of how many, and which one a line is about."""
        search = self.search
        planned = candidate_trials(search.config, min(search.config.search.trials, len(search.space)))
        return f"[{search.tried()}/{max(planned, len(search.trials))} tried] {trial.id}"


def _id_of(trial: Any) -> str:
    return trial.config["trial"].id


def _cause_of(error: BaseException) -> BaseException:
    """Return what `Bookkeeping` raised: Tune wraps it in errors of its own, whose messages are tracebacks."""
    while isinstance(error, TuneError) and (inner := error.__cause__ or error.__context__):
        error = inner
    return error


def _cause(trial: Any) -> str:
    """Return the last line of a trial's error, which Tune has written to a file by now, and not yet to storage."""
    error = Path(trial.error_file)
    lines = error.read_text().strip().splitlines() if error.is_file() else []
    return session.in_short(lines[-1].strip()) if lines else "its process died"
