"""clusters/spot_notice.py against a metadata service of our own, with a `ray` that writes down what it is told."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_files.files import ROOT

AWS, GCP = "/latest/meta-data/spot/instance-action", "/computeMetadata/v1/instance/preempted"


class Service(ThreadingHTTPServer):
    """Gives no notice the first two times it is asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = 0


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        given = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.say(200 if given else 400, "secret")

    def do_GET(self) -> None:
        self.server.asked += 1
        given = self.server.asked > 2
        if self.path == AWS and self.headers["X-aws-ec2-metadata-token"] == "secret":
            self.say(200 if given else 404, json.dumps({"action": "terminate"}))
        elif self.path == GCP and self.headers["Metadata-Flavor"] == "Google":
            self.say(200, "TRUE" if given else "FALSE")
        else:
            self.say(401, "who are you?")

    def say(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("cloud, seconds", [("aws", "120"), ("gcp", "30")])
def test_a_notice_drains_the_node(tmp_path: Path, service: Service, cloud: str, seconds: str) -> None:
    told = tmp_path / "told"
    (tmp_path / "ray").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\n')
    (tmp_path / "ray").chmod(0o755)
    endpoint = f"http://127.0.0.1:{service.server_port}"
    subprocess.run(
        [sys.executable, ROOT / "clusters/spot_notice.py", cloud, "--endpoint", endpoint, "--every", "0.05"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True, timeout=60,
    )  # fmt: skip
    assert service.asked == 3
    words = told.read_text().splitlines()
    assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"] and words[-1] == seconds
    assert words[4].startswith("spot notice: ")


def test_ray_still_has_the_command() -> None:
    """It is hidden from `ray --help`."""
    help_of = [str(Path(sys.executable).parent / "ray"), "drain-node", "--help"]
    said = subprocess.run(help_of, capture_output=True, text=True, check=True).stdout
    assert "DRAIN_NODE_REASON_PREEMPTION" in said and "--deadline-remaining-seconds" in said
