"""Every criterion of `importance.method` is its definition, over random small shapes of every family."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_search.config.inputs import ImportanceConfig
from minitron_search.config.loading import parse_config
from minitron_search.importance.importance import Importance, combined, importance_sums, measure
from minitron_search.importance.taylor import gradient_sums
from minitron_search.importance.weights import input_axes, magnitude, of_elements, slice_sums, wanda
from minitron_search.models.families import sizes, weights, whole
from minitron_search.planning.prepare import check
from minitron_search.pruning.trimming import permute_teacher, trim
from tests import tiny

METHODS = ("activation", "random", "magnitude", "taylor", "wanda", "pca")
SEEDS = range(6)


def case(seed: int, **given: object) -> tuple[PreTrainedModel, np.ndarray]:
    config = tiny.random_config(seed, **given)
    return tiny.model(config, seed), tiny.tokens(config, rows=5, length=10, seed=seed).numpy()


def by(method: str, **given: object) -> ImportanceConfig:
    return ImportanceConfig(method=method, **given)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5 * float(expected.abs().max()))


def owned(model: PreTrainedModel, values: dict[str, Tensor], layer: int, neuron: int) -> list[Tensor]:
    """What a Llama's neuron owns of `values`, which are named and shaped as its weights."""
    mlp = f"model.layers.{layer}.mlp"
    found = [values[f"{mlp}.gate_proj.weight"][neuron], values[f"{mlp}.up_proj.weight"][neuron]]
    found += [
        values[f"{mlp}.{name}.bias"][neuron, None]
        for name in ("gate_proj", "up_proj")
        if model.config.to_dict().get("mlp_bias")
    ]
    return [*found, values[f"{mlp}.down_proj.weight"][:, neuron]]


