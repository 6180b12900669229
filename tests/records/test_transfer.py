"""Folders between nodes: each arrives whole or not at all, once, and nothing that is not whole is seen."""

import pickle
import shutil
import threading
from pathlib import Path

import pytest

from minitron_search.distillation.checkpoints import CheckpointFolder
from minitron_search.records import transfer as module
from minitron_search.records.transfer import NodeTransfer


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    made = tmp_path / "storage"
    made.mkdir()
    return made


@pytest.fixture
def transfer(tmp_path: Path, storage: Path) -> NodeTransfer:
    return NodeTransfer(storage.as_uri(), tmp_path / "node" / "run", run_is_shared=False)


def folder_in(parent: Path, text: str = "weights") -> Path:
    (parent / "sub").mkdir(parents=True)
    (parent / "config.json").write_text("{}")
    (parent / "sub" / "weights").write_text(text)
    return parent


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_reaches_another_node(tmp_path: Path, transfer: NodeTransfer, storage: Path, inside: bool) -> None:
    folder = folder_in(transfer.root / "trials" / "a" / "x" if inside else tmp_path / "node" / "cache" / "x")
    before = contents(folder)
    transfer.put(folder)
    shutil.rmtree(tmp_path / "node")  # as on a node that has nothing
    again = pickle.loads(pickle.dumps(transfer))
    again.fetch(folder)
    assert contents(folder) == before
    there = storage / ("trials/a/x" if inside else f".cache/{folder.relative_to('/')}")
    assert contents(there) == before and there.with_name("x.whole").exists()
    assert [file.name for file in folder.parent.iterdir() if file.is_dir()] == ["x"]


def test_what_is_not_marked_is_not_there(transfer: NodeTransfer) -> None:
    folder = folder_in(transfer.root / "x")
    transfer.put_files(folder)
    shutil.rmtree(folder)
    assert not transfer.has(folder) and transfer.names(folder.parent) == []
    with pytest.raises(FileNotFoundError, match="neither on this node nor in file://"):
        transfer.fetch(folder)
    assert not folder.exists()


def test_what_is_there_is_not_put_again_and_what_is_here_not_fetched(transfer: NodeTransfer, storage: Path) -> None:
    folder = folder_in(transfer.root / "x")
    transfer.put(folder)
    (folder / "config.json").write_text("changed")
    transfer.put(folder)
    assert (storage / "x" / "config.json").read_text() == "{}"
    transfer.fetch(folder)
    assert (folder / "config.json").read_text() == "changed"


def test_a_run_that_all_nodes_see_does_not_travel_but_caches_do(tmp_path: Path, storage: Path) -> None:
    transfer = NodeTransfer(storage.as_uri(), storage, run_is_shared=True)
    checkpoint, cache = folder_in(storage / "trials" / "a"), folder_in(tmp_path / "cache")
    transfer.put(checkpoint)
    transfer.put(cache)
    assert not transfer.travels(checkpoint) and not checkpoint.with_name("a.whole").exists()
    assert transfer.travels(cache) and transfer.has(cache)
    transfer.fetch(storage / "trials" / "b")  # nobody's to fetch
    transfer.clear(".cache")
    assert not (storage / ".cache").exists() and checkpoint.exists()


def test_of_many_processes_that_need_a_folder_one_fetches_it(
    transfer: NodeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copied = folder_in(transfer.root / "x"), list[str]()
    transfer.put(folder)
    shutil.rmtree(folder)
    original = module.copy_files

    def counted(source: str, *arguments: object, **named: object) -> None:
        copied.append(source)
        original(source, *arguments, **named)

    monkeypatch.setattr(module, "copy_files", counted)
    threads = [threading.Thread(target=transfer.fetch, args=(folder,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copied) == len(contents(folder)) == 2


def test_storage_that_fails_for_a_while_is_waited_for(transfer: NodeTransfer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF_S", (0.01, 0.02))
    left, original = [3], module.copy_files

    def failing(*arguments: object, **named: object) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError("no route to storage")
        original(*arguments, **named)

    monkeypatch.setattr(module, "copy_files", failing)
    folder = folder_in(transfer.root / "x")
    transfer.put(folder)
    assert transfer.has(folder) and not left[0]
    left[0] = 10**9
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    with pytest.raises(OSError, match="no route"):
        transfer.put(folder_in(transfer.root / "y"))
    assert not transfer.has(transfer.root / "y")


def test_the_newest_checkpoint_is_the_newest_of_any_node(transfer: NodeTransfer) -> None:
    folder = transfer.root / "trials" / "a" / "checkpoint"
    for step in (8, 16):
        transfer.put(folder_in(folder / f"step-{step:08d}", str(step)))
    shutil.rmtree(folder)
    folder_in(
        folder / "step-00000024"
    )  # whoever wrote it was lost before it was put there, and its row was not written
    newest = CheckpointFolder(folder, transfer).latest()
    assert newest == folder / "step-00000016" and (newest / "sub" / "weights").read_text() == "16"
    CheckpointFolder(folder, transfer).keep_newest()
    assert transfer.names(folder) == ["step-00000016"]
    assert CheckpointFolder(transfer.root / "none", transfer).latest() is None


@pytest.mark.parametrize(
    "uri, found",
    [
        ("s3://bucket/run", "s3://bucket/run/.ray"),
        ("s3://bucket/run/?region=x&y=z", "s3://bucket/run/.ray?region=x&y=z"),
    ],
)
def test_addresses_beneath_a_run(uri: str, found: str) -> None:
    assert NodeTransfer(uri, Path("/run"), run_is_shared=False).address(".ray") == found
