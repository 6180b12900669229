"""One content-addressed cache: what takes time is computed once, for every run that needs the same.

    <cache folder>/<kind>/<content id of everything that its value depends on>
    <cache folder>/locks/

An entry appears whole or not at all: it is made beside its place and renamed into it, under a lock, so that of several
processes that need it one computes it and the others wait. NFS renames and locks as a local disk does (`flock` holds
between machines since Linux 2.6.12).
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from minitron_search.records.paths import cache_folder

# Part of every key: raise a number when the same inputs give another value. What older code kept is then left alone.
FORMULA = {
    "corrected": 1,  # the optimizer, schedule, loss or LoRA of a teacher's correction
    "depth_pieces": 1,  # LM loss, Winogrande, BI, angular distance or Taylor of a cut
    "docstrings": 1,  # which documentation strings are documents, and their order
    "evaluation": 1,  # the numbers made of lm-eval's answers
    "importance": 1,  # the scores, or the composition of rounds
    "laco": 1,  # which layers LaCo merges
    "teacher_cache": 2,  # what is stored of the teacher for a window
    "teachers": 1,  # the conversion of the embedded teacher
    "tokens": 1,  # how documents become token ids, or which documents are left out
}


def content_id(content: Any, digits: int = 10) -> str:
    """Return the first hexadecimal digits of the SHA-256 of `content`: equal content has equal ids on every machine.

    Bytes are hashed as they are, everything else as JSON with sorted keys; in it, an array is its dtype, shape and
    elements, and a Path the bytes of the file it names. Raises TypeError for what JSON cannot write.
    """
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, default=_in_json).encode()
    return hashlib.sha256(data).hexdigest()[:digits]


def _in_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, content_id(value.tobytes(), digits=64)]
    if isinstance(value, Path):
        return file_hash(value)
    raise TypeError(f"{type(value).__name__} has no content id")


def entry(kind: str, key: str, suffix: str = "") -> Path:
    """Return the path at which the cache keeps the `kind` found by `key`; nothing need be there."""
    return cache_folder() / kind / f"{key}{suffix}"


def make_once(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> bool:
    """Make the file or folder at `path` unless it exists; return True where this call made it.

    `write(partial)` makes it at the path it is given, where nothing is. `durable`: on disk when this returns, so that
    not even a machine that loses power leaves an entry with a file cut short.
    """
    if path.exists():
        return False
    with lock(path):
        if path.exists():
            return False
        _replace(path, path.with_name(f".{path.name}.partial"), write, durable)
    return True


def replace(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Write a file that appears whole or not at all, in the place of one that is there. Arguments as `make_once`."""
    _replace(path, path.with_name(f".{path.name}.{os.getpid()}.partial"), write, durable)


def lock(path: Path) -> FileLock:
    """Return the lock that whoever makes `path` holds; the kernel releases it when its holder is killed."""
    folder = cache_folder()
    place = path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / content_id(str(place)))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file: read once (a second a gigabyte), then remembered by path, size and time."""
    path = path.resolve()
    status = path.stat()
    remembered = entry("hashes", content_id(f"{path} {status.st_size} {status.st_mtime_ns}".encode(), digits=32))
    if remembered.exists():
        return remembered.read_text()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file changed in this very moment could change again within its clock's tick and keep its time.
    if time.time() - status.st_mtime > 2:
        replace(remembered, lambda partial: partial.write_text(digest), durable=True)
    return digest


def _replace(path: Path, partial: Path, write: Callable[[Path], object], durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)  # left by a process that was killed
    try:
        write(partial)
        if durable:
            for written in (*partial.rglob("*"), partial):
                _fsync(written)
        os.replace(partial, path)
    except BaseException as error:
        _remove(partial)
        if not (isinstance(error, OSError) and path.is_dir()):  # there by now: fetched from storage, the same content
            raise
    if durable:
        _fsync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
