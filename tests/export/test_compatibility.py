"""A student in the hands of llama.cpp and vLLM: every tensor has its GGUF name; what they would not take is said."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from minitron_search.config.schema import Config
from minitron_search.export.compatibility import ALWAYS_TIED, FOUR_TIMES, NOT_CONVERTED, PERIODS, complete, refusals
from minitron_search.export.student_folder import write_folder
from minitron_search.export.teacher_files import teacher_files
from minitron_search.models.families import student_config, whole
from minitron_search.planning.defaults import completed
from minitron_search.pruning.trimming import trim
from minitron_search.search.space import SearchSpace
from minitron_search.teachers.sources import teacher_config
from tests import tiny

# llama.cpp's names of the families that it calls otherwise
GGUF_NAMES = {"mistral": "llama", "gemma3_text": "gemma3", "olmo3": "olmo2", "phi": "phi2", "cohere": "command-r",
              "gpt_neox": "gptneox"}  # fmt: skip
ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
UNKNOWN_TO_GGUF = ("ministral", "opt")
# vLLM 0.33's list of text generation models, as far as families here are in it (model_executor/models/registry.py);
# what is not there runs through its Transformers backend
VLLM = {
    "CohereForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "GraniteForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "NemotronForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM",
    "Olmo3ForCausalLM", "OlmoForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
}  # fmt: skip


def exported(folder: Path, name: str, seed: int, **given: Any) -> Path:
    """The folder of a random student of a random teacher of the family."""
    teacher = tiny.random_config(seed, model_type=name, vocab_size=258, **given)
    tiny.model(teacher).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    student = trim(folder / "teacher", tiny.random_architecture(teacher, seed))
    complete(student.config)
    write_folder(student, teacher_files(folder / "teacher").contents, folder / "best")
    return folder / "best"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@tiny.over((name, seed) for name, seed in tiny.family_seeds(2, 10) if name not in UNKNOWN_TO_GGUF)
def test_every_tensor_of_a_student_has_a_name_in_gguf(name: str, seed: int, tmp_path: Path) -> None:
    given = {"tie_word_embeddings": True} if name in ALWAYS_TIED["llama.cpp"] else {}
    folder = exported(tmp_path, name, seed, **given)
    config = json.loads((folder / "config.json").read_text())
    family = GGUF_NAMES.get(config["model_type"], config["model_type"])
    layers = config["num_hidden_layers"] if "num_hidden_layers" in config else config["n_layer"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], layers)
    found = tensors(folder)
    mapped = {each: names.get_name(each, try_suffixes=(".weight", ".bias")) for each in found}
    assert None not in mapped.values(), [each for each, made in mapped.items() if made is None]
    assert len(set(mapped.values())) == len(found), "no two tensors have one name"
    blocks = {made.split(".")[1] for made in mapped.values() if made.startswith("blk.")}
    assert blocks == {str(layer) for layer in range(layers)}, "layers are numbered anew"
    assert ("lm_head.weight" in found) != config.get("tie_word_embeddings", True), "a tied head is stored once"


@tiny.over(tiny.FAMILIES)
def test_the_configuration_says_every_shape(name: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, name, 1)
    said, loaded = json.loads((folder / "config.json").read_text()), AutoConfig.from_pretrained(folder)
    (architecture,) = said["architectures"]
    assert architecture in VLLM or name == "ministral"
    heads = loaded.num_attention_heads
    assert heads % (getattr(loaded, "num_key_value_heads", None) or heads) == 0
    assert all(isinstance(said.get(key, 0), int) for key in ("hidden_size", "intermediate_size", "head_dim"))
    if tiny.FAMILIES[name].head_dim != "derived":
        assert said["head_dim"] > 0
    for key in tiny.FAMILIES[name].per_layer:
        assert key not in said or len(said[key]) == loaded.num_hidden_layers
    assert (folder / "tokenizer.json").exists() and (folder / "tokenizer_config.json").exists()


def test_everything_in_the_default_space_is_taken() -> None:
    """And its heads have a size that every attention back end of vLLM takes (FlashInfer's are the fewest)."""
    config, _ = completed(Config(), None)
    space = SearchSpace(config.space, teacher_config(config.teacher.model))
    for shape in space.shapes:
        architecture = space.architecture(shape)
        student = student_config(space.config, architecture)
        assert not refusals(student) and student.head_dim == 64
        assert student.num_attention_heads % student.num_key_value_heads == 0


def of(
    name: str, hidden_size: int, heads: int, layers: tuple[int, ...] | None = None, **given: Any
) -> PretrainedConfig:
    shape = {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 6, "intermediate_size": 128, **given}
    teacher = tiny.config(name, **shape)
    made = replace(whole(teacher), hidden_size=hidden_size, num_attention_heads=heads, layers=layers or tuple(range(6)))
    return student_config(teacher, made)


@tiny.over(["granite", "olmo", "olmo2", "olmo3", "phi3", "exaone4", "nemotron", "starcoder2", "cohere"])
def test_heads_that_do_not_make_up_hidden_size_are_said_to_be_refused_by_llama_cpp(name: str) -> None:
    assert not refusals(of(name, 32, 4))
    assert set(refusals(of(name, 24, 4))) == {"llama.cpp"}


def test_of_qwen2_by_vllm_too() -> None:
    assert not refusals(of("qwen2", 32, 4)) and not refusals(of("qwen2", 16, 2))
    found = refusals(of("qwen2", 24, 4))
    assert set(found) == {"llama.cpp", "vLLM"} and "4 of 8 are not 24" in found["vLLM"]


@tiny.over(["llama", "mistral", "qwen3", "smollm3", "seed_oss", "ernie4_5", "gemma", "glm4"])
def test_families_that_read_head_dim_may_have_any_hidden_size(name: str) -> None:
    assert not refusals(of(name, 24, 4)) and not refusals(of(name, 24, 2))


@tiny.over(PERIODS)
def test_layers_out_of_their_rhythm_are_said_to_be_refused(name: str) -> None:
    given = {"query_pre_attn_scalar": 8} if name.startswith("gemma") else {}
    period = PERIODS[name][2]
    assert not refusals(of(name, 32, 4, **given))
    assert not refusals(of(name, 32, 4, tuple(range(4)), **given)), "the last ones dropped, and the rhythm is kept"
    without = tuple(layer for layer in range(6) if layer != period - 2)
    assert "repeat every" in refusals(of(name, 32, 4, without, **given))["llama.cpp"]


@tiny.over(["gemma2", "gemma3_text"])
def test_another_scale_of_attention_is_said_to_be_refused(name: str) -> None:
    assert "query_pre_attn_scalar" in refusals(of(name, 32, 4, query_pre_attn_scalar=9))["llama.cpp"]


@tiny.over(FOUR_TIMES)
def test_an_mlp_of_another_width_is_said_to_be_refused(name: str) -> None:
    assert not refusals(of(name, 32, 4))
    assert "4 x 32" in refusals(of(name, 32, 4, intermediate_size=96))["llama.cpp"]


@tiny.over(ALWAYS_TIED["llama.cpp"])
def test_a_head_of_its_own_is_said_to_be_refused_where_theirs_are_tied(name: str) -> None:
    given = {"query_pre_attn_scalar": 8} if name == "gemma2" else {}
    assert not refusals(of(name, 32, 4, **given))
    found = refusals(of(name, 32, 4, tie_word_embeddings=False, **given))
    assert set(found) == {tool for tool, families in ALWAYS_TIED.items() if name in families}


def test_families_without_a_converter_are_said_to_be_refused() -> None:
    for name in NOT_CONVERTED:
        assert name in refusals(of(name, 32, 4))["llama.cpp"]


@tiny.over(["gpt2", "gpt_neox"])
def test_keys_of_transformers_4_change_nothing(name: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, name, 3)
    said = json.loads((folder / "config.json").read_text())
    assert said["n_ctx" if name == "gpt2" else "rotary_pct"] == (
        said["n_positions"] if name == "gpt2" else said["rope_parameters"]["partial_rotary_factor"]
    )
    with_keys = AutoModelForCausalLM.from_pretrained(folder)
    for key in ("n_ctx", "rotary_pct"):
        said.pop(key, None)
    (folder / "config.json").write_text(json.dumps(said))
    without = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = tiny.tokens(without.config)
    assert (tiny.logits(with_keys, input_ids) == tiny.logits(without, input_ids)).all()


CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f32"]
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"  # it knows tokenizers by a hash, and not the tests' own
convert_hf_to_gguf.main()
"""


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no checkout of llama.cpp")
@tiny.over(range(3))
def test_llama_cpp_converts_it(seed: int, tmp_path: Path) -> None:
    """Every weight is there, at its value (q and k but for the order of their rows)."""
    folder = exported(tmp_path, "llama", seed, attention_bias=False, mlp_bias=False)
    command = [sys.executable, "-c", CONVERT, os.environ["LLAMA_CPP"], str(folder), str(tmp_path / "student.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read = gguf.GGUFReader(tmp_path / "student.gguf")
    config, found = AutoConfig.from_pretrained(folder), tensors(folder)
    for key, value in (("embedding_length", config.hidden_size), ("attention.key_length", config.head_dim),
                       ("attention.head_count_kv", config.num_key_value_heads),
                       ("block_count", config.num_hidden_layers)):  # fmt: skip
        assert read.fields[f"llama.{key}"].contents() == value
    names = gguf.get_tensor_name_map(ARCHITECTURES["llama"], config.num_hidden_layers)
    kept = {tensor.name: tensor.data for tensor in read.tensors}
    assert len(kept) == len(found)
    for name, weight in found.items():
        there = kept[names.get_name(name, try_suffixes=(".weight",))]
        permuted = "q_proj" in name or "k_proj" in name
        ours, theirs = (np.sort(each, axis=None) if permuted else each for each in (weight, there))
        assert np.array_equal(ours, theirs), name
