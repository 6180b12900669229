"""Keep a run in storage: `output: s3://bucket/run`, or any other pyarrow filesystem, beside a working copy here.

A file that is appended to or replaced here is put there as one object, so a reader never sees half of one. A folder
that exists whole or not at all (`best/`, a checkpoint) is complete there once `<folder>.whole` lies beside it.
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

from minitron_search.messages.console import say
from minitron_search.messages.failures import first_line
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import LostError
from minitron_search.records.paths import LOCK, OWNER, is_uri
from minitron_search.records.transfer import BACK_OFF_S, PATIENCE_S, WHOLE

LOOK_S = 2.0  # between two looks for changes

FileStates = dict[PurePosixPath, tuple[int, int]]  # (time of change in ns, bytes), by name in the run


def bucket_copy(
    output: str, run_dir: RunDirectory, check: Callable[[], None] = lambda: None
) -> "BucketCopy | None":  # fmt: skip
    """Return the copy in storage of a run whose `output` is an address; None if it is a folder."""
    return BucketCopy(output, run_dir, check) if is_uri(output) else None


def stored_text(output: str, name: str) -> str | None:
    """Return the text of a file of the run that is kept at the address `output`; None if it is not there.

    Raises ValueError if `output` is no address, or storage does not answer.
    """
    copy = BucketCopy(output, RunDirectory(output))
    try:
        with copy.storage.open_input_stream(str(copy.base / name)) as stream:
            return stream.readall().decode()
    except FileNotFoundError:
        return None
    except (ArrowException, OSError) as error:
        raise ValueError(f"output: {output!r} could not be read: {first_line(error)}; valid: an address that these "
                         "credentials may read") from None  # fmt: skip


class BucketCopy:
    """The stored copy of one run. Raises ValueError if `uri` is no address, or storage refuses it.

    `check`: raises LostError if the process that writes there has lost the output to another one.
    """

    def __init__(self, uri: str, run_dir: RunDirectory, check: Callable[[], None] = lambda: None):
        self.uri, self.run_dir, self.check = uri, run_dir, check
        try:
            self.storage, base = FileSystem.from_uri(uri)
        except (ArrowException, ValueError, OSError) as error:
            raise ValueError(f"output: {uri!r}: {first_line(error)}; valid: s3://bucket/run or runs/name") from None
        self.base = PurePosixPath(base)
        self._stored: FileStates = {}  # as each file was when it was put there
        self._whole: set[PurePosixPath] = set()
        self._created: set[PurePosixPath] = set()  # folders, for file systems that have them

    def exists(self) -> bool:
        """Return whether storage holds anything at the address."""
        return bool(self._names())

    def check_writable(self) -> None:
        """Raise ValueError if nothing can be written there: before anything is computed."""
        name = self._at(PurePosixPath(".writable"))
        try:
            with self.storage.open_output_stream(name) as stream:
                stream.write(b"")
            self.storage.delete_file(name)
        except (ArrowException, OSError) as error:
            raise ValueError(f"output: {self.uri} cannot be written to: {first_line(error)}; "
                             "valid: a bucket that these credentials may write to") from None  # fmt: skip

    # From storage

    def pull(self) -> None:
        """Make the working copy what storage holds, unless the working copy is ahead of it."""
        names = self._names()
        if not names or self._is_ahead(names):
            return
        self._empty()
        for name in names:
            folder = _whole_folder(name)
            if name.suffix == WHOLE or (folder is not None and self._marked(folder) not in names):
                continue
            local = self.run_dir.root / name
            local.parent.mkdir(parents=True, exist_ok=True)
            copy_files(self._at(name), str(local), source_filesystem=self.storage)

    def _empty(self) -> None:
        """Remove the working copy, but for what says that this process holds it."""
        for path in self.run_dir.root.glob("*"):
            if path.name not in (LOCK, OWNER):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _is_ahead(self, names: set[PurePosixPath]) -> bool:
        """Return whether the working copy's log of events begins with the stored one."""
        log = PurePosixPath(self.run_dir.events_log.name)
        if not self.run_dir.events_log.exists() or log not in names:
            return self.run_dir.events_log.exists()
        with self.storage.open_input_stream(self._at(log)) as stream:
            return self.run_dir.events_log.read_bytes().startswith(stream.readall())

    def _names(self) -> set[PurePosixPath]:
        infos = self.storage.get_file_info(FileSelector(str(self.base), recursive=True, allow_not_found=True))
        names = {PurePosixPath(info.path).relative_to(self.base) for info in infos if info.type == FileType.File}
        return {name for name in names if not _is_temporary(name)}

    # To storage

    def push(self) -> None:
        """Put what has changed since the last call. Whole folders first: a checkpoint is there before its row.

        Raises LostError if another process holds the output by now.
        """
        self.check()
        # folders that a NodeTransfer carries are put, and removed, by the node that makes them
        folders = self._whole_folders() if self.run_dir.transfer is None else self._whole
        self._push_folders(folders)
        for name, state in sorted(self._changing_files().items()):
            if self._stored.get(name) != state:
                self.put(self.run_dir.root / name, name)
                self._stored[name] = state
        self._remove_all_but(folders)

    def _push_folders(self, folders: set[PurePosixPath]) -> None:
        for folder in sorted(folders - self._whole):
            files = self._files_in(folder)
            try:
                for file in files:
                    self.put(file, PurePosixPath(file.relative_to(self.run_dir.root)))
                if self._files_in(folder) != files:
                    raise FileNotFoundError(folder)
            except FileNotFoundError:  # its successor replaced it meanwhile, or its run has ended
                self._remove(folder)
                continue
            with self.storage.open_output_stream(self._at(self._marked(folder))) as stream:
                stream.write(b"")
            self._whole.add(folder)

    def _files_in(self, folder: PurePosixPath) -> list[Path]:
        return [file for file in sorted((self.run_dir.root / folder).rglob("*")) if file.is_file()]

    def _remove_all_but(self, folders: set[PurePosixPath]) -> None:
        for folder in sorted(self._whole - folders):
            with suppress(FileNotFoundError):  # storage may have failed after removing it
                self.storage.delete_file(self._at(self._marked(folder)))
            self._remove(folder)
            self._whole.remove(folder)

    def _remove(self, folder: PurePosixPath) -> None:
        with suppress(FileNotFoundError):
            self.storage.delete_dir(self._at(folder))
        self._created = {path for path in self._created if folder not in (path, *path.parents)}

    def put(self, file: Path, name: PurePosixPath) -> None:
        """Put one file at `name` in the stored run; a database as it is at one moment, whoever writes to it."""
        if name.parent not in self._created:
            self.storage.create_dir(self._at(name.parent), recursive=True)
            self._created.add(name.parent)
        if file.suffix == ".db":
            copy = file.with_name(f".{file.name}.copy")
            with sqlite3.connect(file) as source, sqlite3.connect(copy) as target:
                source.backup(target)
            copy_files(str(copy), self._at(name), destination_filesystem=self.storage)
            copy.unlink()
        else:
            copy_files(str(file), self._at(name), destination_filesystem=self.storage)

    def _changing_files(self) -> FileStates:
        """Return the state of every file of the working copy that is in no whole folder."""
        states = {}
        for folder, _, files in os.walk(self.run_dir.root):
            for file in files:
                name = PurePosixPath(folder, file).relative_to(self.run_dir.root)
                if not _is_temporary(name) and _whole_folder(name) is None:
                    with suppress(FileNotFoundError):
                        status = os.stat(self.run_dir.root / name)
                        states[name] = (status.st_mtime_ns, status.st_size)
        return states

    def _whole_folders(self) -> set[PurePosixPath]:
        root = self.run_dir.root
        folders = [*root.glob("best*"), *root.glob("trials/*/checkpoint/step-*")]
        return {PurePosixPath(folder.relative_to(root)) for folder in folders if folder.is_dir()}

    def _at(self, name: PurePosixPath) -> str:
        return str(self.base / name)

    def _marked(self, folder: PurePosixPath) -> PurePosixPath:
        return folder.with_name(folder.name + WHOLE)

    # Continuously

    def _find_whole_folders(self) -> None:
        """Note which folders storage holds whole, those included that the working copy no longer has."""
        marks = [name for name in self._names() if name.suffix == WHOLE]
        self._whole = {mark.with_suffix("") for mark in marks}

    @contextmanager
    def kept_up_to_date(self) -> Iterator[None]:
        """Push while the block runs, and what is left at its end; storage may fail for a while.

        Raises RuntimeError if storage is gone for `PATIENCE_S` at the end. The working copy is kept, and the next
        `--resume` on this machine puts it there.
        """
        self._find_whole_folders()
        over = threading.Event()
        thread = threading.Thread(target=self._push_until, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._push_the_rest()

    def _push_until(self, over: threading.Event) -> None:
        wait, failed = LOOK_S, 0.0
        while not over.wait(wait):
            try:
                self.push()
            except LostError:
                return  # the run's next line, and the end of the block, say so
            except (ArrowException, OSError) as error:
                if not failed:
                    failed, wait = time.monotonic(), BACK_OFF_S[0] / 2
                    self.run_dir.event("storage_failed", message=first_line(error))
                    say(f"storage: {first_line(error)}; everything is kept here, and tried again")
                wait = min(2 * wait, BACK_OFF_S[1])
            else:
                if failed:
                    self.run_dir.event("storage_back", seconds=time.monotonic() - failed)
                    say(f"storage: back after {time.monotonic() - failed:.0f} s")
                wait, failed = LOOK_S, 0.0

    def _push_the_rest(self) -> None:
        wait, began = BACK_OFF_S[0], time.monotonic()
        while True:
            try:
                return self.push()
            except (ArrowException, OSError) as error:
                if time.monotonic() - began > PATIENCE_S:
                    raise RuntimeError(f"output: {self.uri} could not be written to for {PATIENCE_S / 60:.0f} minutes "
                                       f"({first_line(error)}); all of it is in {self.run_dir.root}, and --resume on "
                                       "this machine puts it there") from None  # fmt: skip
                say(f"storage: {first_line(error)}; trying again in {wait:.0f} s")
                time.sleep(wait)
                wait = min(2 * wait, BACK_OFF_S[1])


def _whole_folder(name: PurePosixPath) -> PurePosixPath | None:
    """Return the folder that exists whole or not at all and that holds `name`, or is it; None for any other name."""
    parts = name.parts
    if parts[0].startswith("best") and len(parts) > 1:
        return PurePosixPath(parts[0])
    if len(parts) > 4 and parts[2] == "checkpoint":  # trials/<id>/checkpoint/step-N/...
        return PurePosixPath(*parts[:4])
    return None


def _is_temporary(name: PurePosixPath) -> bool:
    """Return whether `name` is a file in the making, or one that only travels: such names begin with a dot.

    Names inside a whole folder may begin with a dot too: a checkpoint has its `.metadata`.
    """
    return any(part.startswith(".") for part in (_whole_folder(name) or name).parts)
