"""A run from a notebook: started, continued and read."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import minitron_search as ms
from minitron_search.ownership.owner import HeldError, held
from tests.runs import Command, rows


def test_a_run_is_read_as_plain_objects(finished_run: Path) -> None:
    run = ms.open_run(finished_run)
    assert set(run.trials["arm"]) == {"teacher", "search", "random_pruned", "random_init", "untrained", "retrained"}
    assert {"run_started", "run_finished"} <= set(run.events["event"]) and run.config["name"] == "tiny"
    best = run.best()
    retrained = run.trials[run.trials["arm"] == "retrained"].iloc[0]
    assert best.model.num_parameters() == best.shape.params == retrained["params"]
    assert "retrained" in repr(run) and str(finished_run) in repr(run) and "retrained" in run._repr_html_()
    with pytest.raises(ValueError, match="holds no best-2/"):
        run.best(2)


def test_reading_and_reporting_need_neither_torch_nor_ray(finished_run: Path, tmp_path: Path) -> None:
    """With both out of reach, and what brings them."""
    output = Path(shutil.copytree(finished_run, tmp_path / "read"))
    (output / "report.html").unlink()
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ray", "transformers", "datasets", "lm_eval"):
            raise ImportError(f"{{name}} is out of reach")
sys.meta_path.insert(0, Blocked())
import minitron_search as ms
run = ms.open_run({str(output)!r})
assert len(run.trials) and len(run.events) and "retrained" in repr(run) and run._repr_html_()
from analysis.report import main
assert main([{str(output)!r}]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (output / "report.html").is_file()


def test_a_search_goes_on_with_what_is_there_and_refuses_what_is_wrong(
    finished_run: Path, tiny_command: Command, shared_ray: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(finished_run, tmp_path / "again"))
    (output / "report.html").unlink()
    flags = {"search__concurrency": 1, "resources__launcher": "inline"}
    run = ms.search(tiny_command.file, output=output, **flags)
    assert run.report.is_file() and rows(output) == rows(finished_run)
    pd.testing.assert_frame_equal(run.trials, ms.open_run(finished_run).trials)
    with pytest.raises(ValueError, match="search.trials: 'many'"):
        ms.search(tiny_command.file, output=tmp_path / "new", search__trials="many")
    with pytest.raises(ValueError, match="did you mean search.trials"):
        ms.search(tiny_command.configuration, output=tmp_path / "new", search__trails=3)
    assert not (tmp_path / "new").exists()
    with held(str(output)), pytest.raises(HeldError):
        ms.search(tiny_command.file, output=output, **flags)
