"""What a family declares is what its models have; what it does not is refused by name."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from minitron_search.models import families
from minitron_search.models.architecture import Architecture, dimension
from minitron_search.models.families import (
    decoder_layers,
    family_of,
    final_hidden,
    in_model,
    is_expressible,
    sizes,
    sizes_of,
    split_name,
    student_config,
    weights,
    whole,
    why_not_expressible,
)
from minitron_search.models.family_tables import LLAMA
from minitron_search.models.output_head import output_head
from tests import tiny

SEEDS = range(20)


@tiny.over(tiny.family_seeds(4))
def test_every_parameter_is_listed_once_with_its_dimensions(model_type: str, seed: int) -> None:
    config = tiny.random_config(seed, model_type=model_type)
    model, dims = tiny.model(config), sizes(config)
    listed = {weight.name: weight for weight in weights(config)}
    assert list(listed) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        weight = listed[name]
        assert parameter.shape == tuple(dimension(dims, dim) for dim in weight.dims)
        tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        assert weight.embedding == (name == "lm_head.bias" or any(parameter is table for table in tables))
        number = re.search(r"\.(\d+)\.", name)
        assert weight.layer == (int(number[1]) if number else None)
    lookups = {"embed_tokens", "embed_in", "wte", "wpe", "embed_positions"}
    for weight in listed.values():
        if weight.name.split(".")[-2] in lookups:  # a tied embedding is the head's product too
            assert weight.matmul == (weight.embedding and config.tie_word_embeddings)
        else:
            assert weight.matmul == (len(weight.dims) == 2)


@tiny.over(tiny.family_seeds(4))
def test_the_whole_teacher_has_its_own_sizes(model_type: str, seed: int) -> None:
    config = tiny.random_config(seed, model_type=model_type)
    assert sizes_of(config, whole(config)) == sizes(config)
    student = student_config(config, whole(config))
    assert student.to_dict() == config.to_dict()


def test_head_dim_and_key_value_heads_have_the_familys_defaults() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4)
    assert sizes(config)["head_dim"] == 8 and whole(config).num_key_value_heads == 4


@tiny.over(SEEDS)
def test_the_students_configuration_survives_a_round_trip_with_head_dim_written(seed: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed)
    architecture = tiny.random_architecture(config, seed)
    before = config.to_dict()
    student_config(config, architecture).save_pretrained(tmp_path)
    assert config.to_dict() == before  # the teacher's is not touched
    written = json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert written["head_dim"] == reloaded.head_dim == config.head_dim
    assert whole(reloaded) == dataclasses.replace(architecture, layers=tuple(range(len(architecture.layers))))
    for kept in ("vocab_size", "tie_word_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act"):
        assert getattr(reloaded, kept) == getattr(config, kept), kept


@tiny.over(["llama", "mistral"])
def test_a_head_dim_that_the_teacher_leaves_to_its_family_is_written_for_the_student(model_type: str) -> None:
    config = tiny.config(model_type, head_dim=None)  # 24 / 4
    config.head_dim = None
    for hidden_size, heads in ((24, 4), (16, 2), (20, 4)):
        assert student_config(config, Architecture(hidden_size, 20, heads, 2, (0,))).head_dim == 6


def test_lists_over_layers_are_sliced_with_them() -> None:
    config = tiny.config(num_hidden_layers=4)
    config.layer_types = ["full", "sliding", "full", "chunked"]
    assert student_config(config, Architecture(24, 20, 4, 2, (1, 3))).layer_types == ["sliding", "chunked"]
    assert config.layer_types == ["full", "sliding", "full", "chunked"]


@tiny.over([("llama", False), ("llama", True), ("mistral", False)])  # Mistral has no biases
def test_expressible_is_exactly_what_stock_classes_accept(model_type: str, biased: bool) -> None:
    bias = {"attention_bias": True} if biased else {}
    config = tiny.config(model_type, num_attention_heads=6, num_key_value_heads=2, **bias)
    for hidden_size in range(14, 24):
        for heads in (2, 4, 6):
            architecture = Architecture(hidden_size, 20, heads, 2, (0, 1))
            divides = hidden_size % heads == 0
            assert is_expressible(config, architecture) == (divides or model_type == "mistral" or not biased)
            if is_expressible(config, architecture):
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(student_config(config, architecture))
                assert model.config.model_type == (model_type if divides else "mistral")
                query = model.model.layers[0].self_attn.q_proj
                assert query.weight.shape == (heads * 6, hidden_size) and (query.bias is not None) == biased


@tiny.over(tiny.FAMILIES)
def test_what_a_family_can_say_is_what_its_classes_build(model_type: str, tmp_path: Path) -> None:
    config = tiny.random_config(1, model_type=model_type)
    shape, ratio = whole(config), whole(config).num_attention_heads // whole(config).num_key_value_heads
    sizes_tried = sorted(
        {shape.hidden_size, shape.hidden_size - 1, *range(2, shape.hidden_size, max(4, shape.hidden_size // 4))}
    )
    listed = {weight.name: weight for weight in weights(config) if weight.layer in (None, 0, 1)}
    said = 0
    for groups, each, hidden_size in itertools.product(
        range(1, shape.num_key_value_heads + 1), (1, ratio), sizes_tried
    ):
        architecture = Architecture(hidden_size, 3, groups * each, groups, (0, 1))
        if not is_expressible(config, architecture):
            with pytest.raises(ValueError, match=r"hidden_size: .*valid: |num_key_value_heads: .*valid: "):
                student_config(config, architecture)
            continue
        student_config(config, architecture).save_pretrained(tmp_path)
        reloaded = AutoConfig.from_pretrained(tmp_path)  # validated
        dims = sizes_of(config, architecture)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(reloaded)
        for name, parameter in built.named_parameters():
            assert tuple(parameter.shape) == tuple(dimension(dims, dim) for dim in listed[name].dims), name
        said += 1
    assert said


@tiny.over(["stablelm", "gpt_neox", "gpt2", "opt"])
def test_a_hidden_size_that_heads_do_not_make_up_is_refused(model_type: str) -> None:
    config = tiny.config(model_type)
    groups = whole(config).num_key_value_heads
    with pytest.raises(ValueError, match="hidden_size: 20 with num_attention_heads 4.*valid: hidden_size 24"):
        student_config(config, Architecture(20, 20, 4, groups, (0,)))


def test_long_rope_of_phi3_ties_hidden_size_to_heads() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3, "rope_theta": 100.0}
    config = tiny.config("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    assert not is_expressible(config, Architecture(16, 20, 4, 2, (0,)))
    with pytest.raises(Exception, match="short_factor field must have length"):
        tiny.config("phi3", hidden_size=16, rope_parameters=rope, original_max_position_embeddings=16).validate()
    assert is_expressible(config, Architecture(12, 20, 2, 2, (0,)))
    student_config(config, Architecture(12, 20, 2, 2, (0,))).validate()


def test_code_that_came_with_the_teacher_is_not_the_students() -> None:
    config = tiny.config("phi3", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    assert "auto_map" not in student_config(config, whole(config)).to_dict()


def test_weights_under_older_names_are_found() -> None:
    assert in_model("embed_out.weight") == "lm_head.weight"  # Pythia
    assert in_model("h.0.attn.c_attn.bias") == "transformer.h.0.attn.c_attn.bias"  # gpt2 on the Hub
    assert in_model("decoder.layers.1.fc1.weight") == "model.decoder.layers.1.fc1.weight"
    for name in ("model.decoder.layers.1.fc1.weight", "lm_head.weight", "transformer.h.0.ln_1.bias"):
        assert in_model(name) == name


def test_what_llama_refuses_is_why_mistral_is_needed() -> None:
    with pytest.raises(Exception, match="multiple of the number of attention heads"):
        tiny.config(hidden_size=20, num_attention_heads=6).validate()


@tiny.over(
    [
        ("mixtral", "mixture of experts"), ("qwen3_moe", "mixture of experts"), ("gpt_oss", "mixture of experts"),
        ("mamba", "state-space"), ("jamba", "hybrid"), ("qwen3_next", "hybrid"), ("zamba2", "hybrid"),
        ("deepseek_v3", "latent attention"), ("t5", "encoder-decoder"), ("bart", "encoder-decoder"),
        ("gemma3", "multimodal"), ("qwen2_5_vl", "multimodal"),
        ("bert", "not supported; supported: cohere, ernie4_5, exaone4, gemma, gemma2"),
    ]
)  # fmt: skip
def test_other_families_are_refused_by_name_with_the_reason(model_type: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"teacher\.model: family '{model_type}' is .*{said}"):
        family_of(CONFIG_MAPPING[model_type]())


@tiny.over(
    [
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"mamba_d_state": 16}, "hybrid"),
        ({"vision_config": {"hidden_size": 8}}, "multimodal"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ]
)
def test_a_family_of_another_name_is_refused_for_what_its_configuration_says(keys: dict, said: str) -> None:
    config = PretrainedConfig(**keys)
    config.model_type = "tomorrows"
    with pytest.raises(ValueError, match=rf"'tomorrows' is refused: .*{said}.*valid: "):
        family_of(config)


@tiny.over(
    [
        ("opt", {"do_layer_norm_before": False}, "OPT-350m"),
        ("opt", {"_remove_final_layer_norm": True}, "no final norm"),
        ("stablelm", {"qk_layernorm": True}, "module a head"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "the layer's index"),
        ("gpt2", {"add_cross_attention": True}, "encoder"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
    ]
)
def test_an_option_that_no_declaration_describes_is_refused(model_type: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=rf"this {model_type} has {next(iter(options))} .*{said}.*valid: "):
        family_of(tiny.config(model_type, **options))


def test_quantised_weights_are_refused() -> None:
    config = tiny.config(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"teacher\.model.*quantised.*valid"):
        family_of(config)


def test_a_weight_that_the_family_does_not_declare_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = {name: dims for name, dims in LLAMA.layer_weights.items() if name != "mlp.up_proj.weight"}
    monkeypatch.setattr(families, "FAMILIES", (dataclasses.replace(LLAMA, layer_weights=fewer),))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight.*does not declare"):
        weights(tiny.config())


@tiny.over(tiny.family_seeds(3))
def test_the_declared_modules_are_there_and_take_what_they_should(model_type: str, seed: int) -> None:
    config = tiny.random_config(seed, model_type=model_type)
    model, family, dims = tiny.model(config), family_of(config), sizes(config)
    layers = decoder_layers(model)
    assert len(layers) == config.num_hidden_layers
    seen: dict[str, int] = {}

    def widths(name: str, seen: dict[str, int] = seen):  # type: ignore[no-untyped-def]
        return lambda module, inputs, output: seen.__setitem__(name, inputs[0].shape[-1])

    names = (*family.norms, family.attention_output, family.mlp_output)
    for name in names:
        layers[-1].get_submodule(name).register_forward_hook(widths(name))
    tiny.logits(model, tiny.tokens(config))
    assert [seen[name] for name in names] == [dims["hidden"]] * len(family.norms) + [dims["query"], dims["mlp"]]
    assert isinstance(model.get_submodule(family.final_norm), torch.nn.Module)


@tiny.over(tiny.family_seeds(2))
def test_body_and_head_are_the_model(model_type: str, seed: int) -> None:
    config = tiny.random_config(seed, model_type=model_type)
    model, input_ids = tiny.model(config), tiny.tokens(config)
    with torch.no_grad():
        hidden = final_hidden(model, input_ids)
        assert hidden.shape == (*input_ids.shape, config.hidden_size)
        assert torch.equal(output_head(model).logits(hidden), tiny.logits(model, input_ids))


@tiny.over(tiny.FAMILIES)
def test_an_additive_mask_hides_what_it_hides(model_type: str) -> None:
    config = tiny.config(model_type)
    model, input_ids = tiny.model(config), tiny.tokens(config, rows=1, length=6)
    alone = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)
    alone[3:, :3] = alone[0, 1]  # two texts of three tokens in a row
    with torch.no_grad():
        packed = final_hidden(model, input_ids, torch.tensor([[0, 1, 2, 0, 1, 2]]), alone[None, None])
        apart = final_hidden(model, input_ids.view(2, 3))
    torch.testing.assert_close(packed.view(2, 3, -1), apart, rtol=1e-4, atol=1e-5)


def test_names_split_at_their_layer() -> None:
    assert split_name(LLAMA, "model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    assert split_name(LLAMA, "model.norm.weight") == (None, "model.norm.weight")


def test_a_configuration_of_the_embedded_teacher_is_declared() -> None:
    from minitron_search.teachers.embedded import config as embedded_config

    config: PretrainedConfig = embedded_config()
    counted = sum(torch.Size(sizes(config)[dim] for dim in weight.dims).numel() for weight in weights(config))
    assert counted == 134_515_008


def test_a_size_that_no_configuration_says_is_refused_with_the_sizes_on_either_side() -> None:
    """A biased Llama cannot be exported as Mistral: its heads have to divide hidden_size."""
    teacher = tiny.config("llama", hidden_size=24, num_attention_heads=4, num_key_value_heads=4, attention_bias=True)
    for hidden_size, valid in ((22, "20 or 24"), (13, "12 or 16"), (3, "4")):
        why = why_not_expressible(teacher, Architecture(hidden_size, 20, 4, 4, (0, 1, 2)))
        assert why is not None and why.endswith(f"valid: {valid}"), why
    assert why_not_expressible(teacher, Architecture(20, 20, 4, 4, (0, 1, 2))) is None
