"""The code of the notebook's document, and of the README, runs in its order on a tiny model in the place of SmolLM2."""

import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from minitron_search import NOTEBOOK
from tests.project.test_docs import ROOT, fenced
from tests.runs import Command

DOCUMENT = ROOT / "docs" / "notebook.md"


def test_what_the_readme_says_runs(
    tiny_command: Command, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_command.configuration
    teacher, text = (repr(config[section][key]) for section, key in (("teacher", "model"), ("corpus", "train")))
    smaller = {
        '"smollm2-135m", params="90M"': f'{teacher}, params="75%", text={text}, length=32, trials=2',
        '"smollm2-135m"': teacher,
        '"docstrings", student, tokens="64K"': f'{text}, student, tokens="1K", length=32, calibration=8, validation=8',
        '"runs/smollm2-135m"': repr(str(finished_run)),
    }  # fmt: skip
    (block,) = fenced(ROOT / "README.md", "python")
    for said, instead in smaller.items():
        assert said in block, said
        block = block.replace(said, instead)
    names: dict[str, Any] = {}
    with redirect_stdout(StringIO()) as printed:
        exec(compile(block, "README.md", "exec"), names)
    assert "kl" in printed.getvalue() and len(names["run"].trials)


def test_what_it_says_runs(
    tiny_command: Command, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that it searches is one that is finished, and goes on with nothing to do."""
    monkeypatch.chdir(tmp_path)
    output = shutil.copytree(finished_run, tmp_path / "again")  # going on says its stages once more
    config = tiny_command.configuration
    smaller = {
        '"smollm2-135m", params="90M"': f'{config["teacher"]["model"]!r}, params="75%", length=32, trials=2',
        '"smollm2-135m"': repr(config["teacher"]["model"]),
        '"docstrings", teacher, tokens="16K"':
            f'{config["corpus"]["train"]!r}, teacher, tokens="1K", length=32, calibration=8, validation=8',
        "intermediate_size=1024": "intermediate_size=96",
        "lengths=(2, 4)": "lengths=(1, 2)",
        "best(4)": "best(2)",
        '"smollm2.yaml", output="runs/x", search__trials=8':
            f'{str(tiny_command.file)!r}, output={str(output)!r}, search__concurrency=1, '
            'resources__launcher="inline"',
    }  # fmt: skip
    names: dict[str, Any] = {}
    blocks = fenced(DOCUMENT, "python")
    assert len(blocks) == 3
    for block in blocks:
        for said, instead in smaller.items():
            block = block.replace(said, instead)
        with redirect_stdout(StringIO()) as printed:
            exec(compile(block, str(DOCUMENT), "exec"), names)
        assert printed.getvalue()
    assert "kl" in repr(names["after"]) and (tmp_path / "student" / "config.json").is_file()
    assert all(f"`{name}(" in DOCUMENT.read_text() or f" `{name}(" in DOCUMENT.read_text() for name in NOTEBOOK)
