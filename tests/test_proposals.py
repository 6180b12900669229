"""Proposals never repeat, are always legal, and depend on what was observed and on the seed alone."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from minitron_search.architecture import Architecture
from minitron_search.config import parse
from minitron_search.proposals import STARTUP, Observation, propose, write_study
from minitron_search.search_space import SearchSpace
from tests import tiny

TEACHER = tiny.config(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=6)


def space(tolerance: float = 0.6, anchors: Any = ()) -> SearchSpace:
    return SearchSpace(
        parse({
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


def observe(architecture: Architecture, turn: int) -> Observation:
    """Every state occurs: what fails has no value, what runs or was stopped has one rung of two."""
    state = ("complete", "stopped", "complete", "running", "failed")[turn % 5]
    first = value(architecture) + 1
    values = {"complete": (first, first - 1), "stopped": (first,), "running": (first,), "failed": ()}[state]
    return Observation(architecture, values, state)


def searched(space: SearchSpace, turns: int, sampler: str = "tpe", seed: int = 0) -> list[Observation]:
    observed: list[Observation] = []
    while len(observed) < turns:
        architecture = propose(space, observed, sampler=sampler, seed=seed)
        if architecture is None:
            break
        observed.append(observe(architecture, len(observed)))
    return observed


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_two_hundred_proposals_are_legal_and_without_twins(sampler: str) -> None:
    tested = space()
    assert len(tested) > 200
    ids = [observation.architecture.id for observation in searched(tested, 200, sampler)]
    assert len(set(ids)) == len(ids) == 200
    assert set(ids) <= {architecture.id for architecture in tested.architectures()}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_small_space_is_proposed_whole_and_then_none(sampler: str) -> None:
    tested = space(tolerance=0.03)
    observed = searched(tested, 10_000, sampler)
    assert {o.architecture.id for o in observed} == {a.id for a in tested.architectures()}
    assert len(observed) == len(tested) > STARTUP


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_observations_and_seed_give_the_same_proposal(sampler: str) -> None:
    """What a killed search does when it goes on: a new process, the same tables."""
    observed = searched(space(), 12, sampler, seed=5)
    for turn in range(12):
        again = propose(space(), observed[:turn], sampler=sampler, seed=5)
        assert again == observed[turn].architecture
    seeds = {propose(space(), observed, sampler=sampler, seed=seed) for seed in range(8)}
    assert len(seeds) > 1


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


def test_workers_that_run_at_once_do_not_get_twins() -> None:
    tested = space()
    observed = searched(tested, 10)
    for _ in range(8):
        architecture = propose(tested, observed, sampler="tpe", seed=0)
        assert architecture
        observed.append(Observation(architecture, (), "running"))
    ids = [o.architecture.id for o in observed]
    assert len(set(ids)) == len(ids)


# The study


def test_the_study_opens_and_says_what_was_observed(tmp_path: Path) -> None:
    tested = space(anchors=[{"hidden_size": 9}])  # no multiple of 4: outside the axes
    observed = searched(tested, 15)
    write_study(tested, observed, "a search", tmp_path / "study.db")
    study = optuna.load_study(study_name="a search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    states = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "running": TrialState.RUNNING,
              "failed": TrialState.FAIL}  # fmt: skip
    assert len(study.trials) == 15
    for trial, observation in zip(study.trials, observed, strict=True):
        assert trial.state == states[observation.state]
        assert trial.intermediate_values == dict(enumerate(observation.values))
        coordinates = tested.coordinates(observation.architecture)
        assert trial.user_attrs == {"architecture": observation.architecture.id, **coordinates}
        assert trial.params.items() <= coordinates.items()
        assert trial.value == (observation.values[-1] if observation.state == "complete" else None)
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_a_stopped_trial_is_never_taken_for_a_complete_one(tmp_path: Path) -> None:
    tested = space()
    first, second, third = list(tested.architectures())[:3]
    observed = [
        Observation(first, (5.0, 4.0), "complete"),
        Observation(second, (1.0,), "stopped"),  # the least value of all, at fewer tokens
        Observation(third, (0.5,), "running"),
    ]
    write_study(tested, observed, "s", tmp_path / "study.db")
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.best_value == 4.0 and study.best_trial.number == 0
    assert [trial.number for trial in study.get_trials(states=(TrialState.COMPLETE,))] == [0]


def test_a_study_written_again_replaces_the_one_before(tmp_path: Path) -> None:
    tested = space()
    observed = searched(tested, 6)
    for count in (3, 6, 6):
        write_study(tested, observed[:count], "s", tmp_path / "study.db")
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert len(study.trials) == 6
    (tmp_path / ".study.db.tmp").write_bytes(b"cut off")  # of a process that was killed here
    write_study(tested, observed, "s", tmp_path / "study.db")
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_a_study_without_trials_opens(tmp_path: Path) -> None:
    write_study(space(), [], "s", tmp_path / "study.db")
    assert optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}").trials == []
