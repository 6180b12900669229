"""What is damaged in a run is named, and mended from the rest of it, or refused with what would do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.run_data import load_run
from minitron_search.records.damage import ASIDE, mend
from minitron_search.records.directory import RunDirectory
from tests.runs import rows
from tests.tiny import over

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"
TRIAL = "search-57ef2e6cf4"  # of three rungs, promoted
METRICS, DECISIONS = f"trials/{TRIAL}/metrics.jsonl", f"trials/{TRIAL}/decisions.jsonl"


def copied(folder: Path) -> RunDirectory:
    return RunDirectory(shutil.copytree(OLD / "finished", folder / "run"))


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def shorten(root: Path) -> None:
        path = next(root.glob(name))
        os.truncate(path, int(path.stat().st_size * keep))

    return shorten


def folder_for(name: str) -> Callable[[Path], None]:
    def replace(root: Path) -> None:
        (root / name).unlink()
        (root / name).mkdir()

    return replace


def with_line(name: str, line: bytes) -> Callable[[Path], None]:
    def append(root: Path) -> None:
        with open(root / name, "ab") as file:
            file.write(line + b"\n")

    return append


def without_rung(rung: int, *, in_table: bool) -> Callable[[Path], None]:
    """As when that line is overwritten by something else, and with `in_table` False the table is damaged too."""

    def remove(root: Path) -> None:
        lines = (root / METRICS).read_text().splitlines(keepends=True)
        is_it = [json.loads(line).get("rung") == rung and '"kind": "rung"' in line for line in lines]
        changed = ("#" * 20 + "\n" if it else line for line, it in zip(lines, is_it, strict=True))
        (root / METRICS).write_text("".join(changed))
        if not in_table:
            cut("trials.parquet", 0.5)(root)

    return remove


LINES = [b"[1]", b"\xff\xfe", b"null", b'"words"', b"{", b'{"time": 1}', b"\x00" * 40, b"[" * 5000]
FILES = (
    "environment.json", "evidence.json", "forecast.json", "depth.json", "depth.parquet", "importance.safetensors",
    "study.db", "trials.parquet",
)  # fmt: skip
# Damage after which the table is what it was, as soon as it is mended.
MENDED: dict[str, Callable[[Path], Any]] = {
    **{f"{name} cut at {keep}": cut(name, keep) for name in FILES for keep in (0, 0.6)},
    **{f"{name} is a folder": folder_for(name) for name in FILES},
    **{f"{line[:12]!r} in events.jsonl": with_line("events.jsonl", line) for line in LINES},
    **{f"{line[:12]!r} in metrics.jsonl": with_line(METRICS, line) for line in LINES},
    **{f"{line[:12]!r} in decisions.jsonl": with_line(DECISIONS, line) for line in LINES},
    "a rung in words": with_line(METRICS, b'{"kind": "rung", "trial": "a", "rung": "two"}'),
    "a number in words": with_line(METRICS, b'{"kind": "rung", "trial": "a", "rung": 1, "lm_loss": "low"}'),
    "a number too large": with_line(METRICS, b'{"kind": "step", "step": 1' + b"0" * 40 + b"}"),
    "metrics.jsonl is a folder": folder_for(METRICS),
    "metrics.jsonl is empty": cut(METRICS, 0),
    "metrics.jsonl cut short": cut(METRICS, 0.4),
    "the last rung is lost": without_rung(2, in_table=True),
    "the first rung is lost": without_rung(0, in_table=True),
    "architecture.json cut short": cut(f"trials/{TRIAL}/architecture.json", 0.5),
    "architecture.json is a list": lambda root: (root / f"trials/{TRIAL}/architecture.json").write_text("[]"),
    "a piece of the depth sweep": cut("depth_pieces/*.npz", 0.5),
    "best/ without its end": cut("best/model.safetensors", 0.9),
    "best/ without its configuration": lambda root: (root / "best" / "config.json").unlink(),
}


def test_a_sound_run_is_left_as_it_is(tmp_path: Path) -> None:
    run = copied(tmp_path)
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    assert mend(run) == []
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before


@over(list(MENDED))
def test_what_the_rest_of_the_run_holds_is_mended(kind: str, tmp_path: Path) -> None:
    run = copied(tmp_path)
    before, made = rows(run.root), architectures(run)
    MENDED[kind](run.root)
    assert load_run(run).trials is not None  # a report is made of it as it is
    found = mend(run)
    assert found and all("\n" not in line for line in found), kind
    again = RunDirectory(run.root)
    assert rows(again.root) == before
    assert sorted((row["trial"], row["rung"]) for row in again.rungs()) == sorted(
        (r["trial"], r["rung"]) for r in before
    )
    assert architectures(again) == made
    for name in FILES:
        assert not (run.root / name).exists() or (run.root / name).is_file()
    left = {line for line in mend(RunDirectory(run.root)) if "is no line of such a log" not in line}
    assert left == set(), "the second time there is nothing left to mend"


def architectures(run: RunDirectory) -> dict[str, Any]:
    """What a search reads of each trial's architecture.json."""
    read = ("architecture", "arm", "seed", "proposal", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "layers", "initialization")  # fmt: skip
    described = {path.parent.name: json.loads(path.read_text()) for path in run.root.glob("trials/*/architecture.json")}
    return {trial: {name: made[name] for name in read} for trial, made in described.items()}


