"""Rounds compose one order of the teacher's elements: nested, whole, and of one round the single-shot order."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from minitron_search.config.inputs import ImportanceConfig
from minitron_search.config.space import Axes
from minitron_search.importance.importance import Importance, measure
from minitron_search.importance.iterative import after_round, composed, iterative_importance, smallest_widths
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import is_expressible, whole
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import trim
from tests import tiny

ASKED = ImportanceConfig(method="magnitude")


class Measured:
    """Measures the model in a folder, and keeps the shapes that it was given."""

    def __init__(self, asked: ImportanceConfig = ASKED):
        self.asked, self.seen = asked, []  # type: ignore[var-annotated]

    def __call__(self, folder: Path) -> Importance:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.seen.append(whole(model.config))
        windows = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 10))
        return measure(model, windows, self.asked)


def teacher(folder: Path, seed: int, **given: object) -> tuple[Path, Architecture]:
    config = tiny.random_config(seed, **given)
    tiny.model(config, seed).save_pretrained(folder / "teacher")
    return folder / "teacher", whole(config)


def same(left: Rankings, right: Rankings) -> bool:
    return all(torch.equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(Rankings))


def is_whole(rankings: Rankings) -> bool:
    """Whether every axis is an order of all its elements."""
    return all(
        torch.equal(getattr(rankings, f.name).sort(-1).values, torch.arange(n).expand_as(getattr(rankings, f.name)))
        for f in fields(Rankings)
        for n in [getattr(rankings, f.name).shape[-1]]
    )


@tiny.over(range(4))
def test_one_round_is_the_single_shot_order(seed: int, tmp_path: Path) -> None:
    folder, shape = teacher(tmp_path, seed)
    measured = Measured()
    found = iterative_importance(measured, folder, shape, 1, tmp_path / "scratch")
    expected = Measured()(folder)
    assert found.order is None and len(measured.seen) == 1
    assert same(found.rankings(shape.num_key_value_heads), expected.rankings(shape.num_key_value_heads))


@tiny.over(["activation", "magnitude", "taylor", "wanda", "random"])
def test_rounds_order_everything_once_and_keep_what_went_first_behind(method: str, tmp_path: Path) -> None:
    folder, shape = teacher(
        tmp_path, 3, hidden_size=24, intermediate_size=20, num_attention_heads=6, num_key_value_heads=2,
        attention_bias=False, mlp_bias=False, sliding_window=None,
    )  # fmt: skip
    smallest = replace(shape, hidden_size=6, intermediate_size=5, num_attention_heads=2)
    asked = ImportanceConfig(method=method)
    measured = Measured(asked)
    found = iterative_importance(measured, folder, smallest, 3, tmp_path / "scratch")
    assert [s.hidden_size for s in measured.seen] == [24, 18, 12]
    assert [s.intermediate_size for s in measured.seen] == [20, 15, 10]
    assert [s.num_attention_heads for s in measured.seen] == [6, 6, 4]
    assert not (tmp_path / "scratch").exists()
    order, first = found.rankings(2), Measured(asked)(folder)
    assert found.order is not None and is_whole(order)
    assert torch.equal(found.hidden, first.hidden)  # the scores a report shows are the teacher's
    single = first.rankings(2)
    assert torch.equal(order.hidden[18:], single.hidden[18:]) and torch.equal(order.mlp[:, 15:], single.mlp[:, 15:])
    assert set(order.hidden[:18].tolist()) == set(single.hidden[:18].tolist())
    # the last round's order is that of the model it measured
    size = replace(shape, hidden_size=12, intermediate_size=10, num_attention_heads=4)
    left = trim(folder, size, order)
    left.save_pretrained(tmp_path / "left")
    again = Measured(asked)(tmp_path / "left").rankings(2)
    if method not in ("activation", "taylor", "random"):  # rounding, and random draws, may order equals otherwise
        assert same(again, Rankings.identity(left.config))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_a_composed_order_trims_to_the_trim_of_the_trim(seed: int) -> None:
    """Cutting to `size` and then by `inner` keeps what cutting by the composed order keeps, whatever the shapes."""
    import tempfile

    config = tiny.random_config(seed, attention_bias=False, mlp_bias=False, sliding_window=None)
    size = replace(tiny.random_architecture(config, seed), layers=whole(config).layers)
    order = Rankings.random(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        tiny.model(config, seed).save_pretrained(f"{folder}/teacher")
        middle = trim(Path(folder, "teacher"), size, order)
        middle.save_pretrained(f"{folder}/middle")
        inner = Rankings.random(middle.config, seed + 1)
        both = composed(order, inner, size)
        assert is_whole(both)
        last = replace(tiny.random_architecture(middle.config, seed + 2), layers=size.layers)
        twice, once = trim(Path(folder, "middle"), last, inner), trim(Path(folder, "teacher"), last, both)
    weights = dict(once.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in twice.named_parameters())


def test_what_is_composed_is_kept_in_the_file(tmp_path: Path) -> None:
    folder, shape = teacher(tmp_path, 0, attention_bias=False, mlp_bias=False)
    smallest = replace(shape, intermediate_size=2)
    found = iterative_importance(Measured(), folder, smallest, 2, tmp_path / "scratch")
    found.save(tmp_path / "importance.safetensors", 4, ASKED)
    loaded = Importance.load(tmp_path / "importance.safetensors")
    assert loaded.order is not None and found.order is not None and same(loaded.order, found.order)
    assert same(loaded.rankings(shape.num_key_value_heads), found.order)


@tiny.over(range(20))
def test_steps_are_equal_and_can_be_said(seed: int) -> None:
    config = tiny.random_config(seed, attention_bias=False, mlp_bias=False)
    shape = whole(config)
    smallest = replace(tiny.random_architecture(config, seed), layers=shape.layers)
    sizes = [after_round(config, smallest, done, 4) for done in range(5)]
    assert sizes[0] == shape and sizes[-1] == smallest
    assert all(is_expressible(config, size) for size in sizes)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        values = [getattr(size, name) for size in sizes]
        assert name == "num_attention_heads" or values == sorted(values, reverse=True)


def test_a_shape_that_the_configuration_cannot_say_is_an_error_that_names_the_key() -> None:
    config = tiny.config(hidden_size=20, num_attention_heads=4, num_key_value_heads=1, attention_bias=True)
    smallest = replace(whole(config), hidden_size=19, num_attention_heads=2)
    with pytest.raises(ValueError, match="importance.rounds: 2: no configuration.*valid: 1"):
        after_round(config, smallest, 1, 2)


def test_the_smallest_widths_are_those_of_the_axes_that_are_searched() -> None:
    shape = whole(tiny.config())
    axes = Axes.model_validate({
        "hidden_size": {"low": 12, "high": 24, "step": 6}, "num_attention_heads": {"choices": [4, 2]},
    })  # fmt: skip
    assert smallest_widths(axes, shape) == replace(shape, hidden_size=12, num_attention_heads=2)
    assert smallest_widths(Axes(), shape) == shape
