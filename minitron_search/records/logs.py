"""Append-only logs and files that appear whole: how a run is written down, by several processes at once."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Files(Protocol):
    """Where a run's logs are: on this node, or on another that is asked for them (`node_files`)."""

    def poll_s(self, waited: float) -> float:
        """How long who has `waited` so long for a line or a file should sleep until it looks again, in seconds."""

    def append(self, path: Path, line: bytes, durable: bool) -> None:
        """In a single write, so that two processes never mix their lines."""

    def replace(self, path: Path, content: bytes) -> None:
        """`path` holds what it held, or all of `content`."""

    def read(self, path: Path, offset: int = 0) -> bytes:
        """From `offset` to the end; nothing where there is no such file."""

    def names(self, folder: Path) -> list[str]:
        """Of the files in `folder`; none where there is no such folder."""


class LocalFiles:
    """Those of this node, or of a folder that all nodes share."""

    def poll_s(self, waited: float) -> float:
        return 0.02  # two stat calls: a slot waits for this at every rung, and trains nothing meanwhile

    def append(self, path: Path, line: bytes, durable: bool) -> None:
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
    """Append one JSON line; on disk when this returns, if it is to be `durable`."""
    files.append(path, (json.dumps(record) + "\n").encode(), durable)


def ends_whole(path: Path) -> bool:
    """False where a kill in the middle of a write left a line without its end."""
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
        """The whole lines since the last call."""
        text = self.files.read(self.path, self.offset)
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return list(_parsed(whole.decode().splitlines()))


def read_lines(path: Path, files: Files = LOCAL) -> list[dict[str, Any]]:
    """The JSON lines of a log; a line cut short by a kill is left out."""
    return list(_parsed(files.read(path).decode().splitlines()))


def _parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
