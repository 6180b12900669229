"""The state of one search, rebuilt from its run directory: what was proposed, how far it got, and what is next.

What is next comes in phases, each of which looks at all results of those before it: the sampler's proposals; stopped
trials that are continued while there are tokens left; more seeds of the finalists; controls beside the winner.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitron_search.architecture_search.samplers import Observation, promotable, propose
from minitron_search.architecture_search.schedule import halving, search_tokens, whole_batches
from minitron_search.architecture_search.space import SearchSpace, counts
from minitron_search.config.schema import Config
from minitron_search.config.types import Precision
from minitron_search.distillation.settings import LoopSettings
from minitron_search.evaluation.evidence import not_worse
from minitron_search.models.architecture import Architecture
from minitron_search.records.directory import FINISHED, TRIALS_SCHEMA, Log, RunDirectory
from minitron_search.records.lines import ENDED
from minitron_search.records.metrics import METRICS
from minitron_search.trials.settings import CONTROLS
from minitron_search.trials.trial import Trial

# What a trial that met a damaged file failed with, in the words of whatever read it: such a trial is tried again.
DAMAGE = re.compile(
    r"is damaged|EOFError|UnpicklingError|CheckpointException|PytorchStreamReader|central directory|SafetensorError|"
    r"JSONDecodeError|BadZipFile|ArrowInvalid"
)


class SearchState:
    """A search's trials by id, in the order they were made; a trial is running, stopped, complete or failed."""

    def __init__(self, run_dir: RunDirectory, config: Config, space: SearchSpace, settings: LoopSettings):
        self.run, self.config, self.space, self.settings = run_dir, config, space, settings
        self.trials: dict[str, Trial] = {}  # candidates; controls are apart
        self.controls: dict[str, Trial] = {}
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}  # rung -> row, by trial id
        self.failures: dict[str, str] = {}
        self.decisions: dict[str, dict[int, str]] = {}  # rung -> continue or stop, by trial id
        self.alive: set[str] = set()  # handed out, and not known to have ended
        self.ended: set[str] = set()  # at least once, by the events: what was stopped may go on again
        self.settled = False  # whether what was stopped stays stopped
        self._events = Log(run_dir.events_log)
        self.rung_tokens = [whole_batches(config, tokens) for tokens in settings.milestones]
        self._read()
        self.waiting = [trial for trial in self.all_trials().values() if self.status(trial.id) == "running"]

    def _read(self) -> None:
        files = [json.loads(path.read_text()) for path in self.run.root.glob("trials/*/architecture.json")]
        for described in sorted(files, key=lambda described: described["proposal"]):
            arm = described["arm"]
            if arm == "search" or arm in CONTROLS:
                architecture = Architecture.of_trial(described)
                self.add(self.new_trial(architecture, described["proposal"], described["seed"], arm))
        for row in self.run.rungs():
            if row["trial"] in self.rows:
                self.rows[row["trial"]][row["rung"]] = row
        for trial_id in self.all_trials():
            decided = self.run.decisions(trial_id)
            self.decisions[trial_id] = {rung: line["decision"] for rung, line in decided.items()}
        self.read_failures()
        # a file that was damaged then is mended, or made again, by now
        self.failures = {trial: text for trial, text in self.failures.items() if not DAMAGE.search(text)}

    def read_failures(self) -> None:
        """Read from the events which trials have failed. One that diverges has said so itself, and so has a retraining,
        which is not a trial of the search."""
        for event in self._events.new():
            if event["event"] in ENDED and isinstance(event.get("trial"), str):
                self.ended.add(event["trial"])
            if event["event"] == "trial_failed":
                self.failures[event["trial"]] = event["message"]
            elif event["event"] == "trial_finished" and event["status"] == "complete":
                self.failures.pop(event["trial"], None)

    def new_trial(self, architecture: Architecture, proposal: int, seed: int, arm: str = "search") -> Trial:
        """Return a trial of the search, scored in the precision it trains in."""
        return make_trial(
            self.space,
            architecture,
            arm,
            self.settings,
            seed=seed,
            initialization=CONTROLS.get(arm, self.config.distillation.initialization),
            proposal=proposal,
            score_precision=self.settings.precision,
        )

    def tried(self) -> int:
        """Return how many candidates have run as far as they first went: no fewer when one of them goes on."""
        return sum(trial in self.ended or self.status(trial) in FINISHED for trial in self.trials)

    def add(self, trial: Trial) -> None:
        (self.controls if trial.arm in CONTROLS else self.trials)[trial.id] = trial
        self.rows.setdefault(trial.id, {})
        self.decisions.setdefault(trial.id, {})

    def all_trials(self) -> dict[str, Trial]:
        """Return candidates and controls by id."""
        return {**self.trials, **self.controls}

    @property
    def last_rung(self) -> int:
        return len(self.settings.milestones) - 1

    def status(self, trial: str) -> str:
        if trial in self.failures:
            return "failed"
        if self.last_rung in self.rows[trial]:
            return "complete"
        return "stopped" if "stop" in self.decisions[trial].values() else "running"

    def decide(self, trial: str, rung: int, decision: str) -> None:
        self.run.decide(trial, rung, decision)
        self.decisions[trial][rung] = decision

    # What was measured

    def record(self, result: dict[str, Any]) -> dict[str, Any]:
        """Keep, and return, the row of a rung that Tune reports."""
        row = {name: result[name] for name in TRIALS_SCHEMA.names if name in result}
        return self.rows[row["trial"]].setdefault(row["rung"], row)

    def objective(self, row: dict[str, Any]) -> float:
        """Return what rungs rank by, lower is better."""
        return minimised(row, self.config.search.ranks_by)

    def by_proposal(self) -> dict[int, list[Trial]]:
        """Return the trials of every proposed architecture, a trial a seed."""
        groups: dict[int, list[Trial]] = {}
        for trial in self.trials.values():
            groups.setdefault(trial.proposal, []).append(trial)
        return groups

    def observed(self) -> list[Observation]:
        """Return one observation per architecture, in the order proposed: means over its seeds at each rung."""
        observations = []
        for trials in self.by_proposal().values():
            states = [self.status(trial.id) for trial in trials]
            state = next((s for s in ("running", "stopped", "complete") if s in states), "failed")
            shared = min((len(self.rows[t.id]) for t in trials if self.status(t.id) != "failed"), default=0)
            values = tuple(self.mean_objective(trials, rung) for rung in range(shared))
            others = tuple(self._further(trials, rung) for rung in range(shared))
            seeds = tuple(trial.seed for trial in trials)
            observations.append(Observation(trials[0].architecture, values, state, others, seeds))
        return observations

    def _further(self, trials: list[Trial], rung: int) -> tuple[float, ...]:
        """Return the objectives besides the one that rungs rank by."""
        rows = [self.rows[t.id][rung] for t in trials if rung in self.rows[t.id]]
        names = self.config.search.objectives[1:]
        return tuple(sum(minimised(row, name) for row in rows) / len(rows) for name in names)

    def mean_objective(self, trials: list[Trial], rung: int) -> float:
        """Return the mean over seeds of what rungs rank by, lower is better."""
        values = [self.objective(self.rows[t.id][rung]) for t in trials if rung in self.rows[t.id]]
        return sum(values) / len(values)

    def committed_tokens(self) -> int:
        """Return the tokens that candidates have trained on, counting those that run up to their next rung."""
        return sum(self._tokens_of(trial) for trial in self.trials)

    def _tokens_of(self, trial: str) -> int:
        reached = len(self.rows[trial]) + (self.status(trial) == "running")
        return self.rung_tokens[min(reached, self.last_rung + 1) - 1] if reached else 0

    def affords(self, more: int = 0) -> bool:
        """Return whether `search.tokens` allows what is committed and `more` tokens."""
        limit = self.config.search.tokens
        return limit == "auto" or self.committed_tokens() + more <= limit

    # What is next

    def next_trial(self) -> Trial | None:
        """Return the next trial to start; None while that depends on trials that are running, and when none is left."""
        if not self.waiting:
            proposed = self._proposed()
            self.waiting = [proposed] if proposed else []
        if not self.waiting and not self.alive:
            self.waiting = self._continued()
            self.settled = self.settled or not self.waiting
            self.waiting = self.waiting or self._more_seeds() or self._controls()
        if not self.waiting:
            return None
        trial = self.waiting.pop(0)
        self.add(trial)
        self.alive.add(trial.id)
        self.run.start_trial(trial.id, trial.describe())
        return trial

    def spent(self) -> set[str]:
        """Return the trials that no decision brings back: the complete ones, and, once none is continued any more, the
        stopped ones. One that failed may yet be tried again."""
        over = ("complete", "stopped") if self.settled else ("complete",)
        return {trial for trial in self.all_trials() if self.status(trial) in over} - self.alive

    def _proposed(self) -> Trial | None:
        last, seeds = next(reversed(self.trials.values()), None), self.config.search.seeds
        if last is not None and not self._more_seeds_began():
            done = sum(trial.proposal == last.proposal for trial in self.trials.values())
            if done < seeds:  # the same architecture with its next seed
                return self.new_trial(last.architecture, last.proposal, self.config.seed + done)
        proposed = len({trial.proposal for trial in self.trials.values()})
        most = halving(self.config, self.config.search.trials)[0]
        if proposed >= most or not self.affords(self.rung_tokens[0]):
            return None
        architecture = propose(
            self.space, self.observed(), sampler=self.config.search.sampler, seed=self.config.seed
        )  # fmt: skip
        return self.new_trial(architecture, proposed, self.config.seed) if architecture else None

    def _at(self, rung: int) -> list[list[Trial]]:
        """Return the trials of every architecture that reached a rung and has not failed, best first, by the seeds
        that every architecture runs with."""
        first = [[t for t in trials if not self.is_extra(t)] for trials in self.by_proposal().values()]
        sound = [[t for t in trials if self.status(t.id) != "failed"] for trials in first]
        here = [trials for trials in sound if any(rung in self.rows[t.id] for t in trials)]
        return sorted(here, key=lambda trials: self.mean_objective(trials, rung))

    def _continued(self) -> list[Trial]:
        """Return the stopped trials that go on from their checkpoints once all is proposed: those that successive
        halving passes by the order of their rung, where the next one takes a failed trial's place; then, as far as
        tokens last, the best of the highest rung, one after another."""
        config = self.config.search
        left = (search_tokens(self.config) if config.tokens == "auto" else config.tokens) - self.committed_tokens()
        # more than was planned only where a trial failed
        at_any_cost = config.scheduler == "halving" and config.tokens == "auto"
        passing: list[Trial] = []
        others: list[tuple[int, list[Trial]]] = []
        numbers = halving(self.config, len(self.by_proposal()))
        for rung in reversed(range(self.last_rung)):
            for rank, trials in enumerate(self._at(rung)):
                waiting = self._waiting(trials, rung)
                cost = self._cost(rung, waiting)
                if waiting and rank < numbers[rung + 1] and (cost <= left or at_any_cost):
                    left -= cost
                    passing += self._go_on(rung, waiting)
                elif waiting and cost <= left:
                    others.append((rung, waiting))
        if passing or not others:  # one after another: what it reaches may make it pass there
            return passing
        return self._go_on(*others[0])

    def _waiting(self, trials: list[Trial], rung: int) -> list[Trial]:
        """Return the trials that were stopped at a rung, and have ended."""
        return [
            t for t in trials
            if self.rows[t.id] and max(self.rows[t.id]) == rung and self.status(t.id) == "stopped"
            and t.id not in self.alive
        ]  # fmt: skip

    def _cost(self, rung: int, trials: list[Trial]) -> int:
        return (self.rung_tokens[rung + 1] - self.rung_tokens[rung]) * len(trials)

    def _go_on(self, rung: int, trials: list[Trial]) -> list[Trial]:
        for trial in trials:
            self.decide(trial.id, rung, "continue")
            self.run.event("trial_continued", trial=trial.id, rung=rung)
            self.ended.add(trial.id)
        return trials

    def _more_seeds(self) -> list[Trial]:
        """Return trials for the seeds that finalists have not run with: of the best at the last rung,
        `reduction_factor` for each that is promoted. Who they are was decided by the seeds that all ran with."""
        config = self.config.search
        missing = []
        for trials in self._finalists() if config.finalist_seeds > config.seeds else []:
            seeds = {trial.seed for trial in trials}
            missing += [
                self.new_trial(trials[0].architecture, trials[0].proposal, self.config.seed + number)
                for number in range(config.seeds, config.finalist_seeds) if self.config.seed + number not in seeds
            ]  # fmt: skip
        return missing

    def _more_seeds_began(self) -> bool:
        return any(self.is_extra(trial) for trial in self.trials.values())

    def is_extra(self, trial: Trial) -> bool:
        """Return whether a trial runs to the last rung whatever its rank: a control, or a finalist's further seed."""
        return trial.arm in CONTROLS or trial.seed >= self.config.seed + self.config.search.seeds

    def _finalists(self) -> list[list[Trial]]:
        first = [[t for t in trials if not self.is_extra(t)] for trials in self.by_proposal().values()]
        complete = [trials for trials in first if any(self.status(t.id) == "complete" for t in trials)]
        complete.sort(key=lambda trials: self.mean_objective(trials, self.last_rung))
        config = self.config.search
        number = config.reduction_factor * (1 if config.promote == "not_worse" else config.promote)
        chosen = {id(trials) for trials in complete[:number]}
        return [self.by_proposal()[trials[0].proposal] for trials in complete if id(trials) in chosen]

    def _controls(self) -> list[Trial]:
        if not self.config.search.controls or not any(self.status(trial) == "complete" for trial in self.trials):
            return []
        controls = [
            self.new_trial(architecture, -1, self.config.seed, arm) for architecture in self.best() for arm in CONTROLS
        ]  # fmt: skip
        return [trial for trial in controls if trial.id not in self.controls]

    # What it ends with

    def best(self) -> list[Architecture]:
        """Return the architectures to promote, best first, by the mean over seeds at the last rung. With several
        objectives, those on the Pareto front come before the others, each part by the objective that rungs rank by.

        Raises ValueError when no trial reached the last rung.
        """
        config = self.config.search
        several = config.finalist_seeds > config.seeds  # then one lucky seed cannot compete with a mean of several
        groups = self._finalists() if several else list(self.by_proposal().values())
        sound = [[t for t in trials if self.status(t.id) != "failed"] for trials in groups]
        complete = [trials for trials in sound if trials and all(self.last_rung in self.rows[t.id] for t in trials)]
        if not complete:
            raise ValueError("search: no trial reached the last rung, so there is nothing to promote; "
                             "trials.parquet says why each one failed")  # fmt: skip
        reached = [
            Observation(trials[0].architecture, (self.mean_objective(trials, self.last_rung),), "complete",
                        (self._further(trials, self.last_rung),)) for trials in complete
        ]  # fmt: skip
        architectures = [observation.architecture for observation in promotable(reached, 0)]
        if config.promote != "not_worse":
            return architectures[: config.promote]
        rows = [self.rows[t.id][self.last_rung] for trials in complete for t in trials]
        tied = not_worse(rows, self.run.scores(), config.ranks_by)
        return [architecture for architecture in architectures if architecture.id in tied]

    def write_tables(self, promoted: frozenset[str] = frozenset()) -> None:
        """Write trials.parquet with every trial's status; of `promoted`, those that are complete are promoted."""
        self.read_failures()
        statuses = {trial: self.status(trial) for trial in self.all_trials()}
        done = {trial: "promoted" for trial in promoted if statuses[trial] == "complete"}
        self.run.write_trials({**statuses, **done}, self.failures)


def minimised(row: Mapping[str, Any], objective: str) -> float:
    """Return an objective of a row of the table, so that lower is better."""
    return METRICS[objective].sign * row[objective]


def make_trial(
    space: SearchSpace | None,
    architecture: Architecture,
    arm: str,
    settings: LoopSettings,
    *,
    seed: int,
    initialization: str,
    proposal: int = -1,
    score_precision: Precision = "float32",
) -> Trial:
    """Return a trial, which trains with its own seed.

    space: what counts the architecture's parameters; None leaves those columns empty. proposal: -1 outside the search.
    score_precision: float32 for whatever users see and reload.
    """
    return Trial(
        architecture=architecture,
        arm=arm,
        seed=seed,
        proposal=proposal,
        initialization=initialization,
        settings=replace(settings, seed=seed),
        score_precision=score_precision,
        counts=counts(space, architecture) if space is not None else {},
    )
