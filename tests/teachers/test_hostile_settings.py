"""Settings of a config.json that no weight contradicts, and with which a model is of no use or never made."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from minitron_search.teachers import sources
from tests import tiny
from tests.tiny import over


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))


def why(folder: Path, **settings: Any) -> str:
    """What is said of the teacher with other settings."""
    file = folder / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), **settings}))
    try:
        with pytest.raises(ValueError, match="; valid: ") as error:
            sources.teacher_config(str(folder))
    finally:
        file.write_text(before)
    return str(error.value)


@over([
    ("rms_norm_eps", float("nan"), "NaN is no number"),
    ("rms_norm_eps", -1.0, "rms_norm_eps -1 "),
    ("attention_dropout", 2.0, "attention_dropout 2 "),
    ("return_dict", False, "return_dict false"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": -5.0}, "rope_theta -5 "),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}, "factor 0 "),
])  # fmt: skip
def test_a_setting_that_makes_every_number_nan_or_none_is_refused(
    name: str, value: Any, said: str, teacher: Path
) -> None:
    assert said in why(teacher, **{name: value})


@over(["num_labels", "num_hidden_layers"])
def test_a_list_without_end_is_never_made(name: str, teacher: Path) -> None:
    began = time.process_time()
    assert f"{name} 1,000,000,000" in why(teacher, **{name: 10**9})
    assert time.process_time() - began < 5


def test_a_size_of_zero_is_told_without_a_library_s_warning(teacher: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert "intermediate_size" in why(teacher, intermediate_size=0) or "mlp" in why(teacher, intermediate_size=0)
    assert not list(recwarn)
