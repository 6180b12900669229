"""No test reaches the Hub, none starts Ray without saying so, and those that need one share it."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# read once, when Ray is imported: without it whatever calls Ray by mistake starts one, which stays for later tests
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
import ray  # noqa: E402, F401

del os.environ["RAY_ENABLE_AUTO_CONNECT"]  # the command's own processes are a user's
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray for every test of this process that asks for it: `main()` joins it instead of starting its own.

    Yields the cache folder of its processes, which is fixed when they start; what is cached is keyed by content, so
    tests may share it.
    """
    from minitron_search.cluster import joined

    with pytest.MonkeyPatch.context() as environment:
        cache = tmp_path_factory.mktemp("cache")
        environment.setenv("MINITRON_SEARCH_CACHE", str(cache))
        environment.setenv("PYTHONPATH", str(ROOT))  # its workers import what tests define
        environment.delenv("RAY_ADDRESS", raising=False)
        with joined():
            yield cache


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.time()


BEGAN = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how often Ray was started, by this process and by those that tests started: the dearest thing they do."""
    sessions = (Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray").glob("session_2*")
    starts = sum(folder.lstat().st_ctime >= config.stash[BEGAN] for folder in sessions)
    terminalreporter.write_line(f"Ray was started {starts} times")
