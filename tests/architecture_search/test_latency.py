"""A table's sums are the times it was made of, and a space is held to them; the real times are only ordered."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minitron_search.architecture_search import latency
from minitron_search.architecture_search.latency import (
    HIDDEN_SIZES,
    INTERMEDIATE_SIZES,
    LatencyTable,
    Pass,
    Widths,
    measure,
    models_of,
    table_of,
)
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.cluster.session import UnfitError
from minitron_search.config.loading import parse_config
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import is_expressible, whole
from minitron_search.pipeline import latency as latency_stage
from minitron_search.records.directory import RunDirectory
from tests import tiny

TEACHER = tiny.config(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=5)
PASS = Pass(2, 16)


def layer_ms(widths: Widths) -> float:
    """Made up: attention by its heads, MLP by its size, both by hidden_size."""
    hidden, mlp, query, groups = widths
    return 0.01 * hidden * (3 * query + groups) + 0.002 * hidden * mlp + 0.5


def ends_ms(hidden_size: int) -> float:
    return 1.0 + 0.25 * hidden_size


def made_up(config: Any, shapes: np.ndarray, asked: Pass = PASS) -> LatencyTable:
    models = models_of(config, shapes)
    return table_of(
        asked, {size: ends_ms(size) for size, *_ in models}, {widths: layer_ms(widths) for widths in models}
    )


def true_ms(architecture: Architecture) -> float:
    widths = (
        architecture.hidden_size,
        architecture.intermediate_size,
        architecture.num_attention_heads,
        architecture.num_key_value_heads,
    )
    return ends_ms(architecture.hidden_size) + architecture.num_hidden_layers * layer_ms(widths)


def space(budget: Any = None, axes: Any = None, teacher: Any = TEACHER, anchors: Any = ()) -> SearchSpace:
    axes = axes or {
        "hidden_size": {"low": 12, "high": 24, "step": 4},
        "intermediate_size": {"low": 4, "high": 20, "step": 2},
        "num_attention_heads": {"choices": [2, 4, 6]},
        "drop_block": {"lengths": [0, 1, 3]},
    }
    values = {"budget": budget or around(18.0, 0.9), "axes": axes, "anchors": list(anchors)}
    return SearchSpace(parse_config({"space": values}).space, teacher)


def around(target: float, tolerance: float, name: str = "latency_ms") -> Any:
    return {name: {"target": target, "tolerance": tolerance, "batch_size": 2, "context_length": 16}}


# The table


def test_sums_are_the_times_they_were_made_of() -> None:
    """Where time is that of the ends, plus layers of an attention and an MLP, and linear in the MLP's size."""
    tested = space()
    table = made_up(TEACHER, tested.shapes)
    assert len({key[1] for key in table.mlp}) == INTERMEDIATE_SIZES < len(np.unique(tested.shapes[:, 1]))
    summed = table.milliseconds(tested.shapes, 5 - tested.shapes[:, 4])
    expected = [true_ms(tested.architecture(shape)) for shape in tested.shapes]
    np.testing.assert_allclose(summed, expected, rtol=1e-12)


@tiny.over(range(12))
def test_sums_hold_in_random_spaces_of_every_family(seed: int) -> None:
    draw = np.random.default_rng(seed)
    name = str(draw.choice(sorted(tiny.FAMILIES)))
    teacher = tiny.random_config(seed, model_type=name)
    shape = whole(teacher)
    axes = {
        "hidden_size": {"low": 1, "high": shape.hidden_size, "step": 1},
        "intermediate_size": {"low": 1, "high": shape.intermediate_size, "step": 1},
        "num_key_value_heads": {"low": 1, "high": shape.num_key_value_heads, "step": 1},
    }
    tested = space(around(1.0, 0.0), axes, teacher)
    kept = tested.shapes[draw.random(len(tested.shapes)) < 0.7]  # as other budgets leave it: no full grid
    models = models_of(teacher, kept)
    assert all(is_expressible(teacher, Architecture(*widths, (0,))) for widths in models)
    assert {(query, groups) for *_, query, groups in models} == set(map(tuple, kept[:, 2:4].tolist()))
    assert len(models) == len(set(models))
    summed = made_up(teacher, kept).milliseconds(kept, np.full(len(kept), 2))
    exact = np.isin(kept[:, 0], [size for size, *_ in models])
    expected = np.array([ends_ms(s[0]) + 2 * layer_ms((s[0], s[1], s[2], s[3])) for s in kept.tolist()])
    np.testing.assert_allclose(summed[exact], expected[exact], rtol=1e-9)
    np.testing.assert_allclose(summed, expected, rtol=0.5)


