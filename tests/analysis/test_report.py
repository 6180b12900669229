"""The page: complete, offline, and deaf to whatever a run says."""

import base64
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from analysis import report, run_cards
from analysis.cards.pareto import AXES
from analysis.page.page import csv_link, embedded, fill, no_formula
from analysis.report import main, write_report
from minitron_search.messages.escaping import UNSEEN
from minitron_search.records.bucket import BucketCopy
from minitron_search.records.directory import RunDirectory
from tests.analysis.conftest import METRICS

TITLES = ["Summary", "Shape", "Generations", "Pareto fronts", "Convergence", "Depth", "Importance",
          "Axes of the search", "Ablations and controls", "Tables 1 and 2", "Rank agreement", "Spend against forecast",
          "Health", "Trials", "Configuration and environment"]  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, the JSON of every figure, and each card's title or reason."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []  # scripts of JSON
        self.titles: list[str] = []
        self.reasons: list[str] = []
        self.filling: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if attributes.get("type") == "application/json":
            self.filling = self.data
        elif tag == "h2":
            self.filling = self.titles
        elif attributes.get("class") == "reason":
            self.filling = self.reasons
        if self.filling is not None:
            self.filling.append("")

    def handle_data(self, data: str) -> None:
        if self.filling is not None:
            self.filling[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.filling = None


def read(run: RunDirectory) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(finished_page: Path) -> Page:
    return Page(finished_page.read_text(encoding="utf-8"))


def test_a_finished_run_fills_every_card(page: Page, finished_page: Path):
    assert page.titles == TITLES and page.reasons == []
    assert sum(attributes.get("class") == "plot" for _, attributes in page.tags) == 25
    assert finished_page.stat().st_size < 10_000_000


def test_nothing_is_loaded_from_anywhere(page: Page):
    for tag, attributes in page.tags:
        assert "src" not in attributes and tag not in ("link", "iframe", "img", "object", "base")
        assert (attributes.get("href") or "#").startswith(("#", "data:text/csv"))
    policy = next(a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy and "script-src 'sha256-" in policy


def test_no_word_of_a_run_becomes_a_tag(page: Page, hostile_page: Path):
    wild = Page(hostile_page.read_text(encoding="utf-8"))
    assert [tag for tag, _ in wild.tags] == [tag for tag, _ in page.tags]
    assert "alert(1)" in hostile_page.read_text()  # it is shown, as text
    for text in wild.data:
        json.loads(text)
        assert "<" not in text


def test_no_word_of_a_run_turns_or_hides_others(hostile_page: Path):
    shown = hostile_page.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert "\\u202egpj.exe" in shown and UNSEEN.search(shown) is None


@pytest.mark.parametrize("kind", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_no_word_of_a_run_becomes_a_formula(kind: str):
    assert no_formula(kind) == f"'{kind}"
    assert no_formula("plain") == "plain"
    link = csv_link("runs", pd.DataFrame({kind: [1.0]}))
    table = base64.b64decode(link.split("base64,")[1].split('"')[0]).decode()
    assert pd.read_csv(io.StringIO(table)).columns.tolist() == [f"'{kind}"]


def test_every_figure_offers_its_data(page: Page, finished: RunDirectory):
    links = {a["download"]: a["href"] or "" for _, a in page.tags if "download" in a}
    assert set(links) == {f"{name}.csv" for name in (
        "summary", "shape", "convergence", "loss_curves", "layer_importance", "hidden_importance", "mlp_importance",
        "head_importance", "parallel_coordinates", "axis_importance", "axis_direction", "finalists", "controls",
        "evaluation", "against_teacher", "published_tables", "agreement_0", "rungs", "spend", "incidents", "trials",
        *(f"pareto_{axis.column}" for axis in AXES),
        *(f"depth_{metric}" for metric in METRICS),
        *(f"depth_map_{metric}" for metric in METRICS if metric != "bi"))}  # fmt: skip
    tables = {
        name: pd.read_csv(io.BytesIO(base64.b64decode(address.split(",", 1)[1]))) for name, address in links.items()
    }
    assert len(tables["trials.csv"]) == len(finished.read_trials())
    assert tables["layer_importance.csv"].columns.tolist() == ["layer", "bi"]
    assert tables["pareto_params.csv"]["on_front"].any()


def test_a_run_that_is_going_renders(going: RunDirectory):
    page = read(going)
    assert page.titles == TITLES
    assert any("importance.safetensors" in reason for reason in page.reasons)


def test_any_one_artifact_is_enough(finished: RunDirectory, tmp_path: Path):
    for kept in ("config", "importance", "trials_table", "events_log", "evaluation"):
        part = RunDirectory(tmp_path / kept)
        part.root.mkdir()
        getattr(part, kept).write_bytes(getattr(finished, kept).read_bytes())
        assert read(part).titles == TITLES, kept


def test_a_run_whose_every_trial_failed_renders(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.start_trial("t0", {"trial": "t0", "architecture": "a", "arm": "search", "seed": 0, "proposal": 0})
    run.write_trials({"t0": "failed"}, {"t0": "it broke"})
    page = read(run)
    assert page.titles == TITLES and "it broke" in run.report.read_text()


def test_a_damaged_artifact_is_named_and_the_rest_is_shown(make_run: Callable[..., RunDirectory], tmp_path: Path):
    run = make_run(tmp_path)
    run.trials_table.write_bytes(b"PAR1")
    run.importance.write_bytes(b"")
    page = read(run)
    assert page.titles == TITLES and len(page.reasons) == 1  # trials come from their own logs
    text = run.report.read_text()
    assert "trials.parquet: " in text and "importance.safetensors: " in text


def test_a_card_that_fails_says_so_in_its_place(finished: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    def broken_card(run: object) -> run_cards.Card:
        raise KeyError("depth")

    monkeypatch.setattr(run_cards, "CARDS", {"summary": run_cards.summary_card, "broken": broken_card})
    page = read(finished)
    assert page.titles == ["Summary", "Broken"] and "KeyError" in page.reasons[0]


def test_a_folder_without_a_run_is_refused_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder in (tmp_path, tmp_path / "absent"):
        assert main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert str(folder) in error and "no run here" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_report_needs_neither_torch_nor_ray(finished: RunDirectory):
    code = (
        "import sys, analysis.ablation_report, analysis.report; analysis.report.main([sys.argv[1]]); "
        "print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(finished.root)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_of_a_run_in_storage_the_report_is_all_that_is_put_there(
    finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    there = Path(shutil.copytree(finished.root, tmp_path / "there", ignore=shutil.ignore_patterns("report.html")))
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*") if path.is_file()}
    monkeypatch.setattr(report, "bucket_copy", lambda address, run: BucketCopy(there.as_uri(), run))
    here = tmp_path / "here"
    assert main([str(here)]) == 0 and (here / "report.html").exists()
    after = {path: path.stat().st_mtime_ns for path in there.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {there / "report.html"}
    assert {path: after[path] for path in before} == before
    assert main([str(here), "--output", str(tmp_path / "elsewhere.html")]) == 0
    assert (there / "report.html").stat().st_mtime_ns == after[there / "report.html"]


def test_what_fills_a_placeholder_is_never_one():
    assert fill("{{a}} {{b}} {{c}}", {"a": "{{b}}", "b": "1"}) == "{{b}} 1 {{c}}"
    assert json.loads(embedded(json.dumps({"a": "</script>"}))) == {"a": "</script>"}
