"""A run in storage: what is there is whole, what was lost here comes back, and nothing that exists is lost."""

import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSystem

from minitron_search.records import bucket as module
from minitron_search.records.bucket import BucketCopy
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import is_uri, working_folder


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


def mirror(there: Path, run: RunDirectory) -> BucketCopy:
    there.mkdir(exist_ok=True)
    return BucketCopy(there.as_uri(), run)


def contents(root: Path) -> dict[str, bytes]:
    """What is in a folder but for marks, and for folders that have a dot."""
    names = [file.relative_to(root) for file in sorted(root.rglob("*")) if file.is_file() and file.suffix != ".whole"]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts[:-1])]
    return {str(name): (root / name).read_bytes() for name in shown}


def fill(run: RunDirectory, step: int = 8) -> None:
    run.write_config({"seed": 0})
    run.event("run_started")
    run.start_trial("a", {"trial": "a"})
    run.log_step("a", loss=1.0)
    checkpoint = run.checkpoint("a") / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(range(256)) * step)
    (checkpoint / ".metadata").write_bytes(b"as torch.distributed.checkpoint calls it")
    (run.scratch / "groups").mkdir(parents=True, exist_ok=True)
    (run.scratch / "groups" / "job").write_text("not kept")
    (run.best() / "sub").mkdir(parents=True, exist_ok=True)
    (run.best() / "sub" / "config.json").write_text("{}")


