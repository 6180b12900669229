"""Every shape of a run is timed once, alone; until then the table says nothing of its speed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis.page.formatting import MISSING
from analysis.page.formatting import speed as shown
from minitron_search.evaluation import scoring
from minitron_search.records.directory import SHAPE, RunDirectory, shape_of
from minitron_search.records.lines import SPEED
from minitron_search.trials import speed
from tests import tiny
from tests.runs import events


def table(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "trials.parquet").to_pylist()


def test_a_run_times_each_shape_once_after_all_else(finished_run: Path) -> None:
    timed, rows = events(finished_run, "speed_measured"), table(finished_run)
    assert sorted(map(shape_of, timed)) == sorted({shape_of(row) for row in rows}), "the teacher's too, and each once"
    by_shape = {shape_of(event): event for event in timed}
    for row in rows:
        assert {name: row[name] for name in SPEED} == {name: by_shape[shape_of(row)][name] for name in SPEED}
        assert row["tokens_per_second"] > row["tokens_per_second_stderr"] > 0
    ended = [event["time"] for event in events(finished_run, "stage_finished") if event["stage"] == "retrain"]
    assert min(event["time"] for event in timed) > max(ended)
    assert not any("tokens_per_second" in row for row in RunDirectory(finished_run).rungs()), "none beside others"


def made(folder: Path, *rows: dict[str, Any]) -> RunDirectory:
    run, shape = RunDirectory(folder), dict(zip(SHAPE, (48, 64, 6, 3, 4), strict=True))
    for number, row in enumerate(rows):
        trial = f"search-{number}"
        run.start_trial(trial, {**shape, **row, "layers": [0, 1, 2, 3]})
        run.log_rung(trial, {"trial": trial, "rung": 0, "proposal": number, "arm": "search", **shape, **row})
    run.write_trials({})
    return run


def test_what_was_timed_is_not_timed_again_and_old_rows_keep_what_they_say(tmp_path: Path) -> None:
    run = made(tmp_path, {"hidden_size": 42}, {"hidden_size": 42}, {}, {"hidden_size": 30, "tokens_per_second": 7.0})
    assert [shape[0] for shape in speed.unmeasured(run)] == [42, 48]
    assert [row["tokens_per_second"] for row in table(tmp_path)] == [None, None, None, 7.0]
    assert shown(table(tmp_path)[0]) == MISSING
    (shape, *_) = speed.unmeasured(run)
    fields = dict(zip(SHAPE, shape, strict=True))
    run.event("speed_measured", **fields, tokens_per_second=1200.0, tokens_per_second_stderr=34.0, repeats=8)
    run.event("speed_measured", **fields, tokens_per_second="fast")  # of another hand
    assert [shape[0] for shape in speed.unmeasured(RunDirectory(tmp_path))] == [48]
    run.write_trials({})
    assert [row["tokens_per_second"] for row in table(tmp_path)] == [1200.0, 1200.0, None, 7.0]
    assert [shown(row) for row in table(tmp_path)][1::2] == ["1,200 ± 34", "7 beside others"]


def test_the_speed_is_of_the_mean_over_repeats_and_so_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 9, 10, 11, 20, 23])  # a slow first pass, then one second and three
    monkeypatch.setattr(scoring.time, "perf_counter", lambda: float(next(ticks)))
    found = scoring.throughput(tiny.model(tiny.config()), np.zeros((1, 16), dtype=np.int32), "float32", 2)
    assert found == pytest.approx((8.0, 8.0 * 1.0 / 2))
