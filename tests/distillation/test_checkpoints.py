"""A training goes on from a checkpoint that is as it was written, and from no other."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from minitron_search.checkpoints.safe_reading import DamagedError
from minitron_search.distillation.checkpoints import CheckpointFolder
from minitron_search.records.logs import LocalFiles, LostError
from minitron_search.records.transfer import NodeTransfer
from tests.distillation.test_loop import SETTINGS, run
from tests.tiny import over

GARBAGE: dict[str, Any] = {
    "empty": "", "cut": '{"step": 6, "first_lo', "a list": "[1]", "nothing in it": "{}", "bytes": "\x00\x01",
    "deep": "[" * 100_000,
    "a step in words": json.dumps({"step": "six", "settings": {}, "first_losses": [], "last_loss": 1.0}),
    "losses in words": json.dumps({"step": 6, "settings": {}, "first_losses": ["a"], "last_loss": 1.0}),
    "settings that are none": json.dumps({"step": 6, "settings": [], "first_losses": [], "last_loss": 1.0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after six steps."""
    folder = tmp_path_factory.mktemp("checkpoint")
    six = dataclasses.replace(SETTINGS, checkpoint_tokens=6 * 64, total_tokens=6 * 64)
    run(six, checkpoints=CheckpointFolder(folder))
    return folder / "step-00000006"


@over(list(GARBAGE))
def test_a_state_that_is_garbage_is_damage(kind: str, tmp_path: Path, written: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / written.name))
    (folder / "state.json").write_text(GARBAGE[kind])
    with pytest.raises(DamagedError, match="is damaged: state.json"):
        run(resume=folder)


def test_other_settings_are_no_damage(written: Path) -> None:
    with pytest.raises(ValueError, match="learning_rate: 0.1, but the checkpoint") as raised:
        run(dataclasses.replace(SETTINGS, learning_rate=0.1), resume=written)
    assert not isinstance(raised.value, DamagedError)


def test_what_is_set_aside_leaves_the_one_before(tmp_path: Path, written: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    for step in (3, 6):
        shutil.copytree(written, checkpoints.at(step))
    os.truncate(next(checkpoints.at(6).glob("*.distcp")), 1000)
    newest = checkpoints.latest()
    assert newest == checkpoints.at(6)
    with pytest.raises(DamagedError, match=r"__0_0.distcp has 1,000 bytes of"):
        run(resume=newest)
    checkpoints.set_aside(newest)
    assert checkpoints.latest() == checkpoints.at(3)
    run(resume=checkpoints.at(3))
    checkpoints.set_aside(checkpoints.at(3))
    assert checkpoints.latest() is None


def test_a_run_that_was_taken_over_writes_no_checkpoint_and_removes_none(tmp_path: Path, written: Path) -> None:
    record = tmp_path / ".owner"
    record.write_text("theirs")
    checkpoints = CheckpointFolder(tmp_path / "checkpoint", files=LocalFiles((record, "ours")))
    shutil.copytree(written, checkpoints.at(3))
    shutil.copytree(written, checkpoints.at(6))
    with pytest.raises(LostError, match="taken over"):
        run(dataclasses.replace(SETTINGS, checkpoint_tokens=2 * 64), checkpoints=checkpoints)
    for harm in (checkpoints.keep_newest, checkpoints.free, lambda: checkpoints.set_aside(checkpoints.at(6))):
        with pytest.raises(LostError):
            harm()
    assert sorted(path.name for path in checkpoints.path.iterdir()) == ["step-00000003", "step-00000006"]


def test_what_is_freed_leaves_none_that_looks_whole_wherever_it_is_killed(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    transfer = NodeTransfer(storage.as_uri(), tmp_path / "run", run_is_shared=False)
    checkpoints = CheckpointFolder(tmp_path / "run" / "trials" / "a" / "checkpoint", transfer)
    for step in (3, 6):
        shutil.copytree(written, checkpoints.at(step))
        transfer.put(checkpoints.at(step))

    def killed(folder: Path, **_: object) -> None:
        if next(Path(folder).glob("**/*.distcp"), None):
            next(Path(folder).glob("**/*.distcp")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        checkpoints.free()
    assert not checkpoints.path.exists(), "and storage still has it whole"
    assert checkpoints.latest() == checkpoints.at(6)
    run(resume=checkpoints.at(6))
    checkpoints.free()
    assert checkpoints.latest() is None and not list(checkpoints.path.parent.iterdir())
    checkpoints.free()  # of none
