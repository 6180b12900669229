"""The teacher's name -> folder, configuration, tokenizer and content id."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minitron_search.teachers import sources
from tests.tiny import over


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return folder


def test_a_folder_gives_its_configuration_tokenizer_and_path(model):
    assert sources.teacher_folder(str(model)) == model
    assert sources.teacher_config(str(model)).hidden_size == 16
    assert sources.load_tokenizer(str(model))("a a")["input_ids"] == [1, 1]


def test_the_embedded_configuration_needs_no_download(tmp_path):
    assert sources.teacher_config("smollm2-135m").num_hidden_layers == 30
    assert not (tmp_path / "cache").exists()


@over(itertools.product(
    [sources.teacher_folder, sources.teacher_config, sources.load_tokenizer],
    ["./mode", "/no/where/at/all", "owner/never-downloaded", "no such name", "gpt"],
))  # fmt: skip
def test_what_is_no_teacher_is_refused_with_what_would_be_one(ask, name, model, monkeypatch):
    monkeypatch.chdir(model.parent)
    with pytest.raises(ValueError, match=f"teacher.model: '{name}'.*'smollm2-135m'.*folder.*Hub name") as error:
        ask(name)
    assert name != "./mode" or "near it: model" in str(error.value)


def test_a_folder_without_configuration_or_weights_is_refused(model):
    weights = model / "model.safetensors"
    os.rename(weights, model / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="teacher.model: .* has no weights in safetensors"):
        sources.teacher_folder(str(model))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks 1 of its 2 weight files, first model-00002"):
        sources.teacher_folder(str(model))
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        sources.teacher_config(str(model))


def test_a_folder_without_a_tokenizer_is_refused(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="teacher.model: .*tokenizer"):
        sources.load_tokenizer(str(model))


def test_a_hub_name_is_fetched_with_what_is_needed_only(model, monkeypatch):
    asked = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(model)

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    assert sources.teacher_folder("owner/name") == model
    assert not any("bin" in pattern or pattern.startswith("*.s") for pattern in asked["owner/name"])


def test_the_fingerprint_is_of_the_content(model, tmp_path):
    first = sources.fingerprint(model)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "another"}, indent=7))
    assert sources.fingerprint(copy) == first

    weights = load_file(copy / "model.safetensors")
    last = sorted(weights)[-1]
    weights[last].view(-1)[-1] += torch.finfo(torch.float32).eps  # one number in one tensor
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert sources.fingerprint(copy) != first
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert sources.fingerprint(model) != first
