"""Trimming is removal: what is kept computes what it computed, and nothing else is there."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from minitron_search.architecture import Architecture
from minitron_search.families import sizes, student_config, whole
from minitron_search.rankings import Rankings
from minitron_search.trimming import (
    load_head,
    load_teacher,
    permute_teacher,
    random_student,
    student_of,
    trim,
    trimmed_weights,
)
from tests import tiny

SEEDS = range(12)
HEADED = [(seed, ratio) for ratio in tiny.RATIOS for seed in range(3)]


def saved(teacher: PretrainedConfig, folder: Path, seed: int = 0) -> PreTrainedModel:
    made = tiny.model(teacher, seed)
    made.save_pretrained(folder)
    return made


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Float32 rounding: sums over tens of terms, a few layers deep."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def masked(teacher: PreTrainedModel, architecture: Architecture, rankings: Rankings) -> PreTrainedModel:
    """The teacher at its full size, whose pruned neurons, heads and channels reach nothing.

    RMS is over hidden_size: with S the sum of squares over h kept of H channels, x / sqrt(S / H + e) equals
    x / sqrt(S / h + e H / h) * sqrt(H / h). Its norms are therefore scaled by sqrt(h / H), with e h / H for e.
    """
    model = copy.deepcopy(teacher)
    shape, head_dim = whole(teacher.config), sizes(teacher.config)["head_dim"]
    ratio = shape.num_attention_heads // shape.num_key_value_heads
    kept_per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    dropped = rankings.hidden[architecture.hidden_size :]
    share = architecture.hidden_size / shape.hidden_size
    with torch.no_grad():
        model.model.embed_tokens.weight[:, dropped] = 0
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight[:, rankings.mlp[index, architecture.intermediate_size :]] = 0
            keep = torch.zeros(shape.num_key_value_heads, ratio, head_dim)
            for group in rankings.groups[index, : architecture.num_key_value_heads].tolist():
                keep[group, rankings.heads[index, group, :kept_per_group]] = 1
            layer.self_attn.o_proj.weight *= keep.flatten()
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[dropped] = 0
                if writer.bias is not None:
                    writer.bias[dropped] = 0
        for norm in (module for module in model.modules() if type(module).__name__.endswith("RMSNorm")):
            norm.weight *= share**0.5
            norm.variance_epsilon *= share
    model.model.layers = nn.ModuleList(model.model.layers[layer] for layer in architecture.layers)
    return model


@pytest.mark.parametrize("seed", SEEDS)
def test_the_identity_architecture_is_the_teacher(seed: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed)
    teacher = saved(config, tmp_path)
    student = trim(tmp_path, whole(config))
    input_ids = tiny.tokens(config)
    assert torch.equal(tiny.logits(student, input_ids), tiny.logits(teacher, input_ids))
    assert student.num_parameters() == teacher.num_parameters()


@pytest.mark.parametrize(("seed", "ratio"), HEADED)
def test_the_permuted_teacher_computes_the_same_function(seed: int, ratio: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed, ratio)
    teacher = saved(config, tmp_path / "teacher")
    rankings = Rankings.random(config, seed)
    folder = permute_teacher(tmp_path / "teacher", rankings, tmp_path / "permuted")
    permuted = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = tiny.tokens(config)
    assert_close(tiny.logits(permuted, input_ids), tiny.logits(teacher, input_ids))
    moved = permuted.model.embed_tokens.weight
    assert torch.equal(moved, teacher.model.embed_tokens.weight[:, rankings.hidden])


@pytest.mark.parametrize(("seed", "ratio"), HEADED)
@pytest.mark.parametrize("axis", ["mlp", "heads", "groups", "depth", "hidden", "all"])
def test_masking_what_is_pruned_equals_trimming_it(axis: str, seed: int, ratio: int, tmp_path: Path) -> None:
    config = tiny.random_config(10 * ratio + seed, ratio)
    shape = whole(config)
    keep = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "layers": shape.layers,
    }
    free = {
        "mlp": ["intermediate_size"],
        "heads": ["num_attention_heads"],
        "groups": ["num_attention_heads", "num_key_value_heads"],
        "depth": ["layers"],
        "hidden": ["hidden_size"],
        "all": list(keep),
    }[axis]
    architecture = tiny.random_architecture(
        config, seed, **{name: size for name, size in keep.items() if name not in free}
    )
    teacher = saved(config, tmp_path)
    rankings = Rankings.random(config, seed)
    input_ids = tiny.tokens(config)
    expected = tiny.logits(masked(teacher, architecture, rankings), input_ids)
    assert_close(tiny.logits(trim(tmp_path, architecture, rankings), input_ids), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_saved_student_is_stock_and_reloads_exactly(seed: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed)
    saved(config, tmp_path / "teacher")
    architecture = tiny.random_architecture(config, seed)
    student = trim(tmp_path / "teacher", architecture, Rankings.random(config, seed))
    student.save_pretrained(tmp_path / "student")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], info
    input_ids = tiny.tokens(config)
    assert torch.equal(tiny.logits(reloaded, input_ids), tiny.logits(student, input_ids))
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["head_dim"] == config.head_dim
    assert written["num_hidden_layers"] == len(architecture.layers)
    assert written["architectures"] == [type(reloaded).__name__]
    embeddings = reloaded.get_input_embeddings().weight
    assert (reloaded.get_output_embeddings().weight is embeddings) == config.tie_word_embeddings


def test_a_hidden_size_that_the_heads_do_not_divide_is_exported_as_mistral(tmp_path: Path) -> None:
    config = tiny.config(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-3, hidden_act="gelu",
        rope_parameters={"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    )  # fmt: skip
    teacher = saved(config, tmp_path / "teacher")
    architecture = Architecture(20, 11, 6, 2, (0, 2))  # 20 is no multiple of 6
    rankings = Rankings.random(config, 0)
    student = trim(tmp_path / "teacher", architecture, rankings)
    student.save_pretrained(tmp_path / "student")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert reloaded.config.model_type == "mistral" and reloaded.config.sliding_window is None
    assert (reloaded.config.bos_token_id, reloaded.config.eos_token_id) == (0, 1)
    input_ids = tiny.tokens(config, length=40)
    assert_close(tiny.logits(reloaded, input_ids), tiny.logits(masked(teacher, architecture, rankings), input_ids))


@pytest.mark.parametrize("seed", SEEDS)
def test_generation_with_a_key_value_cache_agrees_with_forward_passes_without(seed: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed, num_hidden_layers=4, eos_token_id=None)
    saved(config, tmp_path)
    architecture = tiny.random_architecture(config, seed, layers=(1, 3))  # their indices in the cache are 0 and 1
    student = trim(tmp_path, architecture, Rankings.random(config, seed))
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    prompt = tiny.tokens(config, rows=1, length=5)
    generated = student.generate(
        prompt, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    assert generated.sequences.shape == (1, 13)
    whole_pass = tiny.logits(student, generated.sequences)[0, 4:-1]
    assert_close(torch.cat(generated.logits), whole_pass)


@pytest.mark.parametrize("seed", SEEDS)
def test_candidates_nest_as_leading_slices_of_the_permuted_teacher(seed: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed)
    saved(config, tmp_path / "teacher")
    rankings = Rankings.random(config, seed)
    folder = permute_teacher(tmp_path / "teacher", rankings, tmp_path / "permuted")
    permuted = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    architecture = tiny.random_architecture(config, seed)
    student = trim(folder, architecture)
    shape, head_dim = whole(config), config.head_dim
    grouped = (shape.num_key_value_heads, -1, head_dim)  # a group's query heads are ranked inside it
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    for name, parameter in student.named_parameters():
        of_teacher = name
        if name.startswith("model.layers."):
            _, _, position, rest = name.split(".", 3)
            of_teacher = f"model.layers.{architecture.layers[int(position)]}.{rest}"
        whole_weight = permuted[of_teacher]
        queries = {"q_proj": 0, "o_proj": 1}.get(name.split(".")[-2])
        if queries is not None and whole_weight.ndim > queries:
            whole_weight = whole_weight.unflatten(queries, grouped)
            whole_weight = whole_weight.narrow(queries, 0, architecture.num_key_value_heads)
            whole_weight = whole_weight.narrow(queries + 1, 0, per_group).flatten(queries, queries + 2)
        assert torch.equal(parameter, whole_weight[tuple(map(slice, parameter.shape))]), name
    # and the same student comes from the unpermuted teacher with its rankings
    input_ids = tiny.tokens(config)
    direct = trim(tmp_path / "teacher", architecture, rankings)
    assert torch.equal(tiny.logits(direct, input_ids), tiny.logits(student, input_ids))


def test_writing_into_a_student_leaves_the_teacher_file_untouched(tmp_path: Path) -> None:
    config = tiny.config()
    saved(config, tmp_path)
    weights = tmp_path / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    for rankings in (None, Rankings.identity(config), Rankings.random(config, 0)):
        student = trim(tmp_path, whole(config), rankings)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
        again = trim(tmp_path, whole(config), rankings)
        assert all(parameter.abs().sum() > 0 for parameter in again.parameters())


def test_a_student_of_a_bfloat16_teacher_trains_in_float32(tmp_path: Path) -> None:
    config = tiny.config()
    tiny.model(config).to(torch.bfloat16).save_pretrained(tmp_path)
    student = trim(tmp_path, Architecture(16, 8, 2, 2, (0, 2)))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_a_view_is_taken_where_what_is_kept_leads() -> None:
    config = tiny.config()
    state = dict(tiny.model(config).named_parameters())
    kept = trimmed_weights(state.__getitem__, config, Architecture(16, 8, 4, 2, (0, 1, 2)), Rankings.identity(config))
    for name, tensor in kept.items():
        assert tensor.untyped_storage().data_ptr() == state[name].untyped_storage().data_ptr(), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_permuted_teacher_on_mapped_weights_is_what_from_pretrained_loads(
    tied: bool, dtype: str, tmp_path: Path
) -> None:
    config = tiny.config(tie_word_embeddings=tied)
    saved(config, tmp_path / "teacher")
    folder = permute_teacher(tmp_path / "teacher", Rankings.random(config, 1), tmp_path / "permuted", dtype)
    plain, mapped = AutoModelForCausalLM.from_pretrained(folder), load_teacher(folder)
    assert mapped.dtype == plain.dtype == getattr(torch, dtype)
    input_ids = tiny.tokens(config)
    assert torch.equal(tiny.logits(mapped, input_ids), tiny.logits(plain, input_ids))
    head, bias = load_head(folder)
    assert torch.equal(head, plain.get_output_embeddings().weight) and bias is None
    assert not list(tmp_path.glob(".*"))  # nothing half made


def test_a_permuted_teacher_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    config = tiny.config()
    saved(config, tmp_path / "teacher")
    folder = permute_teacher(tmp_path / "teacher", Rankings.random(config, 1), tmp_path / "permuted")
    before = (folder / "model.safetensors").read_bytes()
    permute_teacher(tmp_path / "teacher", Rankings.random(config, 2), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_random_control_has_the_shape_and_is_its_seeds(tmp_path: Path) -> None:
    config = tiny.config()
    architecture = Architecture(16, 8, 2, 2, (0, 2))
    state = torch.random.get_rng_state()
    first, again, other = (random_student(config, architecture, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    saved(config, tmp_path)
    shapes = [parameter.shape for parameter in trim(tmp_path, architecture).parameters()]
    assert [parameter.shape for parameter in first.parameters()] == shapes
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_a_model_is_built_on_the_tensors_themselves(tmp_path: Path) -> None:
    config = tiny.config()
    state = {name: parameter.detach().clone() for name, parameter in tiny.model(config).named_parameters()}
    built = student_of(student_config(config, whole(config)), state)
    for name, parameter in built.named_parameters():
        assert parameter.data_ptr() == state[name].data_ptr(), name
    assert not built.training


# Rankings


def test_rankings_descend_and_ties_keep_the_teachers_order() -> None:
    rankings = Rankings.of_scores(
        hidden=torch.tensor([1.0, 3.0, 3.0, 2.0]),
        mlp=torch.tensor([[0.0, 0.0, 1.0]]),
        heads=torch.tensor([[5.0, 1.0, 2.0, 3.0, 2.0, 3.0]]),  # two groups of three, sums 8 and 8
        key_value_heads=2,
    )
    assert rankings.hidden.tolist() == [1, 2, 3, 0]
    assert rankings.mlp.tolist() == [[2, 0, 1]]
    assert rankings.groups.tolist() == [[0, 1]]
    assert rankings.heads.tolist() == [[[0, 2, 1], [0, 2, 1]]]


def test_whole_groups_are_ranked_by_the_sum_of_their_heads() -> None:
    heads = torch.tensor([[1.0, 1.0, 9.0, 0.0, 5.0, 6.0]])  # sums 2, 9 and 11
    rankings = Rankings.of_scores(torch.ones(2), torch.ones(1, 2), heads, key_value_heads=3)
    assert rankings.groups.tolist() == [[2, 1, 0]]
    kept = rankings.kept(Architecture(2, 2, 2, 2, (0,)), 0, "query", head_dim=2)
    assert kept is not None and kept.tolist() == [10, 11, 4, 5]  # head 5 of group 2, head 2 of group 1
    groups = rankings.kept(Architecture(2, 2, 2, 2, (0,)), 0, "key_value", head_dim=2)
    assert groups is not None and groups.tolist() == [4, 5, 2, 3]


@pytest.mark.parametrize(("seed", "ratio"), HEADED)
def test_every_ranking_is_a_permutation_and_keeps_heads_with_their_group(seed: int, ratio: int) -> None:
    config = tiny.random_config(seed, ratio)
    shape = whole(config)
    rankings = Rankings.random(config, seed)
    assert sorted(rankings.hidden.tolist()) == list(range(shape.hidden_size))
    for layer in shape.layers:
        assert sorted(rankings.mlp[layer].tolist()) == list(range(shape.intermediate_size))
        assert sorted(rankings.groups[layer].tolist()) == list(range(shape.num_key_value_heads))
        architecture = tiny.random_architecture(config, seed)
        channels = rankings.kept(architecture, layer, "query", config.head_dim)
        assert channels is not None
        groups = (channels // (ratio * config.head_dim)).unique_consecutive().tolist()
        assert groups == rankings.groups[layer, : architecture.num_key_value_heads].tolist()
        assert len(channels.unique()) == architecture.num_attention_heads * config.head_dim


def test_random_rankings_are_their_seeds_and_leave_the_global_generator_alone() -> None:
    config = tiny.config()
    state = torch.random.get_rng_state()
    first, again, other = (Rankings.random(config, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.mlp, again.mlp) and not torch.equal(first.mlp, other.mlp)
