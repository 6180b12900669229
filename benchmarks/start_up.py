"""How long a person waits for `--help` and for the message about a misspelt key, beside the import of what a run needs.

    python -m benchmarks.start_up [--runs 5]

Whole processes, in turn: wall seconds and processor seconds (user + system), medians, and the ratio of processor time
to a process that imports torch, transformers and Ray, which the command did before it read a flag.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch, transformers, ray": ["-c", "import torch, transformers, ray"],
    "--help": ["-m", "minitron_search.run", "--help"],
    "a misspelt key": ["-m", "minitron_search.run", "--serch.trials", "3"],
    "a misspelt file": ["-m", "minitron_search.run", "--config", "no-such-file.yaml"],
}


def measured(arguments: list[str]) -> tuple[float, float]:
    """Return wall and processor seconds of one process."""
    began, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):  # the first of each warms the disk's cache
        for name, arguments in COMMANDS.items():
            times[name].append(measured(arguments))
    dearest = 0.0
    for name, of in times.items():
        wall, spent = (statistics.median(column) for column in zip(*of[1:], strict=True))
        dearest = dearest or spent
        print(f"{name:32s} {wall:6.2f} s wall {spent:6.2f} s user+sys, ratio {spent / dearest:.3f}  (n = {runs})")


if __name__ == "__main__":
    main()
