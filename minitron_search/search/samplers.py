"""Which architecture to try next: Optuna's samplers over the enumerated space, told what has been observed.

The tables are the truth: a proposal depends on the seed and on the observations, in their order, alone. A search
that was killed therefore proposes what it would have proposed, and no study can disagree with a table. What is kept
between proposals (`_View`) only saves making it again.
"""

import warnings
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from minitron_search.models.architecture import Architecture
from minitron_search.search.space import COORDINATES, SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)
# multivariate sampling has been Optuna's "experimental" feature since 2.2, its GP since 3.6
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

STARTUP = 4  # uniform draws before there is anything to model; Optuna's default of 10 is most of a small search
POPULATION = 8  # parents of nsga2 and nsga3; Optuna's default of 50 is longer than most searches
# Observations with a value that a sampler must have before its first proposal; TPE goes on without.
NEEDED = {"tpe": 0, "gp": 2, "nsga2": POPULATION, "nsga3": POPULATION}
# A sampler is told of at most so many, so that a proposal's cost does not grow with the search: the best ones, as many
# as TPE models as good at most, and the latest. TPE itself weighs all but the latest 25 of the others down.
TOLD, BEST = 256, 25


@dataclass(frozen=True)
class Observation:
    """What is known of one proposed architecture: its objectives at each rung reached (lower is better).

    values: by rung, of the objective that rungs rank by. others: by rung, of the further objectives.
    state: running | stopped | complete | failed. seeds: of its trials.
    """

    architecture: Architecture
    values: tuple[float, ...]
    state: str
    others: tuple[tuple[float, ...], ...] = ()
    seeds: tuple[int, ...] = ()

    def at(self, rung: int) -> tuple[float, ...]:
        """All objectives at a rung, the one that ranks first."""
        return (self.values[rung], *(self.others[rung] if self.others else ()))


def propose(space: SearchSpace, observed: Sequence[Observation], *, sampler: str, seed: int) -> Architecture | None:
    """The next architecture: an anchor not yet tried, else the sampler's; None when every one has been tried.

    sampler: tpe | random | grid | nsga2 | nsga3 | gp. Always legal, in budget and new: what Optuna samples is moved to
    the nearest architecture not yet proposed, running or not, and that is what Optuna is told.
    """
    taken = {observation.architecture.id for observation in observed}
    for anchor in space.anchors:
        if anchor.id not in taken:
            return anchor
    if sampler == "grid":
        return _next_of_grid(space, observed, taken)
    own_seed = [seed, len(observed)]
    with_values = sum(bool(observation.values) for observation in observed if observation.state != "failed")
    if sampler == "random" or len(observed) < STARTUP or with_values < NEEDED[sampler]:
        return space.random(np.random.default_rng(own_seed), taken)
    view = _view(space, space.anchors)
    asked = view.ask(observed, sampler, int(np.random.SeedSequence(own_seed).generate_state(1)[0]))
    return space.nearest(asked, taken)


def pareto_front(values: Sequence[Sequence[float]]) -> list[int]:
    """Of points (n, objectives), lower is better: the indices of those that no other is at least as good as in every
    objective and better than in one. Equal points are both on the front."""
    points = np.array(values, dtype=float)
    front: list[int] = []
    # none of these is better than one before it, so that the first is on the front
    left = np.lexsort(points.T[::-1]) if len(points) else points
    while len(left):
        best = points[left[0]]
        front += left[(points[left] == best).all(1)].tolist()
        left = left[(points[left] < best).any(1)]
    return sorted(front)


def promotable(observed: Sequence[Observation], rung: int) -> list[Observation]:
    """Those that are complete at `rung`, best first: first those on the Pareto front, each part in the order of the
    objective that ranks. With one objective that is the order of its values."""
    complete = [observation for observation in observed if observation.state == "complete"]
    return [complete[index] for index in _best_first([observation.at(rung) for observation in complete])]


def _best_first(values: Sequence[tuple[float, ...]]) -> list[int]:
    front = set(pareto_front(values))
    return sorted(range(len(values)), key=lambda index: (index not in front, values[index]))


def at_equal_tokens(observed: Sequence[Observation]) -> list[tuple[float, ...] | None]:
    """Every observation's objectives at the last rung that any has reached; None where nothing is known.

    One that is not there yet, or was stopped, is expected to gain what those that got there gained from its rung on
    average: so the order within each rung is kept, and objectives known from the shape stay as they are. Samplers
    that know no rungs are told this, and nobody else.
    """
    known = [o for o in observed if o.values and o.state != "failed"]
    last = max((len(o.values) for o in known), default=0) - 1
    there = [o for o in known if len(o.values) == last + 1]
    of_rungs = [np.array([o.at(rung) for o in there]).mean(0) for rung in range(last + 1)]
    gains = [(of_rungs[last] - of).tolist() for of in of_rungs]
    found: list[tuple[float, ...] | None] = []
    for o in observed:
        rung = len(o.values) - 1
        known_now = rung >= 0 and o.state != "failed"
        found.append(tuple(map(sum, zip(o.at(rung), gains[rung], strict=True))) if known_now else None)
    return found


