"""Trimming is removal: what is kept computes what it computed, and nothing else is there."""

import copy
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from minitron_search.models.architecture import Architecture
from minitron_search.models.families import decoder_layers, family_of, sizes, student_config, whole
from minitron_search.models.loading import load_teacher, random_student, student_of
from minitron_search.models.output_head import output_head
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import permute_teacher, trim, trimmed_weights
from tests import tiny

SEEDS = range(8)
HEADED = [(seed, ratio) for ratio in tiny.RATIOS for seed in range(3)]
# (model_type, query heads per key-value head): every family with one ratio, all ratios in turn, and twenty more
ONCE = [
    (name, tiny.RATIOS[place % len(tiny.RATIOS)] if family.grouped_query else 1)
    for place, (name, family) in enumerate(tiny.FAMILIES.items())
]
OTHERS = [headed for headed in tiny.HEADED if headed not in ONCE]
MORE = [OTHERS[at] for at in np.random.default_rng(0).permutation(len(OTHERS))[:20]]


def saved(teacher: PretrainedConfig, folder: Path, seed: int = 0) -> PreTrainedModel:
    made = tiny.model(teacher, seed)
    made.save_pretrained(folder)
    return made


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Float32 rounding: sums over tens of terms, a few layers deep, amplified by norms over a handful of channels.
    A wrong slice is off by the size of the logits."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


class Kept(nn.Module):
    """A norm over the channels that are kept only; the others are 0 behind it.

    That is the definition of trimming a normalised axis: mean and RMS are over what is left.
    """

    def __init__(self, norm: nn.Module, channels: Tensor):
        super().__init__()
        self.channels, self.norm = channels, copy.deepcopy(norm)
        for name, parameter in self.norm.named_parameters():
            setattr(self.norm, name, nn.Parameter(parameter[channels]))
        if hasattr(norm, "normalized_shape"):
            self.norm.normalized_shape = (len(channels),)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_copy(-1, self.channels, self.norm(x[..., self.channels]))


class Skip(nn.Module):
    def forward(self, hidden_states: Tensor, *positional: object, **named: object) -> Tensor:
        return hidden_states


def masked(teacher: PreTrainedModel, architecture: Architecture, rankings: Rankings) -> PreTrainedModel:
    """The teacher at its full size, whose pruned neurons, heads and channels reach nothing, by hooks on its modules."""
    model = copy.deepcopy(teacher)
    family, shape, head_dim = family_of(model.config), whole(model.config), sizes(model.config)["head_dim"]
    ratio = shape.num_attention_heads // shape.num_key_value_heads
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    hidden = rankings.hidden[: architecture.hidden_size]

    def only(module: nn.Module, kept: Tensor) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return inputs[0] * torch.zeros(inputs[0].shape[-1]).index_fill(0, kept, 1.0), *inputs[1:]

        module.register_forward_pre_hook(hook)

    layers = decoder_layers(model)
    only(layers[architecture.layers[0]], hidden)
    for index, layer in enumerate(layers):
        if index not in architecture.layers:
            layers[index] = Skip()
            continue
        groups = rankings.groups[index, : architecture.num_key_value_heads]
        heads = torch.tensor([
            int(group) * ratio + int(head) for group in groups for head in rankings.heads[index, group, :per_group]
        ])  # fmt: skip
        query, key_value = ((which[:, None] * head_dim + torch.arange(head_dim)).flatten() for which in (heads, groups))
        only(layer.get_submodule(family.attention_output), query)
        only(layer.get_submodule(family.mlp_output), rankings.mlp[index, : architecture.intermediate_size])
        for name, module in list(layer.named_modules()):
            if "norm" in type(module).__name__.lower():
                (over,) = family.layer_weights.get(f"{name}.weight", ("hidden",))
                if over != "head_dim":  # OLMo 2's and 3's are over all heads
                    layer.set_submodule(
                        name, Kept(module, {"hidden": hidden, "query": query, "key_value": key_value}[over])
                    )
    model.set_submodule(family.final_norm, Kept(model.get_submodule(family.final_norm), hidden))
    return model


def axes(config: PretrainedConfig) -> dict[str, tuple[str, ...]]:
    """Which sizes shrink together, by axis; hidden_size does with the heads where they make it up."""
    heads = ("num_attention_heads",) if family_of(config).grouped_query else ()
    return {
        "mlp": ("intermediate_size",),
        "heads": heads,
        "groups": ("num_attention_heads", "num_key_value_heads"),
        "depth": ("layers",),
        "hidden": ("hidden_size",) if family_of(config).head_dim != "derived" else (),
        "all": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "layers"),
    }


