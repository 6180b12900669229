"""Write the tensors of a checkpoint, and let what the system refused be told as the system's refusal.

Where a disk is full, PyTorch's writer of archives raises a RuntimeError about positions in a file, with the OSError
behind it, which the processes of a group lose on the way to each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter


@contextmanager
def told_by_the_system() -> Iterator[None]:
    """While the block runs, raise the OSError behind an error in place of the error."""
    try:
        yield
    except Exception as error:
        refused = _refusal(error)
        if refused is None or refused is error:
            raise
        raise refused from None


class CheckpointWriter(FileSystemWriter):
    """Writes to a folder, as `FileSystemWriter` does; raises OSError where that could not write."""

    def write_data(self, *arguments: Any, **named: Any) -> Any:
        """Write this process's tensors."""
        with told_by_the_system():
            return super().write_data(*arguments, **named)


def _refusal(error: BaseException) -> OSError | None:
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    return inner
