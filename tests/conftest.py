"""No test reaches the Hub, none starts Ray without saying so, and those that need one share it."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

with suppress(ImportError):  # torch.compile imports it, and it refuses to come after the standard library's distutils
    import setuptools  # noqa: F401

# read once, when Ray is imported: without it whatever calls Ray by mistake starts one, which stays for later tests
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
import ray  # noqa: E402

del os.environ["RAY_ENABLE_AUTO_CONNECT"]  # the command's own processes are a user's
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

if TYPE_CHECKING:
    from tests.runs import Command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray for every test of this process that asks for it: `main()` joins it instead of starting its own.

    Yields the cache folder of its processes, which is fixed when they start; what is cached is keyed by content, so
    tests may share it.
    """
    from minitron_search.cluster.session import joined

    with pytest.MonkeyPatch.context() as environment:
        cache = tmp_path_factory.mktemp("cache")
        environment.setenv("MINITRON_SEARCH_CACHE", str(cache))
        environment.setenv("PYTHONPATH", str(ROOT))  # its workers import what tests define
        environment.delenv("RAY_ADDRESS", raising=False)
        with SHARED:
            SHARED.enter_context(joined())
            yield cache


SHARED = ExitStack()  # what is shared, while it is there


@pytest.fixture(scope="module")
def no_shared_ray() -> Iterator[None]:
    """For a module that starts a Ray of another kind: the shared one, where there is one, is away meanwhile."""
    from minitron_search.cluster.session import joined

    shared = ray.is_initialized()
    if shared:
        SHARED.close()
    yield
    if shared:
        SHARED.enter_context(joined())


@pytest.fixture(scope="session")
def among_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every process of these tests has, for what one of them makes and all of them read."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_command(among_all: Path, tmp_path_factory: pytest.TempPathFactory) -> "Command":
    """Of `tiny_inputs`, which all processes share; whoever asks for it gives its outputs names of their own."""
    from tests.runs import Command, tiny_inputs

    folder = among_all / "tiny"
    with FileLock(f"{folder}.lock"):
        configuration = tiny_inputs(folder)
    return Command(tmp_path_factory.mktemp("tiny"), configuration)


@pytest.fixture(scope="session")
def finished_run(among_all: Path, tiny_command: "Command", shared_ray: Path) -> Iterator[Path]:
    """A whole unbroken run of `tiny_command` at concurrency 1, inside the Tune trials: to be read only, as is checked
    at the end, for what one test writes into it another reads."""
    output = among_all / "finished"
    with FileLock(f"{output}.lock"):
        if not output.exists():
            tiny_command.main(output, "--search.concurrency", "1", "--resources.launcher", "inline")
    events = (output / "events.jsonl").read_bytes()
    yield output
    assert (output / "events.jsonl").read_bytes() == events, "a test went on with the run that all of them read"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """moto's S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_address(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Makes the address of a folder, by bucket and name, and the bucket."""
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # moto refuses the delayed way of pyarrow's to open a stream otherwise
    options = f"region=us-east-1&allow_delayed_open=true&endpoint_override={quote(s3_endpoint, safe='')}"

    def made(bucket: str, name: str) -> str:
        boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)
        return f"s3://{bucket}/{name}?{options}"

    return made


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.time()


BEGAN = pytest.StashKey[float]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files first that take long, so that no process is left with one of them when the others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how often Ray was started, by this process and by those that tests started: the dearest thing they do."""
    sessions = (Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray").glob("session_2*")
    starts = sum(folder.lstat().st_ctime >= config.stash[BEGAN] for folder in sessions)
    terminalreporter.write_line(f"Ray was started {starts} times")
