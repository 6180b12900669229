"""Peak memory of a command and all its processes, shared pages counted once.

    python -m benchmarks.peak_memory -- python -m minitron_search.run --output DIR --search.concurrency 2

Samples the proportional set size (PSS: a page that n processes share counts 1/n in each) of every process in the
command's tree, every two seconds. Prints the peak of the sum, and of each kind of process.
"""

import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path


def pss_bytes(process: Path) -> int:
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def descendants(root: int) -> list[Path]:
    """Every live process below `root`, which become ours when their parents end: this process adopts them."""
    parent = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ProcessLookupError):
            continue
    found, grown = {root}, True
    while grown:
        more = {pid for pid, above in parent.items() if above in found} - found
        found, grown = found | more, bool(more)
    return [Path(f"/proc/{pid}") for pid in found]


def main(command: list[str]) -> int:
    running = subprocess.Popen(command)
    peak, by_name = 0, defaultdict(int)
    while running.poll() is None:
        total, now = 0, defaultdict(int)
        for process in descendants(running.pid):
            try:
                name = (process / "cmdline").read_bytes().split(b"\0")[0].decode().split("/")[-1][:40] or "?"
                used = pss_bytes(process)
            except (OSError, ProcessLookupError):
                continue
            total += used
            now[name] = max(now[name], used)
        peak = max(peak, total)
        for name, used in now.items():
            by_name[name] = max(by_name[name], used)
        time.sleep(2)
    for name, used in sorted(by_name.items(), key=lambda item: -item[1])[:8]:
        print(f"  {name:40} {used / 2**20:8.0f} MiB at most in one process")
    print(f"peak of all processes together: {peak / 2**30:.2f} GiB")
    return running.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[sys.argv.index("--") + 1 :]))
