"""A group's mailbox: who takes the next trial, and when a group that has none gives its place to another."""

import threading
from pathlib import Path
from typing import Any

import pytest

from minitron_search.cluster import worker_groups
from minitron_search.cluster.worker_groups import next_job
from minitron_search.records.logs import LOCAL


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(worker_groups, "IDLE_S", 0.1)
    made = tmp_path / "search" / "group"
    made.mkdir(parents=True)
    return made


def in_thread(*arguments: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(next_job(LOCAL, *arguments)), daemon=True)
    thread.start()
    return thread, found


def test_an_idle_group_leaves_when_another_waits_for_a_place(folder: Path) -> None:
    thread, found = in_thread(folder, 0, 0)
    thread.join(0.3)
    assert thread.is_alive(), "it left though nobody wants its place"
    (folder.parent / "wanted").touch()
    thread.join(5)
    assert found == [None] and (folder / "left").exists()


def test_a_group_that_has_a_trial_takes_it_though_another_waits(folder: Path) -> None:
    (folder.parent / "wanted").touch()
    job = folder / "00000-a.job"
    job.touch()
    assert next_job(LOCAL, folder, 0, 0) == job
    assert not (folder / "left").exists()


def test_every_process_does_as_the_first(folder: Path) -> None:
    """A trial that comes as the first process leaves is begun by none."""
    thread, found = in_thread(folder, 0, 1)
    (folder / "00000-a.job").touch()
    thread.join(0.3)
    assert thread.is_alive(), "it took what the first process has not"
    assert next_job(LOCAL, folder, 0, 0) == folder / "00000-a.job"
    thread.join(5)
    assert found == [folder / "00000-a.job"]
    thread, found = in_thread(folder, 1, 1)
    (folder.parent / "wanted").touch()
    assert next_job(LOCAL, folder, 1, 0) is None
    (folder / "00001-b.job").touch()
    thread.join(5)
    assert found == [None]


def test_a_closed_stage_ends_every_process(folder: Path) -> None:
    (folder.parent / "closed").touch()
    thread, found = in_thread(folder, 0, 1)
    assert next_job(LOCAL, folder, 0, 0) is None
    thread.join(5)
    assert found == [None]
