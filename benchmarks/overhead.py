"""Seconds per trial outside training and scoring, and which trials ran at once, of a finished run.

    python -m benchmarks.overhead RUN_DIR

A trial's own clock runs from the trimmed student to its row; what is left of the time between its start, or that of its
going on after a rung, and its end is process start, trim, load and save. The first trial of every slot starts the
worker group of those after it.
"""

import math
import statistics
import sys

from minitron_search.records.directory import RunDirectory


def main(folder: str) -> None:
    run = RunDirectory(folder)
    began = {event["trial"]: event["time"] for event in run.events() if event["event"] == "trial_started"}
    ended = {event["trial"]: event["time"] for event in run.events() if event["event"] == "trial_finished"}
    finished = {(event["trial"], event["rung"]): event["time"] for event in run.events()
                if event["event"] == "rung_finished"}  # fmt: skip
    worked = dict.fromkeys(began, 0.0)
    for row in run.rungs():
        if finished.get((row["trial"], row["rung"]), 0) > began.get(row["trial"], math.inf):
            worked[row["trial"]] += row["seconds"]
    first = min(began.values())
    overheads = []
    for trial, start in sorted(began.items(), key=lambda item: item[1]):
        if trial not in ended or not trial.startswith("search-"):
            continue
        overheads.append(ended[trial] - start - worked[trial])
        at_once = [other for other, time in began.items() if other != trial and time < ended[trial]
                   and ended.get(other, time) > start]  # fmt: skip
        print(f"{trial}: {start - first:7.1f} s to {ended[trial] - first:7.1f} s, of which {overheads[-1]:5.1f} s "
              f"outside training and scoring; at once with {', '.join(at_once) or 'none'}")  # fmt: skip
    print(f"overhead per trial: mean {statistics.mean(overheads):.1f} s, median {statistics.median(overheads):.1f} s, "
          f"largest {max(overheads):.1f} s")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