def excess(space: SearchSpace, architecture: Architecture) -> dict[str, float]:
    """By budget, how far an architecture is outside it, as a share of the target; at most 0 inside: the constraints of
    its Optuna trial. Of what is proposed only an anchor is ever outside."""
    measures = space.measures(architecture)
    bounds = {name: getattr(space.budget, name) for name in type(space.budget).model_fields}
    return {
        name: abs(getattr(measures, name) - bound.target) / bound.target - bound.tolerance
        for name, bound in bounds.items() if bound is not None and hasattr(measures, name)
    }  # fmt: skip


def distributions_of(space: SearchSpace) -> dict[str, IntDistribution]:
    """The coordinates that vary, each a range in its own steps that holds the anchors too: without an anchor's, Optuna
    would model that coordinate apart from the others from then on."""
    found: dict[str, IntDistribution] = {}
    dropping = space.points[space.points[:, COORDINATES.index("drop_block_length")] > 0]
    for name in space.varied():
        points = dropping if name == "drop_block_start" else space.points
        anchors = [space.coordinates(anchor).get(name) for anchor in space.anchors]
        values = np.unique([*points[:, COORDINATES.index(name)], *(value for value in anchors if value is not None)])
        if len(values) > 1:
            step = int(np.gcd.reduce(np.diff(values)))
            found[name] = IntDistribution(int(values[0]), int(values[-1]), step=step)
    return found


def _next_of_grid(space: SearchSpace, observed: Sequence[Observation], taken: Collection[str]) -> Architecture | None:
    """The list of architectures from coarse to fine, so that a search that ends early has seen all of it evenly: the
    lexical order would end among the smallest hidden sizes. No seed plays a part."""
    view = _view(space, space.anchors)
    tried = {view.point(observation.architecture) for observation in observed}
    order = _coarse_to_fine(len(space))
    begin = max(0, len(observed) - len(space.anchors))  # what is before this place was proposed in its turn
    for place in range(len(order)):
        point = tuple(space.points[order[(begin + place) % len(order)]].tolist())
        if point not in tried:
            return space.nearest(dict(zip(COORDINATES, point, strict=True)), taken)
    return None


