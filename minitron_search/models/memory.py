"""Giving memory back to the machine."""

import contextlib
import ctypes
import gc


def release_memory() -> None:
    """Give back what a large model left behind: glibc keeps it for a process that may never need it again.

    Measured after the teacher's conversion: 975 MiB before, 592 MiB after.
    """
    gc.collect()  # a model and its optimizer hold each other
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
