"""Every architecture of a space is legal and in budget, and every legal one in budget is in the space."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from minitron_search.architecture_search.samplers import Observation, propose
from minitron_search.architecture_search.space import COORDINATES, SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.config.space import SpaceConfig
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import is_expressible, sizes, student_config, whole
from tests import tiny

TEACHER = tiny.config(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=5)
AXES: dict[str, Any] = {
    "hidden_size": {"low": 12, "high": 24, "step": 4},
    "intermediate_size": {"choices": [8, 20]},
    "num_attention_heads": {"low": 1, "high": 6, "step": 1},
    "drop_block": {"lengths": [0, 1, 3]},
}


COUNTS: dict[str, dict[tuple[int, ...], tuple[int, int, int]]] = {}  # a teacher's shapes, built once


def space(axes: Any = AXES, budget: Any = None, anchors: Any = (), teacher: PretrainedConfig = TEACHER) -> SearchSpace:
    return SearchSpace(of(axes, budget, anchors), teacher)


def of(axes: Any, budget: Any = None, anchors: Any = ()) -> SpaceConfig:
    return parse_config(
        {"space": {"budget": budget or around(11_000, 0.9), "axes": axes, "anchors": list(anchors)}}
    ).space


def around(target: int, tolerance: float, name: str = "params") -> Any:
    return {name: {"target": target, "tolerance": tolerance}}


def refusal(*given: Any, **named: Any) -> str:
    with pytest.raises(ValueError) as caught:
        space(*given, **named)
    return str(caught.value)


def measured(teacher: PretrainedConfig, architecture: Architecture) -> tuple[int, int, int]:
    """Parameters, non-embedding parameters and key-value cache elements a token, of the model itself."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(student_config(teacher, architecture))
    params = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    cached = architecture.num_key_value_heads * sizes(teacher)["head_dim"] * architecture.num_hidden_layers
    return params, params - sum(weight.numel() for weight in embeddings), 2 * cached


def brute_force(teacher: PretrainedConfig, space: SpaceConfig) -> list[Architecture]:
    """By definition: every point of the grid, built and measured."""
    whole_teacher, depth = whole(teacher), teacher.num_hidden_layers
    axes = space.axes
    ratio = whole_teacher.num_attention_heads // whole_teacher.num_key_value_heads
    found, counts = [], COUNTS.setdefault(teacher.to_json_string(), {})
    for hidden, mlp, heads, groups, length in itertools.product(
        axes.hidden_size.values() if axes.hidden_size else [whole_teacher.hidden_size],
        axes.intermediate_size.values() if axes.intermediate_size else [whole_teacher.intermediate_size],
        axes.num_attention_heads.values() if axes.num_attention_heads else [None],
        axes.num_key_value_heads.values() if axes.num_key_value_heads else [None],
        axes.drop_block.lengths if axes.drop_block else [0],
    ):
        if groups is None:
            groups = heads if ratio == 1 and heads else whole_teacher.num_key_value_heads
        heads = heads or groups * ratio
        for start in range(depth - length + 1) if length else [0]:
            if heads % groups or heads > groups * ratio:
                continue
            shape = (hidden, mlp, heads, groups, length)  # where the block starts changes no count
            layers = tuple(layer for layer in range(depth) if not start <= layer < start + length)
            architecture = Architecture(hidden, mlp, heads, groups, layers)
            if not is_expressible(teacher, architecture):
                continue
            if shape not in counts:
                counts[shape] = measured(teacher, architecture)
            if all(within(space, *counts[shape])):
                found.append(architecture)
    return found


def within(space: SpaceConfig, params: int, non_embedding: int, cache_per_token: int) -> list[bool]:
    budget = space.budget
    checks = [(budget.params, params), (budget.non_embedding_params, non_embedding)]
    if budget.memory_bytes:
        tokens = budget.memory_bytes.batch_size * budget.memory_bytes.context_length
        checks.append((budget.memory_bytes, 2 * (params + cache_per_token * tokens)))
    return [abs(value - bound.target) <= bound.tolerance * bound.target for bound, value in checks if bound]


