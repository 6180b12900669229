"""An ablation in a bucket, with the command, real processes and real Ray: killed, and continued by an empty machine."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSelector, FileSystem, copy_files

from tests.runs import Command, rows, tiny_inputs

pytestmark = pytest.mark.slow
BUCKET = "ablations"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)
    # moto refuses the delayed way of pyarrow's to open a stream otherwise
    yield f"s3://{BUCKET}/a?region=us-east-1&allow_delayed_open=true&endpoint_override={quote(endpoint, safe='')}"
    server.stop()


def test_an_empty_machine_goes_on_with_an_ablation_in_a_bucket(tmp_path: Path, address: str) -> None:
    values: dict[str, Any] = {key: value for key, value in tiny_inputs(tmp_path).items() if key != "name"}
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
    command.run(unbroken)

    assert command.interrupt(address, "b_student:", signal.SIGKILL) == -signal.SIGKILL
    command.environment["MINITRON_SEARCH_CACHE"] = str(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "cache")
    refused = command.start(address)
    printed, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "is not empty" in printed and "--resume" in printed
    printed = command.run(address, "--resume")
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
