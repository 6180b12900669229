"""What the system refuses while a checkpoint is written is raised as the system's refusal, wherever the file ends."""

import errno
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from minitron_search.checkpoints.writing import CheckpointWriter, told_by_the_system

TENSORS = {f"tensor{number}": torch.arange(3_000.0) for number in range(5)}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A file that grows over `size` bytes is refused, as by a disk that has no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(folder: Path, size: int) -> BaseException | None:
    with files_of_at_most(size):
        try:
            dcp.save(TENSORS, storage_writer=CheckpointWriter(folder / str(size)), no_dist=True)
        except dcp.CheckpointException as error:
            return error
    return None


def test_wherever_the_files_end_the_refusal_is_the_last_line(tmp_path: Path) -> None:
    assert refused(tmp_path, 1 << 20) is None
    largest = max(path.stat().st_size for path in (tmp_path / str(1 << 20)).iterdir())
    for size in (0, 1, 100, 598, 4_096, largest // 2, largest - 1):
        error = refused(tmp_path, size)
        assert error is not None
        last = traceback.format_exception(error)[-1].strip().splitlines()[-1]
        assert last.startswith(f"OSError: [Errno {errno.EFBIG}]"), (size, last)


def test_an_archive_of_one_file_too(tmp_path: Path) -> None:
    with pytest.raises(OSError) as found, files_of_at_most(700), told_by_the_system():  # noqa: PT011 the number is below
        with open(tmp_path / "teacher.pt", "wb") as file:
            torch.save(TENSORS, file)
    assert found.value.errno == errno.EFBIG


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a fault"), told_by_the_system():
        raise RuntimeError("a fault")
