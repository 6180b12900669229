"""What an embedded Ray listens on: the loopback interface, whoever is on the network."""

import ipaddress
import os
import urllib.request
from pathlib import Path

import psutil
import pytest
import ray

from minitron_search.cluster.ray_internals import loopback_only


def listening() -> dict[str, list[str]]:
    """The addresses on which this process and those below it listen, by the name of the process."""
    found: dict[str, list[str]] = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    found.setdefault(process.cmdline()[0].rpartition("/")[2], []).append(socket.laddr.ip)
        except (psutil.NoSuchProcess, IndexError):  # it ended meanwhile
            continue
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def test_every_socket_of_an_embedded_ray_is_on_loopback(shared_ray: Path) -> None:
    ray.get(ray.remote(lambda: None).remote())  # a worker has a socket of its own
    found = listening()
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= found.keys()
    assert {name: [ip for ip in addresses if not is_loopback(ip)] for name, addresses in found.items()} == {
        name: [] for name in found
    }


def test_what_answers_without_the_token_is_what_the_document_says(shared_ray: Path) -> None:
    """The page of metrics: any user of this machine may read it (docs/cluster.md)."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        assert page.status == 200
    document = Path(__file__).parents[2] / "docs" / "cluster.md"
    assert "`/metrics`" in document.read_text()


def test_a_ray_that_is_started_outside_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray start` refuses to begin a cluster where that variable is left behind."""
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    monkeypatch.delenv(name, raising=False)
    with loopback_only():
        assert os.environ[name] == "0"
    assert name not in os.environ