@lru_cache(maxsize=4)
def _coarse_to_fine(count: int) -> tuple[int, ...]:
    """0 ... count - 1 in the order of van der Corput's sequence: each prefix is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return tuple(index for index in reversed_bits if index < count)


class _Told(optuna.storages.InMemoryStorage):
    """A storage whose trials are those of the observations, not copied and in any state that they may be in by now;
    the trial that is asked for is its own."""

    trials: list[FrozenTrial]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self.trials if states is None or trial.state in states]


class _SteadyState:
    """Parents are the elite of everything observed, not of the generation before: searches are short, trials end out
    of turn, and no table has a column for generations (Nebro and Durillo 2008)."""

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        return 1

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


class _NSGAII(_SteadyState, NSGAIISampler):
    pass


class _NSGAIII(_SteadyState, NSGAIIISampler):
    pass


def _sampler(name: str, seed: int) -> BaseSampler:
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=0, warn_independent_sampling=False)
    if name in ("nsga2", "nsga3"):
        return {"nsga2": _NSGAII, "nsga3": _NSGAIII}[name](seed=seed, population_size=POPULATION)
    # constant liar: trials still running repel, so that two workers do not get twins
    return TPESampler(seed=seed, n_startup_trials=0, multivariate=True, constant_liar=True)


class _View:
    """A space as Optuna's samplers see it. What an architecture or an observation becomes there is kept."""

    def __init__(self, space: SearchSpace):
        self.space = space
        ranges = distributions_of(space)
        self.distributions: dict[str, BaseDistribution] = {**ranges}
        outside = {anchor.id: excess(space, anchor) for anchor in space.anchors}
        # where every trial is inside, constraints say nothing and cost time; Optuna wants those of all trials or none
        self.constrained = any(value > 0 for of in outside.values() for value in of.values())
        # Optuna models jointly the coordinates that every trial has. A block that is not there starts in the middle:
        # over 72 seeds of a made-up loss on SmolLM2's default space, TPE's regret after 32 trials fell to 0.12 of the
        # loss's spread, from 0.20 with a start at 0 (chance: 0.39).
        self.missing = {name: of.low + (of.high - of.low) // 2 // of.step * of.step for name, of in ranges.items()}
        self._points: dict[str, tuple[int, ...]] = {}
        self._trials: dict[tuple, FrozenTrial] = {}

    def point(self, architecture: Architecture) -> tuple[int, ...]:
        """Its row of the space's points."""
        if architecture.id not in self._points:
            coordinates = self.space.coordinates(architecture)
            self._points[architecture.id] = tuple(coordinates.get(name, 0) for name in COORDINATES)
        return self._points[architecture.id]

    def ask(self, observed: Sequence[Observation], sampler: str, seed: int) -> dict[str, int]:
        """What the sampler asks for after these observations, legal or not."""
        objectives = max((len(o.at(0)) for o in observed if o.values), default=1)
        by_rung = sampler == "tpe" and objectives == 1  # the one that ranks stopped trials by the rung they reached
        storage = _Told()
        storage.trials = self._by_rung(observed) if by_rung else self._at_equal_tokens(observed)
        told = _sampler(sampler, seed)
        study = optuna.create_study(storage=storage, sampler=told, directions=["minimize"] * objectives)
        asked = storage.get_trial(storage.create_new_trial(storage.get_study_id_from_name(study.study_name)))
        # as `Study.ask` does, which would first look in every trial for the coordinates that all of them have
        jointly = told.sample_relative(study, asked, self.distributions)
        return {
            name: jointly[name] if name in jointly else told.sample_independent(study, asked, name, distribution)
            for name, distribution in self.distributions.items()
        }

    def _by_rung(self, observed: Sequence[Observation]) -> list[FrozenTrial]:
        """Stopped trials pruned at their last rung: TPE ranks them by it, behind those that went further."""
        states = {"running": TrialState.RUNNING, "stopped": TrialState.PRUNED, "complete": TrialState.COMPLETE}
        ranked = sorted(
            (index for index, o in enumerate(observed) if o.state in ("complete", "stopped") and o.values),
            key=lambda index: (-len(observed[index].values), observed[index].values[-1]),
        )
        kept = _at_most(TOLD, ranked, [index for index, o in enumerate(observed) if o.state in states])
        return [
            self._trial(index, o.architecture, states[o.state], o.values[-1:], len(o.values))
            for index, o in ((index, observed[index]) for index in kept)
        ]

    def _at_equal_tokens(self, observed: Sequence[Observation]) -> list[FrozenTrial]:
        """Whatever has a value complete at one rung; what has none yet is running, and repels where the sampler can
        (TPE's constant liar, the GP's expectation over what is pending)."""
        values = at_equal_tokens(observed)
        known = [index for index, of in enumerate(values) if of is not None]
        ranked = [known[place] for place in _best_first([values[index] or () for index in known])]
        kept = _at_most(TOLD, ranked, [index for index, o in enumerate(observed) if o.state != "failed"])
        return [
            self._trial(
                index, observed[index].architecture, TrialState.RUNNING if of is None else TrialState.COMPLETE, of
            )
            for index, of in ((index, values[index]) for index in kept)
        ]

    def _trial(
        self,
        index: int,
        architecture: Architecture,
        state: TrialState,
        values: tuple[float, ...] | None,
        rungs: int = 0,
    ) -> FrozenTrial:
        key = (index, architecture.id, state, values, rungs)
        if key not in self._trials:
            params = {**self.missing, **self.space.coordinates(architecture)}
            params = {name: params[name] for name in self.distributions}
            trial = optuna.trial.create_trial(
                state=state,
                values=values if state is TrialState.COMPLETE else None,
                params=params,
                distributions=self.distributions,
                intermediate_values={rungs - 1: values[0]} if values and rungs else {},
                constraints=excess(self.space, architecture) if self.constrained else None,
            )
            trial.number = index + 1  # 0 is the number of the trial that is asked for
            self._trials[key] = trial
        return self._trials[key]


@lru_cache(maxsize=4)
def _view(space: SearchSpace, anchors: tuple[Architecture, ...]) -> _View:
    """Of a space with these anchors: a run adds some once it knows the depth sweep's best blocks."""
    return _View(space)


def _at_most(count: int, ranked: Sequence[int], all_told: Sequence[int]) -> list[int]:
    """Of the observations to tell, in their order: all, or the best and the latest."""
    if len(all_told) <= count:
        return list(all_told)
    best = set(ranked[:BEST])
    latest = [index for index in all_told if index not in best][-(count - len(best)) :]
    return sorted(best | set(latest))
