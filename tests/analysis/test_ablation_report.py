"""An ablation's page: arms against the baseline, whatever of them is there."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import ablation_report, report
from analysis.ablation_report import load_ablation, main, write_ablation_report
from minitron_search.records.directory import RunDirectory
from tests.analysis.conftest import ARMS, HOSTILE, MILESTONES, SHIFTS, write_ablation
from tests.analysis.test_report import Page

TITLES = ["The question", "Paired differences", "LM loss by tokens", "Students", "Cost", "Health",
          "Differences of configuration"]  # fmt: skip


def page(folder: Path) -> Page:
    return Page(write_ablation_report(folder).read_text())


def test_a_finished_ablation_fills_every_card(tmp_path: Path):
    made = page(write_ablation(tmp_path / "a"))
    assert made.titles == TITLES and made.reasons == []
    assert sum(attributes.get("class") == "plot" for _, attributes in made.tags) == 3
    names = {str(attributes["download"]) for _, attributes in made.tags if "download" in attributes}
    assert names == {"differences.csv", "differences_by_tokens.csv", "lm_loss_by_tokens.csv", "trials.csv", "cost.csv",
                     "configuration.csv"}  # fmt: skip


def test_arms_are_the_shifts_they_were_made_with_and_seeds_decide_how_sure_that_is(tmp_path: Path):
    ablation = load_ablation(write_ablation(tmp_path / "a"))
    card = ablation_report.differences_card(ablation)
    table = card.panels[0].data.set_index("arm")
    assert table.index.tolist() == list(ARMS[1:])
    for arm, shift in zip(ARMS[1:], SHIFTS[1:], strict=True):
        assert table.loc[arm, "difference"] == pytest.approx(shift, abs=0.02)
        assert table.loc[arm, "low"] > 0
    sure, unsure = table.loc["random"], table.loc["none"]
    assert sure["seeds_low"] > 0 > unsure["seeds_low"]
    assert "random: 0." in card.body and "no interval holds zero" in card.body
    assert "another training might not" in card.body


def test_what_the_ablation_tested_itself_is_beside_it_and_what_is_stale_is_not(tmp_path: Path):
    folder = write_ablation(tmp_path / "a")
    ablation = load_ablation(folder)
    table = ablation_report.differences_card(ablation).panels[0].data
    assert table["p_holm"].isna().all()  # it has not ended
    tests = pd.DataFrame([
        {"arm": arm, "metric": metric, "tokens": MILESTONES[-1], "difference": difference, "low": 0.0, "high": 1.0,
         "p_holm": 0.015, "seeds_low": None, "seeds_high": None, "seeds_p_holm": 0.25, "n": 32, "seeds": 3}
        for metric in ("lm_loss", "kl")
        for arm, difference in zip(ARMS[1:], [table["difference"].iloc[0], 99.0], strict=True)
    ])  # fmt: skip
    tests.to_parquet(folder / "ablation.parquet")
    card = ablation_report.differences_card(load_ablation(folder))
    assert card.panels[0].data["p_holm"].tolist()[0] == 0.015 and np.isnan(card.panels[0].data["p_holm"].iloc[1])
    assert [panel.name for panel in card.panels] == ["differences", "differences_by_tokens", "differences_kl"]
    assert card.body.count("0.015") == 2 and "KL" in card.panels[-1].figure.layout.xaxis.title.text
    (folder / "ablation.parquet").write_bytes(b"PAR1")
    assert "ablation.parquet: " in ablation_report.health_card(load_ablation(folder)).body


def test_curves_are_means_with_the_range_of_seeds(tmp_path: Path):
    data = ablation_report.curves_card(load_ablation(write_ablation(tmp_path / "a"))).panels[0].data
    assert sorted(data["tokens"].unique()) == list(MILESTONES) and (data["count"] == 3).all()
    last = data[data["tokens"] == MILESTONES[-1]].set_index("arm")
    assert last.loc["none", "max"] - last.loc["none", "min"] == pytest.approx(0.2, abs=0.05)
    assert (last["min"] <= last["mean"]).all() and (last["mean"] <= last["max"]).all()


def test_only_what_was_varied_is_a_difference_of_configuration(tmp_path: Path):
    card = ablation_report.configuration_card(load_ablation(write_ablation(tmp_path / "a")))
    assert card.data[0][1]["key"].tolist() == ["distillation.loss"]


@pytest.mark.parametrize("arms", [(), ("kept",), ("random",), ("kept", "none")])
def test_arms_that_have_not_begun_leave_the_others(tmp_path: Path, arms: tuple[str, ...]):
    folder = write_ablation(tmp_path / "a", arms)
    made = page(folder)
    assert made.titles == TITLES and not any("could not be made" in reason for reason in made.reasons)
    states = ablation_report.question_card(load_ablation(folder)).body
    assert states.count("not begun") == 3 - len(arms) and states.count("finished") == len(arms)
    paired = "kept" in arms and len(arms) > 1
    assert (ablation_report.differences_card(load_ablation(folder)).reason == "") == paired


def test_an_arm_that_is_behind_is_compared_at_the_tokens_it_has(tmp_path: Path):
    folder = write_ablation(tmp_path / "a")
    run = RunDirectory(folder / "random")
    for log in run.root.glob("trials/*/metrics.jsonl"):
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["rung"] < len(MILESTONES) - 1]
        log.write_text("\n".join(kept) + "\n")
    run.trials_table.unlink()
    run.events_log.write_text("")
    ablation = load_ablation(folder)
    tokens, rows = ablation_report.compared_at(ablation)
    assert tokens == MILESTONES[-2] and set(rows) == set(ARMS)
    body = ablation_report.question_card(ablation).body
    assert "Not finished: compared below at 4.1K of 8.19K tokens" in body and "not finished" in body


def test_a_failed_arm_is_called_so_and_a_broken_folder_is_named(tmp_path: Path):
    folder = write_ablation(tmp_path / "a", ("kept", "random"))
    RunDirectory(folder / "random").event("run_started", stages=[])
    RunDirectory(folder / "random").event("run_failed", message="disk full")
    (folder / "none").mkdir()
    ablation = load_ablation(folder)
    states = {arm: ablation_report.state(ablation, arm) for arm in ARMS}
    assert states == {"kept": "finished", "random": "failed", "none": "unreadable"}
    health = ablation_report.health_card(ablation).body
    assert "none: " in health and "no run here" in health and "1 failed" in health


def test_a_resumed_arm_is_what_its_last_session_was(tmp_path: Path):
    folder = write_ablation(tmp_path / "a", ("kept",))
    run = RunDirectory(folder / "kept")
    run.event("run_failed", message="killed")
    run.event("run_started", stages=[])
    assert ablation_report.state(load_ablation(folder), "kept") == "all students scored"


def test_of_several_students_of_a_seed_the_best_counts_and_the_teacher_is_none(tmp_path: Path):
    folder = write_ablation(tmp_path / "a", ("kept",), seeds=(0,))
    run = RunDirectory(folder / "kept")
    for trial, arm, loss in (("worse", "search", 9.0), ("teacher", "teacher", 1.0)):
        made = {"trial": trial, "architecture": "b", "arm": arm, "seed": 0, "proposal": 1}
        run.start_trial(trial, made)
        run.log_rung(trial, {**made, "rung": 0, "tokens": MILESTONES[-1], "lm_loss": loss})
    rows = ablation_report.students(load_ablation(folder).runs["kept"])
    assert rows["trial"].unique().tolist() == ["s0"] and len(rows) == len(MILESTONES)


def test_an_arm_called_teacher_is_its_students(tmp_path: Path):
    folder = write_ablation(tmp_path / "a", ("kept",), seeds=(0,))
    run = RunDirectory(folder / "kept")
    made = {"trial": "teacher", "architecture": "b", "arm": "teacher", "seed": 0, "proposal": -1}
    run.start_trial("teacher", made)
    run.log_rung("teacher", {**made, "rung": 0, "tokens": 0, "lm_loss": 1.0})
    rows = ablation_report.students(load_ablation(folder).runs["kept"]._replace(name="teacher"))
    assert rows["trial"].unique().tolist() == ["s0"]


def test_no_word_of_an_ablation_becomes_a_tag(tmp_path: Path):
    wild = HOSTILE.replace("/", "∕")  # arms are folders
    tags = [[tag for tag, _ in page(write_ablation(tmp_path / kind, hostile=words)).tags]
            for kind, words in (("tame", ""), ("wild", wild))]  # fmt: skip
    assert tags[0] == tags[1]


def test_a_folder_that_is_no_ablation_is_refused_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for text in (None, "{", '{"name": "a"}', "[1]"):
        if text is not None:
            (tmp_path / "ablation.json").write_text(text)
        assert main([str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "ablation.json" in error and "a run directory per arm" in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_the_report_of_a_run_says_whose_an_ablation_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_ablation(tmp_path / "a", ("kept",))
    assert report.main([str(folder)]) == 2
    assert f"python -m analysis.ablation_report {folder}" in capsys.readouterr().err
    assert report.main([str(folder / "kept")]) == 0  # an arm is a run


def test_the_command_says_when_it_cannot_draw_static_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("analysis.page.static_figures.BROWSERS", ())
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    folder = write_ablation(tmp_path / "a")
    assert main([str(folder), "--figures"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(folder / "report.html")] and "no static figures: they need Chromium" in err


def test_the_wider_interval_is_the_band(tmp_path: Path):
    ablation = load_ablation(write_ablation(tmp_path / "a"))
    table = ablation_report.differences_by_tokens(ablation, list(ARMS))
    assert table.groupby("tokens").size().to_dict() == {tokens: 2 for tokens in MILESTONES}
    band = ablation_report.by_tokens_plot(ablation, table[table["arm"] == "none"]).data[0]
    rows = table[table["arm"] == "none"]
    np.testing.assert_allclose(band.y[: len(rows)], rows[["high", "seeds_high"]].max(axis=1))
