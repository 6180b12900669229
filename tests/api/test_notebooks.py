"""The notebooks run from top to bottom on a tiny model in the place of SmolLM2, and are kept with what they showed."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.project.test_docs import ROOT
from tests.runs import Command

EXAMPLES = ROOT / "examples"


def cells(notebook: str) -> list[dict[str, Any]]:
    found = json.loads((EXAMPLES / notebook).read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def shown(cell: str, names: dict[str, Any]) -> str:
    """What a notebook shows of a cell: its last expression, as HTML where that has any."""
    *before, last = ast.parse(cell).body
    exec(compile(ast.Module(before, []), "cell", "exec"), names)
    if not isinstance(last, ast.Expr):
        exec(compile(ast.Module([last], []), "cell", "exec"), names)
        return ""
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)


def run_all(notebook: str, instead: dict[str, str]) -> list[str]:
    names: dict[str, Any] = {}
    said = []
    for cell in cells(notebook):
        code = "".join(cell["source"])
        for there, here in instead.items():
            code = code.replace(there, here)
        said.append(shown(code, names))
    return said


def test_pruning_distilling_and_comparing(
    tiny_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_command.configuration
    said = run_all("prune_distill_compare.ipynb", {
        '"smollm2-135m"': repr(config["teacher"]["model"]),
        '"docstrings", teacher, tokens="16K"':
            f'{config["corpus"]["train"]!r}, teacher, tokens="1K", length=32, calibration=8, validation=8',
        "hidden_size=448, intermediate_size=1024": "hidden_size=42, intermediate_size=96",
    })  # fmt: skip
    assert all(said) and (tmp_path / "student" / "config.json").is_file()


def test_reading_a_run(finished_run: Path) -> None:
    said = run_all("read_a_run.ipynb", {'"runs/smollm2-135m"': repr(str(finished_run))})
    assert all(said) and "search" in said[3]


@pytest.mark.parametrize("notebook", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_they_are_kept_with_what_they_showed_of_smollm2(notebook: str) -> None:
    for cell in cells(notebook):
        assert cell["outputs"], "".join(cell["source"])
        assert all(output["output_type"] != "error" for output in cell["outputs"])
