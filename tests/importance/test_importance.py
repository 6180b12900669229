"""Importance equals its definition, written out, and does not depend on how the samples are batched."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minitron_search.config.inputs import ImportanceConfig
from minitron_search.importance.importance import Importance, measure
from tests import tiny

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext2_valid.txt"
BATCH, SEQUENCE = ("l1", "l2", "mean", "variance"), ("mean", "l2", "variance")
SEEDS = range(4)


class Activations(NamedTuple):
    """Of one window: stream (layers + 1, length, hidden), norms (2 layers, length, hidden), neurons (layers, length,
    intermediate), heads (layers, length, heads, head_dim)."""

    stream: Tensor
    norms: Tensor
    neurons: Tensor
    heads: Tensor
    logits: Tensor


def by_hand(model: PreTrainedModel, window: Tensor) -> Activations:
    """A Llama forward pass of one window, written out: no hooks, no attention kernel."""
    config, body = model.config, model.model
    groups, length = config.num_attention_heads // config.num_key_value_heads, len(window)
    x = body.embed_tokens(window)
    cos, sin = body.rotary_emb(x[None], torch.arange(length)[None])
    future = torch.full((length, length), float("-inf")).triu(1)
    stream, attention_norms, mlp_norms, neurons, heads = [x], [], [], [], []
    for layer in body.layers:
        normed = layer.input_layernorm(x)
        attention_norms.append(normed)
        q, k, v = (
            projection(normed).view(length, -1, config.head_dim).transpose(0, 1)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        q, k = (part[0] for part in apply_rotary_pos_emb(q[None], k[None], cos, sin))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        weights = (q @ k.transpose(1, 2) / config.head_dim**0.5 + future).softmax(-1)
        head = (weights @ v).transpose(0, 1)
        heads.append(head)
        x = x + layer.self_attn.o_proj(head.flatten(1))
        normed = layer.post_attention_layernorm(x)
        mlp_norms.append(normed)
        neuron = torch.nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
        neurons.append(neuron)
        x = x + layer.mlp.down_proj(neuron)
        stream.append(x)
    logits = model.lm_head(body.norm(x))
    return Activations(
        torch.stack(stream), torch.stack(attention_norms + mlp_norms), torch.stack(neurons), torch.stack(heads), logits
    )


def aggregated(samples: np.ndarray, batch: str, sequence: str) -> np.ndarray:
    """(samples, ..., length, elements) -> (..., elements), by the papers' definitions."""
    x = samples.astype(np.float64)
    over_positions = {"mean": np.abs(x).mean(-2), "l2": np.sqrt((x**2).sum(-2)), "variance": x.var(-2)}[sequence]
    return {
        "l1": np.abs(over_positions).sum(0),
        "l2": np.sqrt((over_positions**2).sum(0)),
        "mean": over_positions.mean(0),
        "variance": over_positions.var(0),
    }[batch]


def case(seed: int) -> tuple[PreTrainedModel, np.ndarray, list[Activations]]:
    config = tiny.random_config(seed, sliding_window=None, mlp_bias=False, attention_bias=bool(seed % 2))
    model = tiny.model(config, seed)
    windows = tiny.tokens(config, rows=7, length=10).numpy().astype(np.int32)
    with torch.no_grad():
        found = [by_hand(model, torch.from_numpy(window).long()) for window in windows]
    return model, windows, found


def stacked(found: list[Activations], field: str) -> np.ndarray:
    return np.stack([getattr(activations, field).numpy() for activations in found])


def close(actual: Tensor, expected: np.ndarray) -> bool:
    return np.allclose(actual.numpy(), expected, rtol=2e-4, atol=2e-5 * float(np.abs(expected).max()))


@tiny.over(SEEDS)
def test_the_pass_by_hand_is_the_models(seed: int) -> None:
    model, windows, found = case(seed)
    expected = tiny.logits(model, torch.from_numpy(windows).long())
    torch.testing.assert_close(torch.stack([a.logits for a in found]), expected, rtol=1e-4, atol=1e-4)


@tiny.over((batch, sequence, seed) for batch, sequence in itertools.product(BATCH, SEQUENCE) for seed in (0, 3))
def test_every_aggregation_is_its_definition(batch: str, sequence: str, seed: int) -> None:
    model, windows, found = case(seed)
    measured = measure(model, windows, ImportanceConfig(batch=batch, sequence=sequence))
    per_norm = aggregated(stacked(found, "norms"), batch, sequence)
    assert close(measured.hidden_per_norm, per_norm)
    assert close(measured.hidden, per_norm.sum(0))
    assert close(measured.mlp, aggregated(stacked(found, "neurons"), batch, sequence))
    head_norms = np.linalg.norm(stacked(found, "heads"), axis=-1)  # a head's activation is a vector
    assert close(measured.heads, aggregated(head_norms, batch, sequence))
    layers = model.config.num_hidden_layers
    assert measured.hidden_per_norm.shape == (2 * layers, model.config.hidden_size)
    assert measured.mlp.shape == (layers, model.config.intermediate_size)
    assert measured.heads.shape == (layers, model.config.num_attention_heads)


