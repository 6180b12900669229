"""Carry folders between cluster nodes whose disks are their own: through storage, each folder once.

A folder that exists whole or not at all (a teacher, a cache, a checkpoint) is put beside the run by the process that
made it, and fetched by the first process of a node that needs it. It has the same path on every node. In storage it is

    <output>/trials/<id>/checkpoint/step-N     if it belongs to the run
    <output>/.cache/<path>                     if it does not; removed when the run has ended well

and it is complete there once `<folder>.whole` lies beside it.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from filelock import FileLock
from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, copy_files

from minitron_search.records.logs import LostError
from minitron_search.records.paths import OWNER, inside

WHOLE = ".whole"
CACHE = ".cache"
BACK_OFF_S = (1.0, 60.0)  # the first wait after a failure, which doubles, and the longest
PATIENCE_S = 600.0  # how long storage may be unreachable while a process waits for it

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class NodeTransfer:
    """The way of one run's folders between nodes.

    `uri`: where the run is stored. `root`: the folder that it is worked on in. `run_is_shared`: all nodes see that
    folder, so nothing inside it has to travel. `token`: its owner's (`ownership.owner`), "" if nobody holds it; once
    the run has another owner nothing more is put there.
    """

    uri: str
    root: Path
    run_is_shared: bool
    token: str = ""

    @cached_property
    def _opened(self) -> tuple[FileSystem, PurePosixPath]:
        storage, base = FileSystem.from_uri(self.uri)
        return storage, PurePosixPath(base)

    def travels(self, folder: Path) -> bool:
        """Return whether other nodes need a copy of `folder` to see it."""
        return not (self.run_is_shared and folder.is_relative_to(self.root))

    def put(self, folder: Path) -> None:
        """Copy `folder` to storage if it is not there. Raises OSError if storage fails for `PATIENCE_S`."""
        if self.travels(folder) and not self.has(folder):
            self.put_files(folder)
            self.mark(folder)

    def put_files(self, folder: Path, part: Path | None = None) -> None:
        """Copy the files of `part` (`folder` itself unless given) to where storage keeps `folder`.

        Several nodes may make one folder together; it is complete when one of them calls `mark`.
        """
        storage, _ = self._opened
        self._check()
        local = part or folder
        for file in sorted(file for file in local.rglob("*") if file.is_file()):
            name = self._at(folder) / file.relative_to(local)

            def copy(file: Path = file, name: PurePosixPath = name) -> None:
                storage.create_dir(str(name.parent), recursive=True)
                copy_files(str(file), str(name), destination_filesystem=storage)

            patiently(copy)

    def mark(self, folder: Path) -> None:
        """Declare that storage holds all of `folder`."""
        storage, _ = self._opened
        self._check()

        def write_mark() -> None:
            with storage.open_output_stream(str(_mark(self._at(folder)))) as stream:
                stream.write(b"")

        patiently(write_mark)

    def has(self, folder: Path) -> bool:
        """Return whether storage holds all of `folder`."""
        storage, _ = self._opened
        info = patiently(lambda: storage.get_file_info(str(_mark(self._at(folder)))))
        return info.type == FileType.File

    def fetch(self, folder: Path) -> None:
        """Copy `folder` from storage to this node if it is not here. Raises FileNotFoundError if storage lacks it."""
        if folder.exists() or not self.travels(folder):
            return
        storage, _ = self._opened
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.exists():
                return
            if not self.has(folder):
                raise FileNotFoundError(f"{folder} is neither on this node nor in {self.uri}")
            partial = folder.with_name(f".{folder.name}.fetched")
            base = self._at(folder)
            for name in self._files(base):
                local = partial / name.relative_to(base)
                local.parent.mkdir(parents=True, exist_ok=True)

                def copy(name: PurePosixPath = name, local: Path = local) -> None:
                    copy_files(str(name), str(local), source_filesystem=storage)

                patiently(copy)
            os.rename(partial, folder)

    def names(self, folder: Path) -> list[str]:
        """Return the names of the complete folders that storage holds inside `folder`, sorted."""
        marks = [name for name in self._files(self._at(folder), recursive=False) if name.suffix == WHOLE]
        return sorted(mark.stem for mark in marks)

    def delete(self, folder: Path) -> None:
        """Remove `folder` from storage, its mark first."""
        storage, _ = self._opened
        if self.travels(folder):
            self._check()
            for remove in (
                lambda: storage.delete_file(str(_mark(self._at(folder)))),
                lambda: storage.delete_dir(str(self._at(folder))),
            ):
                with suppress(FileNotFoundError):
                    patiently(remove)

    def address(self, name: str) -> str:
        """Return the address of `name` inside the stored run."""
        return inside(self.uri, name)

    def clear(self, name: str) -> None:
        """Remove the folder `name` of the stored run."""
        storage, base = self._opened
        with suppress(FileNotFoundError):
            storage.delete_dir(str(base / name))

    def _check(self) -> None:
        """Raise LostError if another process has taken the run over."""
        if self.token:
            storage, base = self._opened

            def read() -> bytes:
                with storage.open_input_stream(str(base / OWNER)) as stream:
                    return stream.readall()

            with suppress(FileNotFoundError):
                found = patiently(read)
                if not found or self.token.encode() in found:  # empty: HDFS is about to hold it
                    return
            raise LostError(f"{self.uri} was taken over by another process, or removed: nothing more is written")

    def _at(self, folder: Path) -> PurePosixPath:
        _, base = self._opened
        if folder.is_relative_to(self.root):
            return base / folder.relative_to(self.root)
        return base / CACHE / folder.relative_to("/")

    def _files(self, folder: PurePosixPath, recursive: bool = True) -> list[PurePosixPath]:
        storage, _ = self._opened
        selector = FileSelector(str(folder), recursive=recursive, allow_not_found=True)
        infos = patiently(lambda: storage.get_file_info(selector))
        return sorted(PurePosixPath(info.path) for info in infos if info.type == FileType.File)


def patiently(work: Callable[[], Answer]) -> Answer:
    """Return what `work` returns, trying again while storage fails.

    Raises FileNotFoundError at once if what `work` wants is not there, and its last error after `PATIENCE_S`.
    """
    wait, began = BACK_OFF_S[0], time.monotonic()
    while True:
        try:
            return work()
        except FileNotFoundError:
            raise
        except (ArrowException, OSError):
            if time.monotonic() - began > PATIENCE_S:
                raise
            time.sleep(wait)
            wait = min(2 * wait, BACK_OFF_S[1])


def _mark(folder: PurePosixPath) -> PurePosixPath:
    return folder.with_name(folder.name + WHOLE)
