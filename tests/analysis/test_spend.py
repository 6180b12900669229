"""The card that compares what was forecast with what was spent."""

from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.cards import spend
from analysis.run_cards import spend_card
from analysis.run_data import load_run
from minitron_search.records.directory import RunDirectory, append_line
from tests.analysis.conftest import FORECAST, HOSTILE


def log(run: RunDirectory, *events: tuple[float, str, str]) -> None:
    """(time, event, stage) each."""
    for time, kind, stage in events:
        append_line(run.events_log, {"time": time, "event": kind, "stage": stage})


@pytest.fixture
def begun(tmp_path: Path) -> RunDirectory:
    """An hour and a half of a search that was forecast to take an hour, on two GPUs; retraining still to come."""
    run = RunDirectory(tmp_path)
    run.write_config({"name": "begun"})
    about = {**FORECAST, "seconds": 3600.0, "gpus": 2, "gpu_seconds": 7200.0, "price_per_hour": 8.0, "cost": 8.0}
    run.write_forecast({stage: {**about, "basis": "stated"} for stage in ("search", "retrain")})
    log(run, (0, "run_started", ""), (0, "stage_started", "search"), (5400, "stage_finished", "search"))
    return run


def test_spent_is_put_beside_the_forecast(begun: RunDirectory) -> None:
    search, retrain = spend.spend_info(load_run(begun)).rows.to_dict("records")
    assert (search["stage"], search["ratio"]) == ("search", 1.5)
    assert (search["forecast_hours"], search["spent_hours"]) == (1, 1.5)
    assert (search["forecast_gpu_hours"], search["spent_gpu_hours"]) == (2, 3)
    assert (search["forecast_cost"], search["spent_cost"]) == (8, 12)
    assert retrain["forecast_hours"] == 1 and retrain["spent_hours"] != retrain["spent_hours"], "not a number"


def test_the_words_say_how_much_and_what_is_left(begun: RunDirectory) -> None:
    card = spend_card(load_run(begun))
    assert "Of 60 min forecast, 90 min were spent, 1.50 times as much; retrain still to run." in card.body
    assert card.sample == "Forecast: stated." and [panel.name for panel in card.panels] == ["spend"]
    (foretold, spent) = card.panels[0].figure.data
    assert (spent.name, foretold.name) == ("spent", "forecast")
    assert list(foretold.x) == [60, 60] and spent.x[0] == 90


def test_tokens_and_flops_are_those_of_the_log(finished: RunDirectory) -> None:
    run = load_run(finished)
    rows = spend.spend_info(run).rows.set_index("stage")
    last = run.trials.groupby("trial")["tokens"].max()
    searched = run.trials[run.trials["arm"].isin(["search", "random_pruned", "random_init"])]["trial"].unique()
    assert rows.loc["search", "spent_tokens"] == last[searched].sum()
    assert rows.loc["retrain", "spent_tokens"] == 262144
    assert rows.loc["search", "spent_flops"] == 1e12


def test_a_stage_without_a_forecast_is_still_shown(finished: RunDirectory) -> None:
    rows = spend.spend_info(load_run(finished)).rows.set_index("stage")
    assert rows.loc["evaluation", "spent_hours"] >= 0
    assert rows.loc["evaluation", ["forecast_hours", "ratio"]].isna().all()


def test_no_forecast_and_nothing_spent_say_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_config({"name": "old"})
    log(run, (0, "stage_started", "search"), (9, "stage_finished", "search"))
    assert "No forecast.json" in spend_card(load_run(run)).reason
    fresh = RunDirectory(tmp_path / "fresh")
    fresh.write_forecast({"search": {**FORECAST, "basis": "measured"}})
    fresh.write_config({"name": "fresh"})
    assert "no stage has started" in spend_card(load_run(fresh)).reason


def test_a_stage_in_the_cache_and_gpu_hours_nobody_knows_leave_dashes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_config({"name": "unknown"})
    unknown = {**FORECAST, "seconds": 0.0, "gpu_seconds": None, "price_per_hour": None, "cost": None, "basis": "given"}
    run.write_forecast({"importance": unknown})
    log(run, (0, "stage_started", "importance"), (9, "stage_finished", "importance"))
    card = spend_card(load_run(run))
    assert "GPU-hours" not in card.body and "money" not in card.body and "–" in card.body and "nan" not in card.body


def test_words_of_a_run_are_escaped(make_run: Callable[..., RunDirectory], tmp_path: Path) -> None:
    card = spend_card(load_run(make_run(tmp_path / "wild", hostile=HOSTILE)))
    assert HOSTILE not in card.body and "alert(1)" in card.body
    assert "<script" not in "".join(card.panels[0].figure.data[0].y)