def head_owned(model: PreTrainedModel, values: dict[str, Tensor], layer: int, head: int) -> list[tuple[Tensor, int]]:
    """What a Llama's head owns, with how many heads share it."""
    dims, attention = sizes(model.config), f"model.layers.{layer}.self_attn"
    ratio, head_dim = dims["query"] // dims["key_value"], dims["head_dim"]
    rows = slice(head * head_dim, (head + 1) * head_dim)
    shared = slice(head // ratio * head_dim, (head // ratio + 1) * head_dim)
    found = [(values[f"{attention}.q_proj.weight"][rows], 1), (values[f"{attention}.o_proj.weight"][:, rows], 1)]
    found += [(values[f"{attention}.{name}.weight"][shared], ratio) for name in ("k_proj", "v_proj")]
    if model.config.to_dict().get("attention_bias"):
        found += [(values[f"{attention}.q_proj.bias"][rows], 1)]
        found += [(values[f"{attention}.{name}.bias"][shared], ratio) for name in ("k_proj", "v_proj")]
    return found


# Magnitude


@tiny.over(SEEDS)
def test_magnitude_is_the_l2_norm_of_what_an_element_owns(seed: int) -> None:
    model, windows = case(seed)
    found = measure(model, windows, by("magnitude"))
    squares = {name: weight.detach().square() for name, weight in model.named_parameters()}
    shape = whole(model.config)
    for layer in shape.layers:
        neurons = [sum(part.sum() for part in owned(model, squares, layer, n)) for n in range(shape.intermediate_size)]
        close(found.mlp[layer], torch.stack(neurons).sqrt())
        heads = [
            sum(part.sum() / shared for part, shared in head_owned(model, squares, layer, head))
            for head in range(shape.num_attention_heads)
        ]
        close(found.heads[layer], torch.stack(heads).sqrt())
    channels = torch.zeros(shape.hidden_size)
    for weight in weights(model.config):  # tied ones are listed once
        if "hidden" in weight.dims:
            channels += (
                squares[weight.name].movedim(weight.dims.index("hidden"), 0).reshape(shape.hidden_size, -1).sum(1)
            )
    close(found.hidden, channels.sqrt())


@tiny.over(SEEDS)
def test_what_owns_only_zeros_has_magnitude_zero_and_is_ranked_last(seed: int) -> None:
    model, windows = case(seed, num_key_value_heads=2, num_attention_heads=6, hidden_size=24)
    draw = np.random.default_rng(seed)
    shape = whole(model.config)
    neuron, head, channel = draw.integers(shape.intermediate_size), draw.integers(6), draw.integers(24)
    with torch.no_grad():
        for weight in weights(model.config):
            tensor = model.get_parameter(weight.name)
            for axis, dim in enumerate(weight.dims):
                if dim == "mlp":
                    tensor.select(axis, neuron).zero_()
                if dim == "hidden":
                    tensor.select(axis, channel).zero_()
                if dim == "query":
                    tensor.unflatten(axis, (6, -1)).select(axis, head).zero_()
    for method in ("magnitude", "wanda", "taylor"):
        found = measure(model, windows, by(method))
        rankings = found.rankings(2)
        assert (found.mlp[:, neuron] == 0).all() and (rankings.mlp[:, -1] == neuron).all()
        assert found.hidden[channel] == 0 and rankings.hidden[-1] == channel
        assert (rankings.heads[:, head // 3, -1] == head % 3).all()


# Taylor


@tiny.over(SEEDS)
def test_taylor_is_weight_times_gradient_of_the_lm_loss(seed: int) -> None:
    model, windows = case(seed)
    found = measure(model, windows, by("taylor"))
    assert all(parameter.grad is None for parameter in model.parameters())
    ids = torch.from_numpy(windows)
    model(ids, labels=ids, use_cache=False).loss.backward()
    products = {name: (weight * weight.grad).detach() for name, weight in model.named_parameters()}
    shape = whole(model.config)
    for layer in shape.layers:
        for neuron in range(shape.intermediate_size):
            expected = sum(part.sum().abs() for part in owned(model, products, layer, neuron))
            assert float(found.mlp[layer, neuron]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
        for head in range(shape.num_attention_heads):
            parts = head_owned(model, products, layer, head)
            expected = sum(part.sum().abs() / shared for part, shared in parts)
            assert float(found.heads[layer, head]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    channels = torch.zeros(shape.hidden_size)
    for weight in weights(model.config):
        if "hidden" in weight.dims:
            of_weight = products[weight.name].movedim(weight.dims.index("hidden"), 0)
            channels += of_weight.reshape(shape.hidden_size, -1).sum(1).abs()
    torch.testing.assert_close(found.hidden, channels, rtol=1e-3, atol=1e-5)


def test_taylor_holds_one_gradient_at_a_time() -> None:
    """By the time a weight's gradient is there, those before it in the backward pass are gone."""
    model, windows = case(0)
    held = []
    handles = [
        parameter.register_hook(lambda grad: held.append(sum(p.grad is not None for p in model.parameters())))
        for parameter in model.parameters()
    ]
    gradient_sums(model, windows, "float32")
    for handle in handles:
        handle.remove()
    assert held and max(held) == 0
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_taylor_is_the_slope_of_the_loss_as_a_neuron_shrinks() -> None:
    model, windows = case(1)
    ids, step = torch.from_numpy(windows), 1e-2
    sums = gradient_sums(model, windows, "float32")
    down = "model.layers.0.mlp.down_proj.weight"

    def loss(neuron: int, factor: float) -> float:
        column = model.get_parameter(down)[:, neuron]
        original = column.clone()
        column.mul_(factor)
        logits = tiny.logits(model, ids).double()
        column.copy_(original)
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    with torch.no_grad():
        for neuron in range(4):
            slope = (loss(neuron, 1 + step) - loss(neuron, 1 - step)) / (2 * step)
            assert float(sums[down, 1, 0][neuron]) / len(windows) == pytest.approx(slope, rel=2e-2, abs=1e-4)


# Wanda


@tiny.over(SEEDS)
def test_wanda_where_every_activation_has_norm_one_is_the_l1_norm_of_the_products_weights(seed: int) -> None:
    model, _ = case(seed)
    config = model.config
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    inputs = input_axes(config)
    ones = {name: torch.ones(parameters[name].shape[axis]) for name, axis in inputs.items()}
    sums = {}
    for weight in weights(config):
        if weight.matmul:
            sums |= slice_sums(weight, parameters[weight.name].abs(), sizes(config))
    actual, expected = wanda(config, parameters.__getitem__, ones), of_elements(config, sums)
    for name in ("hidden", "mlp", "heads"):
        close(getattr(actual, name), getattr(expected, name))


@tiny.over(SEEDS)
def test_wanda_multiplies_each_weight_by_the_norm_of_its_input(seed: int) -> None:
    model, windows = case(seed)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, x, name=name: seen.__setitem__(name, x[0].flatten(0, -2)))
    tiny.logits(model, torch.from_numpy(windows))  # the head too, which the pass below does not call
    values = {
        f"{name}.weight": model.get_submodule(name).weight.detach().abs() * x.norm(dim=0) for name, x in seen.items()
    }
    found = measure(model, windows, by("wanda"), rows_at_once=2)
    for layer in range(model.config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        rows = sum(values[f"{mlp}.{name}.weight"].sum(1) for name in ("gate_proj", "up_proj"))
        close(found.mlp[layer], rows + values[f"{mlp}.down_proj.weight"].sum(0))
    writers = ("o_proj.weight", "down_proj.weight")
    close(found.hidden, sum(v.sum(1 if name.endswith(writers) else 0) for name, v in values.items()))


# Random


def test_random_repeats_with_its_seed_and_differs_with_another() -> None:
    model, windows = case(0)
    first, again, other = (measure(model, windows, by("random"), seed=seed) for seed in (3, 3, 4))
    for name in ("hidden", "mlp", "heads"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    activation = measure(model, windows)
    assert torch.equal(first.block_bi, activation.block_bi)


# All


@tiny.over(itertools.product(METHODS, range(2)))
def test_parts_added_up_are_one_pass(method: str, seed: int) -> None:
    model, windows = case(seed)
    asked = by(method)
    whole_pass = measure(model, windows, asked)
    parts = [
        importance_sums(model, windows[first : first + 2], asked, "float32", 1) for first in range(0, len(windows), 2)
    ]
    added = combined(parts, asked, 0, lambda: model)
    for name, tensor in whole_pass.tensors().items():
        if name != "rotation":  # columns of near-equal variance may turn in their plane
            close(getattr(added, name), tensor)


@tiny.over(METHODS)
def test_measuring_leaves_the_teacher_as_it_was(method: str) -> None:
    model, windows = case(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, windows, by(method))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@tiny.over(METHODS)
def test_saved_importance_loads_as_it_was(method: str, tmp_path: Path) -> None:
    model, windows = case(2)
    measured = measure(model, windows, by(method))
    measured.save(tmp_path / "importance.safetensors", samples=5, config=by(method))
    loaded = Importance.load(tmp_path / "importance.safetensors")
    assert loaded.tensors().keys() == measured.tensors().keys()
    assert all(torch.equal(tensor, measured.tensors()[name]) for name, tensor in loaded.tensors().items())
    assert ("rotation" in loaded.tensors()) == (method == "pca") and loaded.order is None


@tiny.over((method, seed) for seed, method in enumerate(METHODS) if method != "pca")
def test_every_method_ranks_and_trims(method: str, seed: int, tmp_path: Path) -> None:
    model, windows = case(seed)
    model.save_pretrained(tmp_path / "teacher")
    shape, tokens = whole(model.config), tiny.tokens(model.config)
    rankings = measure(model, windows, by(method)).rankings(shape.num_key_value_heads)
    permuted = permute_teacher(tmp_path / "teacher", rankings, tmp_path / "permuted")
    again = AutoModelForCausalLM.from_pretrained(permuted).eval()
    torch.testing.assert_close(tiny.logits(again, tokens), tiny.logits(model, tokens), rtol=1e-3, atol=1e-3)
    architecture = tiny.random_architecture(model.config, seed)
    direct, sliced = trim(tmp_path / "teacher", architecture, rankings), trim(permuted, architecture)
    torch.testing.assert_close(tiny.logits(direct, tokens), tiny.logits(sliced, tokens), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_nothing_an_element_owns_is_counted_twice_or_forgotten(seed: int) -> None:
    """Over all shapes: the squares of an axis' elements sum to those of every weight that has the axis."""
    config = tiny.random_config(seed)
    parameters = {name: weight.detach() for name, weight in tiny.model(config, seed).named_parameters()}
    found = magnitude(config, parameters.__getitem__)
    for score, dims in ((found.hidden, ("hidden",)), (found.mlp, ("mlp",)), (found.heads, ("query", "key_value"))):
        expected = sum(
            parameters[weight.name].square().sum() for weight in weights(config) for dim in weight.dims if dim in dims
        )
        assert float(score.square().sum()) == pytest.approx(float(expected), rel=1e-4)


def test_keys_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="importance.method: 'wandb' is not valid; valid: activation, .*wanda"):
        check(parse_config({"importance": {"method": "wandb"}}), resume=False)
    with pytest.raises(ValueError, match="depth.weights: streamed with metric taylor.*valid: resident"):
        parse_config({"depth": {"metrics": ["taylor"], "weights": "streamed"}})
    with pytest.raises(ValueError, match="importance.rounds: 3 with method pca.*valid: 1"):
        check(parse_config({"importance": {"method": "pca", "rounds": 3}}), resume=False)
