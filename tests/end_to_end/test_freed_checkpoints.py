"""Checkpoints go when nothing goes on from them, and whoever is killed in between goes on all the same."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from minitron_search.cluster import tuner
from minitron_search.pipeline import stages
from minitron_search.records.directory import RunDirectory
from tests.runs import Command, rows

INLINE = ("--resources.launcher", "inline", "--search.concurrency", "1")


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("trials/*/*checkpoint*"))


def test_none_is_left_and_a_student_that_is_lost_is_trained_again(
    finished_run: Path, tiny_command: Command, tmp_path: Path
) -> None:
    assert not checkpoints(finished_run)
    output = Path(shutil.copytree(finished_run, tmp_path / "again"))
    shutil.rmtree(output / "best")
    tiny_command.main(output, *INLINE, "--resume")
    again, before = ((folder / "best" / "model.safetensors").read_bytes() for folder in (output, finished_run))
    assert again == before and not checkpoints(output) and rows(output) == rows(finished_run)


def test_a_kill_before_and_while_they_go(
    finished_run: Path, tiny_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, asked = tmp_path / "killed", list[list[str]]()

    def killed(run_dir: RunDirectory, trials: Iterable[str], on_nodes: bool = True) -> None:
        asked.append(list(trials))
        raise KeyboardInterrupt

    for module, moment in ((tuner, "search"), (stages, "retrained")):
        with monkeypatch.context() as patched:
            patched.setattr(module, "free_checkpoints", killed)
            tiny_command.main(output, *INLINE, *(["--resume"] if asked else []), status=130)
        assert len(asked[-1]) and all(trial.startswith(moment) for trial in asked[-1]), asked
        assert checkpoints(output)
    assert (output / "best" / "model.safetensors").exists(), "written whole before its checkpoint goes"
    tiny_command.main(output, *INLINE, "--resume")
    assert not checkpoints(output) and rows(output) == rows(finished_run)
