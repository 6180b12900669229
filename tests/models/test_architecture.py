"""Counts are those of the model that would be built; shapes have one id and no illegal ones exist."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from minitron_search.models.architecture import Architecture, forward_flops, memory_bytes, parameter_count
from minitron_search.models.families import sizes, sizes_of, student_config, weights
from minitron_search.records.cache import content_id
from tests import tiny

SHAPE = Architecture(24, 20, 4, 2, (0, 1, 4))


def drawn(seed: int, **given: object):  # type: ignore[no-untyped-def]
    """(teacher's weights, sizes, configuration) of a random architecture in a random teacher."""
    config = tiny.random_config(seed, **given)
    architecture = tiny.random_architecture(config, seed)
    return weights(config), sizes_of(config, architecture), student_config(config, architecture)


@tiny.over(tiny.family_seeds(5))
def test_parameters_are_those_of_the_materialised_model_tied_ones_once(model_type: str, seed: int) -> None:
    listed, sizes, config = drawn(seed, model_type=model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert parameter_count(listed, sizes) == sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    embeddings = {model.get_input_embeddings().weight, head.weight, head.bias}
    outside = sum(parameter.numel() for parameter in model.parameters() if parameter not in embeddings)
    assert parameter_count(listed, sizes, embeddings=False) == outside


@tiny.over(tiny.family_seeds(3))
def test_memory_is_that_of_weights_and_a_real_key_value_cache(model_type: str, seed: int) -> None:
    listed, sizes, config = drawn(seed, model_type=model_type, **tiny.wide_window(model_type))
    model = tiny.model(config)
    rows, length = 3, 7
    cache = DynamicCache()
    with torch.no_grad():
        model(tiny.tokens(config, rows, length), past_key_values=cache, use_cache=True)
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    expected = sum(parameter.numel() for parameter in model.parameters()) + cached
    assert memory_bytes(listed, sizes, rows, length) == 2 * expected
    assert memory_bytes(listed, sizes, rows, length, element_bytes=4) == 4 * expected


@tiny.over(tiny.family_seeds(3))
def test_flops_are_those_counted_in_a_forward_pass_with_half_of_attention(model_type: str, seed: int) -> None:
    listed, sizes, config = drawn(seed, model_type=model_type)
    model = tiny.model(config)
    model.set_attn_implementation("eager")
    length = 16
    with FlopCounterMode(display=False) as counter:
        tiny.logits(model, tiny.tokens(config, rows=1, length=length))
    # eager attention multiplies every query with every key, causal or not
    masked_half = 2 * sizes["layers"] * sizes["query"] * length * length
    assert forward_flops(listed, sizes, length) * length == counter.get_total_flops() - masked_half


@tiny.over(
    [
        ("llama", 8_030_261_248, (128_256, 4096, 14_336, 32, 32, 8, 128, False)),  # Llama-3.1-8B
        ("mistral", 7_241_732_096, (32_000, 4096, 14_336, 32, 32, 8, 128, False)),  # Mistral-7B-v0.1
        ("qwen2", 494_032_768, (151_936, 896, 4864, 24, 14, 2, 64, True)),  # Qwen2.5-0.5B
        ("qwen3", 596_049_920, (151_936, 1024, 3072, 28, 16, 8, 128, True)),  # Qwen3-0.6B
        ("smollm3", 3_075_098_624, (128_256, 2048, 11_008, 36, 16, 4, 128, True)),  # SmolLM3-3B
        ("granite", 2_533_531_648, (49_155, 2048, 8192, 40, 32, 8, 64, True)),  # granite-3.1-2b-base
        ("gemma2", 2_614_341_888, (256_000, 2304, 9216, 26, 8, 4, 256, True)),  # gemma-2-2b
        ("gemma3_text", 268_098_176, (262_144, 640, 2048, 18, 4, 1, 256, True)),  # gemma-3-270m
        ("phi3", 3_821_079_552, (32_064, 3072, 8192, 32, 32, 32, 96, False)),  # Phi-3-mini-4k
        ("olmo2", 1_484_916_736, (100_352, 2048, 8192, 16, 16, 16, 128, False)),  # OLMo-2-0425-1B
        ("gpt_neox", 70_426_624, (50_304, 512, 2048, 6, 8, 8, 64, False)),  # pythia-70m
        ("gpt2", 124_439_808, (50_257, 768, 3072, 12, 12, 12, 64, True)),  # gpt2
        ("opt", 125_239_296, (50_272, 768, 3072, 12, 12, 12, 64, True)),  # opt-125m
        ("gemma", 2_506_172_416, (256_000, 2048, 16_384, 18, 8, 1, 256, True)),  # gemma-2b
        ("phi", 2_779_683_840, (51_200, 2560, 10_240, 32, 32, 32, 80, False)),  # phi-2
        ("starcoder2", 3_030_371_328, (49_152, 3072, 12_288, 30, 24, 2, 128, True)),  # starcoder2-3b
        ("olmo", 1_176_764_416, (50_304, 2048, 8192, 16, 16, 16, 128, True)),  # OLMo-1B-hf
        ("olmo3", 7_298_011_136, (100_278, 4096, 11_008, 32, 32, 32, 128, False)),  # Olmo-3-1025-7B
        ("cohere", 34_980_831_232, (256_000, 8192, 22_528, 40, 64, 64, 128, True)),  # c4ai-command-r-v01
        ("ernie4_5", 360_748_032, (103_424, 1024, 3072, 18, 16, 2, 128, True)),  # ERNIE-4.5-0.3B
        ("stablelm", 1_644_515_328, (100_352, 2048, 5632, 24, 32, 32, 64, False)),  # stablelm-2-1_6b
    ]
)
def test_published_models_have_their_published_parameters(model_type: str, count: int, shape: tuple[int, ...]) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "tie_word_embeddings")  # fmt: skip
    positions = {"gpt2": 1024}.get(model_type, 2048)
    options = {"use_qkv_bias": True} if model_type == "stablelm" else {}
    config = tiny.config(
        model_type, **dict(zip(names, shape, strict=True)), max_position_embeddings=positions, **options
    )
    assert parameter_count(weights(config), sizes(config)) == count


def test_counts_of_many_architectures_at_once_are_those_of_each() -> None:
    config = tiny.config(num_hidden_layers=5, tie_word_embeddings=False)
    listed = weights(config)
    each = [sizes_of(config, tiny.random_architecture(config, seed)) for seed in range(10)]
    together = {name: torch.tensor([sizes[name] for sizes in each]).numpy() for name in each[0]}
    assert parameter_count(listed, together).tolist() == [parameter_count(listed, sizes) for sizes in each]
    assert memory_bytes(listed, together, 2, 9).tolist() == [memory_bytes(listed, sizes, 2, 9) for sizes in each]
    assert forward_flops(listed, together, 9).tolist() == [forward_flops(listed, sizes, 9) for sizes in each]


def test_large_counts_do_not_overflow() -> None:
    config = tiny.config(vocab_size=256_000, hidden_size=16_384, intermediate_size=65_536, num_hidden_layers=126)
    listed = weights(config)
    sizes = sizes_of(config, Architecture(16_384, 65_536, 4, 2, tuple(range(126))))
    assert parameter_count(listed, sizes) > 2**38
    assert isinstance(parameter_count(listed, sizes), int)


def test_equal_shapes_have_equal_ids_in_every_process_and_unequal_ones_do_not() -> None:
    again = Architecture.from_dict(json.loads(json.dumps(SHAPE.to_dict())))
    assert again == SHAPE and again.id == SHAPE.id and hash(again) == hash(SHAPE)
    code = (
        "from minitron_search.models.architecture import Architecture\n"
        "print(Architecture(24, 20, 4, 2, (0, 1, 4)).id, end='')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert out.stdout == SHAPE.id
    others = [
        dataclasses.replace(SHAPE, **{name: value})
        for name, value in [
            ("hidden_size", 25), ("intermediate_size", 21), ("num_attention_heads", 2), ("num_key_value_heads", 1),
            ("layers", (0, 1, 3)), ("layers", (0, 1)),
        ]
    ]  # fmt: skip
    assert len({SHAPE.id, *(other.id for other in others)}) == 7
    assert content_id({"a": 1, "b": 2}) == content_id({"b": 2, "a": 1})


def test_an_architecture_cannot_be_changed_or_be_illegal() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SHAPE.hidden_size = 1  # type: ignore[misc]
    for illegal in ({"hidden_size": 0}, {"num_attention_heads": 3}, {"layers": ()}, {"layers": (1, 0)},
                    {"layers": (0, 0)}):  # fmt: skip
        with pytest.raises(AssertionError):
            dataclasses.replace(SHAPE, **illegal)  # type: ignore[arg-type]


def test_the_dropped_block_is_where_layers_are_missing() -> None:
    for start in range(5):
        for length in range(1, 6 - start):
            layers = tuple(layer for layer in range(6) if not start <= layer < start + length)
            assert dataclasses.replace(SHAPE, layers=layers).dropped_block(6) == (start, length)
    assert dataclasses.replace(SHAPE, layers=tuple(range(6))).dropped_block(6) == (0, 0)
    for apart in ((0, 2, 4), (1, 2, 4, 5), (1, 3, 4)):
        assert dataclasses.replace(SHAPE, layers=apart).dropped_block(6) is None
