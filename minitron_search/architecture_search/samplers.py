"""Which architecture to try next: samplers over the enumerated space, told what has been observed.

The tables are the truth: a proposal depends only on the seed and on the observations, in their order. A search that
was killed therefore proposes what it would have proposed, and no study can disagree with a table. What is kept between
proposals (`_View`) only saves making it again.
"""

import warnings
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from minitron_search.architecture_search.space import COORDINATES, SearchSpace
from minitron_search.models.architecture import Architecture

optuna.logging.set_verbosity(optuna.logging.WARNING)
# multivariate sampling has been Optuna's "experimental" feature since 2.2, its GP since 3.6
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

STARTUP = 4  # uniform draws before there is anything to model; Optuna's default of 10 is most of a small search
POPULATION = 8  # parents of nsga2 and nsga3; Optuna's default of 50 is longer than most searches
# An Optuna sampler is told of at most TOLD observations, so that the cost of a proposal does not grow with the search:
# the BEST ones, which are as many as TPE models as good at most, and the latest. TPE itself gives all but the latest 25
# of the others less weight.
TOLD, BEST = 256, 25


@dataclass(frozen=True)
class Observation:
    """What is known of one proposed architecture: its objectives at each rung it reached (lower is better).

    values: the objective that rungs rank by, a number a rung. others: the further objectives, a tuple a rung.
    state: running | stopped | complete | failed. seeds: those of its trials.
    """

    architecture: Architecture
    values: tuple[float, ...]
    state: str
    others: tuple[tuple[float, ...], ...] = ()
    seeds: tuple[int, ...] = ()

    def at(self, rung: int) -> tuple[float, ...]:
        """Return all objectives at a rung, the one that rungs rank by first."""
        return (self.values[rung], *(self.others[rung] if self.others else ()))


def propose(space: SearchSpace, observed: Sequence[Observation], *, sampler: str, seed: int) -> Architecture | None:
    """Return the next architecture: an anchor not yet tried, or else the sampler's; None when all have been tried.

    sampler: a key of `SAMPLERS`. What it returns is legal, in budget and new.
    """
    taken = {observation.architecture.id for observation in observed}
    for anchor in space.anchors:
        if anchor.id not in taken:
            return anchor
    return SAMPLERS[sampler](space, observed, taken, np.random.SeedSequence([seed, len(observed)]))


