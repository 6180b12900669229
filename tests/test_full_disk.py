"""A disk that is full in mid-run: one message, and with room again the unbroken run's table."""

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from minitron_search.cluster import words_of
from minitron_search.run_directory import RunDirectory
from tests.runs import Command, rows, tiny_inputs

STAGES = ("--stages", "importance,search", "--search.concurrency", "1", "--resources.launcher", "inline")


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of its own, of 60 MB."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"mounting is not permitted here: {made.stderr.strip()}")
        yield Path(folder)
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves no byte of it."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"x" * 512)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return disk / "filler"


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_one_message_and_costs_no_trial(tmp_path: Path, small_disk: Path) -> None:
    command = Command(tmp_path, tiny_inputs(tmp_path))
    unbroken, output = tmp_path / "unbroken", small_disk / "run"
    command.run(unbroken, *STAGES)

    process = command.start(output, *STAGES)
    assert process.stdout is not None
    for line in process.stdout:
        if "rung 1" in line:
            filler = fill(small_disk)
            break
    said = process.stdout.read()
    assert process.wait(timeout=300) == 1
    assert os.strerror(errno.ENOSPC) in said and "--resume continues it" in said and "Traceback" not in said
    finished = rows(output)
    assert not [event for event in RunDirectory(output).events() if event["event"] == "trial_failed"]

    filler.unlink()
    command.run(output, *STAGES, "--resume")
    assert rows(output) == rows(unbroken)
    assert len(finished) < len(rows(output))


def test_what_the_system_refused_a_worker_is_told_without_a_traceback() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/run/checkpoint")
    task = RayTaskError("placed", "Traceback: many lines", full).as_instanceof_cause()
    group = WorkerGroupError("Traceback: many lines", {1: task})
    for error in (full, task, group, RayTaskError("above", "Traceback: many lines", group)):
        assert words_of(error) == "[Errno 28] No space left on device: '/data/run/checkpoint'"
    fault = RayTaskError("placed", "Traceback: many lines", TypeError("a fault")).as_instanceof_cause()
    assert "Traceback: many lines" in words_of(fault)
