"""How busy a search keeps the cores: 64 trials of a tiny random teacher by the real command, at concurrency auto.

    python -m benchmarks.idle_share [--launcher train] [--trials 64] [--folder DIR]

The teacher has 1.2M parameters (hidden 128, MLP 384, 6 layers, 258 tokens); students have 0.7M and train on 16 steps of
1,024 tokens, the better third on 48: about 4 s of one core a trial. The window is from the first trial's start to the
last one's end, stopped trials that are continued and the winner's controls included; importance, the teacher and Ray's
start are before it. Three numbers, since none says it all:

1. cores: what the run's own processes, down to the last child, left of the cores' time. On a quiet machine the number
   that counts (bar: under 15%); beside other load too high, as others take the cores. Waiting in a loop counts as busy:
   hence by kind of process, and the share of those that train.
2. machine: what nobody used, by /proc/stat. Beside other load too low.
3. slots: time of the trial slots in which no trial trained or was scored, by the trials' own clocks, and where it went.
   It says something beside other load.

Exits 1 where the first is not under the bar.
"""

import argparse
import heapq
import os
import re
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from minitron_search.records.directory import RunDirectory
from tests import tiny
from tests.runs import Command

BAR = 0.15
SAMPLE_S = 0.5
TRAINS = {"train": "RayTrainWorker", "inline": "ImplicitFunc"}  # by launcher, what Ray calls the processes that train


