"""Tables are whole or absent, logs survive a kill, and a status is never mistaken for another."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitron_search.records import directory
from minitron_search.records.directory import (
    AXES,
    TRIALS_SCHEMA,
    RunDirectory,
    append_line,
    read_lines,
    replace_text,
    write_table,
)

# The interface: columns of trials.parquet that others read.
COLUMNS = {
    "trial": "string", "architecture": "string", "arm": "string", "seed": "int64", "rung": "int64", "tokens": "int64",
    "lm_loss": "double", "lm_loss_stderr": "double", "kl": "double", "winogrande_acc": "double",
    "winogrande_acc_stderr": "double", "winogrande_margin": "double", "winogrande_margin_stderr": "double",
    "bi": "double", "params": "int64", "non_embedding_params": "int64", "memory_bytes": "int64",
    "tokens_per_second": "double",
    "tokens_per_second_stderr": "double", "status": "string", "seconds": "double", "hidden_size": "int64",
    "intermediate_size": "int64", "num_attention_heads": "int64", "num_key_value_heads": "int64",
    "num_hidden_layers": "int64",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def row(trial: str, rung: int = 0, **given: Any) -> dict[str, Any]:
    made = {"trial": trial, "architecture": "a" + trial, "arm": "search", "seed": 0, "rung": rung,
            "tokens": 1000 * (rung + 1), "lm_loss": 3.5, "params": 7, "proposal": 0}  # fmt: skip
    return {**made, **given}


def start(run: RunDirectory, trial: str, **given: Any) -> None:
    made = {name: value for name, value in row(trial).items() if name not in ("rung", "tokens", "lm_loss")}
    run.start_trial(trial, {**made, "hidden_size": 16, **given})


def writer(path: Path, name: int) -> None:
    for number in range(200):
        append_line(path, {"name": name, "number": number, "padding": "x" * 300}, durable=False)


def test_making_the_object_touches_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.read_trials() == [] and run.events() == [] and run.rungs() == [] and run.read_environment() == {}
    assert run.metrics("t") == [] and run.decisions("t") == {}
    assert list(tmp_path.iterdir()) == []
    assert RunDirectory(f"file://{tmp_path}/run").root == run.root


def test_the_layout_is_the_documented_one(run: RunDirectory) -> None:
    names = {run.config: "config.yaml", run.environment: "environment.json", run.importance: "importance.safetensors",
             run.depth: "depth.parquet", run.trials_table: "trials.parquet", run.events_log: "events.jsonl",
             run.study: "study.db", run.report: "report.html", run.trial("x"): "trials/x",
             run.checkpoint("x"): "trials/x/checkpoint", run.best(): "best", run.best(2): "best-2"}  # fmt: skip
    assert {str(path.relative_to(run.root)) for path in names} == set(names.values())
    assert all(path == run.root / name for path, name in names.items())


def test_the_table_has_the_columns_others_read() -> None:
    assert {name: str(TRIALS_SCHEMA.field(name).type) for name in COLUMNS} == COLUMNS
    assert set(AXES) <= set(TRIALS_SCHEMA.names)


def test_the_table_has_a_row_per_trial_and_rung_with_the_trials_status(run: RunDirectory) -> None:
    for trial, rungs, proposal in (("b", 2, 1), ("a", 1, 0), ("c", 1, 2)):
        start(run, trial, proposal=proposal)
        for rung in range(rungs):
            run.log_step(trial, step=rung, loss=1.0)
            run.log_rung(trial, row(trial, rung, proposal=proposal, lm_loss=3.0 + rung))
    run.write_trials({"a": "stopped", "b": "complete", "c": "running"})
    written = run.read_trials()
    assert [(r["trial"], r["rung"], r["status"]) for r in written] == [
        ("a", 0, "stopped"), ("b", 0, "complete"), ("b", 1, "complete"), ("c", 0, "running"),
    ]  # fmt: skip
    assert pq.read_schema(run.trials_table).equals(TRIALS_SCHEMA)
    assert written[1]["tokens"] == 1000 and written[2]["lm_loss"] == 4.0
    assert written[0]["kl"] is None and written[0]["message"] == ""


def test_a_trial_outside_the_search_is_complete_when_it_has_a_row(run: RunDirectory) -> None:
    run.log_rung("teacher", row("teacher", arm="teacher", proposal=-1))
    run.write_trials({})
    assert [(r["trial"], r["status"]) for r in run.read_trials()] == [("teacher", "complete")]


def test_a_trial_that_failed_before_its_first_rung_still_has_a_row(run: RunDirectory) -> None:
    start(run, "a", proposal=3)
    start(run, "b", proposal=1)
    run.log_rung("b", row("b", proposal=1))
    run.write_trials({"a": "failed", "b": "failed"}, {"a": "no memory", "b": "diverged"})
    assert [(r["trial"], r["rung"], r["tokens"], r["status"], r["message"]) for r in run.read_trials()] == [
        ("b", 0, 1000, "failed", "diverged"), ("a", 0, 0, "failed", "no memory"),
    ]  # fmt: skip
    assert run.read_trials()[1]["hidden_size"] == 16 and run.read_trials()[1]["lm_loss"] is None


def test_a_rung_that_a_restarted_trial_wrote_twice_counts_once(run: RunDirectory) -> None:
    for loss in (3.0, 3.0):
        run.log_rung("a", row("a", lm_loss=loss))
    assert len(run.rungs()) == 1


def test_not_a_number_and_infinity_survive(run: RunDirectory) -> None:
    run.log_rung("a", row("a", lm_loss=float("inf"), kl=float("nan")))
    run.write_trials({"a": "complete"})
    (read,) = run.read_trials()
    assert read["lm_loss"] == float("inf") and read["kl"] != read["kl"]


def test_a_line_cut_short_by_a_kill_is_left_out_and_spoils_no_other(run: RunDirectory) -> None:
    run.log_rung("a", row("a", 0))
    log = run.trial("a") / "metrics.jsonl"
    whole = log.read_bytes()
    run.log_rung("a", row("a", 1))
    second = log.read_bytes()[len(whole) :]
    for cut in range(0, len(second), 7):  # wherever it is cut
        log.write_bytes(whole + second[:cut])
        after = RunDirectory(run.root)
        assert len(after.rungs()) == 1
        after.log_rung("a", row("a", 2))
        assert [line["rung"] for line in after.rungs()] == [0, 2], cut


def test_a_row_is_seen_when_it_is_written(run: RunDirectory) -> None:
    for rung in range(3):
        run.log_step("b", step=rung)
        run.log_rung("a", row("a", rung))
        run.log_rung("b", row("b", rung))
        rows = run.rungs()
        assert [(line["trial"], line["rung"]) for line in rows] == [(t, r) for t in "ab" for r in range(rung + 1)]
        rows[0]["lm_loss"] = 0.0  # the caller's own copy
        assert run.rungs()[0]["lm_loss"] != 0.0


def test_events_have_their_time_in_order(run: RunDirectory) -> None:
    for number in range(5):
        run.event("tick", number=number)
    events = run.events()
    assert [event["number"] for event in events] == list(range(5))
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


def test_decisions_are_by_rung(run: RunDirectory) -> None:
    run.decide("a", 0, "continue")
    run.decide("a", 1, "stop")
    assert {rung: line["decision"] for rung, line in run.decisions("a").items()} == {0: "continue", 1: "stop"}
    assert run.decisions("b") == {}


def test_processes_that_append_at_once_mix_no_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=writer, args=(log, name)) for name in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = read_lines(log)
    for name in range(3):
        assert [line["number"] for line in lines if line["name"] == name] == list(range(200))


def test_a_table_is_replaced_whole_or_not_at_all(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log_rung("a", row("a"))
    run.write_trials({"a": "running"})
    before = run.trials_table.read_bytes()

    def cut_off(table: Any, path: Path) -> None:
        Path(path).write_bytes(b"PAR1 half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(directory.pq, "write_table", cut_off)
        with pytest.raises(OSError):
            run.write_trials({"a": "complete"})
    assert run.trials_table.read_bytes() == before
    replace_text(run.config, "seed: 0")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError):
            replace_text(run.config, "half")
    assert run.config.read_text() == "seed: 0"
    run.write_trials({"a": "complete"})
    assert run.read_trials()[0]["status"] == "complete"


def test_what_is_written_is_read(run: RunDirectory) -> None:
    config = {"name": "a", "search": {"rungs": [1, 2], "objective": "lm_loss"}, "space": {"anchors": []}, "limit": None}
    run.write_config(config)
    assert run.read_config() == config and list(run.read_config()) == list(config)  # in its order
    run.write_environment({"python": "3.11"})
    assert run.read_environment() == {"python": "3.11"}
    run.start_trial("a", {"trial": "a", "layers": [0, 2]})
    assert json.loads((run.trial("a") / "architecture.json").read_text())["layers"] == [0, 2]
    write_table(run.depth, pa.table({"start": [1]}))
    assert pq.read_table(run.depth).to_pylist() == [{"start": 1}]
    left = [path for path in run.root.rglob("*") if path.name.startswith(".")]
    assert left == []  # no temporary file stays