def test_what_is_here_comes_back_on_an_empty_machine(tmp_path: Path, run: RunDirectory, there: Path) -> None:
    fill(run)
    assert not mirror(there, run).exists()
    mirror(there, run).push()
    assert contents(there) == contents(run.root) and mirror(there, run).exists()
    other = RunDirectory(tmp_path / "other machine")
    mirror(there, other).pull()
    assert contents(other.root) == contents(run.root)
    assert not other.scratch.exists()


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is put there from now on."""
    names, original = list[str](), BucketCopy.put

    def noted(self: BucketCopy, file: Path, name: Any) -> None:
        names.append(str(name))
        original(self, file, name)

    monkeypatch.setattr(BucketCopy, "put", noted)
    return names


def test_only_what_changed_is_put_there_again(run: RunDirectory, there: Path, put: list[str]) -> None:
    fill(run)
    kept = mirror(there, run)
    kept.push()
    assert len(put) == len(contents(run.root))
    put.clear()
    kept.push()
    assert put == []
    run.event("tick")
    kept.push()
    assert put == ["events.jsonl"]


def test_a_checkpoint_that_was_replaced_is_gone_there_too(run: RunDirectory, there: Path) -> None:
    fill(run)
    kept = mirror(there, run)
    kept.push()
    newer = run.checkpoint("a") / "step-00000016"
    newer.mkdir()
    (newer / "weights").write_text("new")
    shutil.rmtree(run.checkpoint("a") / "step-00000008")
    kept.push()
    assert contents(there) == contents(run.root)
    assert [mark.name for mark in there.rglob("trials/a/checkpoint/*.whole")] == ["step-00000016.whole"]


@pytest.mark.parametrize("gone", ["step-00000008", "step-00000008.whole"])
def test_what_is_half_removed_there_already_is_removed(run: RunDirectory, there: Path, gone: str) -> None:
    fill(run)
    kept = mirror(there, run)
    kept.push()
    checkpoint = there / "trials" / "a" / "checkpoint"
    shutil.rmtree(checkpoint / gone, ignore_errors=True)
    (checkpoint / gone).unlink(missing_ok=True)
    shutil.rmtree(run.checkpoint("a") / "step-00000008")
    kept.push()
    assert not list(checkpoint.iterdir())
    kept.push()


def test_a_folder_that_is_not_whole_there_does_not_come_back(tmp_path: Path, run: RunDirectory, there: Path) -> None:
    fill(run)
    mirror(there, run).push()
    (there / "best.whole").unlink()
    other = RunDirectory(tmp_path / "other")
    mirror(there, other).pull()
    assert not other.best().exists() and (other.checkpoint("a") / "step-00000008" / "weights").exists()
    mirror(there, run).pull()  # here is what wrote it: it is whole, and put there again
    assert run.best().exists()
    with mirror(there, run).kept_up_to_date():
        pass
    assert (there / "best.whole").exists()


def test_a_run_that_goes_on_puts_no_whole_folder_there_again_and_takes_away_what_is_gone(
    run: RunDirectory, there: Path, put: list[str]
) -> None:
    fill(run)
    mirror(there, run).push()
    shutil.rmtree(run.checkpoint("a") / "step-00000008")
    put.clear()
    with mirror(there, run).kept_up_to_date():
        pass
    assert put and not any(name.startswith("best") for name in put)
    assert contents(there) == contents(run.root)


@pytest.mark.parametrize("ahead", ["here", "there"])
def test_the_copy_whose_log_of_events_goes_on_from_the_others_is_kept(
    tmp_path: Path, run: RunDirectory, there: Path, ahead: str
) -> None:
    fill(run)
    mirror(there, run).push()
    other = RunDirectory(tmp_path / "other")
    mirror(there, other).pull()
    (run if ahead == "here" else other).log_step("a", loss=0.5)
    (run if ahead == "here" else other).event("more")
    if ahead == "there":  # another machine went on, and put it there
        mirror(there, other).push()
    mirror(there, run).pull()
    assert [event["event"] for event in run.events()] == ["run_started", "more"]
    assert [line["loss"] for line in run.metrics("a")] == [1.0, 0.5]


def test_storage_that_fails_for_a_while_loses_nothing_and_says_so(
    run: RunDirectory, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    monkeypatch.setattr(module, "say", said.append)
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    monkeypatch.setattr(module, "BACK_OFF_S", (0.02, 0.05))
    fill(run)
    kept, gone, failed = mirror(there, run), threading.Event(), threading.Event()
    original = BucketCopy.put

    def put(self: BucketCopy, file: Path, name: Any) -> None:
        if gone.is_set():
            failed.set()
            raise OSError("no route to storage")
        original(self, file, name)

    monkeypatch.setattr(BucketCopy, "put", put)
    gone.set()
    with kept.kept_up_to_date():
        assert failed.wait(10)
        run.event("while it is gone")
        while not said:
            time.sleep(0.01)
        gone.clear()
        while len(said) < 2:
            time.sleep(0.01)
    assert contents(there) == contents(run.root)
    assert said[0] == "storage: no route to storage; everything is kept here, and tried again"
    assert said[1].startswith("storage: back after")
    assert {"storage_failed", "storage_back"} <= {event["event"] for event in run.events()}


def test_storage_that_never_comes_back_ends_with_where_everything_is(
    run: RunDirectory, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    monkeypatch.setattr(module, "BACK_OFF_S", (0.02, 0.05))
    fill(run)
    kept = mirror(there, run)

    def put(self: BucketCopy, file: Path, name: Any) -> None:
        raise OSError("no route to storage")

    monkeypatch.setattr(BucketCopy, "put", put)
    with pytest.raises(RuntimeError, match=f"no route to storage.*{run.root}"), kept.kept_up_to_date():
        pass


def test_a_study_that_is_being_written_is_whole_there(run: RunDirectory, there: Path) -> None:
    fill(run)
    with sqlite3.connect(run.study) as study:
        study.execute("create table t (x)")
        study.executemany("insert into t values (?)", [(n,) for n in range(100)])
    open_transaction = sqlite3.connect(run.study)
    open_transaction.execute("insert into t values (100)")  # not committed
    mirror(there, run).push()
    with sqlite3.connect(there / "study.db") as copy:
        assert copy.execute("select count(*) from t").fetchone() == (100,)
    assert not list(run.root.glob(".study*"))


def test_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path))
    assert not is_uri("runs/a") and not is_uri("file:///runs/a") and is_uri("s3://bucket/a") and is_uri("gs://b/a")
    one = working_folder("s3://bucket/a?endpoint_override=http%3A//127.0.0.1:1")
    assert one == working_folder("s3://bucket/a/") and one.parent == tmp_path / "runs" and one.name.startswith("a-")
    assert one != working_folder("s3://other/a")
    assert RunDirectory("s3://bucket/a").root == one and RunDirectory("file:///runs/a").root == Path("/runs/a")


@pytest.mark.parametrize("uri", ["s3://", "s3:///a", "s3://bucket/run?no_such_option=1"])
def test_an_address_that_is_none_is_refused_by_name(uri: str, run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="output: "):
        BucketCopy(uri, run).check_writable()


def test_storage_that_cannot_be_written_to_is_refused(run: RunDirectory, there: Path, monkeypatch: Any) -> None:
    kept = mirror(there, run)
    kept.check_writable()
    assert not list(there.iterdir())
    shutil.rmtree(there)
    there.write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="cannot be written to"):
        kept.check_writable()
    assert isinstance(kept.storage, FileSystem)


def test_a_checkpoint_that_goes_while_it_is_put_there_leaves_nothing(
    run: RunDirectory, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ablation deletes the checkpoints of an arm that has ended while its storage is brought up to date."""
    fill(run)
    bucket, put = mirror(there, run), BucketCopy.put

    def put_and_go(self: BucketCopy, file: Path, name: Any) -> None:
        put(self, file, name)
        if file.name == ".metadata":
            shutil.rmtree(run.checkpoint("a"))

    monkeypatch.setattr(BucketCopy, "put", put_and_go)
    bucket.push()
    assert not list(there.rglob("step-*")) and contents(there) == contents(run.root)
