"""The command with its output in a bucket: a second driver, on a machine that holds nothing, goes on with the run."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import boto3
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSelector, FileSystem, copy_files
from transformers import AutoModelForCausalLM

from tests.runs import TIMES, Command, rows, tiny_inputs

pytestmark = pytest.mark.slow
ONE = ("--search.concurrency", "1", "--resources.launcher", "inline")
BUCKET = "searches"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def address(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)
    # moto refuses the delayed way of pyarrow's to open a stream otherwise
    return f"s3://{BUCKET}/run?region=us-east-1&allow_delayed_open=true&endpoint_override={quote(endpoint, safe='')}"


def test_a_second_driver_goes_on_from_the_bucket_alone(tmp_path: Path, address: str) -> None:
    command = Command(tmp_path, tiny_inputs(tmp_path))
    unbroken = tmp_path / "unbroken"
    command.run(unbroken, *ONE)

    assert command.interrupt(address, "rung 1", signal.SIGKILL, *ONE) == -signal.SIGKILL
    shutil.rmtree(tmp_path / "cache")
    refused = command.start(address, *ONE)
    printed, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "is not empty" in printed and "--resume" in printed

    printed = command.run(address, *ONE, "--resume")
    assert f"minutes: s3://{BUCKET}/run" in printed
    there, base = FileSystem.from_uri(address)
    with there.open_input_file(f"{base}/trials.parquet") as file:
        table = pq.read_table(file).to_pylist()
    assert not [row["message"] for row in table if row["message"]]
    assert [{key: value for key, value in row.items() if key not in TIMES} for row in table] == rows(unbroken)

    (tmp_path / "downloaded").mkdir()
    copy_files(f"{base}/best", str(tmp_path / "downloaded"), source_filesystem=there)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "downloaded")
    assert student.num_parameters() == next(row["params"] for row in table if row["arm"] == "retrained")
    everything = FileSelector(base, recursive=True)
    names = {info.base_name for info in there.get_file_info(everything)}
    assert {"report.html", "study.db", "events.jsonl", "best.whole"} <= names and "job" not in names


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_computed(tmp_path: Path, address: str) -> None:
    command = Command(tmp_path, tiny_inputs(tmp_path))
    process = command.start(address.replace(BUCKET, "no-such-bucket"), *ONE)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "output: s3://no-such-bucket/run" in printed and "Traceback" not in printed
    assert not (tmp_path / "cache" / "teachers").exists() and not list((tmp_path / "cache").glob("runs/*/config.yaml"))
