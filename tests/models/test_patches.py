"""Patches of transformers change no number and are undone; there is one file of them."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, masking_utils

from minitron_search.models.families import final_hidden
from minitron_search.models.patches import windows_are_not_packed
from tests import tiny

ROOT = Path(__file__).parents[2] / "minitron_search"


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_windows_give_the_same_bits_without_the_search_for_packed_sequences(model_type: str) -> None:
    before = masking_utils.find_packed_sequence_indices
    config = tiny.config(model_type)
    model, ids = tiny.model(config, 0).eval(), tiny.tokens(config, rows=2, length=12)
    with torch.no_grad():
        expected = final_hidden(model, ids)
        with windows_are_not_packed():
            assert masking_utils.find_packed_sequence_indices is not before
            assert torch.equal(final_hidden(model, ids), expected)
    assert masking_utils.find_packed_sequence_indices is before


def test_no_other_module_reaches_into_transformers() -> None:
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "models" / "patches.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "object" and getattr(node.value, "id", "") == "patch":
                assert path == ROOT / "cluster" / "ray_internals.py", path  # Ray's, by the same rule
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            assert "masking_utils" not in names, path


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_generation_defaults_that_are_refused_cost_no_load(place: str, tmp_path: Path) -> None:
    folder = tiny.teacher_folder(tmp_path / "teacher")
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    path = folder / place
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_return_sequences": 4}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").num_return_sequences in (None, 1)


def test_generation_defaults_that_are_valid_are_loaded_as_ever(tmp_path: Path) -> None:
    folder = tiny.teacher_folder(tmp_path / "teacher")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true, "eos_token_id": [1, 7]}')
    loaded = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (loaded.temperature, loaded.do_sample, loaded.eos_token_id) == (0.5, True, [1, 7])
    with pytest.raises(OSError, match="nowhere"):
        GenerationConfig.from_pretrained(tmp_path / "nowhere")