def shrunk(config: PretrainedConfig, axis: str, seed: int) -> Architecture:
    """A random architecture that keeps the teacher's size along every other axis; without a block for `all`."""
    shape = whole(config)
    given = {name: getattr(shape, name) for name in axes(config)["all"] if name not in axes(config)[axis]}
    if axis == "all":
        start = seed % (shape.num_hidden_layers - 1)
        given["layers"] = tuple(layer for layer in shape.layers if layer != start)
    return tiny.random_architecture(config, seed, **given)


@tiny.over(tiny.family_seeds(2))
def test_the_identity_architecture_is_the_teacher(model_type: str, seed: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed, model_type=model_type)
    teacher = saved(config, tmp_path)
    student = trim(tmp_path, whole(config))
    input_ids = tiny.tokens(config)
    assert torch.equal(tiny.logits(student, input_ids), tiny.logits(teacher, input_ids))
    assert student.num_parameters() == teacher.num_parameters()


@tiny.over(ONCE + MORE)
def test_the_permuted_teacher_computes_the_same_function(model_type: str, ratio: int, tmp_path: Path) -> None:
    config = tiny.random_config(ratio, ratio, model_type, num_hidden_layers=2)
    teacher = saved(config, tmp_path / "teacher")
    rankings = Rankings.random(config, ratio)
    folder = permute_teacher(tmp_path / "teacher", rankings, tmp_path / "permuted")
    permuted = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = tiny.tokens(config)
    assert_close(tiny.logits(permuted, input_ids), tiny.logits(teacher, input_ids))
    moved = permuted.get_input_embeddings().weight
    assert torch.equal(moved, teacher.get_input_embeddings().weight[:, rankings.hidden])
    assert torch.equal(tiny.logits(load_teacher(folder), input_ids), tiny.logits(permuted, input_ids))
    head, of_model = output_head(folder), output_head(permuted)
    assert torch.equal(head.weight, of_model.weight) and head[2:] == of_model[2:]
    assert (head.bias is None) == (of_model.bias is None) == (model_type != "phi")
    assert head.bias is None or torch.equal(head.bias, of_model.bias)


@tiny.over([(*headed, headed in ONCE) for headed in ONCE + MORE])
def test_masking_what_is_pruned_equals_trimming_it_equals_the_saved_student(
    model_type: str, ratio: int, every: bool, tmp_path: Path
) -> None:
    config = tiny.random_config(ratio, ratio, model_type, num_hidden_layers=3)
    teacher, rankings = saved(config, tmp_path), Rankings.random(config, ratio)
    input_ids = tiny.tokens(config)
    single = list(axes(config))[len(model_type) % 5]  # of the axes alone one is read back: that is what takes long
    for seed, axis in enumerate(axes(config) if every else ["all"]):
        architecture = shrunk(config, axis, seed)
        student = trim(tmp_path, architecture, rankings)
        logits = tiny.logits(student, input_ids)
        assert_close(logits, tiny.logits(masked(teacher, architecture, rankings), input_ids))
        if axis in ("all", single):
            reloaded = reload(student, tmp_path / axis)
            assert torch.equal(tiny.logits(reloaded, input_ids), logits), axis


