"""`space.deployable` keeps the architectures that the engines take, through every way by which one is proposed."""

from typing import Any

import numpy as np
import pytest
from transformers import PretrainedConfig

from minitron_search.architecture_search.latency import LatencyTable
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.models.engines import refusals
from minitron_search.models.families import student_config
from tests import tiny

BOTH = ["vllm", "llama.cpp"]
WIDE = {"params": {"target": "60K", "tolerance": 0.99}}
QWEN = tiny.config("qwen2", hidden_size=112, num_attention_heads=14, num_key_value_heads=2, head_dim=8)
GEMMA = tiny.config("gemma3_text", hidden_size=32, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
                    num_hidden_layers=14, query_pre_attn_scalar=8)  # fmt: skip


def space(teacher: PretrainedConfig, axes: Any, engines: Any, **given: Any) -> SearchSpace:
    asked = {"axes": axes, "budget": WIDE, "deployable": engines, **given}
    return SearchSpace(parse_config({"space": asked}).space, teacher)


def refused(tested: SearchSpace) -> set[str]:
    """The engines that refuse one of the space's architectures."""
    return {engine for each in tested.architectures() for engine in refusals(student_config(tested.config, each))}


@tiny.over([("vllm", "vLLM"), ("llama.cpp", "llama.cpp")])
def test_what_the_engine_refuses_is_left_out_and_nothing_else(engine: str, name: str) -> None:
    axes = {"hidden_size": {"low": 16, "high": 112, "step": 16}, "num_attention_heads": {"choices": [4, 10, 14]}}
    everything, kept = space(QWEN, axes, []), space(QWEN, axes, engine)
    assert name in refused(everything) and name not in refused(kept)
    taken = [point for point, each in zip(everything.points.tolist(), everything.architectures(), strict=True)
             if name not in refusals(student_config(QWEN, each))]  # fmt: skip
    assert kept.points.tolist() == taken and len(taken) == 3
    assert kept.in_budget.tolist() == everything.points.tolist()


def test_heads_follow_hidden_where_an_engine_takes_them_to_make_it_up() -> None:
    """14 heads of 8 in 2 groups: 16 channels are a head of each group."""
    widths = {"hidden_size": {"low": 56, "high": 112, "step": 8}}
    assert set(space(QWEN, widths, []).points[:, 2].tolist()) == {14}
    assert space(QWEN, widths, BOTH).points[:, [0, 2, 3]].tolist() == [
        [64, 8, 2],
        [80, 10, 2],
        [96, 12, 2],
        [112, 14, 2],
    ]
    heads = {"num_attention_heads": {"choices": [8, 14]}}
    assert space(QWEN, heads, BOTH).points[:, [0, 2]].tolist() == [[64, 8], [112, 14]]
    groups = {"num_key_value_heads": {"choices": [1, 2]}}
    assert space(QWEN, groups, BOTH).points[:, [0, 2, 3]].tolist() == [[56, 7, 1], [112, 14, 2]]


def test_heads_do_not_follow_hidden_for_an_engine_that_reads_head_dim() -> None:
    teacher = tiny.config("granite", hidden_size=112, num_attention_heads=14, num_key_value_heads=2, head_dim=8)
    widths = {"hidden_size": {"low": 56, "high": 112, "step": 8}}
    assert set(space(teacher, widths, "vllm").points[:, 2].tolist()) == {14}
    assert set(space(teacher, widths, BOTH).points[:, 2].tolist()) == {8, 10, 12, 14}


def test_blocks_start_where_the_rhythm_of_layers_stays() -> None:
    """Of 14 layers, every 6th attends to all: one may go from the end, six from anywhere."""
    axes = {"drop_block": {"lengths": [0, 1, 6]}}
    kept = space(GEMMA, axes, BOTH)
    starts: dict[int, list[int]] = {}
    for length, start in kept.points[:, 4:].tolist():
        starts.setdefault(length, []).append(start)
    assert starts == {0: [0], 1: [12, 13], 6: list(range(9))}, "of the last two, both attend through a window"
    assert len(space(GEMMA, axes, "vllm")) == 1 + 14 + 9 and not refused(kept)


def test_every_draw_and_every_nearest_one_is_taken() -> None:
    kept = space(GEMMA, {"drop_block": {"lengths": [0, 1, 6]}, "intermediate_size": {"choices": [10, 20]}}, BOTH)
    generator, taken = np.random.default_rng(0), set[str]()
    for _ in range(len(kept)):
        drawn = kept.random(generator, taken)
        assert drawn is not None and drawn in set(kept.architectures())
        taken.add(drawn.id)
    assert kept.random(generator, taken) is None and len(taken) == len(kept) == 24
    near = kept.nearest({"drop_block_length": 1, "drop_block_start": 0}, ())
    assert near is not None and not refusals(student_config(GEMMA, near))


def test_layers_that_are_dropped_first_are_ones_that_the_engines_let_go() -> None:
    kept = space(GEMMA, {"drop_block": {"lengths": [0, 1, 6]}}, BOTH)
    assert kept.largest_without([(4,)]) == ()
    (one,) = kept.largest_without([(4,), (13,)])
    assert 13 not in one.layers and len(one.layers) == 13


def test_a_budget_on_speed_keeps_the_filter() -> None:
    asked = {**WIDE, "latency_ms": {"target": 10, "tolerance": 0.99, "batch_size": 1, "context_length": 8}}
    tested = space(GEMMA, {"drop_block": {"lengths": [0, 1, 6]}}, BOTH, budget=asked)
    table = LatencyTable(tested.passes()["latency_ms"], {32: 1.0}, {(32, 20): 0.5}, {(32, 4, 1): 0.5})
    held = tested.within([table])
    assert held.points.tolist() == tested.points.tolist() and not refused(held)


def test_an_empty_space_is_one_message_that_says_why() -> None:
    with pytest.raises(ValueError) as caught:
        space(QWEN, {"hidden_size": {"choices": [40, 72]}, "num_attention_heads": {"choices": [14]}}, BOTH)
    said = str(caught.value)
    assert said.startswith("space.deployable: vllm, llama.cpp: nothing is left of the 2 architectures in budget: ")
    assert "vLLM: 0 of 2; most often it takes the heads of a qwen2" in said and "; valid: axes" in said


def test_an_anchor_that_an_engine_refuses_is_refused() -> None:
    axes, anchors = {"drop_block": {"lengths": [0, 6]}}, [{"drop_block": [3, 1]}]
    assert len(space(GEMMA, axes, "vllm", anchors=anchors).anchors) == 1
    with pytest.raises(ValueError, match="space.anchors: .* llama.cpp does not take it: it takes layer_types.*; valid"):
        space(GEMMA, axes, BOTH, anchors=anchors)
