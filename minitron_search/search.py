"""Optuna proposes, Ray Tune runs and stops, the tables remember; then the best are promoted.

Tune asks for a trial when a slot is free, ASHA rules at every rung, and each trial obeys the ruling it reads
from its own folder: none is ever killed, so a stopped trial has trained exactly as far as its last row.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from minitron_search.architecture import Architecture
from minitron_search.config import Config
from minitron_search.evidence import SIGN, evidence
from minitron_search.forecast import search_tokens
from minitron_search.launchers import tune_function
from minitron_search.loop_settings import LoopSettings
from minitron_search.proposals import Observation, propose, write_study
from minitron_search.run_directory import FINISHED, TRIALS_SCHEMA, RunDirectory
from minitron_search.search_space import SearchSpace
from minitron_search.trial import Trial
from minitron_search.trial_settings import counts
from minitron_search.worker_group import free_abandoned_groups, free_groups

TRIAL_RESTARTS = 1  # of a trial whose process died
TRIAL_MEMORY = 300 * 2**20  # a Tune trial that only waits for its workers asks for memory, not for a CPU


class Search:
    """The state of one search, rebuilt from the run directory: what was proposed, how far it got, what was ruled."""

    def __init__(self, run: RunDirectory, config: Config, space: SearchSpace, settings: LoopSettings):
        self.run, self.config, self.space, self.settings = run, config, space, settings
        self.trials: dict[str, Trial] = {}  # by id, in the order proposed
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}  # rung -> row, by trial id
        self.failures: dict[str, str] = {}
        self._read()

    def _read(self) -> None:
        made = [json.loads(path.read_text()) for path in self.run.root.glob("trials/search-*/architecture.json")]
        for trial in sorted(made, key=lambda trial: trial["proposal"]):
            architecture = Architecture(
                **{key: trial[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads",
                                               "num_key_value_heads")},
                layers=tuple(trial["layers"]),
            )  # fmt: skip
            self.add(self.make(architecture, trial["proposal"], trial["seed"]))
        for row in self.run.rungs():
            if row["trial"] in self.rows:
                self.rows[row["trial"]][row["rung"]] = row
        self.read_failures()

    def read_failures(self) -> None:
        """A trial that diverged has said so itself; a retraining, which is no trial of the search, too."""
        for event in self.run.events():
            if event["event"] == "trial_failed":
                self.failures[event["trial"]] = event["message"]
            elif event["event"] == "trial_finished" and event["status"] == "complete":
                self.failures.pop(event["trial"], None)

    def make(self, architecture: Architecture, proposal: int, seed: int) -> Trial:
        return Trial(
            architecture=architecture,
            arm="search",
            seed=seed,
            proposal=proposal,
            initialization=self.config.distillation.initialization,
            settings=self.settings_with(seed),
            score_precision=self.settings.precision,
            counts=counts(self.space, architecture),
        )

    def settings_with(self, seed: int) -> LoopSettings:
        return replace(self.settings, seed=seed)

    def add(self, trial: Trial) -> None:
        self.trials[trial.id] = trial
        self.rows.setdefault(trial.id, {})

    def status(self, trial: str) -> str:
        if trial in self.failures:
            return "failed"
        if len(self.settings.milestones) - 1 in self.rows[trial]:
            return "complete"
        stopped = any(line["decision"] == "stop" for line in self.run.decisions(trial).values())
        return "stopped" if stopped else "running"

    def observed(self) -> list[Observation]:
        """One observation per architecture, in the order proposed; of several seeds, the mean by rung."""
        found = []
        by_proposal: dict[int, list[Trial]] = {}
        for trial in self.trials.values():
            by_proposal.setdefault(trial.proposal, []).append(trial)
        for trials in by_proposal.values():
            states = [self.status(trial.id) for trial in trials]
            state = next((s for s in ("running", "stopped", "complete") if s in states), "failed")
            shared = min((len(self.rows[t.id]) for t in trials if self.status(t.id) != "failed"), default=0)
            values = tuple(self.mean_objective(trials, rung) for rung in range(shared))
            found.append(Observation(trials[0].architecture, values, state))
        return found

    def mean_objective(self, trials: list[Trial], rung: int) -> float:
        values = [self.objective(self.rows[t.id][rung]) for t in trials if rung in self.rows[t.id]]
        return sum(values) / len(values)

    def objective(self, row: dict[str, Any]) -> float:
        name = self.config.search.objective
        return SIGN[name] * row[name]

    def next_trial(self) -> Trial | None:
        """The next trial to start; None when the search has proposed all it may."""
        observed = self.observed()
        last = next(reversed(self.trials.values()), None)
        seeds = self.config.search.seeds
        if last is not None:
            done = sum(trial.proposal == last.proposal for trial in self.trials.values())
            if done < seeds:  # the same architecture with its next seed
                return self.make(last.architecture, last.proposal, self.config.seed + done)
        if len(observed) >= self.config.search.trials:
            return None
        architecture = propose(self.space, observed, sampler=self.config.search.sampler, seed=self.config.seed)
        return self.make(architecture, len(observed), self.config.seed) if architecture else None

    def all_proposed(self) -> bool:
        asked = self.config.search
        return len(self.trials) >= min(asked.trials, len(self.space)) * asked.seeds

    def write_tables(self, promoted: frozenset[str] = frozenset()) -> None:
        self.read_failures()
        statuses = {trial: "promoted" if trial in promoted else self.status(trial) for trial in self.trials}
        self.run.write_trials(statuses, self.failures)

    def best(self) -> list[Architecture]:
        """The architectures to promote, best first: by the objective's mean over seeds at the last rung.

        Raises ValueError when no trial reached the last rung.
        """
        last = len(self.settings.milestones) - 1
        complete = [o for o in self.observed() if o.state == "complete" and len(o.values) > last]
        if not complete:
            raise ValueError("search: no trial reached the last rung, so there is nothing to promote; "
                             "trials.parquet says why each one failed")  # fmt: skip
        complete.sort(key=lambda observation: observation.values[last])
        return [observation.architecture for observation in complete[: self.config.search.promote]]


def run_search(
    search: Search, materials: ray.ObjectRef, concurrency: int, progress: Callable[[str], None]
) -> list[Architecture]:
    """Run what is left of the search; returns the promoted architectures, best first.

    Raises KeyboardInterrupt after Ctrl-C, with every finished row kept.
    """
    config, run = search.config, search.run
    unfinished = sum(search.status(trial) == "running" for trial in search.trials)
    fresh = config.search.trials * config.search.seeds - len(search.trials)
    if unfinished + fresh > 0:
        resources: dict[str, float] = {"memory": TRIAL_MEMORY}
        if config.resources.launcher == "inline":
            resources = {"CPU": config.resources.cpus_per_worker}
            if config.resources.gpus_per_worker:
                resources["GPU"] = config.resources.gpus_per_worker
        rungs = len(search.settings.milestones)
        factor = config.search.reduction_factor
        scheduler = Ruling(
            # Tune's own milestones are powers of the reduction factor: rung r is time factor ** r
            time_attr="rung_time", metric="objective", mode="min", grace_period=1,
            max_t=factor ** max(rungs - 1, 1), reduction_factor=factor,
        )  # fmt: skip
        scheduler.prepare(search)
        # Tune looks for result files that nobody here writes, and says so for every trial
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        tune.Tuner(
            tune.with_resources(tune_function(materials, run, config.resources), resources),
            tune_config=tune.TuneConfig(
                search_alg=Proposals(search),
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=concurrency,
                reuse_actors=True,
                trial_name_creator=_id_of,
                trial_dirname_creator=_id_of,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(run.scratch.absolute()),
                failure_config=tune.FailureConfig(max_failures=TRIAL_RESTARTS),
                callbacks=[Bookkeeping(search, progress)],
                verbose=0,
            ),
        ).fit()
        free_groups()
    unruled = [trial for trial in search.trials if search.status(trial) == "running"]
    if unruled or len(search.observed()) < min(config.search.trials, len(search.space)):
        raise KeyboardInterrupt  # Tune returns quietly when it is interrupted
    best = search.best()
    chosen = {architecture.id for architecture in best}
    promoted = frozenset(t.id for t in search.trials.values() if t.architecture.id in chosen)
    for architecture in best:
        run.event("promoted", architecture=architecture.id)
    search.write_tables(promoted)
    run.write_evidence(evidence(run, config.search.objective))
    write_study(search.space, search.observed(), config.name, run.study)
    return best


class Ruling(ASHAScheduler):
    """ASHA's rulings, written where the trial reads them. To Tune every trial goes on until it ends itself."""

    def prepare(self, search: Search) -> None:
        """Rule again, in the order of the first time, on what an interrupted search had ruled."""
        self.search = search
        ruled = sorted(
            (line["time"], rung, trial)
            for trial in search.trials
            for rung, line in search.run.decisions(trial).items()
            if rung in search.rows[trial]
        )
        for _, rung, trial in ruled:
            stand_in = _StandIn(trial)
            if rung == 0:
                super().on_trial_add(None, stand_in)  # type: ignore[arg-type]
            super().on_trial_result(None, stand_in, tune_result(search, search.rows[trial][rung]))  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        stand_in = _StandIn(trial.config["trial"].id)
        if stand_in.trial_id not in self._trial_info:
            super().on_trial_add(tune_controller, stand_in)  # type: ignore[arg-type]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        ours: Trial = trial.config["trial"]
        rung = result["rung"]
        if rung < len(self.search.settings.milestones) - 1 and rung not in self.search.run.decisions(ours.id):
            action = super().on_trial_result(
                tune_controller,
                _StandIn(ours.id),  # type: ignore[arg-type]
                tune_result(self.search, result),
            )
            self.search.run.decide(ours.id, rung, "stop" if action == TrialScheduler.STOP else "continue")
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        pass  # the last result has been seen

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        pass


