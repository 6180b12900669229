"""Folders on their way between the nodes of a cluster whose disks are their own: by storage, each of them once.

A folder that is whole or not there (a teacher, a cache, a checkpoint) is put beside the run by whoever made it, and
fetched by the first process of a node that needs it. It has the same path on every node, and in storage

    <output>/trials/<id>/checkpoint/step-N     where it is one of the run's
    <output>/.cache/<path>                     where it is not; gone when the run has ended well

and is whole there once `<folder>.whole` lies beside it.
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

from minitron_search.records.paths import inside

WHOLE = ".whole"
CACHE = ".cache"
BACK_OFF_S = (1.0, 60.0)  # after a failure: the first wait, which doubles, and the longest
PATIENCE_S = 600.0  # how long storage may be gone while somebody waits for it

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Depot:
    """Of the run at `uri`, worked on in `run`. `run_is_shared`: all nodes see that folder, nothing in it travels."""

    uri: str
    run: Path
    run_is_shared: bool

    @cached_property
    def _opened(self) -> tuple[FileSystem, PurePosixPath]:
        there, base = FileSystem.from_uri(self.uri)
        return there, PurePosixPath(base)

    def travels(self, folder: Path) -> bool:
        return not (self.run_is_shared and folder.is_relative_to(self.run))

    def put(self, folder: Path) -> None:
        """Unless it is there. Raises OSError where storage was gone for `PATIENCE_S`."""
        if self.travels(folder) and not self.has(folder):
            self.put_files(folder)
            self.mark(folder)

    def put_files(self, folder: Path, part: Path | None = None) -> None:
        """Those in `part` (the folder itself unless given), of a folder that several nodes make together: it is whole
        when one of them marks it."""
        there, _ = self._opened
        here = part or folder
        for file in sorted(file for file in here.rglob("*") if file.is_file()):
            name = self._at(folder) / file.relative_to(here)

            def copied(file: Path = file, name: PurePosixPath = name) -> None:
                there.create_dir(str(name.parent), recursive=True)
                copy_files(str(file), str(name), destination_filesystem=there)

            patiently(copied)

    def mark(self, folder: Path) -> None:
        there, _ = self._opened

        def marked() -> None:
            with there.open_output_stream(str(_mark(self._at(folder)))) as stream:
                stream.write(b"")

        patiently(marked)

    def has(self, folder: Path) -> bool:
        there, _ = self._opened
        found = patiently(lambda: there.get_file_info(str(_mark(self._at(folder)))))
        return found.type == FileType.File

    def fetch(self, folder: Path) -> None:
        """Make `folder` be here. Raises FileNotFoundError where nobody has put it there."""
        if folder.exists() or not self.travels(folder):
            return
        there, _ = self._opened
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.exists():
                return
            if not self.has(folder):
                raise FileNotFoundError(f"{folder} is neither on this node nor in {self.uri}")
            partial = folder.with_name(f".{folder.name}.fetched")
            base = self._at(folder)
            for name in self._files(base):
                here = partial / name.relative_to(base)
                here.parent.mkdir(parents=True, exist_ok=True)

                def copied(name: PurePosixPath = name, here: Path = here) -> None:
                    copy_files(str(name), str(here), source_filesystem=there)

                patiently(copied)
            os.rename(partial, folder)

    def names(self, folder: Path) -> list[str]:
        """Of the whole folders in `folder`, there."""
        marks = [name for name in self._files(self._at(folder), recursive=False) if name.suffix == WHOLE]
        return sorted(mark.stem for mark in marks)

    def delete(self, folder: Path) -> None:
        there, _ = self._opened
        if self.travels(folder):
            for removed in (
                lambda: there.delete_file(str(_mark(self._at(folder)))),
                lambda: there.delete_dir(str(self._at(folder))),
            ):
                with suppress(FileNotFoundError):
                    patiently(removed)

    def address(self, name: str) -> str:
        """Of `name` in the run's folder there."""
        return inside(self.uri, name)

    def clear(self, name: str) -> None:
        there, base = self._opened
        with suppress(FileNotFoundError):
            there.delete_dir(str(base / name))

    def _at(self, folder: Path) -> PurePosixPath:
        _, base = self._opened
        if folder.is_relative_to(self.run):
            return base / folder.relative_to(self.run)
        return base / CACHE / folder.relative_to("/")

    def _files(self, folder: PurePosixPath, recursive: bool = True) -> list[PurePosixPath]:
        there, _ = self._opened
        selected = FileSelector(str(folder), recursive=recursive, allow_not_found=True)
        found = patiently(lambda: there.get_file_info(selected))
        return sorted(PurePosixPath(info.path) for info in found if info.type == FileType.File)


def patiently(work: Callable[[], Answer]) -> Answer:
    """What `work` returns, tried again while storage fails; raises its last error after `PATIENCE_S`, and at once where
    what it asks for is not there."""
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
