"""Proposals never repeat, are always legal, and depend on what was observed and on the seed alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minitron_search.architecture_search import samplers
from minitron_search.architecture_search.samplers import (
    POPULATION,
    STARTUP,
    Observation,
    at_equal_tokens,
    distributions_of,
    excess,
    pareto_front,
    promotable,
    propose,
)
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.models.architecture import Architecture
from tests import tiny

TEACHER = tiny.config(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=6)


def space(tolerance: float = 0.6, anchors: Any = ()) -> SearchSpace:
    return SearchSpace(
        parse_config({
            "space": {
                "budget": {"params": {"target": 12_000, "tolerance": tolerance}},
                "axes": {
                    "hidden_size": {"low": 8, "high": 24, "step": 4},
                    "intermediate_size": {"low": 8, "high": 20, "step": 4},
                    "num_attention_heads": {"choices": [2, 4, 6]},
                    "drop_block": {"lengths": [0, 1, 2]},
                },
                "anchors": list(anchors),
            }
        }).space,
        TEACHER,
    )  # fmt: skip


def value(architecture: Architecture) -> float:
    """Smooth, least for wide and deep ones."""
    return 10 - architecture.hidden_size / 8 - architecture.intermediate_size / 20 - architecture.num_hidden_layers / 3


def observe(architecture: Architecture, turn: int, several: bool = False) -> Observation:
    """Every state occurs: what fails has no value, what was stopped one rung of two, what runs one or none."""
    state = ("complete", "stopped", "complete", "running", "failed", "running")[turn % 6]
    first = value(architecture) + 1
    values = {"complete": (first, first - 1), "stopped": (first,), "running": (first,), "failed": ()}[state]
    values = () if turn % 6 == 5 else values
    others = tuple((float(architecture.hidden_size),) for _ in values) if several else ()
    return Observation(architecture, values, state, others)


EVERY_WAY = [*((sampler, False) for sampler in ("tpe", "random", "grid", "gp")),
             *((sampler, True) for sampler in ("tpe", "nsga2", "nsga3"))]  # fmt: skip
every_way = pytest.mark.parametrize(("sampler", "several"), EVERY_WAY)


def searched(
    space: SearchSpace, turns: int, sampler: str = "tpe", seed: int = 0, several: bool = False,
    observed: Sequence[Observation] = (),
) -> list[Observation]:  # fmt: skip
    observed = list(observed)
    while len(observed) < turns:
        architecture = propose(space, observed, sampler=sampler, seed=seed)
        if architecture is None:
            break
        observed.append(observe(architecture, len(observed), several))
    return observed


@every_way
def test_proposals_are_legal_and_without_twins(sampler: str, several: bool) -> None:
    tested = space()
    turns = STARTUP + 5 if sampler == "gp" else 200  # a GP takes half a second to fit
    assert len(tested) > turns
    ids = [observation.architecture.id for observation in searched(tested, turns, sampler, several=several)]
    assert len(set(ids)) == len(ids) == turns
    assert set(ids) <= {architecture.id for architecture in tested.architectures()}


@every_way
def test_a_small_space_is_proposed_whole_and_then_none(sampler: str, several: bool) -> None:
    tested = space(tolerance=0.03)
    observed = searched(tested, len(tested) - 3, "random", several=several)
    observed = searched(tested, 10_000, sampler, several=several, observed=observed)
    assert {o.architecture.id for o in observed} == {a.id for a in tested.architectures()}
    assert len(observed) == len(tested) > POPULATION > STARTUP


@every_way
def test_the_same_observations_and_seed_give_the_same_proposal(sampler: str, several: bool) -> None:
    """What a killed search does when it goes on: a new process, the same tables."""
    kept, turns = space(), STARTUP + 3 if sampler == "gp" else 16
    observed = searched(kept, turns, sampler, seed=5, several=several)
    again = space()
    for turn in reversed(range(turns)):  # nothing is kept of an earlier state of this search
        assert propose(again, observed[:turn], sampler=sampler, seed=5) == observed[turn].architecture
    if sampler != "gp":  # which proposes where its expectation is highest, whatever the seed
        seeds = {propose(kept, observed, sampler=sampler, seed=seed) for seed in range(6)}
        assert (len(seeds) > 1) is (sampler != "grid")


@every_way
def test_a_search_under_way_proposes_what_one_rebuilt_from_its_tables_does(sampler: str, several: bool) -> None:
    """Trials end out of turn, and a stopped one goes on later: what is kept between proposals plays no part."""
    kept = space()
    observed = searched(kept, 14, "random" if sampler == "gp" else sampler, several=several)
    running = next(i for i, o in enumerate(observed) if o.state == "running" and o.values)
    stopped = next(i for i, o in enumerate(observed) if o.state == "stopped")

    def then(index: int, state: str) -> None:
        old = observed[index]
        values = (old.values[0], old.values[0] - 2) if state == "complete" else old.values
        observed[index] = replace(old, state=state, values=values, others=old.others[:1] * len(values))

    proposed = []
    for index, state in ((running, "stopped"), (stopped, "complete"), (running, "complete"), (running, "failed")):
        then(index, state)
        proposed.append(propose(kept, observed, sampler=sampler, seed=1))
        assert proposed[-1] == propose(space(), observed, sampler=sampler, seed=1)
    if sampler in ("tpe", "gp"):  # and it is the observations that they depend on
        assert len(set(proposed)) > 1


def test_the_global_generators_play_no_part() -> None:
    observed = searched(space(), 6)
    first = propose(space(), observed, sampler="tpe", seed=0)
    np.random.seed(1234)
    state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    assert propose(space(), observed, sampler="tpe", seed=0) == first
    assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]


def test_tpe_finds_better_architectures_than_chance() -> None:
    def mean(sampler: str) -> float:
        """Of what is proposed after the first ten, over three searches of thirty."""
        tested, later = space(), list[float]()
        for seed in range(3):
            observed: list[Observation] = []
            for _ in range(30):
                architecture = propose(tested, observed, sampler=sampler, seed=seed)
                assert architecture
                observed.append(Observation(architecture, (value(architecture),), "complete"))
            later += [observation.values[-1] for observation in observed[10:]]
        return float(np.mean(later))

    assert mean("tpe") < mean("random") - 0.2


def test_anchors_come_first_and_once() -> None:
    tested = space(anchors=[{"hidden_size": 9}, {"drop_block": [0, 5]}])
    observed = searched(tested, 10)
    assert tuple(o.architecture for o in observed[:2]) == tested.anchors
    ids = [o.architecture.id for o in observed]
    assert len(set(ids)) == 10
    # one of them in the space already is not proposed again
    inside = next(iter(tested.architectures()))
    assert propose(tested, [observe(inside, 0), *observed[:2]], sampler="tpe", seed=0) not in (inside, *tested.anchors)


@every_way
def test_workers_that_run_at_once_do_not_get_twins(sampler: str, several: bool) -> None:
    tested = space()
    observed = searched(tested, 12, "random", several=several)
    for _ in range(3 if sampler == "gp" else 8):
        architecture = propose(tested, observed, sampler=sampler, seed=0)
        assert architecture
        observed.append(Observation(architecture, (), "running"))
    ids = [o.architecture.id for o in observed]
    assert len(set(ids)) == len(ids)


def test_nothing_but_running_trials_is_enough_to_propose() -> None:
    tested = space()
    for sampler in ("tpe", "gp", "nsga2", "nsga3"):
        observed: list[Observation] = []
        for _ in range(POPULATION + 4):
            architecture = propose(tested, observed, sampler=sampler, seed=0)
            assert architecture
            observed.append(Observation(architecture, (), "running"))
        assert len({o.architecture.id for o in observed}) == POPULATION + 4


def test_running_trials_repel_tpe() -> None:
    """Constant liar: with a worker busy at the best place, the next proposal is elsewhere than it would have been."""
    tested = space()
    moved = 0
    for seed in range(6):
        observed = [
            replace(o, state="complete", values=(value(o.architecture),)) for o in searched(tested, 12, seed=seed)
        ]
        alone = propose(tested, observed, sampler="tpe", seed=0)
        assert alone
        liar = [*observed[:-1], replace(observed[-1], state="running", values=())]
        moved += propose(tested, liar, sampler="tpe", seed=0) != alone
    assert moved


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "gp"])
def test_several_objectives_are_traded(sampler: str) -> None:
    """Wide is good and costs: fewer of the space's architectures dominate what is proposed later than by chance."""
    tested = space()

    def of(architecture: Architecture) -> tuple[float, float]:
        return value(architecture), 10 * abs(architecture.hidden_size - 12) + architecture.intermediate_size

    points = np.array([of(architecture) for architecture in tested.architectures()])

    def dominated(sampler: str, seed: int) -> float:
        observed: list[Observation] = []
        for turn in range(16 if sampler == "gp" else 48):
            by_chance = sampler == "gp" and turn < 12
            architecture = propose(tested, observed, sampler="random" if by_chance else sampler, seed=seed)
            assert architecture
            first, second = of(architecture)
            observed.append(Observation(architecture, (first,), "complete", ((second,),)))
        later = [of(o.architecture) for o in observed[12:]]
        return float(np.mean([((points <= point).all(1) & (points < point).any(1)).mean() for point in later]))

    seeds = range(1 if sampler == "gp" else 3)
    found, chance = (float(np.mean([dominated(name, seed) for seed in seeds])) for name in (sampler, "random"))
    assert found < 0.8 * chance


