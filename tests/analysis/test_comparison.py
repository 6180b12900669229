"""Several runs on one page, and the paired differences that compare them."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import compared_cards, differences
from analysis.cards import configuration
from analysis.report import main
from analysis.run_data import RunData, load_run
from minitron_search.evaluation.paired_scores import against
from minitron_search.records.directory import RunDirectory
from tests.analysis.conftest import write_run
from tests.analysis.test_report import TITLES, Page

SHARED = [title for title in TITLES if title not in ("Shape", "Generations")]  # those are of one student


def losses(rng: np.random.Generator, seeds: tuple[int, ...], shift: float, windows: int = 16) -> dict[int, np.ndarray]:
    text = np.random.default_rng(0).normal(3, 0.3, windows)
    return {seed: text + shift + rng.normal(0, 0.05) + rng.normal(0, 0.02, windows) for seed in seeds}


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2, 3)])
def test_differences_are_those_of_the_search(seeds: tuple[int, ...]):
    rng = np.random.default_rng(len(seeds))
    one, other = losses(rng, seeds, 0.0), losses(rng, (*seeds, 9), 0.1)
    found = differences.paired(one, other)
    rows = {name: [{"trial": f"{name}{seed}", "rung": 0, "seed": seed} for seed in of]
            for name, of in (("one", one), ("other", other))}  # fmt: skip
    scores = {(f"{name}{seed}", 0): {"lm_loss": values} for name, of in (("one", one), ("other", other))
              for seed, values in of.items()}  # fmt: skip
    expected = against(rows["one"], rows["other"], scores)["lm_loss"]
    assert found is not None
    for key in ("difference", "low", "high"):
        assert found[key] == pytest.approx(expected[key])
    assert (found["seeds"], found["windows"]) == (expected["seeds"], expected["n"])
    if len(seeds) > 1:
        for key in ("low", "high"):
            assert found[f"seeds_{key}"] == pytest.approx(expected["over_seeds"][key])
    else:
        assert np.isnan(found["seeds_low"])


def test_runs_of_other_seeds_are_paired_by_windows_alone_and_other_windows_not_at_all():
    rng = np.random.default_rng(0)
    found = differences.paired(losses(rng, (0,), 0.0), losses(rng, (7,), 0.2))
    assert found is not None and found["seeds"] == 0 and found["low"] < 0.2 < found["high"] + 0.1
    assert differences.paired(losses(rng, (0,), 0.0), losses(rng, (0,), 0.0, windows=8)) is None
    assert differences.paired({}, losses(rng, (0,), 0.0)) is None


@pytest.mark.parametrize(
    ("low", "high", "seeds_low", "seeds_high", "seeds", "said"),
    [
        (0.1, 0.3, 0.05, 0.35, 3, "no interval holds zero."),
        (0.1, 0.3, -0.1, 0.5, 3, "another training might not"),
        (-0.1, 0.5, 0.1, 0.3, 3, "other text might not"),
        (-0.1, 0.5, -0.1, 0.5, 3, "it could be chance"),
        (0.1, 0.3, np.nan, np.nan, 1, "one seed, so what another training would give is not known"),
        (np.nan, np.nan, np.nan, np.nan, 1, "one window tells nothing"),
    ],
)
def test_words_claim_no_more_than_both_intervals_do(
    low: float, high: float, seeds_low: float, seeds_high: float, seeds: int, said: str
):
    row = {"arm": "other", "difference": 0.2, "low": low, "high": high, "seeds_low": seeds_low,
           "seeds_high": seeds_high, "seeds": seeds, "windows": 8}  # fmt: skip
    (line,) = differences.in_words(pd.DataFrame([row]), "first")
    assert said in line and line.startswith("other: 0.200 nats per token above first")


def test_a_forest_has_an_interval_over_windows_for_each_and_one_over_seeds_where_there_are_seeds():
    rng = np.random.default_rng(1)
    arms = {"base": losses(rng, (0, 1, 2), 0.0), "far": losses(rng, (0, 1, 2), 0.5), "lone": losses(rng, (0,), 0.2)}
    table = differences.differences(arms, "base")
    windows, seeds = differences.forest_plot(table, "base").data
    assert len(windows.x) == 2 and len(seeds.x) == 1
    assert windows.x[0] + windows.error_x.array[0] == pytest.approx(table["high"].iloc[0])
    assert differences.forest_plot(table, "base").layout.yaxis.ticktext == ("far", "lone")


def test_runs_of_one_name_are_told_apart(finished: RunDirectory):
    run = load_run(finished)
    other = run._replace(name="other")
    names = [each.name for each in differences.labelled([run, other, run, run], ["a", "b", "c", "c"])]
    assert names == [f"{run.name} (a)", "other", f"{run.name} (c) 3", f"{run.name} (c) 4"]


def test_what_differs_in_the_configurations_is_named_and_nothing_else(finished: RunDirectory):
    run = load_run(finished)
    config = {**run.config, "name": "b", "output": "elsewhere", "search": {**run.config["search"], "trials": 99}}
    other = run._replace(name="b", config=config, environment={**run.environment, "python": "3.12.0"})
    table = configuration.differing([run, other])
    assert table["key"].tolist() == ["search.trials", "python"]
    assert table["b"].tolist() == ["99", '"3.12.0"']
    assert configuration.other_windows([run, other]) == []
    moved = other._replace(config={**config, "corpus": {**config["corpus"], "sequence_length": 512}})
    assert configuration.other_windows([run, moved]) == ["corpus.sequence_length"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[RunDirectory]:
    """Nobody writes into them."""
    folder = tmp_path_factory.mktemp("two")
    return [write_run(folder / "one", name="one"), write_run(folder / "two", trials=16, name="two")]


def test_a_page_compares_two_runs_card_by_card(two: list[RunDirectory], tmp_path: Path):
    path = tmp_path / "both.html"
    assert main([*(str(run.root) for run in two), "--output", str(path)]) == 0
    page = Page(path.read_text())
    assert page.titles == SHARED and page.reasons == []
    links = {a["download"]: a["href"] or "" for _, a in page.tags if "download" in a}
    trials = pd.read_csv(io.BytesIO(base64.b64decode(links["trials.csv"].split(",", 1)[1])))
    assert trials.groupby("run").size().to_dict() == {run.root.name: len(run.read_trials()) for run in two}
    assert not (two[0].report.exists() or two[1].report.exists())


def test_without_an_output_the_comparison_is_beside_nobodys_run(
    two: list[RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main([str(run.root) for run in two]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html" and (tmp_path / "comparison.html").exists()


def test_runs_of_other_text_are_warned_of_and_not_paired(two: list[RunDirectory]):
    runs = [load_run(run) for run in two]
    runs[1].config["corpus"]["sequence_length"] = 512
    assert "not to be compared" in compared_cards.summary_card(runs).body
    card = compared_cards.differences_card(runs)
    assert card.panels == () and "Not paired" in card.body


def test_the_paired_difference_is_of_the_retrained_students(two: list[RunDirectory]):
    runs = [load_run(run) for run in two]
    card = compared_cards.differences_card(runs)
    one, other = (compared_cards.student(run) for run in runs)
    assert one["arm"].tolist() == other["arm"].tolist() == ["retrained"]
    table = card.panels[0].data
    assert table["difference"].iloc[0] == pytest.approx(other["lm_loss"].iloc[0] - one["lm_loss"].iloc[0])
    assert "Not at equal tokens" not in card.body
    runs[1].trials.loc[runs[1].trials["arm"] == "retrained", "tokens"] = 1024
    assert "Not at equal tokens" in compared_cards.differences_card(runs).body


def test_a_run_that_is_going_and_an_empty_one_are_compared_too(
    finished: RunDirectory, going: RunDirectory, tmp_path: Path
):
    empty = RunDirectory(tmp_path / "empty")
    empty.write_config({"name": "empty"})
    runs = [load_run(run) for run in (going, empty, finished)]
    cards = compared_cards.compare(runs)
    assert [card.title for card in cards] == SHARED
    assert not any("could not be made" in card.reason for card in cards)
    lonely = compared_cards.compare([load_run(empty), load_run(empty)._replace(name="second")])
    assert not any("could not be made" in card.reason for card in lonely)
    assert sum(bool(card.reason) for card in lonely) == 11  # all but the summary and health


def test_no_word_of_several_runs_becomes_a_tag(finished: RunDirectory, hostile: RunDirectory, tmp_path: Path):
    tags: dict[str, list[str]] = {}
    for kind, run in (("tame", finished), ("wild", hostile)):
        path = tmp_path / f"{kind}.html"
        main([str(run.root), str(run.root), "--output", str(path)])
        tags[kind] = [tag for tag, _ in Page(path.read_text()).tags]
    assert tags["wild"] == tags["tame"]
    text = re.sub(r"<script.*?</script>", "", (tmp_path / "wild.html").read_text(), flags=re.DOTALL)
    assert "alert(1)" in text


def test_health_of_several_names_only_what_is_amiss(two: list[RunDirectory]):
    runs: list[RunData] = [load_run(run) for run in two]
    body = compared_cards.health_card(runs).body
    assert body.count("Hosts lost: 1 lost") == 2 and "Storage:" not in body and "other checks" in body
    assert "t004: OutOfMemoryError" in body
