"""A retraining on two workers that loses one: it resumes by itself and ends where an unbroken one ends."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from transformers import AutoModelForCausalLM

from minitron_search.trials.settings import CHECKPOINTS
from tests.runs import Command, children, in_background, rows, tiny_inputs

pytestmark = pytest.mark.slow
RETRAIN = ("--resume", "--stages", "retrain", "--resources.launcher", "train")
STEPS = 240  # of the retraining
BETWEEN = STEPS // CHECKPOINTS  # its checkpoints


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, shared_ray: Path) -> Command:
    folder = tmp_path_factory.mktemp("killed")
    configuration = tiny_inputs(folder)
    configuration["search"] = {"trials": 1, "rungs": [128]}
    configuration["retraining"] = {"tokens": STEPS * 64, "warmup_steps": 2}
    return Command(folder, configuration)


@pytest.fixture(scope="module")
def searched(command: Command) -> Path:
    """A run whose retraining is still to come."""
    output = command.folder / "searched"
    command.main(output, "--stages", "importance,search", "--resources.launcher", "inline")
    return output


@pytest.fixture(scope="module")
def unbroken(command: Command, searched: Path) -> Path:
    output = copied(searched, "unbroken")
    command.main(output, *RETRAIN)
    return output


def copied(searched: Path, name: str) -> Path:
    return Path(shutil.copytree(searched, searched.parent / name))


def steps(output: Path) -> list[dict[str, Any]]:
    """Every logged step of the retraining, those that were taken twice included; not a line that is being written."""
    logs = output.glob("trials/retrained-*/metrics.jsonl")
    lines = [line for log in logs for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def checkpoints(output: Path, name: str) -> Iterator[Path]:
    return output.glob(f"trials/retrained-*/checkpoint/{name}")


def in_a_step(output: Path) -> bool:
    """Some steps behind a checkpoint, the second or a later one, and before the next."""
    last = steps(output)[-1]["step"]
    return last > 2 * BETWEEN and BETWEEN // 4 < last % BETWEEN < BETWEEN // 2


def in_a_later_checkpoint(output: Path) -> bool:
    """Not before the fourth."""
    whole, cut = checkpoints(output, "step-*"), checkpoints(output, ".step-*.partial")
    return any(int(path.name[5:]) >= 4 * BETWEEN for path in whole) and any(cut)


@pytest.mark.parametrize("strategy, moments", [("ddp", [in_a_step]), ("fsdp2", [in_a_later_checkpoint])])
def test_a_killed_worker_changes_no_number(
    command: Command, searched: Path, unbroken: Path, strategy: str, moments: list[Callable[[Path], bool]]
) -> None:
    """Under ddp bit for bit; shards add up otherwise than replicas, and are compared to 1e-5."""
    output = copied(searched, strategy)
    killed: list[Callable[[Path], bool]] = []

    def kill() -> None:
        for moment in moments:
            taken, workers = len(steps(output)), list[psutil.Process]()
            while len(steps(output)) == taken:  # looked for before they train: meanwhile many steps would be taken
                workers = children("TrainWorker") or workers
            while not moment(output):
                time.sleep(0.005)
            workers[-1].kill()
            killed.append(moment)

    in_background(kill)
    command.main(output, *RETRAIN, "--resources.strategy", strategy)
    assert killed == moments
    taken: dict[int, float] = {}
    again, last = list[int](), 0  # how many are taken again after each kill
    for record in steps(output):
        if record["step"] <= last:
            again.append(last + 1 - record["step"])
        last = record["step"]
        assert taken.setdefault(record["step"], record["loss"]) == record["loss"], "a step taken again differs"
    assert 0 < again[0] < 2 * BETWEEN, "it goes on from its last checkpoint"
    whole = {record["step"]: record["loss"] for record in steps(unbroken)}
    assert list(taken) == list(whole) == list(range(1, STEPS + 1))
    ours, theirs = ([row for row in rows(root) if row["arm"] == "retrained"] for root in (output, unbroken))
    assert ours[0]["status"] == "complete" and len(ours) == 1
    if strategy == "ddp":
        assert taken == whole and ours == theirs
    else:
        assert list(taken.values()) == pytest.approx(list(whole.values()), rel=1e-5)
        assert ours[0]["lm_loss"] == pytest.approx(theirs[0]["lm_loss"], rel=1e-5)
    assert not list(checkpoints(output, "*")), "nothing goes on from it"
    AutoModelForCausalLM.from_pretrained(output / "best")


def test_a_diverging_retraining_in_shards_is_a_row_that_says_so(
    command: Command, searched: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = copied(searched, "diverging")
    configuration = yaml.safe_load((output / "config.yaml").read_text())
    configuration["retraining"]["learning_rate"] = 1e30
    (output / "config.yaml").write_text(yaml.safe_dump(configuration))
    printed = command.main(output, *RETRAIN, "--resources.strategy", "fsdp2", "--retraining.learning_rate", "1e30",
                           status=1)  # fmt: skip
    assert "diverged at step" in printed
    captured = capfd.readouterr()
    assert "Warning" not in printed + captured.out + captured.err
    found = [row for row in rows(output) if row["arm"] == "retrained"]
    assert [row["status"] for row in found] == ["failed"] and "diverged at step" in found[0]["message"]
    assert any(row["status"] == "promoted" for row in rows(output))
