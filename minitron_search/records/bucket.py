"""A run in storage (`output: s3://bucket/run`, or any other pyarrow filesystem): a working copy here, kept as there.

What is appended to or replaced here is put there as one object, so a reader never sees half of one. A folder that is
whole or not there (`best/`, a checkpoint) is whole there once `<folder>.whole` lies beside it.
"""

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, copy_files

from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import is_uri
from minitron_search.records.transfer import BACK_OFF_S, PATIENCE_S, WHOLE

LOOK_S = 2.0  # between two looks at what has changed here

Seen = dict[PurePosixPath, tuple[int, int]]  # time of change, bytes


def mirror_of(output: str, run: RunDirectory) -> "Mirror | None":
    """None where the run is in a folder."""
    return Mirror(output, run) if is_uri(output) else None


class Mirror:
    """Of the run at `uri`. Raises ValueError where the address is none, or storage says no."""

    def __init__(self, uri: str, run: RunDirectory):
        self.uri, self.run = uri, run
        try:
            self.there, base = FileSystem.from_uri(uri)
        except (ArrowException, ValueError, OSError) as error:
            raise ValueError(f"output: {uri!r}: {_reason(error)}; valid: s3://bucket/run or runs/name") from None
        self.base = PurePosixPath(base)
        self._kept: Seen = {}  # as it was when it was put there
        self._whole: set[PurePosixPath] = set()
        self._made: set[PurePosixPath] = set()

    def exists(self) -> bool:
        return bool(self._names())

    def check_writable(self) -> None:
        """Raises ValueError where nothing can be written, before anything is computed that would be."""
        name = self._at(PurePosixPath(".writable"))
        try:
            with self.there.open_output_stream(name) as stream:
                stream.write(b"")
            self.there.delete_file(name)
        except (ArrowException, OSError) as error:
            raise ValueError(f"output: {self.uri} cannot be written to: {_reason(error)}; "
                             "valid: a bucket that these credentials may write to") from None  # fmt: skip

    # From there

    def pull(self) -> None:
        """Make the working copy what storage holds, unless it is storage's own with what came after."""
        names = self._names()
        if not names or self._is_ahead(names):
            return
        shutil.rmtree(self.run.root, ignore_errors=True)
        for name in names:
            folder = _whole_folder(name)
            if name.suffix == WHOLE or (folder is not None and self._marked(folder) not in names):
                continue
            here = self.run.root / name
            here.parent.mkdir(parents=True, exist_ok=True)
            copy_files(self._at(name), str(here), source_filesystem=self.there)

    def _is_ahead(self, names: set[PurePosixPath]) -> bool:
        """Whether the log of events here begins with the one there."""
        log = PurePosixPath(self.run.events_log.name)
        if not self.run.events_log.exists() or log not in names:
            return self.run.events_log.exists()
        with self.there.open_input_stream(self._at(log)) as stream:
            return self.run.events_log.read_bytes().startswith(stream.readall())

    def _names(self) -> set[PurePosixPath]:
        found = self.there.get_file_info(FileSelector(str(self.base), recursive=True, allow_not_found=True))
        names = {PurePosixPath(info.path).relative_to(self.base) for info in found if info.type == FileType.File}
        return {name for name in names if not _is_passing(name)}

    # To there

    def push(self) -> None:
        """What has changed since the last call. Whole folders first: a row is not there before what it goes on from."""
        # none of a depot's: the node that makes one has put it there, and takes it away
        folders = self._whole_folders() if self.run.depot is None else self._whole
        self._push_folders(folders)
        for name, state in sorted(self._here().items()):
            if self._kept.get(name) != state:
                self.put(self.run.root / name, name)
                self._kept[name] = state
        self._remove_all_but(folders)

    def _push_folders(self, folders: set[PurePosixPath]) -> None:
        for folder in sorted(folders - self._whole):
            try:
                for file in sorted((self.run.root / folder).rglob("*")):
                    if file.is_file():
                        self.put(file, PurePosixPath(file.relative_to(self.run.root)))
            except FileNotFoundError:  # replaced by its successor meanwhile
                continue
            with self.there.open_output_stream(self._at(self._marked(folder))) as stream:
                stream.write(b"")
            self._whole.add(folder)

    def _remove_all_but(self, folders: set[PurePosixPath]) -> None:
        for folder in sorted(self._whole - folders):
            with suppress(FileNotFoundError):  # storage may have failed after it was removed
                self.there.delete_file(self._at(self._marked(folder)))
            with suppress(FileNotFoundError):
                self.there.delete_dir(self._at(folder))
            self._whole.remove(folder)
            self._made = {made for made in self._made if folder not in (made, *made.parents)}

    def put(self, file: Path, name: PurePosixPath) -> None:
        if name.parent not in self._made:  # for file systems that have folders of their own
            self.there.create_dir(self._at(name.parent), recursive=True)
            self._made.add(name.parent)
        if file.suffix == ".db":  # as of one moment, whoever writes to it
            copy = file.with_name(f".{file.name}.copy")
            with sqlite3.connect(file) as source, sqlite3.connect(copy) as target:
                source.backup(target)
            copy_files(str(copy), self._at(name), destination_filesystem=self.there)
            copy.unlink()
        else:
            copy_files(str(file), self._at(name), destination_filesystem=self.there)

    def _here(self) -> Seen:
        """Files outside whole folders."""
        found = {}
        for folder, _, files in os.walk(self.run.root):
            for file in files:
                name = PurePosixPath(folder, file).relative_to(self.run.root)
                if not _is_passing(name) and _whole_folder(name) is None:
                    with suppress(FileNotFoundError):
                        about = os.stat(self.run.root / name)
                        found[name] = (about.st_mtime_ns, about.st_size)
        return found

    def _whole_folders(self) -> set[PurePosixPath]:
        root = self.run.root
        found = [*root.glob("best*"), *root.glob("trials/*/checkpoint/step-*")]
        return {PurePosixPath(folder.relative_to(root)) for folder in found if folder.is_dir()}

    def _at(self, name: PurePosixPath) -> str:
        return str(self.base / name)

    def _marked(self, folder: PurePosixPath) -> PurePosixPath:
        return folder.with_name(folder.name + WHOLE)

    # Meanwhile

    def _take_stock(self) -> None:
        """What is whole there already, of what is here and of what no longer is."""
        marks = [name for name in self._names() if name.suffix == WHOLE]
        self._whole = {mark.with_suffix("") for mark in marks}

    @contextmanager
    def kept(self, progress: Callable[[str], None]) -> Iterator[None]:
        """Push while the block runs, and what is left at its end; storage may fail for a while.

        Raises RuntimeError when it is gone for `PATIENCE_S` at the end; the working copy is left, and the next
        `--resume` on this machine puts it there.
        """
        self._take_stock()
        over = threading.Event()
        thread = threading.Thread(target=self._push_until, args=(over, progress), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._push_at_last(progress)

    def _push_until(self, over: threading.Event, progress: Callable[[str], None]) -> None:
        wait, failed = LOOK_S, 0.0
        while not over.wait(wait):
            try:
                self.push()
            except (ArrowException, OSError) as error:
                if not failed:
                    failed, wait = time.monotonic(), BACK_OFF_S[0] / 2
                    self.run.event("storage_failed", message=_reason(error))
                    progress(f"storage: {_reason(error)}; everything is kept here, and tried again")
                wait = min(2 * wait, BACK_OFF_S[1])
            else:
                if failed:
                    self.run.event("storage_back", seconds=time.monotonic() - failed)
                    progress(f"storage: back after {time.monotonic() - failed:.0f} s")
                wait, failed = LOOK_S, 0.0

    def _push_at_last(self, progress: Callable[[str], None]) -> None:
        wait, began = BACK_OFF_S[0], time.monotonic()
        while True:
            try:
                return self.push()
            except (ArrowException, OSError) as error:
                if time.monotonic() - began > PATIENCE_S:
                    raise RuntimeError(f"output: {self.uri} could not be written to for {PATIENCE_S / 60:.0f} minutes "
                                       f"({_reason(error)}); all of it is in {self.run.root}, and --resume on this "
                                       "machine puts it there") from None  # fmt: skip
                progress(f"storage: {_reason(error)}; tried again in {wait:.0f} s")
                time.sleep(wait)
                wait = min(2 * wait, BACK_OFF_S[1])


def _whole_folder(name: PurePosixPath) -> PurePosixPath | None:
    """The folder that appears whole, and holds `name` or is it."""
    parts = name.parts
    if parts[0].startswith("best") and len(parts) > 1:
        return PurePosixPath(parts[0])
    if len(parts) > 4 and parts[2] == "checkpoint":  # trials/<id>/checkpoint/step-N/...
        return PurePosixPath(*parts[:4])
    return None


def _is_passing(name: PurePosixPath) -> bool:
    """Whether it is on its way to another name, or to another node: it begins with a dot. What is inside a folder that
    is whole may: a checkpoint has its `.metadata`."""
    return any(part.startswith(".") for part in (_whole_folder(name) or name).parts)


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
