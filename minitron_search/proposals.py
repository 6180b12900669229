"""Which architecture to try next: Optuna's sampler over the enumerated space, told what has been measured.

The tables are the truth: every proposal rebuilds the study from the observations, with a seed of its own. A
search that was killed therefore proposes what it would have proposed, and no study can disagree with a table.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from minitron_search.architecture import Architecture
from minitron_search.search_space import SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)
# multivariate sampling and the constant liar have been Optuna's "experimental" features since 2.2
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

STARTUP = 4  # uniform draws before TPE has anything to model; Optuna's default of 10 is most of a small search


@dataclass(frozen=True)
class Observation:
    """What is known of one proposed architecture: its objective at each rung reached (lower is better)."""

    architecture: Architecture
    values: tuple[float, ...]  # by rung
    state: str  # running | stopped | complete | failed


def propose(space: SearchSpace, observed: list[Observation], *, sampler: str, seed: int) -> Architecture | None:
    """The next architecture: an anchor not yet tried, else the sampler's; None when every one has been tried."""
    taken = {observation.architecture.id for observation in observed}
    for anchor in space.anchors:
        if anchor.id not in taken:
            return anchor
    own_seed = [seed, len(observed)]
    if sampler == "random" or len(observed) < STARTUP:
        return space.random(np.random.default_rng(own_seed), taken)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence(own_seed).generate_state(1)[0]),
            n_startup_trials=0,
            multivariate=True,
            constant_liar=True,  # trials still running repel: two workers do not get twins
        )
    )
    study.add_trials([_frozen(space, observation) for observation in observed if observation.state != "failed"])
    return space.nearest(study.ask(space.distributions()).params, taken)


def write_study(space: SearchSpace, observed: Iterable[Observation], name: str, path: Path) -> None:
    """Write the search as an Optuna study in SQLite, which optuna-dashboard opens; stopped trials are pruned."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{temporary}")
    study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
    study.add_trials([_frozen(space, observation) for observation in observed])
    storage.engine.dispose()
    temporary.replace(path)


def _frozen(space: SearchSpace, observation: Observation) -> FrozenTrial:
    """A stopped trial is pruned at its last rung: its value is never taken for one at full tokens."""
    distributions = space.distributions()
    coordinates = space.coordinates(observation.architecture)
    inside = {
        name: coordinates[name] for name, allowed in distributions.items()
        if name in coordinates and allowed._contains(coordinates[name])
    }  # fmt: skip  # an anchor may lie outside the axes
    state = {
        "running": TrialState.RUNNING,
        "stopped": TrialState.PRUNED,
        "complete": TrialState.COMPLETE,
        "failed": TrialState.FAIL,
    }[observation.state]
    return optuna.trial.create_trial(
        state=state,
        value=observation.values[-1] if state is TrialState.COMPLETE else None,
        params=inside,
        distributions={name: distributions[name] for name in inside},
        user_attrs={"architecture": observation.architecture.id, **coordinates},
        intermediate_values=dict(enumerate(observation.values)),
    )