@tiny.over(SEEDS)
def test_block_importance_is_one_minus_the_cosine_of_a_blocks_input_and_output(seed: int) -> None:
    model, windows, found = case(seed)
    stream = stacked(found, "stream").astype(np.float64)  # (samples, layers + 1, length, hidden)
    layers = model.config.num_hidden_layers
    block_bi = measure(model, windows).block_bi
    for start in range(layers + 1):
        for end in range(layers + 1):
            x, y = stream[:, start], stream[:, end]
            cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            assert float(block_bi[start, end]) == pytest.approx(1 - cosines.mean(), abs=1e-5)


def test_a_block_of_no_layer_has_none_and_a_layers_is_beside_the_diagonal() -> None:
    model, windows, _ = case(0)
    measured = measure(model, windows)
    assert measured.block_bi.diagonal().abs().max() < 1e-6
    assert torch.equal(measured.block_bi, measured.block_bi.T)
    layers = model.config.num_hidden_layers
    assert measured.layer_bi().tolist() == [float(measured.block_bi[i, i + 1]) for i in range(layers)]


def test_the_last_layer_is_measured_before_the_final_norm() -> None:
    model, windows, found = case(1)
    last = model.config.num_hidden_layers
    with torch.no_grad():
        states = model(torch.from_numpy(windows).long(), output_hidden_states=True).hidden_states
    trap = 1 - torch.cosine_similarity(states[-2], states[-1], dim=-1).mean()  # its last entry is after the norm
    x, y = (torch.from_numpy(stacked(found, "stream")[:, at]) for at in (last - 1, last))
    right = 1 - torch.cosine_similarity(x, y, dim=-1).mean()
    measured = float(measure(model, windows).layer_bi()[-1])
    assert measured == pytest.approx(float(right), abs=1e-5)
    assert abs(measured - float(trap)) > 1e-3


@tiny.over(BATCH)
def test_batching_changes_nothing(batch: str) -> None:
    model, windows, _ = case(2)
    whole = measure(model, windows, ImportanceConfig(batch=batch), rows_at_once=7)
    for rows_at_once in (1, 3, 100):
        other = measure(model, windows, ImportanceConfig(batch=batch), rows_at_once=rows_at_once)
        for name in whole.tensors():
            left, right = getattr(other, name), getattr(whole, name)
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_measuring_leaves_the_teacher_as_it_was() -> None:
    model, windows, _ = case(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, windows)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.model.layers[1].mlp.forward = None  # a pass that fails takes its hooks away too
    with pytest.raises(TypeError):
        measure(model, windows)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_importance_ranks_what_is_larger_first() -> None:
    config = tiny.config()
    model = tiny.model(config)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[13] *= 100
        model.model.layers[2].self_attn.v_proj.weight[6:12] *= 100  # the second group
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = 100
    measured = measure(model, tiny.tokens(config, rows=4).numpy())
    rankings = measured.rankings(config.num_key_value_heads)
    assert rankings.mlp[1, 0] == 13 and rankings.groups[2, 0] == 1 and rankings.hidden[0] == 5


def test_half_precision_sums_stay_near_and_in_float32() -> None:
    model, windows, _ = case(3)
    full, half = measure(model, windows), measure(model, windows, precision="bfloat16")
    for name in full.tensors():
        assert getattr(half, name).dtype == torch.float32
    torch.testing.assert_close(half.mlp, full.mlp, rtol=0.1, atol=0.05 * float(full.mlp.max()))


def test_saved_importance_loads_as_it_was(tmp_path: Path) -> None:
    model, windows, _ = case(0)
    measured = measure(model, windows)
    path = tmp_path / "new" / "importance.safetensors"
    measured.save(path, samples=7, config=ImportanceConfig())
    loaded = Importance.load(path)
    for name in measured.tensors():
        assert torch.equal(getattr(loaded, name), getattr(measured, name))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_smollm2s_last_layer_is_no_outlier() -> None:
    """After the final norm its BI would read 1.0, the most important of all layers by far."""
    if not WIKITEXT.exists():
        pytest.skip("the text is not here")
    from minitron_search.teachers.sources import load_tokenizer, teacher_folder

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder("smollm2-135m"), dtype=torch.float32).eval()
    ids = load_tokenizer("smollm2-135m")(WIKITEXT.read_text()[:20_000])["input_ids"]
    windows = np.array(ids[: 4 * 256], np.int32).reshape(4, 256)
    measured = measure(teacher, windows)
    assert float(measured.layer_bi()[-1]) == pytest.approx(0.25, abs=0.03)
    assert (measured.layer_bi()[:-1] < 1).all()
    with torch.no_grad():
        states = teacher(torch.from_numpy(windows).long(), output_hidden_states=True).hidden_states
    trap = 1 - torch.cosine_similarity(states[-2], states[-1], dim=-1).mean()
    assert float(trap) > 0.9