def test_many_hidden_sizes_are_interpolated() -> None:
    hidden = np.arange(100, 300, 5)
    shapes = np.array([(size, mlp, heads, 2, 0) for size in hidden for mlp in (100, 400) for heads in (4, 6)])
    models = models_of(tiny.config(hidden_size=300, num_attention_heads=6, num_key_value_heads=2), shapes)
    assert len(models) == HIDDEN_SIZES * 3
    summed = made_up(tiny.config(hidden_size=300, num_attention_heads=6), shapes).milliseconds(
        shapes, np.ones(len(shapes))
    )
    expected = [ends_ms(s[0]) + layer_ms((s[0], s[1], s[2], s[3])) for s in shapes.tolist()]
    np.testing.assert_allclose(summed, expected, rtol=1e-12)  # what was made up is linear in each


def test_a_table_is_read_back_as_it_was_written() -> None:
    table = made_up(TEACHER, space().shapes)
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


# The space


def test_before_it_is_measured_a_space_is_not_held_to_it_and_says_so() -> None:
    tested = space(around(18.0, 0.01))
    assert tested.unmeasured == ("latency_ms",) and "latency_ms not measured yet" in tested.described(1)
    assert len(tested) == tested.grid_size
    held = tested.within([made_up(TEACHER, tested.shapes)])
    assert held.unmeasured == () and "not measured" not in held.described(1)
    assert 0 < len(held) < len(tested) == tested.grid_size  # and the one before is as it was


def test_budgets_on_speed_and_on_counts_are_anded() -> None:
    counted = {"params": {"target": 11_000, "tolerance": 0.3}}
    fast, throughput = around(18.0, 0.2), around(1_600.0, 0.2, "tokens_per_second")
    tested = space({**counted, **fast, **throughput}, anchors=[{"hidden_size": 13}])
    held = tested.within([made_up(TEACHER, tested.shapes)])
    expected = [
        a for a in space().architectures()
        if abs(tested.measures(a).params - 11_000) <= 0.3 * 11_000
        and abs(true_ms(a) - 18.0) <= 0.2 * 18.0
        and abs(1e3 * 2 * 16 / true_ms(a) - 1_600) <= 0.2 * 1_600
    ]  # fmt: skip
    assert expected and {a.id for a in held.architectures()} == {a.id for a in expected}
    for one in (fast, throughput, {**counted, **fast}, {**fast, **throughput}):  # each of them leaves some out
        fewer = space(one)
        assert len(held) < len(fewer.within([made_up(TEACHER, fewer.shapes)]))
    assert held.anchors == tested.anchors


def test_two_passes_are_two_tables() -> None:
    other = {"target": 2_000, "tolerance": 0.9, "batch_size": 4, "context_length": 8}
    tested = space({**around(18.0, 0.9), "tokens_per_second": other})
    assert tested.passes() == {"latency_ms": Pass(2, 16), "tokens_per_second": Pass(4, 8)}
    tables = [made_up(TEACHER, tested.shapes, asked) for asked in tested.passes().values()]
    assert len(tested.within(tables[::-1])) == len(tested.within(tables)) > 0


def test_a_speed_that_nothing_reaches_says_what_is_reachable() -> None:
    tested = space(around(500.0, 0.1))
    times = [true_ms(a) for a in tested.architectures()]
    with pytest.raises(ValueError) as caught:
        tested.within([made_up(TEACHER, tested.shapes)])
    said = str(caught.value)
    assert "space.budget.latency_ms: 500.00 +- 10.0% asked" in said
    assert f"{min(times):.2f} to {max(times):.2f} reachable" in said and "valid" in said


def test_a_pass_beyond_the_teachers_positions_is_refused() -> None:
    budget = {"latency_ms": {"target": 5, "context_length": 65}}
    with pytest.raises(ValueError, match=r"space.budget.latency_ms.context_length: 65 .* valid: at most 64"):
        space(budget)


# Measured


@tiny.over(["llama", "gpt2", "gemma2"])
def test_measured_times_are_in_the_order_of_clearly_different_sizes(model_type: str) -> None:
    """Shapes whose work is tenfold apart; the times themselves are the machine's."""
    teacher = tiny.config(
        model_type, hidden_size=256, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8, head_dim=32,
        num_hidden_layers=8, max_position_embeddings=128,
    )  # fmt: skip
    narrow, wide = (32, 64, 1, 1), (256, 1024, 8, 8)
    shapes = np.array([(*narrow, 0), (*narrow, 7), (*wide, 0), (*wide, 7)])
    wholes = [Architecture(*narrow, tuple(range(8))), Architecture(*wide, tuple(range(8)))]
    table, measured = measure(teacher, shapes, wholes, Pass(1, 128), "float32", "cpu", 1)
    deep_narrow, shallow_narrow, deep_wide, shallow_wide = table.milliseconds(shapes, 8 - shapes[:, 4])
    assert deep_wide > max(deep_narrow, shallow_wide) and min(shallow_wide, deep_narrow) > shallow_narrow > 0
    assert measured[1] > measured[0] > 0


