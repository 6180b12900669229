"""A whole run on all that a teacher may have beside its weights: what comes out is whole, and is what was scored."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_search.config.loading import load_config
from minitron_search.evaluation.winogrande import evaluate
from minitron_search.planning.prepare import prepare
from tests import tiny
from tests.runs import Command, events, rows, tiny_configuration

INLINE = ("--search.concurrency", "1", "--resources.launcher", "inline", "--search.trials", "1",
          "--search.rungs", "128", "--retraining.tokens", "256", "--search.controls", "false")  # fmt: skip
NAME = "<script>alert(1)</script> [x](https://evil.example) | \u202egpj"
TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, shared_ray: Path) -> Command:
    """`teacher` in bfloat16, and `padded`: another shape, the same tokenizer, 62 rows of padding."""
    folder = tmp_path_factory.mktemp("whole")
    shape = {"vocab_size": 258, "num_attention_heads": 6, "head_dim": 8, "max_position_embeddings": 512}
    config = tiny.config(**shape, hidden_size=48, intermediate_size=128, num_hidden_layers=6, num_key_value_heads=3)
    padded = tiny.config("qwen3", **{**shape, "vocab_size": 320}, hidden_size=60, num_hidden_layers=3)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATES
    for name, made in (("teacher", tiny.model(config).to(torch.bfloat16)), ("padded", tiny.model(padded))):
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    teacher = folder / "teacher"
    (teacher / "tokenizer_training").mkdir()
    (teacher / "tokenizer.py").write_text("open('PWNED', 'w')")
    (teacher / "generation_config.json").write_text('{"max_new_tokens": -5}')
    (folder / "secret").write_text("a key")
    (teacher / "LICENSE").symlink_to("../secret")
    (folder / "text.txt").write_text(tiny.prose(20_000))
    made = Command(folder, {**tiny_configuration(teacher, folder / "text.txt"), "name": NAME})
    made.environment["MINITRON_SEARCH_CACHE"] = str(shared_ray)
    return made


def kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean over positions of KL(teacher || student), from logits over the same tokens."""
    one, other = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_what_comes_out_is_whole_and_is_what_was_scored(command: Command) -> None:
    output, padded = command.folder / "out", command.folder / "padded"
    printed = command.main(output, *INLINE, "--distillation.teacher", str(padded))
    best = output / "best"
    assert {path.relative_to(best).as_posix() for path in best.rglob("*") if path.is_file()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(best).chat_template == TEMPLATES
    card = (best / "README.md").read_text()
    assert "generation_config.json is none that transformers loads" in card and "LICENSE is a link that leads" in card
    assert "generation_config.json is none" in printed and "\x1b[31m" not in printed and "\u202e" not in printed
    assert "| weights | bfloat16 |" in card and "<script" not in card

    student = AutoModelForCausalLM.from_pretrained(best)
    assert student.dtype == torch.bfloat16
    config = load_config(str(command.file), ["--output", str(command.folder / "none"), *INLINE])
    prepared = prepare(config, resume=False)
    row = next(row for row in rows(output) if row["arm"] == "retrained")
    loaded = student.float().eval()
    assert row["winogrande_margin"] == pytest.approx(evaluate(loaded, prepared.packed).margin, rel=1e-6, abs=1e-6)
    windows = torch.from_numpy(prepared.corpus.validation.astype(np.int64))
    said = tiny.logits(AutoModelForCausalLM.from_pretrained(padded).eval(), windows)
    assert said.shape[-1] == 320
    answers = tiny.logits(loaded, windows)
    assert row["kl"] == pytest.approx(kl(said[..., :258], answers), rel=1e-4)
    loss = torch.nn.functional.cross_entropy(answers[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert row["lm_loss"] == pytest.approx(float(loss), rel=1e-5)
    (taught,) = events(output, "taught_by")
    assert math.isfinite(taught["lm_loss"]) and json.loads((best / "config.json").read_text())["vocab_size"] == 258
