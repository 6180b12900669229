"""Let one process at a time write a run: who holds an output, and how the next one finds out that it may have it.

On one machine, and on a file system that hosts share, it is a lock of the kernel on `<output>/.lock`: it ends with its
holder, however that ends. Ray's processes do not inherit it. `<output>/.owner` says who the holder is, for a message,
and holds its token: whatever a process of the run appends is refused once the file holds another one, so that workers
which outlive their driver write nothing into the run of its successor.

In storage it is the object `<output>/.owner`, written on the condition that nobody else has (If-None-Match, If-Match),
and again every `HEARTBEAT_S`. A holder that has been silent for `EXPIRY_S` is replaced; on its own machine one whose
process is gone is replaced at once.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pyarrow import ArrowException

from minitron_search.messages.failures import first_line, reading
from minitron_search.ownership.stored_object import StoredObject, stored_object
from minitron_search.records.logs import LOCAL, LocalFiles, LostError
from minitron_search.records.paths import LOCK, OWNER, is_uri, working_folder

HEARTBEAT_S, EXPIRY_S = 15.0, 60.0


@dataclass(frozen=True)
class Owner:
    """A process that writes a run. `machine`: within which its process id means something. `started`: its process's
    start, since ids are given again. `since`: Unix time in seconds."""

    token: str
    host: str
    pid: int
    since: float
    machine: str
    started: str

    @classmethod
    def this_process(cls) -> "Owner":
        pid = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, time.time(), _machine(), _started(pid) or "")

    @classmethod
    def parse(cls, text: str | bytes) -> "Owner | None":
        """Return who `text` names; None if it is not what an owner writes."""
        try:
            owner = cls(**json.loads(text))
            return owner if isinstance(owner.pid, int) and isinstance(owner.since, int | float) else None
        except (ValueError, TypeError):
            return None

    def text(self) -> str:
        return json.dumps(asdict(self))

    def is_gone(self) -> bool:
        """Return whether the process ran on this machine and has ended; False of one elsewhere, as far as is known."""
        return self.machine == _machine() and _started(self.pid) != self.started

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


class HeldError(ValueError):
    """Another process writes this output."""


class Hold:
    """An output that this process holds. `files`: what its processes write by, while it does."""

    def __init__(self, output: str, owner: Owner, stored: StoredObject | None):
        self.output, self.owner, self.stored = output, owner, stored
        self.record = working_folder(output) / OWNER
        self.files = LocalFiles((self.record, owner.token))
        self._tag = ""  # of the stored object, as this process wrote it last
        self._over = threading.Event()

    def check(self) -> None:
        """Raise LostError if another process holds the output by now, asking storage if it is there."""
        self.files.check()
        if self.stored is not None and (kept := self.stored.read()) is not None and kept.content:
            other = Owner.parse(kept.content)  # it is empty for a moment where storage has no whole objects (HDFS)
            if other is None or other.token != self.owner.token:
                self._lose(other)

    def _lose(self, other: Owner | None) -> None:
        self.record.unlink(missing_ok=True)  # from now on nothing of this run is written here either
        raise LostError(f"output: {self.output} was taken over by {other or 'another process'}")

    def take_stored(self) -> None:
        """Write the owner into storage. Raises HeldError if another process holds the output there."""
        assert self.stored is not None
        kept = self.stored.read()
        other = kept and Owner.parse(kept.content)
        if kept is not None and other is not None and not other.is_gone() and kept.age_s < EXPIRY_S:
            raise _held(self.output, other, f", heard of {kept.age_s:.0f} s ago")
        tag = self.stored.write(self.owner.text().encode(), kept and kept.tag)
        if tag is None:
            kept = self.stored.read()
            raise _held(self.output, kept and Owner.parse(kept.content), "")
        self._tag = tag

    def keep_stored(self) -> None:
        """Write the owner again every `HEARTBEAT_S`, until the output is released or lost."""
        assert self.stored is not None
        while not self._over.wait(HEARTBEAT_S):
            with suppress(ArrowException, OSError, LostError):  # storage may fail for a while; `check` tells the run
                content = self.owner.text().encode()
                tag = self.stored.write(content, self._tag)
                if tag is None:
                    self.check()  # an answer that was lost leaves our own token under another tag
                    kept = self.stored.read()
                    tag = kept.tag if kept is not None else self.stored.write(content, None)
                self._tag = tag or self._tag

    def release(self) -> None:
        self._over.set()
        if self.stored is not None:
            with suppress(ArrowException, OSError):
                kept = self.stored.read()
                owner = kept and Owner.parse(kept.content)
                if owner is not None and owner.token == self.owner.token:
                    self.stored.delete()
        if self.record.exists() and self.owner.token in self.record.read_text():
            self.record.unlink()


@contextmanager
def held(output: str) -> Iterator[Hold]:
    """Hold an output, a folder or an address, while the block runs.

    Raises HeldError, which names the holder, if another process does; ValueError for a folder that cannot be written.
    """
    root = working_folder(output)
    check_writable(root)
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock = FileLock(root / LOCK, timeout=0.2, thread_local=False)
    while not lock.is_locked:
        with reading(f"output: {output}", "a folder that can be made and written to"):  # in /proc none can be
            root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise _held(output, _owner_in(root), "") from None
        except FileNotFoundError:  # whoever held it has removed the folder, which it had made, in this very moment
            continue
    try:
        hold = Hold(output, Owner.this_process(), _stored(output) if is_uri(output) else None)
        if hold.stored is not None:
            _take(hold)
            threading.Thread(target=hold.keep_stored, daemon=True).start()
        LOCAL.replace(hold.record, hold.owner.text().encode())
        try:
            yield hold
        finally:
            hold.release()
    finally:
        (root / LOCK).unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile sees that it is gone
        lock.release()
        with suppress(OSError):  # a run that was refused leaves no folder behind
            for folder in made:
                folder.rmdir()


def check_writable(root: Path) -> None:
    """Raise ValueError if `root` is, or would be made in, something that is no folder that can be written to."""
    existing = next(path for path in (root, *root.parents) if path.exists() or path.is_symlink())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output: {existing} is not a folder that can be written to; valid: a new folder")


def holds_anything(root: Path) -> bool:
    """Return whether a folder holds more than what says who holds it."""
    return root.is_dir() and any(not path.name.startswith((LOCK, OWNER, f".{OWNER}.")) for path in root.iterdir())


def _held(output: str, owner: Owner | None, heard: str) -> HeldError:
    silent = f" or been silent for {EXPIRY_S:.0f} s" if is_uri(output) else ""
    return HeldError(f"output: {output} is being written by {owner or 'another process'}{heard}; valid: another "
                     f"output, or this one once that process has ended{silent}")  # fmt: skip


def _stored(output: str) -> StoredObject:
    try:
        return stored_object(output, OWNER)
    except (ArrowException, ValueError, OSError) as error:
        raise ValueError(f"output: {output!r}: {first_line(error)}; valid: s3://bucket/run or runs/name") from None


def _take(hold: Hold) -> None:
    try:
        hold.take_stored()
    except (ArrowException, OSError) as error:
        raise ValueError(f"output: {hold.output} cannot be written to: {first_line(error)}; valid: a bucket that these "
                         "credentials may write to") from None  # fmt: skip


def _owner_in(root: Path) -> Owner | None:
    for _ in range(20):  # it writes its name once it has the lock
        with suppress(OSError):
            return Owner.parse((root / OWNER).read_bytes())
        time.sleep(0.05)
    return None


def _machine() -> str:
    """Return what tells this machine, since it was started, from others: within it a process id names one process."""
    try:
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # no Linux
        parts = [str(uuid.getnode())]  # which a container without a network card draws anew in every process
    return " ".join([socket.gethostname(), *parts])


def _started(pid: int) -> str | None:
    """Return when a process of this machine was started, in a form of its own; None if there is none that lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return ""