def check_sampler(name: str, objectives: Sequence[str]) -> None:
    """Raise ValueError for a sampler that does not exist, or that cannot search for these objectives."""
    if name not in SAMPLERS:
        raise ValueError(f"search.sampler: {name!r} is not a sampler; valid: {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    if isinstance(sampler, OptunaSampler) and sampler.for_several and len(objectives) == 1:
        raise ValueError(f"search.sampler: {name} with the one objective {objectives[0]}, whose Pareto front is one "
                         f"architecture; valid: tpe, or search.objective {objectives[0]},params")  # fmt: skip


def pareto_front(values: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points on the Pareto front: no other point is at least as good in every objective and
    better in one. Lower is better; of equal points all are on the front.

    values: (n, objectives).
    """
    points = np.array(values, dtype=float)
    front: list[int] = []
    # no point is better than one before it, so the first is on the front
    left = np.lexsort(points.T[::-1]) if len(points) else points
    while len(left):
        best = points[left[0]]
        front += left[(points[left] == best).all(1)].tolist()
        left = left[(points[left] < best).any(1)]
    return sorted(front)


def promotable(observed: Sequence[Observation], rung: int) -> list[Observation]:
    """Return the observations that are complete, best first at `rung`: those on the Pareto front before the others,
    each part in the order of the objective that rungs rank by."""
    complete = [observation for observation in observed if observation.state == "complete"]
    return [complete[index] for index in _best_first([observation.at(rung) for observation in complete])]


def _best_first(values: Sequence[tuple[float, ...]]) -> list[int]:
    front = set(pareto_front(values))
    return sorted(range(len(values)), key=lambda index: (index not in front, values[index]))


def at_equal_tokens(observed: Sequence[Observation]) -> list[tuple[float, ...] | None]:
    """Estimate every observation's objectives at the last rung that any has reached; None where nothing is known.

    One that is not there yet, or was stopped, is expected to gain what those that got there gained, on average, from
    its rung on: this keeps the order within each rung, and leaves objectives known from the shape as they are. Only
    samplers that know nothing of rungs are told this.
    """
    known = [o for o in observed if o.values and o.state != "failed"]
    last = max((len(o.values) for o in known), default=0) - 1
    arrived = [o for o in known if len(o.values) == last + 1]
    means = [np.array([o.at(rung) for o in arrived]).mean(0) for rung in range(last + 1)]
    gains = [(means[last] - mean).tolist() for mean in means]
    estimates: list[tuple[float, ...] | None] = []
    for o in observed:
        rung = len(o.values) - 1
        is_known = rung >= 0 and o.state != "failed"
        estimates.append(tuple(map(sum, zip(o.at(rung), gains[rung], strict=True))) if is_known else None)
    return estimates


def excess(space: SearchSpace, architecture: Architecture) -> dict[str, float]:
    """Return how far an architecture is outside each budget, as a share of the target, and at most 0 inside it: the
    constraints of its Optuna trial. Among proposals only an anchor is ever outside."""
    measures = space.measures(architecture)
    bounds = {name: getattr(space.budget, name) for name in type(space.budget).model_fields}
    return {
        name: abs(getattr(measures, name) - bound.number) / bound.number - bound.tolerance
        for name, bound in bounds.items() if bound is not None and hasattr(measures, name)
    }  # fmt: skip


def distributions_of(space: SearchSpace) -> dict[str, IntDistribution]:
    """Return the coordinates that vary, each a range in its own steps. Ranges hold the anchors too: with an anchor
    outside, Optuna would model that coordinate apart from the others from then on."""
    distributions: dict[str, IntDistribution] = {}
    dropping = space.points[space.points[:, COORDINATES.index("drop_block_length")] > 0]
    for name in space.varied():
        points = dropping if name == "drop_block_start" else space.points
        anchors = [space.coordinates(anchor).get(name) for anchor in space.anchors]
        values = np.unique([*points[:, COORDINATES.index(name)], *(value for value in anchors if value is not None)])
        if len(values) > 1:
            step = int(np.gcd.reduce(np.diff(values)))
            distributions[name] = IntDistribution(int(values[0]), int(values[-1]), step=step)
    return distributions


def sample_at_random(
    space: SearchSpace, observed: Sequence[Observation], taken: Collection[str], seed: np.random.SeedSequence
) -> Architecture | None:
    """Draw an architecture that is not yet tried, as `SearchSpace.random` does."""
    return space.random(np.random.default_rng(seed), taken)


def sample_grid(
    space: SearchSpace, observed: Sequence[Observation], taken: Collection[str], seed: np.random.SeedSequence
) -> Architecture | None:
    """Return the next of the list of architectures from coarse to fine, so that a search that ends early has seen all
    of the space evenly: the lexical order would end among the smallest hidden sizes. The seed plays no part."""
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
    """Return 0 ... count - 1 in the order of van der Corput's sequence, of which each prefix is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return tuple(index for index in reversed_bits if index < count)


class _ObservedStorage(optuna.storages.InMemoryStorage):
    """A storage whose trials are those of the observations, not copied and in whatever state they are in by now; only
    the trial that is asked for is its own."""

    trials: list[FrozenTrial]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self.trials if states is None or trial.state in states]


class _SteadyState:
    """A steady-state genetic algorithm (Nebro and Durillo 2008): parents are the elite of everything observed, not of
    the generation before. Searches are short, trials end out of turn, and no table has a column for generations."""

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        return 1

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


class _NSGAII(_SteadyState, NSGAIISampler):
    pass


class _NSGAIII(_SteadyState, NSGAIIISampler):
    pass


@dataclass(frozen=True)
class OptunaSampler:
    """One of Optuna's samplers. What it asks for is moved to the nearest architecture that is not yet proposed, and
    that is what it is told of later.

    make: its seed -> Optuna's own. needs: observations with a value that it must have before its first proposal; until
    then architectures are drawn at random. by_rung: with one objective it is told the rung at which a trial was
    stopped; otherwise `at_equal_tokens`. for_several: whether it makes sense only with several objectives.
    """

    make: Callable[[int], BaseSampler]
    needs: int = 0
    by_rung: bool = False
    for_several: bool = False

    def __call__(
        self, space: SearchSpace, observed: Sequence[Observation], taken: Collection[str], seed: np.random.SeedSequence
    ) -> Architecture | None:
        with_values = sum(bool(observation.values) for observation in observed if observation.state != "failed")
        if len(observed) < STARTUP or with_values < self.needs:
            return sample_at_random(space, observed, taken, seed)
        wanted = _view(space, space.anchors).ask(observed, self, int(seed.generate_state(1)[0]))
        return space.nearest(wanted, taken)


def _tpe(seed: int) -> BaseSampler:
    # constant liar: trials still running repel, so that two workers do not get twins
    return TPESampler(seed=seed, n_startup_trials=0, multivariate=True, constant_liar=True)


def _gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed, n_startup_trials=0, warn_independent_sampling=False)


