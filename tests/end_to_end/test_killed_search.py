"""A search whose processes are killed, a trial's own, a train worker's and the driver's, leaves what an unbroken one
leaves."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Command, children, in_background, kill_child, rows, tiny_inputs

pytestmark = pytest.mark.slow
TRIALS = 4
STAGES = ("--stages", "importance,search")
TRIAL, WORKER = "ImplicitFunc", "RayTrainWorker"  # Ray's names of what runs Tune's function, and of what trains
ONE, TWO = ("--search.concurrency", "1"), ("--search.concurrency", "2")
Turn = Callable[[], bool]
INLINE = ("--resources.launcher", "inline")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, shared_ray: Path) -> Command:
    folder = tmp_path_factory.mktemp("killed")
    configuration = tiny_inputs(folder)
    configuration["search"] = {
        "trials": TRIALS, "rungs": [64 * 64, 128 * 64, 192 * 64], "reduction_factor": 2, "controls": False,
    }  # fmt: skip
    return Command(folder, configuration)


@pytest.fixture(scope="module")
def unbroken(command: Command) -> Path:
    output = command.folder / "unbroken"
    command.main(output, *STAGES, *ONE, *INLINE)
    return output


def searched(output: Path) -> list[dict[str, Any]]:
    """Its rows but for the teacher's."""
    return [row for row in rows(output) if row["arm"] != "teacher"]


def logged(output: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of every trial's own log; one that is being written is left out."""
    lines = [
        {**json.loads(line), "log": log.parent.name}
        for log in output.glob("trials/*/metrics.jsonl")
        for line in log.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return [line for line in lines if line["kind"] == kind and not line["log"].startswith("teacher")]


def in_steps(output: Path, *, first: bool) -> set[str]:
    """The trials that are some steps on their way to a rung; to the first one only if that counts."""
    steps, rungs = ({line["log"]: line["tokens"] for line in logged(output, kind)} for kind in ("step", "rung"))
    return {trial for trial in steps if (first or trial in rungs) and steps[trial] > rungs.get(trial, 0)}


def nothing_lost_or_repeated(output: Path, finished: list[dict[str, Any]]) -> None:
    """Every rung is in its trial's log once, and in the table; of `finished`, as it was finished."""
    reached = [(line["log"], line["rung"]) for line in logged(output, "rung")]
    kept = {(row["trial"], row["rung"]): row["lm_loss"] for row in searched(output)}
    assert len(reached) == len(set(reached)), "a finished rung was computed again"
    assert set(kept) == set(reached)
    assert all(kept[row["trial"], row["rung"]] == row["lm_loss"] for row in finished)
    for trial in {row["trial"] for row in searched(output)}:
        mine = [row for row in searched(output) if row["trial"] == trial]
        assert [row["rung"] for row in mine] == list(range(len(mine)))
        assert mine[0]["status"] in ("stopped", "complete", "promoted")
        assert (mine[0]["status"] == "stopped") == (len(mine) < 3)


def kill_in_turn(output: Path, *turns: Turn) -> list[list[dict[str, Any]]]:
    """Tries each until it has killed; what is returned fills with the rungs that were finished before each kill."""
    finished: list[list[dict[str, Any]]] = []

    def wait() -> None:
        for turn in turns:
            before = logged(output, "rung")
            while not turn():
                before = logged(output, "rung")
                time.sleep(0.01)
            finished.append(before)

    in_background(wait)
    return finished


def sigkill_at(process: "subprocess.Popen[str]", line: str) -> None:
    """SIGKILL the driver when it prints `line`."""
    assert process.stdout is not None
    for printed in process.stdout:
        if line in printed:
            process.kill()
            break
    threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would hold it up
    assert process.wait(timeout=300) == -signal.SIGKILL


def test_a_killed_trial_that_trains_itself_changes_no_number(command: Command, unbroken: Path) -> None:
    output = command.folder / "inline"
    finished = kill_in_turn(output, lambda: bool(in_steps(output, first=True)) and kill_child(TRIAL))
    command.main(output, *STAGES, *ONE, *INLINE)
    assert len(finished) == 1, "no trial was killed"
    assert searched(output) == searched(unbroken)
    nothing_lost_or_repeated(output, finished[0])


def test_killed_trial_gives_back_its_worker_group(command: Command, unbroken: Path) -> None:
    """On one CPU, which the groups of killed trials have: one that was still starting, and one that was training."""
    output, first = command.folder / "train", set[str]()

    def while_its_group_starts() -> bool:
        first.update(folder.name for folder in output.glob("trials/search-*"))
        return bool(children("SynchronizationActor", process)) and kill_child(TRIAL, process)

    def while_another_trains() -> bool:
        return bool(in_steps(output, first=False) - first) and kill_child(TRIAL, process)

    process = command.start(output, *STAGES, *ONE, RAY_OVERRIDE_RESOURCES='{"CPU": 1}')
    finished = kill_in_turn(output, while_its_group_starts, while_another_trains)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and len(finished) == 2, printed
    assert searched(output) == searched(unbroken)
    nothing_lost_or_repeated(output, finished[-1])


def test_kills_among_two_trials_at_once_lose_no_row(command: Command, unbroken: Path) -> None:
    """A trial's process and a train worker die as two trials train; then the driver."""
    output = command.folder / "two"

    def a_worker_and_a_trial() -> bool:
        return len(in_steps(output, first=True)) == 2 and kill_child(WORKER, process) and kill_child(TRIAL, process)

    process = command.start(output, *STAGES, *TWO)
    finished = kill_in_turn(output, a_worker_and_a_trial)
    sigkill_at(process, f"[3/{TRIALS}")
    finished.append(logged(output, "rung"))
    command.main(output, *STAGES, *TWO, *INLINE, "--resume")
    assert len(finished) == 2, "no two trials trained at once"
    for before in finished:
        nothing_lost_or_repeated(output, before)
    assert len({row["trial"] for row in searched(output)}) == TRIALS
    alone = {(row["trial"], row["rung"]): row for row in searched(unbroken)}
    both = [(row, alone[row["trial"], row["rung"]]) for row in searched(output) if (row["trial"], row["rung"]) in alone]
    assert len(both) >= TRIALS
    for ours, theirs in both:
        assert {**ours, "status": "", "proposal": 0} == {**theirs, "status": "", "proposal": 0}
