"""A student in the hands of llama.cpp and vLLM: every tensor has its GGUF name, every shape is in its configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_search.export.compatibility import complete
from minitron_search.export.student_folder import write_folder
from minitron_search.export.teacher_files import teacher_files
from minitron_search.pruning.trimming import trim
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
    given = {"tie_word_embeddings": True} if name in ("gemma", "gemma2", "cohere") else {}
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