def test_the_line_is_named_by_its_number(tmp_path: Path) -> None:
    run = copied(tmp_path)
    number = len(run.events_log.read_text().splitlines()) + 1
    with_line("events.jsonl", b"[1]")(run.root)
    assert mend(run) == [f"events.jsonl, line {number}, is no line of such a log: left out"]
    assert load_run(run).problems == [f"events.jsonl, line {number}, is no line of such a log: left out"]
    assert run.events()[-1]["event"] == "damage_mended"


def test_a_rung_that_nothing_holds_is_trained_again_with_all_behind_it(tmp_path: Path) -> None:
    run = copied(tmp_path)
    checkpoint = run.checkpoint(TRIAL) / "step-00000004"
    checkpoint.mkdir(parents=True)
    without_rung(1, in_table=False)(run.root)
    assert f"{METRICS} has lost rung 1: trained again from there" in mend(run)
    left = {line["kind"] + str(line.get("rung", "")) for line in run.metrics(TRIAL)}
    assert left == {"rung0", "scores0", "step"} and list(run.decisions(TRIAL)) == [0]
    assert not checkpoint.exists() and (run.root / ASIDE).is_dir()
    others = [row for row in RunDirectory(run.root).rungs() if row["trial"] != TRIAL]
    assert len(others) == 13


def test_a_trial_that_is_not_described_and_has_no_row_is_set_aside(tmp_path: Path) -> None:
    run = copied(tmp_path)
    (run.root / "trials" / "search-0123456789").mkdir()
    (run.root / "trials" / "search-0123456789" / "architecture.json").write_text("{")
    before = rows(run.root)
    assert len(mend(run)) == 1 and not run.trial("search-0123456789").exists()
    assert rows(run.root) == before


@over(["", "a: [1", "[1]", "\x00", "words"])
def test_a_configuration_that_is_no_more_is_refused(text: str, tmp_path: Path) -> None:
    run = copied(tmp_path)
    run.config.write_text(text)
    with pytest.raises(ValueError, match=r"output: .*config.yaml is damaged .*valid: the file as it was") as raised:
        mend(run)
    assert "\n" not in str(raised.value)


@over(["", "[1]", "{"])
def test_a_space_that_is_no_more_is_refused(text: str, tmp_path: Path) -> None:
    run = copied(tmp_path)
    run.latency.write_text(text)
    with pytest.raises(ValueError, match="latency.json is damaged.*valid: the file from a copy, or delete it"):
        mend(run)
    assert run.latency.read_text() == text