class _StandIn:
    """What ASHA needs of a trial: an id, ours, which outlives Tune's."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id


def tune_result(search: Search, row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "objective": search.objective(row),
        "rung_time": search.config.search.reduction_factor ** row["rung"],
    }


class Proposals(Searcher):
    """Hands Tune first the trials an interrupted search left unfinished, then new ones."""

    def __init__(self, search: Search):
        super().__init__(metric="objective", mode="min")
        self.search = search
        self.unfinished = [t for t in search.trials.values() if search.status(t.id) == "running"]

    def suggest(self, trial_id: str) -> Any:
        trial = self.unfinished.pop(0) if self.unfinished else self.search.next_trial()
        if trial is None:
            return Searcher.FINISHED
        self.search.add(trial)
        self.search.run.start_trial(trial.id, trial.describe())
        return {"trial": trial, "last": not self.unfinished and self.search.all_proposed()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # the tables know

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a search is rebuilt from its tables")


class Bookkeeping(tune.Callback):
    """Tables, events and a line of progress for everything that happens to a trial."""

    def __init__(self, search: Search, progress: Callable[[str], None]):
        self.search, self.progress = search, progress
        self.began = time.monotonic()
        self.tokens = 0

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours: Trial = trial.config["trial"]
        self.search.run.event("trial_started", trial=ours.id)
        self.progress(f"{self._place(ours)} starts: {ours.architecture}")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "trial" not in result:
            return
        ours: Trial = trial.config["trial"]
        row = self.search.rows[ours.id].setdefault(result["rung"], _row(result))
        self.search.write_tables()
        self.search.run.event("rung_finished", trial=ours.id, rung=row["rung"], tokens=row["tokens"])
        ruling = self.search.run.decisions(ours.id).get(row["rung"], {}).get("decision", "complete")
        self.progress(
            f"{self._place(ours)} rung {row['rung']} at {row['tokens']:,} tokens: LM loss {row['lm_loss']:.3f} "
            f"+- {row['lm_loss_stderr']:.3f}, KL {row['kl']:.3f}, {self._pace(row)} -> {ruling}"
        )

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours: Trial = trial.config["trial"]
        self.search.read_failures()
        self.search.run.event("trial_finished", trial=ours.id, status=self.search.status(ours.id))
        self.search.write_tables()
        if ours.id in self.search.failures:
            self.progress(f"{self._place(ours)} failed: {self.search.failures[ours.id]}")

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        free_abandoned_groups()  # at every step, some ten a second: Ray ends a group a while after it was killed

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours: Trial = trial.config["trial"]
        message = _cause(trial)
        self.search.failures[ours.id] = message
        self.search.run.event("trial_failed", trial=ours.id, message=message)
        self.search.write_tables()
        self.progress(f"{self._place(ours)} failed: {message}")

    def _pace(self, row: dict[str, Any]) -> str:
        """Training speed of all trials together, and the time left at it if ASHA keeps one trial in the factor."""
        before = self.search.rows[row["trial"]].get(row["rung"] - 1, {"tokens": 0})
        self.tokens += row["tokens"] - before["tokens"]
        speed = self.tokens / (time.monotonic() - self.began)
        left = max(0, search_tokens(self.search.config) - sum(
            max((row["tokens"] for row in rows.values()), default=0) for rows in self.search.rows.values()
        ))  # fmt: skip
        return f"{speed:.0f} tokens/s in all, about {left / speed / 60:.0f} min left"

    def _place(self, trial: Trial) -> str:
        done = sum(self.search.status(other) in FINISHED for other in self.search.trials)
        total = self.search.config.search.trials * self.search.config.search.seeds
        return f"[{done}/{total} trials done] {trial.id}"


def _row(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in TRIALS_SCHEMA.names if name in result}


def _id_of(trial: Any) -> str:
    return trial.config["trial"].id


def _cause(trial: Any) -> str:
    """The last line of what a trial died of; Tune has written it to a file by now, and not yet to storage."""
    error = Path(trial.error_file)
    lines = error.read_text().strip().splitlines() if error.is_file() else []
    return lines[-1] if lines else "its process died"