def configuration(folder: Path, trials: int) -> dict[str, Any]:
    shape = tiny.config(
        vocab_size=258, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    tiny.model(shape).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(tiny.prose(60_000))
    text = str(folder / "text.txt")
    return {
        "name": "idle-share",
        "precision": "float32",
        "stages": ["importance", "search"],
        "teacher": {"model": str(folder / "teacher")},
        "corpus": {"train": text, "validation": text, "sequence_length": 64, "calibration_samples": 8,
                   "validation_samples": 8},
        "winogrande": {"limit": 10},
        "space": {
            "budget": {"params": {"target": 750_000, "tolerance": 0.1}},
            "axes": {
                "hidden_size": {"low": 96, "high": 128, "step": 8},
                "intermediate_size": {"low": 192, "high": 384, "step": 32},
                "num_attention_heads": {"choices": [2, 4]},
                "drop_block": {"lengths": [0, 1, 2]},
            },
        },
        "search": {"trials": trials, "rungs": [16 * 1024, 48 * 1024]},
        "distillation": {"batch_tokens": 1024},
    }  # fmt: skip


class Sampler:
    """Processor seconds by kind of process, of a process and all below it, and the machine's, every SAMPLE_S."""

    def __init__(self, root: int):
        self.root = psutil.Process(root)
        self.spent: dict[tuple[int, float], tuple[str, float]] = {}  # by process: its kind, its seconds
        self.samples: list[tuple[float, dict[str, float], tuple[float, float]]] = []  # when; by kind; idle and all
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        used: dict[str, float] = defaultdict(float)
        with suppress(psutil.NoSuchProcess):
            while True:
                for process in [self.root, *self.root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        self._add(process, used)
                machine = psutil.cpu_times()
                idle = machine.idle + getattr(machine, "iowait", 0.0)
                self.samples.append((time.time(), dict(used), (idle, sum(machine))))
                time.sleep(SAMPLE_S)

    def _add(self, process: psutil.Process, used: dict[str, float]) -> None:
        times, kind = process.cpu_times(), "driver" if process == self.root else kind_of(process.cmdline())
        key = process.pid, process.create_time()
        before, seconds = self.spent.get(key, (kind, 0.0))
        if kind == "IDLE":  # between two calls, or at its end
            kind = before
        self.spent[key] = kind, times.user + times.system
        used[kind] += times.user + times.system - seconds

    def used(self, began: float, ended: float) -> dict[str, float]:
        kinds = self.samples[-1][1]
        return {kind: self._between([by.get(kind, 0.0) for _, by, _ in self.samples], began, ended) for kind in kinds}

    def idle_share(self, began: float, ended: float) -> float:
        """Of the machine."""
        idle, everything = (self._between([pair[n] for *_, pair in self.samples], began, ended) for n in (0, 1))
        return idle / everything

    def _between(self, series: list[float], began: float, ended: float) -> float:
        first, last = np.interp([began, ended], [when for when, *_ in self.samples], series)
        return float(last - first)


def kind_of(command: list[str]) -> str:
    """What Ray calls a process, or its program."""
    if not command:  # it ends
        return "IDLE"
    if command[0].startswith("ray::"):
        return re.split(r"[.\s(]", command[0].removeprefix("ray::"))[0]
    return next((Path(part).name for part in command if part.endswith(".py")), Path(command[0]).name)


class Slots(NamedTuple):
    """The search from its first trial's start to its last one's end, in Unix seconds, and when every slot had begun to
    train; how many trials ran at once; and the slot-seconds in which nothing trained or was scored, by what they went
    to."""

    began: float
    all_train: float
    ended: float
    count: int
    lost: dict[str, float]


class Span(NamedTuple):
    """A trial in its slot, in Unix seconds; a stopped trial that is continued has one more."""

    began: float
    ended: float
    worked: float  # seconds of training and scoring, by the trial's own clock


def spans_of(run: RunDirectory) -> list[Span]:
    clock = {(row["trial"], row["rung"]): row["seconds"] for row in run.rungs()}
    found, began, worked = [], dict[str, float](), dict[str, float]()
    for event in run.events():
        trial = event.get("trial", "")
        if event["event"] == "trial_started":
            began[trial], worked[trial] = event["time"], 0.0
        elif event["event"] == "rung_finished":
            worked[trial] += clock[trial, event["rung"]]
        elif event["event"] == "trial_finished":
            found.append(Span(began[trial], event["time"], worked[trial]))
    return sorted(found)


def slots_of(spans: list[Span]) -> Slots:
    first, last = spans[0].began, max(span.ended for span in spans)
    count = max(sum(other.began <= span.began < other.ended for other in spans) for span in spans)
    free = [(first, slot) for slot in range(count)]  # since when, for every slot
    lost: dict[str, float] = defaultdict(float)
    fresh, all_train = set(range(count)), first
    for span in spans:
        since, slot = heapq.heappop(free)
        lost["from a trial's end to the next one's start"] += span.began - since
        what = "start of a slot's processes, and inside its first trial" if slot in fresh else "inside later trials"
        lost[what] += span.ended - span.began - span.worked
        if slot in fresh:
            fresh.remove(slot)
            all_train = max(all_train, span.ended - span.worked)
        heapq.heappush(free, (span.ended, slot))
    lost["after a slot's last trial"] = sum(last - since for since, _ in free)
    return Slots(first, all_train, last, count, dict(lost))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launcher", choices=["train", "inline"], default="train")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="a new one, kept; default: a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / options.launcher
        print(f"load average before: {os.getloadavg()[0]:.1f}", flush=True)
        command = Command(folder, configuration(folder, options.trials))
        process = command.start(output, "--resources.launcher", options.launcher)
        sampler = Sampler(process.pid)
        printed, _ = process.communicate()
        if process.returncode:
            print(printed)
            return process.returncode
        return report(RunDirectory(output), sampler, options.launcher)


def report(run: RunDirectory, sampler: Sampler, launcher: str) -> int:
    spans = spans_of(run)
    slots, trials = slots_of(spans), len(spans)
    cores, wall = os.cpu_count() or 1, slots.ended - slots.began
    used = sampler.used(slots.began, slots.ended)
    everything, train = sum(used.values()), used[TRAINS[launcher]]
    print(f"launcher {launcher}: {trials} trials in {wall:.1f} s, {slots.count} at once, on {cores} cores; what trains "
          f"used {train / trials:.1f} s of a core a trial; load average {os.getloadavg()[1]:.1f}")  # fmt: skip

    def idle(began: float, ended: float) -> float:
        return 1 - sum(sampler.used(began, ended).values()) / (cores * (ended - began))

    share = idle(slots.began, slots.ended)
    print(f"1. cores idle, by the run's own processes: {share:.1%} (bar: under {BAR:.0%}); "
          f"{idle(slots.began, slots.all_train):.1%} in the {slots.all_train - slots.began:.1f} s until every slot "
          f"trains, {idle(slots.all_train, slots.ended):.1%} afterwards")  # fmt: skip
    print(f"     of what they used, {train / everything:.1%} by those that train:")
    for kind, seconds in sorted(used.items(), key=lambda pair: -pair[1]):
        if seconds > 0.002 * everything:
            print(f"     {seconds:8.1f} s {kind}")
    print(f"2. cores idle, by /proc/stat: {sampler.idle_share(slots.began, slots.ended):.1%}")
    print(f"3. slots in which nothing trained or was scored: {sum(slots.lost.values()) / (slots.count * wall):.1%}")
    for what, seconds in slots.lost.items():
        print(f"     {seconds:8.1f} s {seconds / (slots.count * wall):6.1%} {what}")
    return int(share >= BAR)


if __name__ == "__main__":
    raise SystemExit(main())
