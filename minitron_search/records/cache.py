"""One content-addressed cache: what takes time is computed once, for every run that needs the same.

    <cache folder>/<kind>/<content id of everything that its value depends on>
    <cache folder>/locks/
    <cache folder>/hashes/       SHA-256 of files that were read before
    <cache folder>/contents/     of every entry that `make_once` made: its files, and the formula it was made by

An entry appears whole or not at all: it is made beside its place and renamed into it, under a lock, so that of several
processes that need it one computes it and the others wait. NFS renames and locks as a local disk does (`flock` holds
between machines since Linux 2.6.12). One that is torn all the same (the machine lost power, a disk was full, a file was
cut by hand), or that another version of a formula made, is made again, which is said in a line.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from minitron_search.messages.console import say
from minitron_search.records.paths import cache_folder
from minitron_search.records.whole import why_torn

# Part of every key: raise a number when the same inputs give another value. What older code kept is then left alone.
FORMULA = {
    "corrected": 1,  # the optimizer, schedule, loss or LoRA of a teacher's correction
    "depth_pieces": 1,  # LM loss, Winogrande, BI, angular distance or Taylor of a cut
    "docstrings": 1,  # which documentation strings are documents, and their order
    "evaluation": 1,  # the numbers made of lm-eval's answers
    "importance": 1,  # the scores, or the composition of rounds
    "laco": 1,  # which layers LaCo merges
    "permuted": 1,  # the order of a permuted teacher's weights, or a rotation; not part of its key
    "teacher_cache": 2,  # what is stored of the teacher for a window
    "teachers": 1,  # the conversion of the embedded teacher
    "tokens": 1,  # how documents become token ids, or which documents are left out
}
HASHED_WHOLE = 2**24  # bytes: of longer files both ends are compared, for a hash takes a second a gigabyte
END = 2**20  # bytes of either end
TOLD_EVERY_S = 5.0
TOLD_AT_ONCE = 2e9  # bytes: no shard of a large model takes so long that its turn would come

Value = TypeVar("Value")


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
    """Make the file or folder at `path` unless it is there and whole; return True where this call made it.

    `write(partial)` makes it at the path it is given, where nothing is. `durable`: on disk when this returns, so that
    not even a machine that loses power leaves an entry with a file cut short.
    """
    if path.exists() and why_not_whole(path) is None:
        return False
    with lock(path):
        if is_whole(path):
            return False

        def write_and_list(partial: Path) -> None:
            write(partial)
            list_contents(path, partial)

        _replace(path, path.with_name(f".{path.name}.partial"), write_and_list, durable)
    return True


def is_whole(path: Path) -> bool:
    """Return True where an entry is there and whole. One that is not is removed, and a line says so: whoever asks holds
    its lock and makes it again."""
    if not path.exists():
        return False
    why = why_not_whole(path)
    if why is not None:
        forget(path, why)
    return why is None


def why_not_whole(path: Path) -> str | None:
    """Return why an entry has to be made again; None for one that is whole.

    A file may be missing, or differ from what was made in its size, beginning or end, or the formula may be another. Of
    what earlier versions made, and of what came from another node, no list was kept: there each file is held against
    what its format says of its length. What lies outside the cache is left alone.
    """
    if not path.is_relative_to(cache_folder()):
        return None
    listed = _read_contents(path)
    if listed is None:
        return next((why for file in _files(path) if (why := why_torn(file)) is not None), None)
    if listed["formula"] != FORMULA.get(_kind(path)):
        return f"was made by formula {listed['formula']}, and this version has {FORMULA.get(_kind(path))}"
    for name, content in listed["files"].items():
        if not (file := path / name).is_file():
            return f"lacks {name or path.name}"
        if file.stat().st_size != content["size"]:
            return f"{file.name} has {file.stat().st_size:,} bytes of {content['size']:,}"
        if _ends(file) != content["ends"]:
            return f"{file.name} is not as it was written"
    return None


def list_contents(path: Path, made: Path) -> None:
    """Write down what the entry `path` holds, which lies at `made` as yet: `why_not_whole` compares it later."""
    if path.is_relative_to(cache_folder()):
        files = {str(file.relative_to(made)) if file != made else "": file for file in _files(made)}
        contents = {name: {"size": file.stat().st_size, "ends": _ends(file)} for name, file in files.items()}
        listed = json.dumps({"entry": str(path), "formula": FORMULA.get(_kind(path)), "files": contents})
        replace(_contents(path), lambda into: into.write_text(listed), durable=True)


def read_kept(path: Path, read: Callable[[Path], Value]) -> Value | None:
    """Return what `read` reads from an entry; None where there is none, or where it is torn: it is removed then, and a
    line says so."""
    if not path.exists():
        return None
    try:
        return read(path)
    except Exception as error:  # of a damaged file: every reader has types of its own
        forget(path, f"cannot be read ({error})")
        return None


def forget(path: Path, why: str) -> None:
    """Remove an entry that is not to be used, and say why."""
    say(f"cache: {path.parent.name}/{path.name} is made again: {why}")
    _remove(path)


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


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from a later state of it: size, mtime_ns, ctime_ns and inode."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file: read once (a second a gigabyte), then remembered by path, size, times and inode.

    A copy with the size and the time of another file still has a time of its own at which it was put there.
    """
    path = path.resolve()
    status = path.stat()
    stamp = [str(path), *stamp_of(status)]
    remembered = entry("hashes", content_id(stamp, digits=32))
    if remembered.is_file() and len(digest := remembered.read_text()) == 64:
        return digest
    digest = _sha256(path, status.st_size)
    # A file changed in this very moment could change again within its clock's tick and keep its time.
    if time.time() - max(status.st_mtime, status.st_ctime) > 2:
        replace(remembered, lambda partial: partial.write_text(digest), durable=True)
    return digest


def _sha256(path: Path, size: int) -> str:
    digest, done, told = hashlib.sha256(), 0, 0.0 if size > TOLD_AT_ONCE else time.monotonic()
    with open(path, "rb") as file:
        while chunk := file.read(HASHED_WHOLE):
            digest.update(chunk)
            done += len(chunk)
            if time.monotonic() - told > TOLD_EVERY_S:
                say(f"hashing {path.name}, once: {done / 1e9:.0f} of {size / 1e9:.0f} GB")
                told = time.monotonic()
    return digest.hexdigest()


def _ends(path: Path) -> str:
    """Return a hash of a file's content, or of its first and its last mebibyte where it is long."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(file.read(END))
        file.seek(size - END)
        digest.update(file.read(END))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _kind(path: Path) -> str:
    return path.relative_to(cache_folder()).parts[0]


def _contents(path: Path) -> Path:
    return entry("contents", content_id(str(path.relative_to(cache_folder())), digits=32), ".json")


def _read_contents(path: Path) -> dict[str, Any] | None:
    try:
        listed = json.loads(_contents(path).read_text())
        return listed if listed.keys() == {"entry", "formula", "files"} else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


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
