"""Certainty is measured on pairs, chance is called chance, and metrics that disagree are said to."""

import json

import numpy as np
import pytest

from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.depth.recommendation import best_blocks, recommendation
from minitron_search.depth.sweep import TEACHER, Values, block
from minitron_search.evaluation.statistics import paired
from tests import tiny


def sweep(n: int = 40, accuracy: float = 0.5, seed: int = 0) -> Values:
    """Four layers, blocks of 2 at 0, 1, 2: LM loss likes the one at 1 clearly, the margin the one at 2."""
    draw = np.random.default_rng(seed)
    window = draw.normal(0, 1, n)  # windows differ far more than cuts do
    loss = {TEACHER: 3.0, block(0, 2): 5.0, block(1, 2): 4.0, block(2, 2): 4.2, (0, 3): 4.1}
    margin = {TEACHER: 0.4, block(0, 2): 0.0, block(1, 2): 0.1, block(2, 2): 0.3, (0, 3): 0.1}
    right = np.arange(n) < accuracy * n
    return {
        "lm_loss": {cut: mean + window + draw.normal(0, 0.05, n) for cut, mean in loss.items()},
        "winogrande_acc": {cut: right.astype(float) for cut in loss},
        "winogrande_margin": {cut: mean + draw.normal(0, 1, n) for cut, mean in margin.items()},
    }


def test_the_exact_test_counts_every_assignment_of_signs() -> None:
    assert paired(np.zeros(3), np.array([1.0, 2.0, 3.0]))["p"] == 2 / 8  # all plus, and all minus
    assert paired(np.zeros(4), np.array([1.0, 1.0, 1.0, -1.0]))["p"] == 10 / 16
    same = paired(np.ones(5), np.ones(5))
    assert same["p"] == 1.0 and same["difference"] == 0.0


def test_a_difference_is_seen_through_what_the_windows_share() -> None:
    draw = np.random.default_rng(0)
    window = draw.normal(3, 1, 200)
    test = paired(window, window + 0.01 + draw.normal(0, 0.02, 200))
    assert test["p"] < 1e-3 and test["difference"] == pytest.approx(0.01, abs=0.005) and test["n"] == 200


def test_where_there_is_no_difference_one_test_in_twenty_says_there_is() -> None:
    draw = np.random.default_rng(1)
    found = [paired(draw.normal(size=15), draw.normal(size=15))["p"] < 0.05 for _ in range(300)]
    assert 0.01 < np.mean(found) < 0.10


def test_the_best_block_its_runner_up_and_how_far_apart_they_are() -> None:
    of = recommendation(sweep(), [2], 4, {2: (0, 3)})["by_length"]["2"]
    best = of["best"]["lm_loss"]
    assert best["layers"] == [1, 2] and best["runner_up"]["layers"] == [2, 3]
    assert best["against_runner_up"]["difference"] == pytest.approx(0.2, abs=0.03)
    assert best["against_runner_up"]["p"] < 0.01 and best["n"] == 40
    assert of["one_by_one"]["lm_loss"]["layers"] == [0, 3]
    assert of["one_by_one"]["lm_loss"]["against_best_block"]["difference"] > 0  # the block is better
    assert of["one_by_one"]["winogrande_margin"]["n"] == 40


def test_the_margin_is_better_when_higher() -> None:
    best = recommendation(sweep(400), [2], 4, {})["by_length"]["2"]["best"]["winogrande_margin"]
    assert best["layers"] == [2, 3] and best["against_runner_up"]["difference"] > 0


def test_disagreement_is_said() -> None:
    found = recommendation(sweep(400), [2], 4, {})
    assert not found["by_length"]["2"]["agree"]
    assert any("disagree" in line and "LM loss at layer 1" in line for line in found["words"])


def test_at_chance_accuracy_is_warned_of_and_ranks_nothing() -> None:
    found = recommendation(sweep(accuracy=0.55), [2], 4, {})
    assert found["at_chance"] is True and "at chance" in found["words"][0]
    assert found["by_length"]["2"]["recommended"]["by"] == "lm_loss"
    assert not any("accuracy" in line for line in found["words"][1:])


def test_above_chance_accuracy_decides_as_in_the_paper() -> None:
    found = recommendation(sweep(accuracy=0.9), [2], 4, {})
    assert found["at_chance"] is False
    assert found["by_length"]["2"]["recommended"]["by"] == "winogrande_acc"


def test_without_winogrande_nothing_is_said_of_chance_and_without_loss_bi_decides() -> None:
    values = {"bi": {block(start, 2): np.full(3, 0.1 * (start + 1)) for start in range(3)}}
    angular = recommendation({"angular": values["bi"]}, [2], 4, {})
    assert angular["by_length"]["2"]["recommended"]["by"] == "angular" and not angular["by_length"]["2"]["one_by_one"]
    found = recommendation(values, [2], 4, {})
    assert found["at_chance"] is None and found["teacher"] == {}
    assert found["by_length"]["2"]["recommended"] == {"by": "bi", "start": 0, "length": 2, "layers": [0, 1]}


def test_a_length_with_one_block_has_no_runner_up() -> None:
    found = recommendation({"lm_loss": {TEACHER: np.ones(2), (0,): np.ones(2)}}, [1], 1, {})
    assert "runner_up" not in found["by_length"]["1"]["best"]["lm_loss"]


def test_it_is_json_and_a_search_reads_its_seeds_from_it() -> None:
    found = json.loads(json.dumps(recommendation(sweep(400), [2], 4, {2: (0, 3)})))
    assert best_blocks(found, "lm_loss") == best_blocks(found, "kl") == {2: 1}
    assert best_blocks(found, "winogrande_margin") == {2: 2}


def test_a_seed_is_the_largest_legal_architecture_without_the_block() -> None:
    teacher = tiny.config(num_hidden_layers=4)
    axes = {"intermediate_size": {"choices": [10, 20]}, "drop_block": {"lengths": [0, 1, 2]}}
    budget = {"params": {"target": 8_000, "tolerance": 0.5}}
    space = SearchSpace(parse_config({"space": {"axes": axes, "budget": budget}}).space, teacher)
    seeds = space.largest_without([(1, 2), (3,), (0, 1, 2)])  # length 3 is not in the space
    assert [seed.layers for seed in seeds] == [(0, 1, 2), (0, 3)]
    assert all(seed.intermediate_size == 20 and seed in list(space.architectures()) for seed in seeds)
