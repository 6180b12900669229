"""The benchmark of Figure 10, on a tiny model: what is timed, and what is made of the times."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks import throughput, throughput_results
from benchmarks.throughput import Request, measured, summary
from tests import tiny


def test_it_times_every_model_at_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny.teacher_folder(tmp_path / "teacher", num_hidden_layers=6)
    throughput.main(["--model", str(teacher), "--params", "18000", "--tolerance", "0.2",
                     "--lengths", "8/3", "5/1", "--batch-sizes", "1", "2",
                     "--repeats", "2", "--precision", "float32", "--output", str(tmp_path)])  # fmt: skip
    rows = pq.read_table(tmp_path / "throughput.parquet").to_pylist()
    assert len(rows) == 3 * 4 * 2 and {row["model"] for row in rows} == {"teacher", "width", "depth"}
    assert all(row["prefill_seconds"] > 0 for row in rows)
    assert all(row["decode_seconds"] == 0 for row in rows if row["output_tokens"] == 1)
    params = {row["model"]: row["params"] for row in rows}
    assert params["depth"] == pytest.approx(params["width"], rel=0.2) and params["depth"] < params["teacher"]
    said = capsys.readouterr().out
    assert all(name in said for name in ("teacher", "width", "depth", "8/3", "requests/s"))

    document = tmp_path / "results.md"
    document.write_text("# Results\n")
    throughput_results.main([str(tmp_path), "--output", str(document), "--folder", str(tmp_path / "kept")])
    lines = document.read_text().splitlines()
    assert [line for line in lines if line.startswith("| 8/3 x 2 | decode |")]
    assert not [line for line in lines if line.startswith("| 5/1 x 1 | decode |")]  # one token is prefill alone
    assert pq.read_table(tmp_path / "kept" / "throughput.parquet").to_pylist() == rows


def test_a_student_is_compared_with_the_teacher_beside_it() -> None:
    """The machine was twice as slow in the second repeat, for all of them alike: no ratio knows of it."""
    seconds = {"teacher": 4.0, "width": 2.0, "depth": 1.0}
    rows = [{"model": model, "input_tokens": 8, "output_tokens": 4, "batch_size": 1, "repeat": repeat,
             "prefill_seconds": slow * time, "decode_seconds": 3 * slow * time}
            for repeat, slow in enumerate((1, 2, 1)) for model, time in seconds.items()]  # fmt: skip
    found = throughput_results.ratios(pd.DataFrame(rows)).set_index(["model", "part"])
    for part in ("prefill", "decode"):
        assert found.loc[("width", part), ["median", "least", "most"]].tolist() == [2, 2, 2]
        assert found.loc[("depth", part), ["median", "least", "most"]].tolist() == [4, 4, 4]


def test_prefill_and_decode_are_told_apart() -> None:
    def timed(asked: Request, new: int) -> float:
        return 0.5 + 0.1 * (new - 1)

    assert measured(timed, Request(16, 5, 2)) == (0.5, pytest.approx(0.4))
    rows = [{"model": "teacher", "input_tokens": 16, "output_tokens": 5, "batch_size": 2, "prefill_seconds": 0.5,
             "decode_seconds": seconds} for seconds in (0.4, 0.4, 9.0)]  # fmt: skip
    ((prefill, decode, requests),) = summary(rows).values()
    assert (prefill, decode, requests) == (64, pytest.approx(20), pytest.approx(2 / 0.9))


def test_lengths_without_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--lengths", "12"])
    assert "--lengths: 12; valid: input/output tokens" in capsys.readouterr().err
