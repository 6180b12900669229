"""The command with its output in a bucket, a run's or an ablation's: a second driver, which has nothing of it, goes on
with it."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSelector, FileSystem, copy_files
from transformers import AutoModelForCausalLM

from tests.runs import TIMES, Command, rows

pytestmark = pytest.mark.slow
ONE = ("--search.concurrency", "1", "--resources.launcher", "inline")
BUCKET = "searches"


@pytest.fixture
def address(s3_address: Callable[[str, str], str], request: pytest.FixtureRequest) -> str:
    """A folder of the test's own."""
    return s3_address(BUCKET, request.node.name)


def test_a_second_driver_goes_on_from_the_bucket_alone(
    tmp_path: Path, address: str, shared_ray: Path, finished_run: Path, tiny_command: Command
) -> None:
    """The first driver's working copy is in caches of its own; the second's begin without one."""
    command = Command(tmp_path, tiny_command.configuration)
    assert command.interrupt(address, "rung 1", signal.SIGKILL, *ONE) == -signal.SIGKILL
    shutil.rmtree(tmp_path / "cache")
    printed = command.main(address, *ONE, status=2)
    assert "is not empty" in printed and "--resume" in printed

    printed = command.main(address, *ONE, "--resume")
    there, base = FileSystem.from_uri(address)
    assert f"minutes: s3://{base}" in printed
    with there.open_input_file(f"{base}/trials.parquet") as file:
        table = pq.read_table(file).to_pylist()
    assert not [row["message"] for row in table if row["message"]]
    assert [{key: value for key, value in row.items() if key not in TIMES} for row in table] == rows(finished_run)

    (tmp_path / "downloaded").mkdir()
    copy_files(f"{base}/best", str(tmp_path / "downloaded"), source_filesystem=there)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "downloaded")
    assert student.num_parameters() == next(row["params"] for row in table if row["arm"] == "retrained")
    everything = FileSelector(base, recursive=True)
    names = {info.base_name for info in there.get_file_info(everything)}
    assert {"report.html", "study.db", "events.jsonl", "best.whole"} <= names and "job" not in names


def test_an_empty_machine_goes_on_with_an_ablation_in_a_bucket(
    tmp_path: Path, address: str, shared_ray: Path, tiny_command: Command
) -> None:
    values: dict[str, Any] = {key: value for key, value in tiny_command.configuration.items() if key != "name"}
    command = Command(tmp_path, {
        **values,
        "question": "Is it?",
        "space": {"budget": {"params": {"target": 130_000, "tolerance": 0.4}}},
        "architecture": {"hidden_size": 42, "intermediate_size": 112},
        "search": {"rungs": [0, 128], "seeds": 2, "concurrency": 1},
        "retraining": {"tokens": 128},
        "resources": {"launcher": "inline"},
        "before": {"middle": {"architecture": {"intermediate_size": 120}}},
        "arms": {"a_first": {}, "b_student": {"teacher": {"model": "{output}/before/middle/best"}}},
    })  # fmt: skip
    unbroken = tmp_path / "unbroken"
    command.main(unbroken)

    assert command.interrupt(address, "b_student:", signal.SIGKILL) == -signal.SIGKILL
    shutil.rmtree(tmp_path / "cache")
    printed = command.main(address, status=2)
    assert "is not empty" in printed and "--resume" in printed
    printed = command.main(address, "--resume")
    assert "arm 2 of 2, b_student" in printed and "arm 1 of 2" not in printed

    there, base = FileSystem.from_uri(address)
    downloaded = tmp_path / "downloaded"
    copy_files(base, str(downloaded), source_filesystem=there)
    for arm in ("before/middle", "a_first", "b_student"):
        assert rows(downloaded / arm) == rows(unbroken / arm), arm
    compared = pq.read_table(downloaded / "ablation.parquet")
    assert compared == pq.read_table(unbroken / "ablation.parquet") and compared.num_rows
    assert (downloaded / "report.html").read_text().count("b_student")
    names = [info.path for info in there.get_file_info(FileSelector(base, recursive=True))]
    assert not [name for name in names if "step-" in name], "nothing goes on from the checkpoints of ended arms"


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_computed(
    tmp_path: Path, address: str, tiny_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    printed = tiny_command.main(address.replace(BUCKET, "no-such-bucket"), *ONE, status=2)
    assert "output: s3://no-such-bucket/test_a_bucket" in printed and "Traceback" not in printed
    assert not (tmp_path / "cache" / "teachers").exists() and not list((tmp_path / "cache").glob("runs/*/config.yaml"))
