"""An ablation whose output is in storage: its runs are there and what compares them; an empty machine goes on."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from minitron_search.ablation import storage as ablation_storage
from minitron_search.ablation.definition import Ablation, checked, load
from minitron_search.ablation.runner import prepare_ablation, run_ablation
from minitron_search.cli import main
from minitron_search.planning.prepare import Prepared
from minitron_search.records.directory import AXES, RunDirectory
from minitron_search.records.paths import SCHEMES, inside
from minitron_search.teachers.sources import is_stored, stored_model, teacher_config, teacher_folder
from tests import tiny
from tests.evaluation.test_evidence import WINDOWS, log

ARMS: dict[str, Any] = {
    "plain": {},
    "other": {"distillation": {"loss": "ce"}},
    "again": {"teacher": {"model": "{output}/before/middle/best"}},
}


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is reached as file:// addresses are storage; its parts have to be there, as buckets' need not."""
    monkeypatch.setattr("minitron_search.records.paths.SCHEMES", (*SCHEMES, "file"))
    monkeypatch.setattr("minitron_search.cluster.session.joined", nullcontext)
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "storage" / "a"
    for place in (*ARMS, "before/middle"):
        (there / place).mkdir(parents=True)
    return there


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sits down at a machine of its own, which holds nothing at first."""
    return lambda name: monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / name / "cache"))


@pytest.fixture
def asked(tmp_path: Path, storage: Path) -> list[str]:
    inputs = tiny.input_files(tmp_path)
    text = str(inputs / "text.txt")
    Path("a.yaml").write_text(yaml.safe_dump({
        "question": "Is it?",
        "architecture": {"hidden_size": 20},
        "teacher": {"model": str(inputs / "teacher")},
        "corpus": {"train": text, "validation": text, "sequence_length": 32, "calibration_samples": 4,
                   "validation_samples": 4},
        "winogrande": {"source": str(inputs / "questions.jsonl")},
        "space": {"budget": {"params": {"target": "15K", "tolerance": 0.5}}},
        "search": {"rungs": [0, 64, 128], "seeds": 2},
        "distillation": {"batch_tokens": 64},
        "before": {"middle": {}},
        "arms": ARMS,
    }, sort_keys=False))  # fmt: skip
    return ["--output", storage.as_uri()]


class Runs:
    """Stands in for the pipeline: what a run leaves, without computing it. `fail` is the arm that breaks."""

    def __init__(self, fail: str = ""):
        self.ran: list[str] = []
        self.fail = fail

    def __call__(self, prepared: Prepared) -> None:
        run, name = prepared.run_dir, prepared.config.output.rpartition("/")[2]
        self.ran.append(name)
        if not run.config.exists():
            run.write_config(prepared.config.dump())
        run.event("run_started")
        if name == self.fail:
            raise ValueError("it diverged")
        log(run, "search", "x", [np.arange(WINDOWS) / 10 + len(name)], params=1)
        shape = {name: 1 for name in AXES[:4]}
        run.start_trial("search-x-0", {"arm": "search", "seed": 0, "proposal": 0, "layers": [0], **shape})
        run.write_trials({})
        (run.trial("search-x-0") / "checkpoint" / "step-00000008").mkdir(parents=True)
        if name == "middle":
            shutil.copytree(prepared.pruned.folder, run.best())
        run.event("run_finished")


def finished(ablation: Ablation, runs: Runs, resume: bool = False) -> list[str]:
    return run_ablation(ablation, prepare_ablation(ablation, resume), runs)


def test_everything_is_in_storage_and_an_empty_machine_goes_on(
    storage: Path, asked: list[str], machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("one")
    ablation, runs = load("a.yaml", asked), Runs(fail="other")
    assert finished(ablation, runs) == ["other"] and runs.ran == ["middle", "plain", "other", "again"]
    assert (storage / "before" / "middle" / "best.whole").exists() and (storage / "ablation.json").exists()
    assert {row["arm"] for row in pq.read_table(storage / "ablation.parquet").to_pylist()} == {"again"}
    assert not list(storage.rglob("step-*")), "nothing goes on from a checkpoint of a run that has ended"
    events = (storage / "plain" / "events.jsonl").read_bytes()

    machine("two")
    ablation, runs = load("a.yaml", asked), Runs()
    assert finished(ablation, runs, resume=True) == [] and runs.ran == ["other"]
    assert {row["arm"] for row in pq.read_table(storage / "ablation.parquet").to_pylist()} == {"other", "again"}
    assert (storage / "plain" / "events.jsonl").read_bytes() == events
    assert len(RunDirectory(storage / "other").events()) == 3, "started, started again, finished"

    machine("three")
    ablation, runs = load("a.yaml", asked), Runs()
    assert finished(ablation, runs, resume=True) == [] and runs.ran == []
    for arm in ARMS:
        assert RunDirectory(ablation.root / arm).read_trials() == RunDirectory(storage / arm).read_trials() != []


def test_an_arm_waits_for_what_is_not_in_storage_yet(
    storage: Path, asked: list[str], machine: Callable[[str], None]
) -> None:
    machine("one")
    ablation = load("a.yaml", asked)
    address = f"{storage.as_uri()}/before/middle/best"
    assert ablation.waits("again", ARMS["again"]) and not ablation.waits("other", ARMS["other"])
    assert set(checked(ablation, resume=False)) == {"before/middle", "plain", "other"}
    tiny.teacher_folder(storage / "before" / "middle" / "best")
    assert ablation.waits("again", ARMS["again"]), "it is not whole"
    (storage / "before" / "middle" / "best.whole").touch()
    assert not ablation.waits("again", ARMS["again"])
    assert ablation.config("again").teacher.model == address
    assert ablation.config("again").output == f"{storage.as_uri()}/again"


def test_what_storage_holds_is_not_written_over(
    storage: Path, asked: list[str], machine: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine("one")
    command = ["--config", "a.yaml", *asked]
    assert main([*command, "--resume"]) == 2 and "holds no ablation to continue" in capsys.readouterr().err
    (storage / "plain" / "events.jsonl").write_text("{}\n")
    assert main(command) == 2
    assert f"output: {storage.as_uri()} is not empty; valid: another folder, or --resume" in capsys.readouterr().err
    (storage / "ablation.json").write_text("{}")
    assert main([*command, "--resume"]) == 2
    assert "holds an ablation of another name" in capsys.readouterr().err


def test_storage_that_was_gone_when_an_arm_ended_has_it_after_a_resume(
    storage: Path, asked: list[str], machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("one")
    with monkeypatch.context() as gone:
        gone.setattr(ablation_storage, "stored", lambda *run: nullcontext())
        gone.setattr(ablation_storage, "put", lambda ablation: None)
        arms = {name: changes for name, changes in ARMS.items() if name != "again"}
        values = yaml.safe_load(Path("a.yaml").read_text()) | {"arms": arms, "before": {}}
        Path("a.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        assert finished(load("a.yaml", asked), Runs()) == []
    assert not list(storage.rglob("*.jsonl"))
    assert finished(load("a.yaml", asked), runs := Runs(), resume=True) == [] and runs.ran == []
    assert all((storage / arm / "events.jsonl").exists() for arm in arms) and (storage / "ablation.parquet").exists()


# A model in storage


def test_a_model_in_storage_is_a_teacher(storage: Path, machine: Callable[[str], None]) -> None:
    machine("one")
    address = f"{storage.as_uri()}/plain/best"
    with pytest.raises(ValueError, match="is not a folder"):
        teacher_config(address)
    made = tiny.teacher_folder(storage / "plain" / "best")
    assert not is_stored(address), "nobody has said that it is whole"
    assert teacher_config(address).hidden_size == 24
    found = teacher_folder(address)
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        file.name: file.read_bytes() for file in made.iterdir()
    }
    assert stored_model(address) == found, "it is copied once"
    shutil.rmtree(made)
    tiny.teacher_folder(storage / "plain" / "best", num_hidden_layers=2)
    assert teacher_config(address).num_hidden_layers == 2, "another model at the same address"


def test_a_model_in_storage_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        @staticmethod
        def from_uri(address: str) -> None:
            raise OSError("When listing objects: no such bucket\nand more")

    monkeypatch.setattr("minitron_search.teachers.sources.FileSystem", Gone)
    with pytest.raises(ValueError, match="teacher.model: 's3://b/best' could not be read: .*no such bucket; valid"):
        teacher_folder("s3://b/best")


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("runs/a", "runs/a/x/y"),
        ("/a?b", "/a?b/x/y"),
        ("s3://b/a", "s3://b/a/x/y"),
        ("s3://b/a/?r=1", "s3://b/a/x/y?r=1"),
    ],
)
def test_an_address_keeps_its_options(output: str, found: str) -> None:
    assert inside(output, "x/y") == found
