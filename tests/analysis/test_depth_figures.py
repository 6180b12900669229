"""The papers' depth figures from a run's depth.parquet and depth.json alone."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import depth_figures
from analysis.cards import depth
from analysis.run_cards import depth_card, make_cards
from analysis.run_data import load_run
from minitron_search.records.directory import RunDirectory
from tests.analysis.conftest import LENGTHS, METRICS, write_depth

HOSTILE = "<script>alert(1)</script>"


def write_sweep(root: Path, metrics: tuple[str, ...] = METRICS, words: tuple[str, ...] = ("Drop it.",)) -> RunDirectory:
    run = RunDirectory(root)
    run.write_config({"name": "swept"})
    write_depth(run, metrics, words)
    return run


@pytest.fixture
def swept(tmp_path: Path) -> RunDirectory:
    return write_sweep(tmp_path / "run")


def test_every_length_is_a_line_with_a_band_and_a_dashed_line(swept: RunDirectory) -> None:
    info = depth.depth_info(load_run(swept))
    assert info.lengths == LENGTHS and info.metrics == METRICS and info.at_chance
    figure = depth.position_plot(info, "lm_loss")
    named = {trace.name: trace for trace in figure.data if trace.name}
    assert set(named) == {"1 layer", "2 layers", "2 layers, one by one", "teacher"}
    assert list(named["2 layers"].x) == [0, 1, 2, 3, 4]
    assert named["2 layers, one by one"].line.dash == "dash" and set(named["2 layers, one by one"].y) == {3.4}
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert len(bands) == 2
    upper = np.array(bands[1].y[:5])
    np.testing.assert_allclose(upper - np.array(named["2 layers"].y), 0.05)


def test_hover_tells_layers_value_and_standard_error(swept: RunDirectory) -> None:
    info = depth.depth_info(load_run(swept))
    line = next(trace for trace in depth.position_plot(info, "lm_loss").data if trace.name == "2 layers")
    assert re.search(r"without layers 3–4<br>LM loss [34]\.\d{4} ± 0\.0500, n = 8", line.hovertext[3])
    chosen = depth.of(info, "lm_loss", "one_by_one", 2)["hover"].iloc[0]
    assert "without layers 0, 2 (chosen one by one)" in chosen


def test_the_papers_points_are_in_the_accuracy_figure_only_and_named_as_another_model(swept: RunDirectory) -> None:
    info = depth.depth_info(load_run(swept))
    points = [trace for trace in depth.position_plot(info, "winogrande_acc").data if "2408.11796" in (trace.name or "")]
    assert {trace.y[0] for trace in points} == {0.5, 0.595}
    assert all("Llama 3.1 8B, another model" in trace.name for trace in points)
    for metric in ("lm_loss", "winogrande_margin", "bi"):
        assert not any("2408.11796" in (trace.name or "") for trace in depth.position_plot(info, metric).data)


def test_the_map_has_every_block_once(swept: RunDirectory) -> None:
    info = depth.depth_info(load_run(swept))
    (map_,) = depth.heat_map_plot(info, "lm_loss").data
    assert len(map_.z) == len(set(zip(map_.x, map_.y, strict=True))) == 6 + 5


def test_the_card_holds_the_words_escaped_and_every_row_for_download(tmp_path: Path) -> None:
    card = depth_card(load_run(write_sweep(tmp_path / "run", words=(f"At chance {HOSTILE}",))))
    assert "At chance" in card.body and HOSTILE not in card.body
    assert [panel.name for panel in card.panels[:4]] == [f"depth_{metric}" for metric in METRICS]
    assert sum(len(panel.data) for panel in card.panels[:4]) == len(RunDirectory(tmp_path / "run").read_depth())


def test_a_sweep_of_bi_alone_and_no_sweep_still_make_a_report(tmp_path: Path) -> None:
    card = depth_card(load_run(write_sweep(tmp_path / "bi", metrics=("bi",))))
    assert [panel.name for panel in card.panels] == ["depth_bi"]
    empty = RunDirectory(tmp_path / "none")
    empty.write_config({"name": "none"})
    (reason,) = (card.reason for card in make_cards(load_run(empty)) if card.title == "Depth")
    assert "No depth.parquet" in reason


def test_the_command_writes_the_page_and_says_when_it_cannot_draw_static_figures(
    swept: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("analysis.page.static_figures.BROWSERS", ())
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    assert depth_figures.main([str(swept.root)]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(swept.root / "depth_figures.html")]
    assert "no static figures: they need Chromium or Chrome" in err and "BROWSER_PATH" in err
    page = (swept.root / "depth_figures.html").read_text()
    assert "depth_lm_loss" in page and "https://" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_static_figures_are_one_file_a_figure(
    swept: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a browser that prints what it was given."""
    fake = tmp_path / "browser"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import json, re, sys, urllib.parse\n"
        "page = open(urllib.parse.unquote(sys.argv[-1].removeprefix('file://'))).read()\n"
        "for name, figure in json.loads(re.search(r'id=\"figures\">(.*?)</script>', page)[1]):\n"
        "    for kind, data in ('svg', '+xml,%3Csvg%3E'), ('png', ';base64,iVBORw=='):\n"
        "        print(f'<pre id=\"{name}.{kind}\">data:image/{kind}{data}</pre>')\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(fake))
    written, reason = depth_figures.write_figures(swept)
    assert not reason
    names = {path.name: path for path in written}
    assert {"depth_lm_loss.svg", "depth_winogrande_acc.png", "depth_bi.svg", "depth_map_lm_loss.svg"} < set(names)
    assert names["depth_bi.svg"].read_bytes() == b"<svg>" and names["depth_bi.png"].read_bytes() == b"\x89PNG"


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDirectory(tmp_path).write_config({"name": "none"})
    assert depth_figures.main([str(tmp_path)]) == 2
    assert "depth.parquet" in capsys.readouterr().err


def test_the_table_is_read_as_it_was_written(swept: RunDirectory) -> None:
    frame = load_run(swept).depth
    assert list(frame.columns) == ["start", "length", "metric", "value", "stderr", "n", "kind", "layers"]
    assert pd.read_json(io.StringIO(frame.to_json()))["length"].max() == 2