def test_a_grid_is_proposed_from_coarse_to_fine_and_needs_no_seed() -> None:
    tested = space()
    ids = [architecture.id for architecture in tested.architectures()]
    for turns in (8, 32, 100):
        observed = searched(tested, turns, "grid")
        places = sorted(ids.index(o.architecture.id) for o in observed)
        # no gap is wider than twice an even spacing
        assert max(np.diff([0, *places, len(ids)])) <= 2 * len(ids) / turns + 1
    assert [o.architecture for o in searched(tested, 9, "grid", seed=3)] == [
        o.architecture for o in searched(tested, 9, "grid", seed=4)
    ]


def test_an_anchor_outside_the_axes_leaves_tpe_its_coordinates_and_one_outside_the_budget_is_said_to_be() -> None:
    tested = space(anchors=[{"hidden_size": 9}, {}])
    small, whole = tested.anchors
    assert {name: (of.low, of.high, of.step) for name, of in distributions_of(space()).items()}["hidden_size"] == (
        8,
        24,
        4,
    )
    assert distributions_of(tested)["hidden_size"]._contains(9)
    inside = next(iter(tested.architectures()))
    assert excess(tested, inside)["params"] <= 0
    asked = tested.budget.params
    assert asked
    for anchor in (small, whole):
        params = tested.measures(anchor).params
        assert (excess(tested, anchor)["params"] > 0) is (abs(params - asked.target) > asked.tolerance * asked.target)


