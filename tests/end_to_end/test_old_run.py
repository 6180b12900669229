"""A run directory that an earlier version wrote is read, reported and continued (fixtures/README.md)."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import yaml

from analysis.report import write_report
from minitron_search.cli import main
from minitron_search.records.directory import RunDirectory
from tests.checkpoints.test_safe_reading import Touch
from tests.runs import events, rows

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be written to, and the working directory: the paths in its configuration are relative."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


def test_a_finished_old_run_is_read_and_reported(old: Path) -> None:
    run = RunDirectory(old / "finished")
    assert len(rows(run.root)) == 16 and run.read_depth() and run.read_evidence()["finalists"]
    page = write_report(run).read_text()
    assert "could not be made" not in page and "search-57ef2e6cf4" in page


def test_what_is_refused_once_damage_was_set_aside_has_written(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(old / "finished")
    begun = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump({**begun, "stages": ["search", "retrain"]}))
    os.truncate(run.importance, 100)
    assert main(["--output", "finished", "--resume"]) == 1
    assert "search needs importance" in capsys.readouterr().err and not run.importance.exists()
    assert main(["--output", "finished", "--resume"]) == 2, "nothing is left to set aside"


@pytest.mark.parametrize("hostile", [False, True])
def test_an_interrupted_old_run_continues_to_the_finished_table(
    old: Path, shared_ray: Path, hostile: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a checkpoint in mid-search; from the trim, where that checkpoint would run code of somebody else's.

    Other processors round otherwise: numbers agree to 1e-4.
    """
    begun = rows(old / "interrupted")
    if hostile:
        (checkpoint,) = (old / "interrupted").glob("trials/*/checkpoint/step-*")
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Touch(old / "ran")))
    assert main(["--config", "old.yaml", "--output", "interrupted", "--resume"]) == 0
    assert not (old / "ran").exists()
    damaged = events(old / "interrupted", "checkpoint_damaged")
    assert len(damaged) == hostile and all("names posix.mkdir" in event["message"] for event in damaged)
    assert ("goes on from the trim" in capsys.readouterr().out) == hostile
    ours, theirs = rows(old / "interrupted"), rows(old / "finished")
    assert len(begun) < len(ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == {name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
                        for name, value in other.items()}  # fmt: skip
