"""A model's files against its configuration: what is refused, in which words, and what is let in."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from minitron_search.models.loading import load_model, reader
from minitron_search.teachers import files, sources
from minitron_search.teachers.files import ModelError, check_files, check_values
from tests import tiny

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Two layers, tied, one file."""
    tiny.model(tiny.config(num_hidden_layers=2)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def reconfigure(folder: Path, **values: object) -> None:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | values))


def why(folder: Path) -> str:
    with pytest.raises(ValueError, match="teacher.model: ") as refused:
        sources.teacher_config(str(folder))
    said = str(refused.value)
    assert "\n" not in said and "; valid: " in said
    return said


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_what_save_pretrained_writes_is_whole(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny.model(tiny.config(family, num_hidden_layers=2, tie_word_embeddings=tied))
    for name, limit in (("one", "1GB"), ("shards", "8KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=limit)
        check_files(tmp_path / name, AutoConfig.from_pretrained(tmp_path / name))
        check_values(tmp_path / name)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("beginning", ["_orig_mod.", "module.", "base.", "base_model.model."])
def test_a_beginning_that_all_names_share_is_named(beginning: str, llama: Path) -> None:
    rewrite(llama, lambda tensors: {beginning + name: tensor for name, tensor in tensors.items()})
    said = why(llama)
    assert f"every name in the files begins with '{beginning}'" in said
    assert "lacks 20 of the 20 weights of config.json, first model.embed_tokens.weight, and holds 20 that" in said
    assert f"first {beginning}model.embed_tokens.weight in model.safetensors" in said


def test_a_model_that_was_saved_without_its_head_is_named_as_one(llama: Path) -> None:
    rewrite(llama, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert "no name in the files begins with 'model.'" in why(llama)


def test_one_weight_that_is_missing_is_no_shared_beginning(llama: Path) -> None:
    rewrite(llama, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"})
    said = why(llama)
    assert "lacks 1 of the 20 weights of config.json, first model.norm.weight" in said and "begins" not in said


def test_a_configuration_that_says_otherwise_is_named_with_both_shapes(llama: Path) -> None:
    reconfigure(llama, intermediate_size=32)
    gate = "has model.layers.0.mlp.gate_proj.weight of shape (20, 24) in model.safetensors, and config.json describes"
    assert f"{gate} (32, 24)" in why(llama)
    reconfigure(llama, intermediate_size=20, num_hidden_layers=10**6)
    assert "has 2 layers in its weight files, and config.json says num_hidden_layers 1000000" in why(llama)


def test_a_configuration_that_transformers_refuses_is_told_in_its_words(llama: Path) -> None:
    before = (llama / "config.json").read_text()
    reconfigure(llama, layer_types=["full_attention"] * 6)
    assert "has a config.json that transformers refuses (" in why(llama) and "layer" in why(llama)
    (llama / "config.json").write_text(before)
    reconfigure(llama, hidden_size=50, head_dim=8)
    assert "has a config.json that transformers refuses (" in why(llama) and "model_type mistral" in why(llama)


def test_a_head_of_its_own_in_a_tied_model_is_refused_and_an_equal_one_is_tied(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert sources.teacher_config(str(llama)).tie_word_embeddings
    model = load_model(llama)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rewrite(llama, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    assert "has a lm_head.weight of its own, other than model.embed_tokens.weight" in why(llama)
    reconfigure(llama, tie_word_embeddings=False)
    assert not sources.teacher_config(str(llama)).tie_word_embeddings


def test_an_untied_model_without_a_head_is_refused(llama: Path) -> None:
    reconfigure(llama, tie_word_embeddings=False)
    assert "lacks 1 of the 21 weights of config.json, first lm_head.weight" in why(llama)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "int64", "bool"])
def test_a_dtype_that_is_not_pruned_is_named(dtype: str, llama: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite(llama, lambda tensors: tensors | {name: tensors[name].to(getattr(torch, dtype))})
    assert f"has {name} stored as " in why(llama) and "weights are F32, BF16, F16, F64" in why(llama)


def test_weights_of_several_dtypes_are_loaded_as_transformers_does(llama: Path) -> None:
    name = "model.norm.weight"
    rewrite(llama, lambda tensors: tensors | {name: tensors[name].bfloat16()})
    sources.teacher_config(str(llama))
    assert load_model(llama).get_parameter(name).dtype == torch.float32


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 269060552\n"
LENGTH = (10**15).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER.encode(), "is a git-lfs pointer"),
        (b"", "0 bytes do not hold its header"),
        (b"\x10\0\0", "3 bytes do not hold its header"),
        (LENGTH + b"{}", "10 bytes do not hold its header"),
        ((2).to_bytes(8, "little") + b"[]", "its header cannot be read"),
        ((2).to_bytes(8, "little") + b"{]", "its header cannot be read"),
        ((16).to_bytes(8, "little") + b'{"a":{"b":"c"} }', "its header cannot be read"),
        (b"<html>404 not found</html>", "do not hold its header"),
    ],
)
def test_what_is_no_safetensors_file_is_told(content: bytes, said: str, llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(content)
    assert said in why(llama) and "model.safetensors" in why(llama)


def test_a_header_with_places_that_overlap_is_refused(llama: Path) -> None:
    path = llama / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name.endswith("layernorm.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])
    assert "is not whole: model.safetensors" in why(llama)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny.model(tiny.config(num_hidden_layers=2)).save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


def reindex(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))


def test_an_index_says_what_the_shards_hold_or_is_refused(sharded: Path) -> None:
    index = (sharded / "model.safetensors.index.json").read_text()
    name = "model.norm.weight"
    listed = json.loads(index)["weight_map"]
    other = next(file for file in listed.values() if file != listed[name])
    reindex(sharded, lambda files: files | {name: other})
    assert f"says {name} is in {other}, and it is in {listed[name]}" in why(sharded)
    reindex(sharded, lambda files: files | {name: listed[name], "ghost": other})
    assert f"says ghost is in {other}, and it is in no file" in why(sharded)
    reindex(sharded, lambda files: {key: file for key, file in listed.items() if key != name})
    assert f"says {name} is in no file, and it is in {listed[name]}" in why(sharded)
    for outside in ("../llama/model.safetensors", "/etc/passwd", 3, None):
        reindex(sharded, lambda files, outside=outside: listed | {name: outside})  # type: ignore[misc]
        assert "names a weight file that is not a file of its folder" in why(sharded)
    for broken in ("{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", index[:100]):
        (sharded / "model.safetensors.index.json").write_text(broken)
        assert "index" in why(sharded) or "has no weights" in why(sharded)


def test_a_weight_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second, {"format": "pt"})
    assert f"holds {name} twice, in {first.name} and {second.name}" in why(sharded)


def test_a_stray_file_of_weights_is_no_weight_of_the_model(llama: Path, sharded: Path) -> None:
    for folder in (llama, sharded):
        before = {name: tensor.clone() for name, tensor in load_model(folder).named_parameters()}
        save_file({name: tensor + 1 for name, tensor in before.items()}, folder / "zz.safetensors", {"format": "pt"})
        sources.teacher_config(str(folder))
        assert all(torch.equal(reader(folder)(name), tensor) for name, tensor in before.items())


def test_an_adapter_beside_a_model_is_refused(llama: Path) -> None:
    (llama / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    assert "holds an adapter (adapter_config.json)" in why(llama)


def test_what_old_files_hold_beside_the_weights_is_let_in(tmp_path: Path) -> None:
    """GPT-2's masks and names without `transformer.`, Llama's rotary frequencies, Pythia's masks."""
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16)).save_pretrained(folder)
    masks = {f"h.{n}.attn.{name}": torch.full((1,), -torch.inf) for n in range(2) for name in ("bias", "masked_bias")}
    rewrite(folder, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()} | masks)
    for family, name in (("llama", "self_attn.rotary_emb.inv_freq"), ("gpt_neox", "attention.masked_bias")):
        model = tiny.model(tiny.config(family))
        model.save_pretrained(tmp_path / family)
        extra = {f"{tiny.FAMILIES[family].layers}.0.{name}": torch.ones(3)}
        rewrite(tmp_path / family, lambda tensors, extra=extra: tensors | extra)  # type: ignore[misc]
    for family in ("gpt2", "llama", "gpt_neox"):
        sources.teacher_config(str(tmp_path / family))
        check_values(tmp_path / family)
        load_model(tmp_path / family)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_counted(value: float, llama: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    sources.checked_fingerprint("m", llama)

    def spoil(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[3:6] = value
        return tensors

    rewrite(llama, spoil)
    said = rf"teacher.model: 'm' has NaN or infinity in {name} \(3 of 480 values, in model.safetensors\)"
    for _ in range(2):  # what is refused is not remembered as fine
        with pytest.raises(ValueError, match=said):
            sources.checked_fingerprint("m", llama)


def test_values_are_read_once_for_a_content(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_values(llama)
    monkeypatch.setattr(files, "not_finite", lambda tensor: pytest.fail("read again"))
    check_values(llama)
    shutil.copytree(llama, llama.with_name("copy"))
    check_values(llama.with_name("copy"))


def test_a_reference_of_a_family_that_is_not_pruned_is_checked_by_itself(llama: Path) -> None:
    reconfigure(llama, model_type="mixtral")
    check_files(llama, AutoConfig.from_pretrained(llama))
    with open(llama / "model.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match="is not whole: model.safetensors has .* bytes, and its header describes"):
        check_files(llama, AutoConfig.from_pretrained(llama))


@pytest.mark.parametrize("spoilt", ["missing", "unexpected", "mismatched"])
def test_no_load_leaves_a_weight_to_chance(spoilt: str, llama: Path) -> None:
    """Whatever was checked before."""
    name = "model.layers.0.mlp.up_proj.weight"
    changes: dict[str, Callable[[Tensors], Tensors]] = {
        "missing": lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name},
        "unexpected": lambda tensors: tensors | {"model.more.weight": torch.ones(3)},
        "mismatched": lambda tensors: tensors | {name: torch.ones(3, 24)},
    }
    rewrite(llama, changes[spoilt])
    with pytest.raises(ValueError, match="model.more.weight" if spoilt == "unexpected" else name):
        load_model(llama)


@pytest.mark.parametrize("damage", ["cut", "dead link"])
def test_what_is_damaged_after_it_was_checked_is_refused(llama: Path, damage: str) -> None:
    for _ in range(2):
        assert sources.teacher_config(str(llama)).model_type == "llama"
    if damage == "cut":
        os.truncate(llama / "model.safetensors", 100)
    else:
        (llama / "special_tokens_map.json").symlink_to(llama / "nothing")
    with pytest.raises(ValueError, match="teacher.model: "):
        sources.teacher_config(str(llama))
