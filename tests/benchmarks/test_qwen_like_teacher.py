"""The command that trains the third teacher: a folder that loads, and the same weights if it was stopped."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import qwen_like_teacher
from tests import tiny

SHAPE = "vocab_size=2048,hidden_size=28,intermediate_size=32,num_hidden_layers=2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))


def test_it_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three steps the second leaves a checkpoint: the same command then takes the last step alone."""
    (tmp_path / "text.txt").write_text(tiny.prose(60_000))
    asked = [str(tmp_path / "text.txt"), str(tmp_path / "out"), "--tokens", "6144", "--checkpoint-tokens", "4096",
             "--length", "32", "--shape", SHAPE]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["qwen_like_teacher", *asked])
    threads, made = torch.get_num_threads(), []
    for _ in range(2):
        qwen_like_teacher.main()
        made.append(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model"))
    torch.set_num_threads(threads)
    first, second = capsys.readouterr().out.split("2,048 rows")[1:]
    assert "2,048 tokens: LM loss" in first and "2,048 tokens: LM loss" not in second
    assert "validation: LM loss" in second and "6,144 tokens: LM loss" in second
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, other)
    config = made[0].config
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == ("qwen2", 14, 2)
    assert not config.tie_word_embeddings and config.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.decode(tokenizer("the lazy dog").input_ids) == "the lazy dog"