def reload(student: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Saved, and loaded by a strict stock loader."""
    student.save_pretrained(folder)
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], info
    return reloaded


@tiny.over(tiny.family_seeds(3, 10))
def test_the_saved_configuration_says_the_truth(model_type: str, seed: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed, model_type=model_type)
    saved(config, tmp_path / f"teacher-{seed}")
    architecture = tiny.random_architecture(config, seed)
    student = trim(tmp_path / f"teacher-{seed}", architecture, Rankings.random(config, seed))
    folder = tmp_path / f"student-{seed}"
    reloaded = reload(student, folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == [type(reloaded).__name__]
    if family_of(config).head_dim == "derived":
        assert "head_dim" not in written
    else:
        assert written["head_dim"] == config.head_dim
    kept = dataclasses.replace(architecture, layers=tuple(range(architecture.num_hidden_layers)))
    assert whole(reloaded.config) == kept
    assert sum(parameter.numel() for parameter in reloaded.parameters()) == sum(
        parameter.numel() for parameter in student.parameters()
    )
    embeddings = reloaded.get_input_embeddings().weight
    assert (reloaded.get_output_embeddings().weight is embeddings) == config.tie_word_embeddings


@tiny.over([name for name, family in tiny.FAMILIES.items() if family.per_layer])
def test_a_kept_layer_keeps_its_own_kind(model_type: str) -> None:
    config = tiny.random_config(1, model_type=model_type, num_hidden_layers=5)
    student = student_config(config, tiny.random_architecture(config, 0, layers=(0, 3, 4)))
    for key in tiny.FAMILIES[model_type].per_layer:
        kinds = getattr(config, key, None)
        assert kinds is None or getattr(student, key) == [kinds[0], kinds[3], kinds[4]]


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


@tiny.over(tiny.FAMILIES)
def test_generation_with_a_key_value_cache_agrees_with_forward_passes_without(model_type: str, tmp_path: Path) -> None:
    config = tiny.random_config(3, model_type=model_type, num_hidden_layers=4, eos_token_id=None)
    saved(config, tmp_path)
    architecture = tiny.random_architecture(config, 3, layers=(1, 3))  # their indices in the cache are 0 and 1
    student = trim(tmp_path, architecture, Rankings.random(config, 3))
    indices = [
        module.layer_idx for module in student.modules() if hasattr(module, "q_proj") or hasattr(module, "c_attn")
    ]
    assert indices in ([0, 1], [])
    prompt = tiny.tokens(config, rows=1, length=5)
    generated = student.generate(
        prompt, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    assert generated.sequences.shape == (1, 13)
    whole_pass = tiny.logits(student, generated.sequences)[0, 4:-1]
    assert_close(torch.cat(generated.logits), whole_pass)


@tiny.over(SEEDS)
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


def test_a_teacher_whose_files_leave_out_the_prefix_is_trimmed(tmp_path: Path) -> None:
    config = tiny.config("gpt2")  # as gpt2 is on the Hub
    teacher = saved(config, tmp_path)
    state = {name.removeprefix("transformer."): tensor for name, tensor in teacher.named_parameters()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    input_ids = tiny.tokens(config)
    assert torch.equal(tiny.logits(trim(tmp_path, whole(config)), input_ids), tiny.logits(teacher, input_ids))


@tiny.over([False, True])
def test_what_does_not_read_the_embedding_is_a_plain_slice_in_gemma_too(tied: bool) -> None:
    config = tiny.config("gemma2", tie_word_embeddings=tied)
    state = dict(tiny.model(config).named_parameters())
    kept = trimmed_weights(state.__getitem__, config, Architecture(6, 8, 4, 2, (0, 1, 2)), Rankings.identity(config))
    scaled = {name for name, tensor in kept.items() if tensor.data_ptr() != state[name].data_ptr()}
    assert scaled == {"model.embed_tokens.weight", *(["model.norm.weight"] if tied else [])}
    assert torch.equal(kept["model.embed_tokens.weight"], 2 * state["model.embed_tokens.weight"][:, :6])  # sqrt(24 / 6)


def test_a_view_is_taken_where_what_is_kept_leads() -> None:
    config = tiny.config()
    state = dict(tiny.model(config).named_parameters())
    kept = trimmed_weights(state.__getitem__, config, Architecture(16, 8, 4, 2, (0, 1, 2)), Rankings.identity(config))
    for name, tensor in kept.items():
        assert tensor.untyped_storage().data_ptr() == state[name].untyped_storage().data_ptr(), name


@tiny.over([(True, "float32"), (False, "float32"), (True, "bfloat16"), (False, "bfloat16")])
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
    head = output_head(folder)
    assert torch.equal(head.weight, plain.get_output_embeddings().weight) and head.bias is None
    assert not list(tmp_path.glob(".*"))  # nothing half made


def test_a_permuted_teacher_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    config = tiny.config()
    saved(config, tmp_path / "teacher")
    folder = permute_teacher(tmp_path / "teacher", Rankings.random(config, 1), tmp_path / "permuted")
    before = (folder / "model.safetensors").read_bytes()
    permute_teacher(tmp_path / "teacher", Rankings.random(config, 2), folder)
    assert (folder / "model.safetensors").read_bytes() == before


@tiny.over([("qwen2", True), ("qwen2", False), ("phi", False), ("gemma2", True), ("gpt_neox", False)])
def test_a_padded_vocabulary_is_cut_to_the_rows_that_are_shared(model_type: str, tied: bool, tmp_path: Path) -> None:
    """What is left says of every token what the whole says, among the tokens that are left."""
    config = tiny.config(model_type, vocab_size=80, tie_word_embeddings=tied)
    tiny.model(config).save_pretrained(tmp_path / "teacher")
    folder = permute_teacher(tmp_path / "teacher", Rankings.identity(config), tmp_path / "cut", "auto", 61)
    ids = tiny.tokens(tiny.config())
    whole = tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval(), ids)[..., :61]
    left = tiny.logits(load_teacher(folder), ids)
    torch.testing.assert_close(left, whole, rtol=1e-5, atol=1e-5)
    again = permute_teacher(tmp_path / "teacher", Rankings.identity(config), tmp_path / "whole", "auto", 80)
    assert AutoConfig.from_pretrained(again).vocab_size == 80 and AutoConfig.from_pretrained(folder).vocab_size == 61


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


@tiny.over(HEADED)
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
