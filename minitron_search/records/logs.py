"""Write append-only logs, and files that appear whole, by several processes at once."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from minitron_search.records.lines import SOUND


class LostError(RuntimeError):
    """Another process has taken the run over: nothing of this one is written any more."""


class Files(Protocol):
    """A run's logs, on this node or on another one (`cluster.remote_logs`)."""

    def check(self) -> None:
        """Raise LostError if another process has taken the run over. Whatever appends or replaces does so first."""

    def poll_s(self, waited: float) -> float:
        """Return how many seconds to sleep before another look for a line or a file, after `waited` seconds."""

    def append(self, path: Path, line: bytes, durable: bool) -> None:
        """Append a line in one write, so that two processes never mix their lines; if `durable`, to the disk."""

    def replace(self, path: Path, content: bytes) -> None:
        """Replace a file at once: `path` holds what it held, or all of `content`."""

    def read(self, path: Path, offset: int = 0) -> bytes:
        """Return the bytes from `offset` to the end; none if there is no such file."""

    def names(self, folder: Path) -> list[str]:
        """Return the names of the files in `folder`; none if there is no such folder."""


class LocalFiles:
    """The logs on this node, or in a folder that all nodes share.

    `owner`: a file and the token that it holds while the run is this driver's (`ownership.owner`); without one nothing
    is checked.
    """

    def __init__(self, owner: tuple[Path, str] | None = None):
        self.owner = owner

    def check(self) -> None:
        if self.owner is None:
            return
        record, token = self.owner
        try:
            ours = token in record.read_text()
        except FileNotFoundError:
            ours = False
        if not ours:
            raise LostError(f"{record.parent} was taken over by another process, or removed: nothing more is written")

    def poll_s(self, waited: float) -> float:
        return 0.02  # two stat calls: a slot waits for this at every rung, and trains nothing meanwhile

    def append(self, path: Path, line: bytes, durable: bool) -> None:
        self.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if not ends_whole(path):
                line = b"\n" + line
            os.write(file, line)
            if durable:
                os.fsync(file)
        finally:
            os.close(file)

    def replace(self, path: Path, content: bytes) -> None:
        self.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def read(self, path: Path, offset: int = 0) -> bytes:
        if not path.exists() or path.stat().st_size <= offset:
            return b""
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read()

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder) if folder.exists() else []


LOCAL = LocalFiles()


def replace_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    LOCAL.replace(path, text.encode())


def append_line(path: Path, record: Mapping[str, Any], durable: bool = True, files: Files = LOCAL) -> None:
    """Append one JSON line; if `durable`, it is on disk when this returns."""
    files.append(path, (json.dumps(record) + "\n").encode(), durable)


def ends_whole(path: Path) -> bool:
    """Return False if a kill in the middle of a write left a line without its end."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class Log:
    """A growing log, each line of it read once."""

    def __init__(self, path: Path, files: Files = LOCAL):
        self.path, self.files, self.offset = path, files, 0

    def new(self) -> list[dict[str, Any]]:
        """Return the complete lines since the last call, without any that is not sound."""
        text = self.files.read(self.path, self.offset)
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [line for line in parsed(self.path.name, whole) if line is not None]


def read_lines(path: Path, files: Files = LOCAL) -> list[dict[str, Any]]:
    """Return the JSON lines of a log, without a line that a kill cut short, and any other that is not sound."""
    return [line for line in parsed(path.name, files.read(path)) if line is not None]


def parsed(name: str, text: bytes) -> Iterable[dict[str, Any] | None]:
    """Yield the lines of a log that is called `name`, None in the place of one that is no line of such a log."""
    is_sound = SOUND.get(name, lambda line: True)
    for line in text.removesuffix(b"\n").split(b"\n") if text else ():
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            value = None
        yield value if isinstance(value, dict) and is_sound(value) else None