def test_what_is_best_outside_the_budget_does_not_draw_tpe() -> None:
    """The whole teacher is an anchor, far outside the budget and the best of all: proposals go where they would have
    gone had it been the worst."""
    tested = space(tolerance=0.3, anchors=[{}])
    assert excess(tested, tested.anchors[0])["params"] > 0
    best, worst = [], []
    for seed in range(4):
        observed = [Observation(tested.anchors[0], (0.0,), "complete")]
        for other in list(tested.architectures())[seed * 3 : seed * 3 + 60 : 5]:
            observed.append(Observation(other, (value(other),), "complete"))
        best.append(propose(tested, observed, sampler="tpe", seed=seed))
        observed[0] = replace(observed[0], values=(99.0,))
        worst.append(propose(tested, observed, sampler="tpe", seed=seed))
    assert best == worst


def test_what_is_told_is_bounded_and_keeps_the_best() -> None:
    tested = space()
    architectures = list(tested.architectures())
    observed = [Observation(a, (float(1000 - i),), "complete") for i, a in enumerate(architectures[:300])]
    observed[0] = replace(observed[0], values=(0.0,))  # the first and the best
    for several in (False, True):
        asked = [replace(o, others=((1.0,),)) for o in observed] if several else observed
        view = samplers._View(tested)
        told = view._at_equal_tokens(asked) if several else view._by_rung(asked)
        assert len(told) == samplers.TOLD
        numbers = [trial.number - 1 for trial in told]
        assert numbers == sorted(numbers) and {0, 299} <= set(numbers)
    few = samplers._View(tested)._by_rung(observed[:20])
    assert [trial.number for trial in few] == list(range(1, 21))


# Several objectives


def test_the_front_is_what_nothing_dominates() -> None:
    draw = np.random.default_rng(0)
    for objectives in (1, 2, 3):
        for _ in range(20):
            values = draw.integers(0, 6, (30, objectives)).astype(float)
            expected = [
                index for index, point in enumerate(values)
                if not any((other <= point).all() and (other < point).any() for other in values)
            ]  # fmt: skip
            assert pareto_front(values.tolist()) == expected
    assert pareto_front([]) == []


def test_the_front_is_promoted_first_by_the_objective_that_ranks() -> None:
    made = list(space().architectures())[:5]
    at_last = [(3.0, 1.0), (1.0, 9.0), (2.0, 9.5), (2.5, 5.0), (0.5, 0.5)]
    observed = [
        Observation(a, (9.0, first), "complete", ((second,), (second,)))
        for a, (first, second) in zip(made, at_last, strict=True)
    ]
    observed[4] = replace(observed[4], state="stopped", values=(0.5,), others=((0.5,),))  # the best, at fewer tokens
    assert [o.values[1] for o in promotable(observed, 1)] == [1.0, 2.5, 3.0, 2.0]
    alone = [replace(o, others=()) for o in observed]
    assert [o.values[1] for o in promotable(alone, 1)] == [1.0, 2.0, 2.5, 3.0]


def test_what_was_stopped_is_told_at_the_last_rung_in_its_own_rungs_order() -> None:
    made = list(space().architectures())[:6]
    observed = [
        Observation(made[0], (5.0, 4.0), "complete", ((7.0,), (7.0,))),
        Observation(made[1], (6.0, 4.5), "complete", ((8.0,), (8.0,))),
        Observation(made[2], (7.0,), "stopped", ((9.0,),)),
        Observation(made[3], (8.0,), "running", ((1.0,),)),
        Observation(made[4], (), "running"),
        Observation(made[5], (1.0,), "failed", ((1.0,),)),
    ]
    found = at_equal_tokens(observed)
    assert found[:2] == [(4.0, 7.0), (4.5, 8.0)]  # as measured
    assert found[2:4] == [(5.75, 9.0), (6.75, 1.0)]  # 1.25 less, as those that went on; what the shape says stays
    assert found[4:] == [None, None]
    assert at_equal_tokens([]) == [] and at_equal_tokens(observed[4:]) == [None, None]