@pytest.mark.parametrize(
    "budget",
    [
        around(11_000, 0.9),
        around(10_000, 0.2),
        around(8_000, 0.15, "non_embedding_params"),
        {"memory_bytes": {"target": 24_000, "tolerance": 0.2, "batch_size": 2, "context_length": 10}},
        {**around(10_000, 0.2), **around(8_500, 0.2, "non_embedding_params"),
         "memory_bytes": {"target": 21_000, "tolerance": 0.15, "batch_size": 1, "context_length": 8}},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "teacher",
    [
        TEACHER,
        tiny.config(hidden_size=24, num_attention_heads=6, num_hidden_layers=5, tie_word_embeddings=False),
        tiny.config(hidden_size=24, num_attention_heads=6, num_hidden_layers=5, attention_bias=True, mlp_bias=True),
        tiny.config("mistral", hidden_size=24, num_attention_heads=6, num_hidden_layers=5),
    ],
    ids=["tied", "untied", "biased", "mistral"],
)
def test_the_space_is_exactly_the_legal_architectures_in_budget(budget: Any, teacher: PretrainedConfig) -> None:
    asked = of(AXES, budget)
    expected = brute_force(teacher, asked)
    assert expected, "the case is empty: it shows nothing"
    found = list(SearchSpace(asked, teacher).architectures())
    assert {architecture.id for architecture in found} == {architecture.id for architecture in expected}
    assert len(found) == len(expected)  # and none is there twice


GROUPED = tiny.config(hidden_size=24, num_attention_heads=12, num_key_value_heads=4, num_hidden_layers=2)
SINGLE = tiny.config(hidden_size=24, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)


@pytest.mark.parametrize(
    ("teacher", "axes", "pairs"),
    [
        (GROUPED, {}, {(12, 4)}),
        (GROUPED, {"num_attention_heads": {"choices": [4, 8, 10]}}, {(4, 4), (8, 4)}),
        (GROUPED, {"num_key_value_heads": {"choices": [1, 2]}}, {(3, 1), (6, 2)}),
        (GROUPED, {"num_attention_heads": {"choices": [2, 6, 8]}, "num_key_value_heads": {"choices": [2, 4]}},
         {(2, 2), (6, 2), (8, 4)}),
        (SINGLE, {"num_attention_heads": {"choices": [1, 3]}}, {(1, 1), (3, 3)}),
        (SINGLE, {"num_key_value_heads": {"choices": [1, 3]}}, {(1, 1), (3, 3)}),
        (SINGLE, {"num_attention_heads": {"choices": [2, 4]}, "num_key_value_heads": {"choices": [2, 4]}},
         {(2, 2), (4, 4)}),
    ],
)  # fmt: skip
def test_heads_go_evenly_or_with_their_groups(
    teacher: PretrainedConfig, axes: Any, pairs: set[tuple[int, int]]
) -> None:
    tested = space(axes, around(9_000, 0.9), teacher=teacher)
    assert {(a.num_attention_heads, a.num_key_value_heads) for a in tested.architectures()} == pairs
    assert {a.id for a in tested.architectures()} == {a.id for a in brute_force(teacher, of(axes, around(9_000, 0.9)))}


def test_heads_and_groups_that_never_fit_are_refused_with_those_that_do() -> None:
    axes = {"num_attention_heads": {"choices": [9, 12]}, "num_key_value_heads": {"choices": [2]}}
    said = refusal(axes, around(9_000, 0.9), teacher=GROUPED)
    assert "space.axes.num_attention_heads: none of [9, 12]" in said and "valid: [2, 4, 6]" in said


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_every_proposal_of_every_family_is_a_model_that_can_be_built(model_type: str) -> None:
    teacher = tiny.config(model_type)
    axes = {
        "hidden_size": {"low": 6, "high": 24, "step": 3},
        "num_attention_heads": {"choices": [1, 2, 3, 4]},
        "num_key_value_heads": {"low": 1, "high": whole(teacher).num_key_value_heads, "step": 1},
        "intermediate_size": {"choices": [11, 20]},
        "drop_block": {"lengths": [0, 1]},
    }
    asked = of(axes, around(9_000, 0.95))
    expected = brute_force(teacher, asked)
    found = list(SearchSpace(asked, teacher).architectures())
    assert {a.id for a in found} == {a.id for a in expected} and len(found) == len(expected) >= 12
    assert tiny.FAMILIES[model_type].head_dim != "derived" or all(
        a.hidden_size == 6 * a.num_attention_heads for a in found
    )


def test_key_value_heads_are_no_coordinate_where_the_heads_decide_them() -> None:
    tested = space({"num_attention_heads": {"choices": [1, 3, 4]}}, around(9_000, 0.9), teacher=SINGLE)
    assert set(tested.varied()) == {"num_attention_heads"}
    found = tested.nearest({"num_attention_heads": 3}, ())
    assert found is not None and (found.num_attention_heads, found.num_key_value_heads) == (3, 3)


def test_a_family_whose_heads_make_up_hidden_size_says_so() -> None:
    said = refusal({"hidden_size": {"choices": [13, 20]}}, teacher=tiny.config("gpt_neox"))
    assert "hidden_size: 13 with num_attention_heads 4" in said and "valid: hidden_size 24" in said
    assert "space.anchors: hidden_size: 13" in refusal(
        {}, around(9_000, 0.9), anchors=[{"hidden_size": 13}], teacher=tiny.config("gpt_neox")
    )


@pytest.mark.parametrize(
    "axes",
    [
        {"hidden_size": {"low": 6, "high": 24, "step": 1}},
        {"num_attention_heads": {"choices": [1, 2, 3, 4]}},
        {"hidden_size": {"choices": [6, 12, 18, 24]}, "num_attention_heads": {"choices": [1, 2, 3, 4]}},
    ],
)
def test_where_heads_make_up_hidden_size_one_axis_gives_the_other(axes: Any) -> None:
    tested = space(axes, around(9_000, 0.95), anchors=[{"hidden_size": 12}], teacher=tiny.config("gpt2"))
    found = {(a.hidden_size, a.num_attention_heads) for a in tested.architectures()}
    assert found == {(6, 1), (12, 2), (18, 3), (24, 4)}
    assert (tested.anchors[0].num_attention_heads, tested.anchors[0].num_key_value_heads) == (2, 2)


@pytest.mark.parametrize("seed", range(8))
def test_in_random_teachers_too(seed: int) -> None:
    teacher, draw = tiny.random_config(seed), np.random.default_rng(seed)
    shape = whole(teacher)
    axes: dict[str, Any] = {
        "hidden_size": {"low": max(1, shape.hidden_size // 2), "high": shape.hidden_size, "step": 3},
        "num_attention_heads": {"choices": sorted({shape.num_key_value_heads, shape.num_attention_heads})},
        "drop_block": {"lengths": [0, 1]},
    }
    target = int(draw.uniform(0.5, 1.0) * measured(teacher, shape)[0])
    asked = of(axes, around(target, 0.3))
    expected = brute_force(teacher, asked)
    if not expected:
        with pytest.raises(ValueError, match="space.budget.params"):
            SearchSpace(asked, teacher)
        return
    found = SearchSpace(asked, teacher)
    assert {a.id for a in found.architectures()} == {a.id for a in expected}


def test_budgets_are_anded() -> None:
    first, second = around(10_000, 0.2), around(7_000, 0.1, "non_embedding_params")
    both = {a.id for a in space(budget={**first, **second}).architectures()}
    apart = [{a.id for a in space(budget=budget).architectures()} for budget in (first, second)]
    assert both == apart[0] & apart[1]
    assert both < apart[0] and both < apart[1]


def test_a_budget_that_nothing_meets_says_what_is_reachable() -> None:
    smallest, largest = (measured(TEACHER, a)[0] for a in space().smallest_and_largest())
    said = refusal(budget=around(1_000_000, 0.05))
    assert "space.budget.params: 1,000,000 +- 5.0% asked" in said
    assert f"{smallest:,} to {largest:,} reachable" in said and "valid" in said
    both = refusal(budget={**around(1_000_000, 0.05), **around(10, 0.05, "non_embedding_params")})
    assert "space.budget.params" in both and "space.budget.non_embedding_params: 10" in both


def test_budgets_that_are_met_apart_and_not_together_are_refused() -> None:
    smallest, largest = (space().measures(a) for a in space().smallest_and_largest())
    params, non_embedding = (
        around(smallest.params, 0.0),
        around(largest.non_embedding_params, 0.0, "non_embedding_params"),
    )
    assert len(space(budget=params)) and len(space(budget=non_embedding))
    assert "no architecture" in refusal(budget={**params, **non_embedding})


def test_a_step_that_leaves_no_legal_head_count_says_which_are() -> None:
    said = refusal({"num_attention_heads": {"low": 1, "high": 5, "step": 2}})
    assert "space.axes.num_attention_heads: none of [1, 3, 5]" in said and "valid: [2, 4, 6]" in said


def test_illegal_head_counts_among_legal_ones_are_left_out() -> None:
    assert {a.num_attention_heads for a in space().architectures()} == {2, 4, 6}


@pytest.mark.parametrize(
    ("axes", "parts"),
    [
        ({"hidden_size": {"low": 12, "high": 32, "step": 4}}, ["space.axes.hidden_size: 32", "24"]),
        ({"intermediate_size": {"choices": [8, 21]}}, ["space.axes.intermediate_size: 21", "20"]),
        ({"num_attention_heads": {"choices": [8]}}, ["space.axes.num_attention_heads: 8", "6"]),
        ({"drop_block": {"lengths": [0, 5]}}, ["space.axes.drop_block.lengths: 5", "at most 4"]),
    ],
)
def test_an_axis_that_leaves_the_teacher_is_refused(axes: Any, parts: list[str]) -> None:
    said = refusal(axes)
    assert all(part in said for part in parts), said


def test_a_grid_that_no_stock_configuration_says_is_refused() -> None:
    biased = tiny.config(hidden_size=24, num_attention_heads=6, attention_bias=True)
    said = refusal({"hidden_size": {"choices": [20, 22]}, "num_attention_heads": {"choices": [6]}}, teacher=biased)
    assert "space.axes" in said and "valid" in said and "num_attention_heads" in said


def test_an_axis_left_out_keeps_the_teachers_value() -> None:
    (only,) = space({}, around(measured(TEACHER, whole(TEACHER))[0], 0.01)).architectures()
    assert only == whole(TEACHER)


def test_the_grid_counts_every_shape_and_block_start() -> None:
    # 4 hidden sizes, 2 intermediate sizes, 3 legal head counts; blocks: 1 of none, 5 of one layer, 3 of three
    assert space().grid_size == 4 * 2 * 3 * (1 + 5 + 3)
    assert len(space()) == 4 * 2 * 3 * (1 + 5 + 3)


def test_the_smallest_and_the_largest_are() -> None:
    tested = space(budget=around(10_000, 0.2))
    params = [tested.measures(a).params for a in tested.architectures()]
    smallest, largest = tested.smallest_and_largest()
    assert tested.measures(smallest).params == min(params) and tested.measures(largest).params == max(params)
    assert {smallest.id, largest.id} <= {a.id for a in tested.architectures()}


def test_measures_are_those_of_the_model() -> None:
    tested = space(budget={"memory_bytes": {"target": 16_000, "tolerance": 0.9, "batch_size": 3, "context_length": 5}})
    for architecture in itertools.islice(tested.architectures(), 0, None, 17):
        params, non_embedding, cache = measured(TEACHER, architecture)
        counted = tested.measures(architecture)
        assert (counted.params, counted.non_embedding_params) == (params, non_embedding)
        assert counted.memory_bytes == 2 * (params + cache * 15)


def test_coordinates_and_architectures_are_each_others() -> None:
    tested = space()
    for architecture, point in zip(tested.architectures(), tested.points.tolist(), strict=True):
        coordinates = tested.coordinates(architecture)
        assert tuple(coordinates.get(name, 0) for name in COORDINATES) == tuple(point)
        assert ("drop_block_start" in coordinates) == (architecture.num_hidden_layers < 5)
        assert tested.nearest(coordinates, ()) == architecture


def test_only_what_varies_is_a_coordinate_to_propose() -> None:
    tested = space({**AXES, "intermediate_size": {"choices": [8]}})
    varied = set(tested.varied())
    assert varied == set(COORDINATES) - {"intermediate_size", "num_key_value_heads"}
    for architecture in tested.architectures():
        missing = varied - tested.coordinates(architecture).keys()
        assert missing == ({"drop_block_start"} if len(architecture.layers) == 5 else set())


def test_where_a_block_starts_is_asked_of_those_that_drop_one() -> None:
    tested = space({"drop_block": {"lengths": [0, 1, 3]}})
    assert tested.nearest({"drop_block_length": 0, "drop_block_start": 4}, ()) == whole(TEACHER)
    for length, start in ((1, 3), (1, 0), (3, 2)):
        found = tested.nearest({"drop_block_length": length, "drop_block_start": start}, ())
        assert found is not None and found.dropped_block(5) == (start, length)
    assert set(space({"drop_block": {"lengths": [0, 4]}}).varied()) == {"drop_block_length", "drop_block_start"}
    assert set(space({"drop_block": {"lengths": [3]}}).varied()) == {"drop_block_start"}
    assert set(space({"hidden_size": {"choices": [20, 24]}}).varied()) == {"hidden_size"}


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_is_the_nearest_that_is_free(seed: int) -> None:
    tested, draw = space(budget=around(10_000, 0.2)), np.random.default_rng(seed)
    everything = list(tested.architectures())
    taken = {a.id for a in everything if draw.random() < 0.7}
    for _ in range(20):
        asked = {name: int(draw.integers(0, 25)) for name in COORDINATES[:4]}
        asked |= {name: int(draw.integers(0, 5)) for name in COORDINATES[4:]}
        found = tested.nearest(asked, taken)
        assert found is not None and found.id not in taken
        span = np.ptp(tested.points, axis=0).clip(1)

        def distance(a: Architecture, asked: dict[str, int] = asked, span: np.ndarray = span) -> float:
            there = tested.coordinates(a)
            if not asked["drop_block_length"]:
                there.pop("drop_block_start", None)
            return sum(((there[n] - asked[n]) / s) ** 2 for n, s in zip(COORDINATES, span, strict=True) if n in there)

        assert distance(found) == pytest.approx(min(distance(a) for a in everything if a.id not in taken))


def test_what_is_taken_is_never_given_and_none_when_all_are() -> None:
    tested, generator = space(budget=around(10_000, 0.1)), np.random.default_rng(0)
    taken: set[str] = set()
    for turn in range(len(tested)):
        found = tested.random(generator, taken) if turn % 2 else tested.nearest({"hidden_size": 16}, taken)
        assert found is not None and found.id not in taken
        taken.add(found.id)
    assert taken == {a.id for a in tested.architectures()}
    assert tested.random(generator, taken) is None and tested.nearest({}, taken) is None


def test_random_draws_are_their_generators_and_reach_everything() -> None:
    tested = space(budget=around(10_000, 0.1))
    draws = [[tested.random(np.random.default_rng(seed), ()) for seed in range(400)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len({a.id for a in draws[0] if a}) > 0.9 * min(len(tested), 400)


@pytest.mark.parametrize("seed", range(10))
def test_every_proposal_is_legal_in_budget_and_new_and_anchors_come_first(seed: int) -> None:
    """In random spaces of every family, until nothing is left."""
    draw = np.random.default_rng(seed)
    teacher = tiny.random_config(seed, model_type=str(draw.choice(sorted(tiny.FAMILIES))), num_hidden_layers=4)
    shape = whole(teacher)
    axes = {
        "hidden_size": {"low": max(1, shape.hidden_size // 3), "high": shape.hidden_size, "divisor": 2},
        "intermediate_size": {"choices": [shape.intermediate_size // 2, shape.intermediate_size]},
        "num_key_value_heads": {"choices": sorted({1, shape.num_key_value_heads})},
        "drop_block": {"lengths": [0, 1, 2]},
    }
    params, _, cache = measured(teacher, shape)
    memory = {"target": 1.5 * params + 8 * cache, "tolerance": 0.3, "batch_size": 2, "context_length": 4}
    budget = {**around(int(0.75 * params), 0.25), "memory_bytes": memory}
    anchors = [{"drop_block": [1, 2]}, {}]
    asked = of(axes, budget, anchors)
    legal = {a.id for a in brute_force(teacher, asked)}
    tested = SearchSpace(asked, teacher)
    assert len(legal) > 5
    observed: list[Observation] = []
    while (proposed := propose(tested, observed, sampler="random", seed=seed)) is not None:
        observed.append(Observation(proposed, (), "running"))
    found = [observation.architecture for observation in observed]
    assert tuple(found[:2]) == tested.anchors == (tested.anchors[0], shape)
    ids = [architecture.id for architecture in found]
    assert len(set(ids)) == len(ids)
    assert set(ids) == legal | {anchor.id for anchor in tested.anchors}


def test_a_small_space_is_said_to_be_tried_whole() -> None:
    tested = space()
    assert f"all {len(tested):,} are tried" in tested.described(len(tested))
    assert "small" not in tested.described(len(tested) - 1)


# Anchors


def test_anchors_keep_the_teachers_value_where_they_are_silent_and_need_no_budget() -> None:
    tested = space(budget=around(10_000, 0.01), anchors=[{}, {"hidden_size": 13, "drop_block": [2, 2]}])
    assert tested.anchors == (whole(TEACHER), Architecture(13, 20, 6, 2, (0, 1, 4)))


@pytest.mark.parametrize(
    ("anchor", "parts"),
    [
        ({"hidden_size": 25}, ["hidden_size: 25", "24"]),
        ({"num_attention_heads": 3}, ["num_attention_heads", "[2, 4, 6]"]),
        ({"drop_block": [3, 3]}, ["space.anchors", "[3, 3]", "5"]),
        ({"drop_block": [0, 5]}, ["space.anchors", "[0, 5]", "5"]),
    ],
)
def test_an_anchor_that_leaves_the_teacher_is_refused(anchor: Any, parts: list[str]) -> None:
    said = refusal(anchors=[anchor])
    assert all(part in said for part in parts), said


def test_an_anchor_that_no_stock_configuration_says_is_refused() -> None:
    biased = tiny.config(hidden_size=24, num_attention_heads=6, num_hidden_layers=5, attention_bias=True)
    assert "space.anchors" in refusal(anchors=[{"hidden_size": 20}], teacher=biased)
