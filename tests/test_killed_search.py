"""A search whose processes are killed: the trial's own, a train worker's, the driver's; what is left is what an
unbroken one leaves."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Command, events, kill_child, rows, tiny_inputs

pytestmark = pytest.mark.slow
TRIALS = 8  # four drawn, four by TPE
SEARCH = ("--stages", "importance,search", "--search.concurrency")
TRIAL, WORKER = "ImplicitFunc", "RayTrainWorker"  # Ray's names: of a process that runs Tune's function, or trains


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("killed")
    configuration = tiny_inputs(folder)
    configuration["search"] = {"trials": TRIALS, "rungs": [4 * 64, 24 * 64, 44 * 64], "reduction_factor": 2}
    return Command(folder, configuration)


@pytest.fixture(scope="module")
def unbroken(command: Command) -> Path:
    output = command.folder / "unbroken"
    command.run(output, *SEARCH, "1", "--resources.launcher", "inline")
    return output


def searched(output: Path) -> list[dict[str, Any]]:
    return [row for row in rows(output) if row["arm"] == "search"]


def logged(output: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of every trial's own log, in no order; a line that is being written is left out."""
    lines = [
        {**json.loads(line), "log": log.parent.name}
        for log in output.glob("trials/search-*/metrics.jsonl")
        for line in log.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return [line for line in lines if line["kind"] == kind]


def training(output: Path, at_once: int) -> bool:
    """Whether that many trials have steps behind a rung, and their next rung to come."""
    steps, rungs = ({line["log"]: line for line in logged(output, kind)} for kind in ("step", "rung"))
    return sum(t in rungs and steps[t]["tokens"] > rungs[t]["tokens"] for t in steps) >= at_once


def starting(output: Path, at_once: int) -> bool:
    """Whether a worker group is being started, and has not said what it occupies."""
    return any(output.glob(".ray/groups/search/*/*.job"))


class Killer:
    """Kills one process of a run when `moment` has come, and remembers which rows were finished by then."""

    def __init__(self, driver: "subprocess.Popen[str]", output: Path, kind: str, moment: Callable[[], bool]):
        self.killed: int | None = None
        self.finished: list[dict[str, Any]] = []

        def wait() -> None:
            while driver.poll() is None and self.killed is None:
                if moment():
                    self.finished = logged(output, "rung")
                    self.killed = kill_child(driver, kind)
                time.sleep(0.002)

        self.thread = threading.Thread(target=wait, daemon=True)
        self.thread.start()


@pytest.mark.parametrize("launcher, moment", [("inline", training), ("train", training), ("train", starting)])
def test_a_killed_trial_process_changes_no_number(
    command: Command, unbroken: Path, launcher: str, moment: Callable[[Path, int], bool]
) -> None:
    output = command.folder / f"{launcher}-{moment.__name__}"
    process = command.start(output, *SEARCH, "1", "--resources.launcher", launcher)
    killer = Killer(process, output, TRIAL, lambda: moment(output, 1))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and killer.killed, printed
    assert searched(output) == searched(unbroken)
    nothing_repeated(output, killer.finished)


def nothing_repeated(output: Path, finished: list[dict[str, Any]]) -> None:
    """Every rung is in its trial's log once, and in the table as it was finished."""
    reached = [(line["log"], line["rung"]) for line in logged(output, "rung")]
    assert len(reached) == len(set(reached)), "a finished rung was computed again"
    kept = {(row["trial"], row["rung"]): row["lm_loss"] for row in searched(output)}
    assert set(kept) == set(reached)
    for row in finished:
        assert kept[row["trial"], row["rung"]] == row["lm_loss"]
