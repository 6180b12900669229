"""The benchmark of teacher correction: every arm on a tiny teacher, one table, nothing repeated."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import teacher_correction
from benchmarks.teacher_correction import ARMS, Curve, curves, figure, main, minus
from minitron_search.models.loading import reader
from tests import tiny

BEGIN, END = "<!-- teacher_correction: begin -->", "<!-- teacher_correction: end -->"


def test_the_command_makes_every_arm_once_and_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    teacher = tiny.teacher_folder(tmp_path / "teacher", hidden_size=48, intermediate_size=96)
    (tmp_path / "text.txt").write_text(tiny.prose(4_000))
    document, work = tmp_path / "results.md", tmp_path / "work"
    document.write_text(f"# Results\n\nbefore\n\n{BEGIN}\nan older table\n{END}\n\nafter\n")
    command = [
        "--model", str(teacher), "--train", str(tmp_path / "text.txt"), "--length", "32", "--samples", "4",
        "--windows", "3", "--seeds", "0", "1", "--precision", "float32", "--tokens", "768", "--batch-tokens", "64",
        "--correction-tokens", "1024", "--correction-learning-rate", "3e-3", "--at-once", "1", "--output",
        str(document), "--work", str(work), "--arms", *ARMS,
    ]  # fmt: skip
    main(command)
    text = document.read_text()
    assert text.startswith("# Results\n\nbefore\n\n") and text.endswith("\n\nafter\n") and "older" not in text
    assert all(arm.title in text for arm in ARMS.values()) and "(hidden_size" in text

    rows = pq.read_table(work / "teacher_correction.parquet").to_pylist()
    found = curves(rows)
    assert list(found) == list(ARMS)
    assert all(curve.losses.shape == (2, 6, 3) for curve in found.values())
    assert list(found["original"].tokens) == [0, 64, 128, 256, 512, 768]
    first = {arm: curve.losses[:, 0] for arm, curve in found.items()}
    same = [np.array_equal(first[arm], first["original"]) for arm in ("taught", "parallel", "corrected")]
    assert same == [True, True, False], "the same untrained student, but where the corrected teacher is pruned"
    for arm in ("taught", "parallel", "corrected"):
        assert not np.array_equal(found[arm].losses[:, -1], found["original"].losses[:, -1])
    assert not np.array_equal(found["original"].losses[0, -1], found["original"].losses[1, -1]), "seeds differ"
    assert all(row["lm_loss"] == pytest.approx(np.mean(row["losses"])) for row in rows)
    (folder,) = (path for path in work.iterdir() if path.is_dir())
    about = json.loads((folder / "corrected" / "correction.json").read_text())
    assert np.mean(about["after"]) < np.mean(about["before"]) and about["tokens"] == 1024
    # the corrected teacher that teaches the original's student is in that student's order of channels
    own, its = (reader(folder / "permuted" / name) for name in ("original-original", "corrected-original"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.corrcoef(torch.stack([own(name).flatten(), its(name).flatten()]))[0, 1] > 0.9
    assert (work / "teacher_correction.html").read_text().count("seeds") > 3

    def never(*given: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(teacher_correction, "ProcessPoolExecutor", never)
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    main(command)
    assert document.read_text() == text
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == kept


def test_bands_are_between_seeds_and_over_windows() -> None:
    draw = np.random.default_rng(0)
    losses = draw.normal(3, 0.1, (3, 4, 8))
    curve = Curve(np.arange(4), losses)
    assert curve.over_seeds()[1] == pytest.approx(losses[:, 1].mean(1).std(ddof=1) / 3**0.5)
    assert curve.over_windows()[2] == pytest.approx(losses[:, 2].mean(0).std(ddof=1) / 8**0.5)
    shifted = minus(Curve(curve.tokens, losses + 0.25), curve)
    assert shifted.losses.mean() == pytest.approx(0.25) and shifted.over_windows().max() < 1e-12


def test_one_seed_draws_a_figure_without_a_band_between_seeds() -> None:
    one = Curve(np.array([0, 64]), np.random.default_rng(0).normal(3, 0.1, (1, 2, 4)))
    made = figure({"original": one, "taught": one}, {"original": 2.5, "corrected": 2.4})
    lines = [trace for trace in made.data if trace.mode == "lines+markers"]
    assert [trace.yaxis for trace in lines] == ["y", "y", "y2"] and not np.isnan(np.array(made.data[1].y)).any()
