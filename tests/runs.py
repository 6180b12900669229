"""Real runs of the command on a tiny teacher: real processes, real Ray."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from minitron_search.cli import main
from tests import tiny

ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "tokens_per_second", "tokens_per_second_stderr"}  # the columns that two equal runs may differ in


def tiny_configuration(teacher: Path, text: Path) -> dict[str, Any]:
    """120 legal architectures of a 6-layer teacher; three rungs; seconds."""
    return {
        "name": "tiny",
        "precision": "float32",
        "teacher": {"model": str(teacher)},
        "corpus": {"train": str(text), "validation": str(text), "sequence_length": 32, "calibration_samples": 8,
                   "validation_samples": 4},
        "winogrande": {"limit": 10},
        "space": {
            "budget": {"params": {"target": 105_000, "tolerance": 0.1}},
            "axes": {
                "hidden_size": {"low": 42, "high": 48, "step": 6},
                "intermediate_size": {"low": 64, "high": 128, "step": 16},
                "num_attention_heads": {"choices": [3, 6]},
                "drop_block": {"lengths": [0, 1, 2]},
            },
        },
        "search": {"trials": 5, "rungs": [128, 256, 512], "reduction_factor": 2},
        "distillation": {"batch_tokens": 64},
        "retraining": {"tokens": 512, "warmup_steps": 2},
    }  # fmt: skip


def tiny_inputs(folder: Path) -> dict[str, Any]:
    """`tiny_configuration` of a 6-layer teacher and a text that are written into `folder`, unless they are there."""
    config = tiny.config(
        vocab_size=258, hidden_size=48, intermediate_size=128, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    if not (folder / "text.txt").exists():
        tiny.model(config).save_pretrained(folder / "teacher")
        tiny.tokenizer().save_pretrained(folder / "teacher")
        (folder / "text.txt").write_text(tiny.prose(20_000))
    return tiny_configuration(folder / "teacher", folder / "text.txt")


class Command:
    """`python -m minitron_search.run` with a configuration of its own, in a process group of its own."""

    def __init__(self, folder: Path, configuration: dict[str, Any]):
        self.folder, self.configuration = folder, configuration
        self.file = folder / "config.yaml"
        self.file.write_text(yaml.safe_dump(configuration))
        self.environment = {
            **os.environ,
            "MINITRON_SEARCH_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.environment.pop("RAY_ADDRESS", None)

    def start(self, output: Path | str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """`output` is a folder or an address."""
        place = output if isinstance(output, str) else os.path.relpath(output, self.folder)
        return subprocess.Popen(
            [sys.executable, "-m", "minitron_search.run", "--config", str(self.file),
             "--output", place, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**self.environment, **environment}, cwd=self.folder,
        )  # fmt: skip

    def run(self, output: Path | str, *arguments: str) -> str:
        """Run to the end; what it printed."""
        process = self.start(output, *arguments)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed
        return printed

    def main(self, output: Path | str, *arguments: str, status: int = 0) -> str:
        """The same run inside this process, whose Ray it joins (`shared_ray`): what it printed.

        Its caches are then those of `shared_ray`.
        """
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            ended = main(["--config", str(self.file), "--output", str(output), *arguments])
        assert ended == status, printed.getvalue()
        return printed.getvalue()

    def interrupt(self, output: Path | str, at: str, how: signal.Signals, *arguments: str) -> int:
        """Run until a printed line holds `at`, then send `how`; the exit status."""
        process = self.start(output, *arguments)
        assert process.stdout is not None
        printed: list[str] = []
        late = threading.Timer(300, process.kill)  # a run that stands still is a failure, not the end of all tests
        late.start()
        for line in process.stdout:
            printed.append(line)
            if at in line:
                process.send_signal(how)
                break
        else:
            raise AssertionError(f"the run ended before it printed {at!r}:\n{''.join(printed)}")
        late.cancel()
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would hold it up
        return process.wait(timeout=120)


def rows(output: Path) -> list[dict[str, Any]]:
    """trials.parquet but for times."""
    table = pq.read_table(output / "trials.parquet").to_pylist()
    return [{key: value for key, value in row.items() if key not in TIMES} for row in table]


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def in_background(work: Callable[[], None]) -> threading.Thread:
    """`work` beside a run in this process."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def children(kind: str, driver: "subprocess.Popen[str] | None" = None) -> list[psutil.Process]:
    """The processes below `driver`, or below this process, whose name of Ray's holds `kind`, oldest first."""
    found = []
    for child in psutil.Process(driver and driver.pid).children(recursive=True):
        with suppress(psutil.Error, IndexError):  # it ended meanwhile
            name = child.cmdline()[0]
            if name.startswith("ray::") and kind in name:
                found.append(child)
    return sorted(found, key=psutil.Process.create_time)  # by time: numbers begin again at some point


def kill_child(kind: str, driver: "subprocess.Popen[str] | None" = None) -> bool:
    """SIGKILL the newest of `children`; whether there was one."""
    found = children(kind, driver)
    for child in found[-1:]:
        with suppress(psutil.NoSuchProcess):
            child.kill()
            return True
    return False
