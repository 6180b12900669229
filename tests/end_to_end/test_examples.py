"""Every example, by the commands that its own first lines say, on the toy model that the first of them writes."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from minitron_search.cli import main
from tests.runs import ROOT

pytestmark = pytest.mark.slow  # which has one process make what all of them read

EXAMPLES = ROOT / "examples"


def said(example: str) -> list[list[str]]:
    """The commands in a file's docstring or first comment, but for the one that makes the toy model."""
    head = re.split(r'"""\n|\n[a-z]', (EXAMPLES / example).read_text())[0]
    found = [shlex.split(line.lstrip("# ")) for line in head.splitlines() if re.match(r"[# ]+python ", line)]
    return [words for words in found if "examples/tiny_teacher.py" not in words or example == "tiny_teacher.py"]


class Place:
    """A folder that looks like the repository to an example, and where what it writes is thrown away."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "examples").symlink_to(EXAMPLES)

    def start(self, words: list[str]) -> None:
        """In a process of its own, as a shell does."""
        assert words[0] == "python"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words[1:]], cwd=self.folder, env=environment, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def run(self, words: list[str]) -> str:
        """In this one; what it printed."""
        _, file, *arguments = words
        with pytest.MonkeyPatch.context() as here, redirect_stdout(StringIO()) as printed:
            here.chdir(self.folder)
            if file == "-m":
                assert arguments[0] == "minitron_search.run" and main(arguments[1:]) == 0, printed.getvalue()
            else:
                here.setattr(sys, "argv", [file, *arguments])
                runpy.run_path(file, run_name="__main__")
        return printed.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shared_ray: Path) -> Place:
    made = Place(tmp_path_factory.mktemp("examples"))
    for words in said("tiny_teacher.py"):
        made.start(words)
    assert (made.folder / "tiny" / "model" / "model.safetensors").exists()
    return made


def test_every_example_is_tried_here() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "tiny_teacher.py", "prune_once.py", "own_text.yaml", "use_student.py", "compare_criteria.yaml",
        "prune_distill_compare.ipynb", "read_a_run.ipynb",
    }  # fmt: skip
    assert all(said(path.name) for path in EXAMPLES.iterdir() if path.is_file() and path.suffix != ".ipynb")


def test_prune_once(place: Place) -> None:
    (words,) = said("prune_once.py")
    printed = place.run(words)
    sizes = [int(number.replace(",", "")) for number in re.findall(r": ([\d,]+) parameters", printed)]
    assert sizes[1] < sizes[0] and "nan" not in printed
    student = AutoModelForCausalLM.from_pretrained(place.folder / "tiny" / "student")
    teacher = AutoModelForCausalLM.from_pretrained(place.folder / "tiny" / "model")
    assert student.num_parameters() == sizes[1]
    assert student.config.num_hidden_layers == teacher.config.num_hidden_layers - 1


def test_own_text_and_use_of_its_student(place: Place) -> None:
    planned, *_ = [place.run(words) for words in said("own_text.yaml")]
    assert "legal and in budget" in planned
    run = place.folder / "tiny" / "runs" / "own-text"
    retrained = [row for row in pq.read_table(run / "trials.parquet").to_pylist() if row["arm"] == "retrained"]
    assert len(retrained) == 1 and abs(retrained[0]["params"] - 110_000) <= 11_000
    assert (run / "report.html").exists()
    (words,) = said("use_student.py")
    assert words[2] == "tiny/runs/own-text/best"
    printed = place.run(words)
    assert f"{retrained[0]['params']:,} parameters, {retrained[0]['non_embedding_params']:,} without" in printed
    assert "The function returns" in printed


def test_compare_criteria(place: Place) -> None:
    (words,) = said("compare_criteria.yaml")
    place.run(words)
    found = pq.read_table(place.folder / "tiny" / "runs" / "criteria" / "ablation.parquet").to_pylist()
    assert {(row["arm"], row["baseline"], row["seeds"]) for row in found} == {("magnitude", "activation", 2)}
