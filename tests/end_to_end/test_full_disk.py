"""A disk that is full in mid-run: one message, and with room again the unbroken run's table."""

import errno
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from minitron_search.cluster.session import message_of
from minitron_search.records.directory import RunDirectory
from tests.runs import Command, in_background, rows

RESUME = "python -m minitron_search.run"
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
def test_a_full_disk_stops_the_run_with_one_message_and_costs_no_trial(
    tiny_command: Command, shared_ray: Path, finished_run: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, filled = RunDirectory(small_disk / "run"), list[Path]()

    def fill_at_a_rung() -> None:
        while not any(event["event"] == "rung_finished" and event["rung"] == 1 for event in output.events()):
            time.sleep(0.002)
        filled.append(fill(small_disk))

    in_background(fill_at_a_rung)
    said = tiny_command.main(output.root, *STAGES, status=1)
    assert (
        filled
        and os.strerror(errno.ENOSPC) in said
        and f"continue with: python -m minitron_search.run --output {output.root} --resume" in said
    )
    captured = capfd.readouterr()
    assert "Traceback" not in said + captured.out + captured.err
    finished = rows(output.root)
    assert not [event for event in output.events() if event["event"] == "trial_failed"]

    filled[0].unlink()
    tiny_command.main(output.root, *STAGES, "--resume")
    found = rows(output.root)
    assert found == [row for row in rows(finished_run) if row["arm"] not in ("untrained", "retrained")]
    assert len(finished) < len(found)


def test_what_the_system_refused_a_worker_is_told_without_a_traceback() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/run/checkpoint")
    task = RayTaskError("placed", "Traceback: many lines", full).as_instanceof_cause()
    group = WorkerGroupError("Traceback: many lines", {1: task})
    for error in (full, task, group, RayTaskError("above", "Traceback: many lines", group)):
        assert message_of(error) == "[Errno 28] No space left on device: '/data/run/checkpoint'"
    fault = RayTaskError("placed", "Traceback: many lines", TypeError("a fault")).as_instanceof_cause()
    assert message_of(fault) == "TypeError: a fault; MINITRON_SEARCH_DEBUG=1 shows where it happened"
