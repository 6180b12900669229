"""Watch what a run takes of memory and disk while it goes on.

Memory is summed over the driver and all processes below it, an embedded Ray's among them: of each what no file backs,
its resident memory less what it shares. Disk is what the run directory holds, and what the run reads from the cache.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from minitron_search.records.directory import RunDirectory

LOOK_S = 1.0


class Usage:
    """The peaks so far, in bytes. `cached`: the folders of the cache that the run reads."""

    def __init__(self, run_dir: RunDirectory):
        self.run_dir, self.cached = run_dir, list[Path]()
        self.memory = self.disk = self.driver = 0

    def look(self) -> None:
        """Compare what is taken now with the peaks."""
        driver = psutil.Process()
        self.driver = max(self.driver, own_bytes(driver))
        self.memory = max(self.memory, sum(map(own_bytes, [driver, *driver.children(recursive=True)])))
        self.disk = max(self.disk, disk_bytes([self.run_dir.root, *self.cached]))


def own_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process less what it shares; 0 of one that has ended."""
    with suppress(psutil.Error):
        info = process.memory_info()
        return int(info.rss - getattr(info, "shared", 0))  # macOS does not say what is shared
    return 0


def disk_bytes(folders: Iterable[Path]) -> int:
    """Return what the files of folders take on disk, each once."""
    seen = {}
    for top in dict.fromkeys(folders):
        for folder, _, files in os.walk(top):
            for file in files:
                with suppress(OSError):
                    status = os.stat(os.path.join(folder, file), follow_symlinks=False)
                    seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


@contextmanager
def watched_usage(run_dir: RunDirectory) -> Iterator[Usage]:
    """Watch while the block runs, and write the peaks down at its end."""
    usage, over = Usage(run_dir), threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            usage.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        over.set()
        thread.join()
    usage.look()
    alone = not os.environ.get("RAY_ADDRESS")  # other nodes' processes are not below this one
    peaks = {"memory": usage.memory} if alone else {}
    run_dir.event("resources_taken", disk=usage.disk, driver=usage.driver, **peaks)
