"""Which layers go: the block of least BI, the layers of least BI, and LaCo's merges."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from minitron_search.architecture_search.samplers import propose
from minitron_search.architecture_search.space import counts
from minitron_search.config.loading import parse_config
from minitron_search.depth.layer_choice import (
    least_block,
    least_layers,
    merged_away,
    merges_of,
    read_merges,
    write_merges,
)
from minitron_search.distillation.settings import LoopSettings
from minitron_search.models.families import decoder_layers, whole
from minitron_search.models.loading import reader
from minitron_search.pruning import laco
from minitron_search.pruning.laco import C, collapsed, merged_model
from minitron_search.pruning.trimming import trim
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.runner import initial_student
from tests import tiny
from tests.architecture_search.test_samplers import space
from tests.materials import materials, trial

UNTRAINED = LoopSettings(total_tokens=0, threads=1)


def random_bi(depth: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((depth + 1, depth + 1)))


@tiny.over(range(10))
def test_the_least_block_and_the_least_layers_are_least(seed: int) -> None:
    depth, bi = 7, random_bi(7, seed)
    for length, cut in zip((1, 2, 5), least_block(bi, (1, 2, 5)), strict=True):
        assert cut == tuple(range(cut[0], cut[0] + length))
        assert bi[cut[0], cut[0] + length] == min(bi[start, start + length] for start in range(depth - length + 1))
    one_by_one = least_layers(bi, range(1, depth))
    assert [len(cut) for cut in one_by_one] == list(range(1, depth))
    for cut in one_by_one:
        kept = set(range(depth)) - set(cut)
        assert list(cut) == sorted(cut)
        assert max(bi[layer, layer + 1] for layer in cut) <= min(bi[layer, layer + 1] for layer in kept)


def test_an_architecture_without_layers_that_are_no_block_is_one_of_a_search() -> None:
    tested = space()
    (made,) = tested.largest_without([(1, 4)])
    assert made.layers == (0, 2, 3, 5) and tested.measures(made).params == tested.measures(
        tested.largest_without([(1, 2)])[0]
    ).params  # fmt: skip
    assert tested.coordinates(made)["drop_block_length"] == 2 and "drop_block_start" not in tested.coordinates(made)
    of = counts(tested, made)
    assert of["drop_block_start"] is None and of["drop_block_length"] is None and of["num_hidden_layers"] == 4
    tested.anchors = (made,)
    assert propose(tested, [], sampler="tpe", seed=0) == made and "drop_block_start" not in tested.coordinates(made)


# LaCo


@tiny.over(range(20))
def test_a_collapse_loses_as_many_layers_as_asked_whatever_is_similar(seed: int) -> None:
    draw = np.random.default_rng(seed)
    depth = int(draw.integers(2, 14))
    length = int(draw.integers(1, depth))
    found = laco._collapse(depth, length, lambda layers: float(draw.uniform(-1, 1)))
    assert len(found) == depth - length and 0 in found and list(found) == sorted(found)
    for base, layer in found.items():
        assert sum(layer.values()) == 1, "theta_l and differences, of which each adds up to nothing"
        assert base == min(layer), "layers are merged into one before them"
    held = [layer for of in found.values() for layer in of]
    assert sorted(held) == list(range(depth)), "every layer is in one that is kept"


def test_the_paper_s_order_is_followed() -> None:
    """All merges are good enough: from the last four layers on, each `INTERVAL` before the last."""
    found = laco._collapse(12, C - 1, lambda layers: 1.0)
    assert found == {**{layer: {layer: 1} for layer in range(8)}, 8: {8: -2, 9: 1, 10: 1, 11: 1}}
    found = laco._collapse(12, 2 * (C - 1), lambda layers: 1.0)
    # the second merge begins two layers before the first, of nine layers left: at 5, and takes 6, 7 and what became 8
    assert list(found) == [0, 1, 2, 3, 4, 5] and found[5] == {5: -2, 6: 1, 7: 1, 8: -2, 9: 1, 10: 1, 11: 1}


def test_what_is_not_similar_enough_is_not_merged_until_the_threshold_has_fallen() -> None:
    seen = []

    def similarity(layers: list[dict[int, int]]) -> float:
        merged = next(number for number, layer in enumerate(layers) if len(layer) > 1)
        seen.append(merged)
        return 0.5 if merged == 3 else 0.1

    found = laco._collapse(8, 2, similarity)
    assert list(found) == [0, 1, 2, 3, 6, 7] and found[3] == {3: -1, 4: 1, 5: 1}
    passes = seen.count(4)
    assert passes == 4 and seen[:4] == [4, 3, 2, 1]  # at 0.65, 0.60, 0.55, and above 0.5 again; then below


@tiny.over(["llama", "gpt2", "phi", "gemma2"])
def test_a_merge_is_its_equation(model_type: str, tmp_path: Path) -> None:
    config = tiny.config(model_type, num_hidden_layers=4)
    teacher = tiny.model(config)
    teacher.save_pretrained(tmp_path)
    architecture = replace(whole(config), layers=(0, 1))
    merged = {0: {0: 1}, 1: {1: -1, 2: 1, 3: 1}}
    with torch.no_grad():
        student = merged_model(reader(tmp_path), AutoConfig.from_pretrained(tmp_path), architecture, merged)
    theta = [dict(layer.named_parameters()) for layer in decoder_layers(teacher)]
    changed = 0
    for name, found in decoder_layers(student)[1].named_parameters():
        expected = theta[1][name]
        if "norm" not in name and "ln_" not in name:
            expected = theta[1][name] + (theta[2][name] - theta[1][name]) + (theta[3][name] - theta[1][name])
            changed += 1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert changed >= 4
    for name, found in decoder_layers(student)[0].named_parameters():
        assert torch.equal(found, theta[0][name])


def test_layers_that_are_alike_merge_into_themselves(tmp_path: Path) -> None:
    """Then no merge changes what it is a merge of, and a student is what trimming gives."""
    config = tiny.config(num_hidden_layers=6)
    teacher = tiny.model(config)
    first = decoder_layers(teacher)[0].state_dict()
    for layer in decoder_layers(teacher):
        layer.load_state_dict(first)
    teacher.save_pretrained(tmp_path)
    windows = tiny.tokens(config, rows=9, length=20).numpy()
    (stack,) = collapsed(tmp_path, windows, [3])
    architecture = replace(whole(config), layers=tuple(stack))
    merged = merged_model(reader(tmp_path), AutoConfig.from_pretrained(tmp_path), architecture, stack)
    ids = tiny.tokens(config)
    torch.testing.assert_close(tiny.logits(merged, ids), tiny.logits(trim(tmp_path, architecture), ids))


def test_a_trial_begins_as_its_run_s_merges_say_and_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    made = materials(tmp_path, num_hidden_layers=5)
    config = AutoConfig.from_pretrained(made.teacher_folder)
    windows = tiny.tokens(config, rows=3).numpy()
    made = replace(made, merges=collapsed(made.teacher_folder, windows, [2, 3]))
    cuts = merged_away(made.merges, 5)
    assert [len(cut) for cut in cuts] == [2, 3] and all(0 not in cut for cut in cuts)
    ids = tiny.tokens(config)
    for cut in cuts:
        architecture = replace(whole(config), layers=tuple(layer for layer in range(5) if layer not in cut))
        student = initial_student(made, trial(architecture, UNTRAINED, "merged"))
        expected = merged_model(
            reader(made.teacher_folder), config, architecture, merges_of(made.merges, architecture.layers)
        )
        assert torch.equal(tiny.logits(student, ids), tiny.logits(expected, ids))
        plain = initial_student(made, trial(architecture, UNTRAINED))
        assert not torch.allclose(tiny.logits(student, ids), tiny.logits(plain, ids))
    other = replace(whole(config), layers=(1, 4))
    students = [initial_student(made, trial(other, UNTRAINED, name)) for name in ("merged", "pruned")]
    assert torch.equal(*(tiny.logits(student, ids) for student in students))


def test_merges_are_found_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    one, other = (RunDirectory(tmp_path / name) for name in ("one", "other"))
    assert read_merges(one) == []
    stacks = [{0: {0: 1}, 1: {1: -1, 2: 1, 3: 1}}, {0: {0: -2, 1: 1, 2: 1, 3: 1}}]
    write_merges(one, ["a teacher", [2, 3]], lambda: stacks)
    write_merges(other, ["a teacher", [2, 3]], lambda: [])
    assert read_merges(one) == read_merges(other) == stacks and merged_away(stacks, 4) == [(2, 3), (1, 2, 3)]
    write_merges(other, ["another", [2, 3]], lambda: stacks[:1])
    assert read_merges(other) == stacks[:1]


@tiny.over(
    [
        (
            {"drop_block": {"lengths": [2]}},
            "with space.axes.drop_block.seeds none; valid: space.axes.drop_block.seeds l",
        ),
        ({"drop_block": {"lengths": [2], "seeds": "laco"}, "hidden_size": {"choices": [9]}}, "valid: drop_block alone"),
    ]
)
def test_merging_goes_with_laco_s_layers_and_whole_widths(axes: dict[str, Any], said: str) -> None:
    given = {"space": {"axes": axes}, "distillation": {"initialization": "merged"}}
    with pytest.raises(ValueError, match="distillation.initialization: merged") as refused:
        parse_config(given)
    assert said in str(refused.value)