def _nsga2(seed: int) -> BaseSampler:
    return _NSGAII(seed=seed, population_size=POPULATION)


def _nsga3(seed: int) -> BaseSampler:
    return _NSGAIII(seed=seed, population_size=POPULATION)


# (space, observed, ids of what is already proposed, seed of this proposal) -> an architecture, or None when all are
Sampler = Callable[[SearchSpace, Sequence[Observation], Collection[str], np.random.SeedSequence], Architecture | None]
# Every value of `search.sampler`. To add one, put it here.
SAMPLERS: dict[str, Sampler] = {
    "tpe": OptunaSampler(_tpe, by_rung=True),  # which goes on without values
    "random": sample_at_random,
    "grid": sample_grid,
    "nsga2": OptunaSampler(_nsga2, needs=POPULATION, for_several=True),
    "nsga3": OptunaSampler(_nsga3, needs=POPULATION, for_several=True),
    "gp": OptunaSampler(_gp, needs=2),
}


class _View:
    """A space as Optuna's samplers see it; what architectures and observations become there is kept."""

    def __init__(self, space: SearchSpace):
        self.space = space
        ranges = distributions_of(space)
        self.distributions: dict[str, BaseDistribution] = {**ranges}
        outside = {anchor.id: excess(space, anchor) for anchor in space.anchors}
        # where every trial is inside, constraints say nothing and cost time; Optuna wants those of all trials or none
        self.constrained = any(value > 0 for excesses in outside.values() for value in excesses.values())
        # Optuna models jointly the coordinates that every trial has. A block that is not there starts in the middle:
        # over 72 seeds of a made-up loss on SmolLM2's default space, TPE's regret after 32 trials fell to 0.12 of the
        # loss's spread, from 0.20 with a start at 0 (chance: 0.39).
        self.missing = {name: r.low + (r.high - r.low) // 2 // r.step * r.step for name, r in ranges.items()}
        self._points: dict[str, tuple[int, ...]] = {}
        self._trials: dict[tuple, FrozenTrial] = {}

    def point(self, architecture: Architecture) -> tuple[int, ...]:
        """Return its row of the space's points."""
        if architecture.id not in self._points:
            coordinates = self.space.coordinates(architecture)
            self._points[architecture.id] = tuple(coordinates.get(name, 0) for name in COORDINATES)
        return self._points[architecture.id]

    def ask(self, observed: Sequence[Observation], sampler: OptunaSampler, seed: int) -> dict[str, int]:
        """Return the coordinates that the sampler asks for after these observations, legal or not."""
        objectives = max((len(o.at(0)) for o in observed if o.values), default=1)
        storage = _ObservedStorage()
        by_rung = sampler.by_rung and objectives == 1
        storage.trials = self._by_rung(observed) if by_rung else self._at_equal_tokens(observed)
        optunas = sampler.make(seed)
        study = optuna.create_study(storage=storage, sampler=optunas, directions=["minimize"] * objectives)
        new = storage.get_trial(storage.create_new_trial(storage.get_study_id_from_name(study.study_name)))
        # as `Study.ask` does, which would first look in every trial for the coordinates that all of them have
        jointly = optunas.sample_relative(study, new, self.distributions)
        return {
            name: jointly[name] if name in jointly else optunas.sample_independent(study, new, name, distribution)
            for name, distribution in self.distributions.items()
        }

    def _by_rung(self, observed: Sequence[Observation]) -> list[FrozenTrial]:
        """Return trials of which stopped ones are pruned at their last rung: TPE ranks them by it, behind those that
        went further."""
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
        """Return trials of which those with a value are complete, at one rung; one without a value is running, and
        repels where the sampler can (TPE's constant liar, the GP's expectation over what is pending)."""
        values = at_equal_tokens(observed)
        known = [index for index, value in enumerate(values) if value is not None]
        ranked = [known[place] for place in _best_first([values[index] or () for index in known])]
        kept = _at_most(TOLD, ranked, [index for index, o in enumerate(observed) if o.state != "failed"])
        return [
            self._trial(
                index, observed[index].architecture, TrialState.RUNNING if value is None else TrialState.COMPLETE, value
            )
            for index, value in ((index, values[index]) for index in kept)
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
    """Return the view of a space with these anchors: a run adds some once it knows the depth sweep's best blocks."""
    return _View(space)


def _at_most(count: int, ranked: Sequence[int], every: Sequence[int]) -> list[int]:
    """Return the indices of the observations to tell, in their order: all, or the best and the latest."""
    if len(every) <= count:
        return list(every)
    best = set(ranked[:BEST])
    latest = [index for index in every if index not in best][-(count - len(best)) :]
    return sorted(best | set(latest))