def test_layers_of_several_kinds_are_each_measured() -> None:
    teacher = tiny.config("gemma3_text", num_hidden_layers=5, sliding_window=5, sliding_window_pattern=2)
    kinds = latency._kinds(teacher)
    assert len(kinds) == 2 and sum(count for _, count in kinds) == 5
    shapes = np.array([(24, 20, 4, 2, 0)])
    table, _ = measure(teacher, shapes, [], Pass(1, 16), "float32", "cpu", 1)
    assert table.milliseconds(shapes, np.array([5]))[0] > 0


# The stage


@pytest.fixture
def asked(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run whose space has a budget on speed, and tasks that run here."""
    budget = {"latency_ms": {"target": 1_000, "tolerance": 0.99999, "batch_size": 1, "context_length": 8}}
    monkeypatch.setattr(latency_stage, "on_all_cpus", lambda depot, function, *arguments, kind: function(*arguments))
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency_stage, "replace", lambda made, **given: SimpleNamespace(**{**vars(made), **given}))
    axes = {"hidden_size": {"choices": [12, 24]}, "drop_block": {"lengths": [0, 1]}}
    config = parse_config({"output": str(tmp_path / "run"), "space": {"budget": budget, "axes": axes}})
    made = SearchSpace(config.space, TEACHER)
    return SimpleNamespace(config=config, run_dir=RunDirectory(config.output), precision="float32", space=made)


def test_a_run_measures_once_and_goes_on_with_what_it_measured(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, found = latency_stage.hold_to_speed(asked)
    assert not asked.run_dir.root.exists(), "a run begins when its space is known"
    asked.run_dir.write_latency(found)
    assert found["on"] == "1 CPU thread" and found["precision"] == "float32"
    assert len(found["tables"][0]["whole"]) == 2  # the smallest is the least deep
    assert all(row["summed_ms"] > 0 < row["measured_ms"] for row in found["tables"][0]["whole"])
    monkeypatch.setattr(latency_stage, "on_all_cpus", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(latency_stage, "measure_tables", lambda *_, **__: pytest.fail("measured again"))
    again, _ = latency_stage.hold_to_speed(asked)
    there = latency_stage.held_here(asked.config, asked.space)
    for held in (again.space, there):
        assert [a.id for a in held.architectures()] == [a.id for a in first.space.architectures()]


def test_a_dry_run_measures_here_and_says_so(asked: Any, capsys: pytest.CaptureFixture) -> None:
    latency_stage.held_here(asked.config, asked.space)
    said = " ".join(capsys.readouterr().out.split())
    assert "on this machine" in said and "1 x 8 tokens on 1 CPU thread" in said
    assert "architectures are within latency_ms" in said and not asked.run_dir.root.exists()


def test_without_a_budget_on_speed_nothing_is_measured() -> None:
    plain = SimpleNamespace(space=space({"params": {"target": 11_000, "tolerance": 0.9}}), config=parse_config({}))
    held, measured = latency_stage.hold_to_speed(plain)
    assert held is plain and measured == {}


def test_a_speed_that_nothing_reaches_is_refused_before_the_run_begins(asked: Any) -> None:
    budget = {"latency_ms": {"target": 1e-9, "tolerance": 0.1, "batch_size": 1, "context_length": 8}}
    config = parse_config({"space": {"budget": budget, "axes": {"hidden_size": {"choices": [12, 24]}}}})
    asked.space = SearchSpace(config.space, TEACHER)
    with pytest.raises(UnfitError, match="latency_ms"):
        latency_stage.hold_to_speed(asked)
    assert not asked.run_dir.root.exists()


def test_the_head_is_timed_on_every_token_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of all tokens of a large vocabulary at once would not fit where the model does."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(latency, "HEAD_ROWS", 8)
    monkeypatch.setattr(
        latency, "output_head", lambda model: SimpleNamespace(logits=lambda rows: asked.append(rows.shape))
    )
    model = tiny.model(tiny.config())
    latency._forward(model, torch.zeros(3, 7, dtype=torch.long), head=True)
    width = model.config.hidden_size
    assert asked == [(8, width), (8, width), (5, width)]
