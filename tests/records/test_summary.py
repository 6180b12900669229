"""A student that training made worse than its untrained trim is said to be, wherever a run says anything of it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from analysis.cards.health import health_info
from analysis.compared_cards import harm_warning
from analysis.outcome.summary import summary_html, summary_info
from analysis.run_data import load_run
from minitron_search.evaluation.evidence import evidence
from minitron_search.export.model_card import model_card, origin_of
from minitron_search.records.directory import RunDirectory
from minitron_search.records.summary import against_trims, harm_sentences, say_harm, summary_table, winner
from tests.export.test_model_card import ROW, TEXTS, teacher, trial

WINDOWS = 16
TEXT = np.random.default_rng(0).normal(4.0, 1.0, WINDOWS)


def log(run: RunDirectory, arm: str, name: str, by_tokens: dict[int, Any], logs: bool = True, **given: Any) -> str:
    """A trial of architecture `name` whose windows are `TEXT` plus what is given for each rung's tokens; its id."""
    made = f"{arm}-{name}"
    run.start_trial(made, {"trial": made, "architecture": name, "arm": arm, "seed": 0, "proposal": 0})
    for rung, (tokens, extra) in enumerate(by_tokens.items()):
        losses = TEXT + extra
        if logs:
            run.log_scores(made, rung, lm_loss=losses.tolist())
        row = {"trial": made, "architecture": name, "arm": arm, "seed": 0, "proposal": 0, "rung": rung, **ROW}
        run.log_rung(made, {**row, "tokens": tokens, "lm_loss": float(losses.mean()), "lm_loss_n": WINDOWS, **given})
    return made


def noise(size: float) -> np.ndarray:
    """Differences of windows that have a mean of exactly 0."""
    drawn = np.random.default_rng(1).normal(0, size, WINDOWS)
    return drawn - drawn.mean()


def held(run: RunDirectory, **statuses: str) -> list[dict[str, Any]]:
    run.write_trials(statuses)
    return against_trims(run.read_trials(), run.scores())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path)
    made.write_config({"name": "harmed"})
    log(made, "teacher", "t", {0: -1.0})
    return made


def test_every_trained_rung_is_paired_with_its_own_trim(run: RunDirectory) -> None:
    log(run, "search", "a", {0: 1.0, 100: 1.3 + noise(0.1), 200: 0.5 + noise(0.1)})
    first, second = held(run)
    assert first["difference"] == pytest.approx(0.3) and first["clear"] and first["above"]
    half = 2.1314 * np.std(noise(0.1), ddof=1) / WINDOWS**0.5  # t(15)
    assert (first["low"], first["high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-4)
    assert second["difference"] == pytest.approx(-0.5) and not second["above"] and not second["clear"]
    assert first["n"] == WINDOWS, "the trims vary by 1 nat between windows, and that is no noise of the difference"


def test_a_candidates_trim_is_that_of_the_same_seed(run: RunDirectory) -> None:
    """Random weights, or random pruning, differ between seeds."""
    log(run, "search", "a", {0: 1.0, 100: 1.5})
    other = log(run, "search", "b", {0: 2.0, 100: 1.5}, architecture="a", seed=1)
    assert {test["trial"]: test["clear"] for test in held(run)} == {"search-a": True, other: False}


def test_only_what_is_worse_beyond_noise_is_worse_and_a_retraining_must_be_better(run: RunDirectory) -> None:
    log(run, "search", "a", {0: 1.0, 100: 1.01 + noise(1.0)})
    assert harm_sentences(held(run)) == []
    log(run, "untrained", "a", {0: 1.0})
    log(run, "retrained", "a", {400: 1.01 + noise(1.0)})
    (said,) = harm_sentences(held(run))
    assert "is no better than its own untrained trim after 400 tokens" in said and "within noise" in said
    log(run, "retrained", "b", {400: 0.9})
    log(run, "untrained", "b", {0: 1.0})
    assert harm_sentences(held(run)) == [said], "what training improved is not named"


def test_a_last_rung_at_which_all_are_worse_says_what_to_lower(run: RunDirectory) -> None:
    for number in range(3):
        log(run, "search", f"s{number}", {0: 1.0, 100: 1.2 + number, 200: 1.5 + number})
    said = harm_sentences(held(run))
    assert said[0].startswith("Every trial at rung 2, after 200 tokens, is WORSE than its untrained trim, by 0.500 to ")
    assert "a lower distillation.learning_rate may help" in said[0] and "at rung 1" in said[1]
    log(run, "search", "good", {0: 1.0, 100: 0.9, 200: 0.5})
    assert harm_sentences(held(run))[0].startswith("3 of 4 trials at rung 2, after 200 tokens, are WORSE than their")


def test_what_was_never_scored_untrained_is_not_called_well(run: RunDirectory) -> None:
    log(run, "search", "a", {100: 1.0, 200: 2.0})
    found = held(run)
    assert all(test["trim"] is None and test["difference"] is None and not test["above"] for test in found)
    (said,) = harm_sentences(found)
    assert said.startswith("Whether training helped is not known: search.rungs does not begin at 0")
    (check,) = [check for check in health_info(load_run(run)).checks if "untrained trims" in check.name]
    assert check.well is None


def test_without_values_of_windows_the_noise_is_not_known(run: RunDirectory) -> None:
    log(run, "untrained", "a", {0: 1.0}, logs=False)
    log(run, "retrained", "a", {400: 1.5}, logs=False)
    (test,) = held(run)
    assert test["above"] and not test["clear"] and test["low"] is None
    assert "beyond noise is not known" in harm_sentences([test])[0]


def test_the_table_the_evidence_and_the_report_say_it(run: RunDirectory) -> None:
    log(run, "search", "a", {0: 1.0, 100: 1.5})
    log(run, "untrained", "a", {0: 1.0})
    log(run, "retrained", "a", {400: 2.0})
    said = harm_sentences(held(run, **{"search-a": "promoted"}))
    assert len(said) == 2
    for columns in (80, 100, 140):
        console = Console(record=True, width=columns, file=io.StringIO())
        console.print(summary_table(run, columns))
        printed = console.export_text()
        assert "…" not in printed and max(map(len, printed.splitlines())) <= columns, printed
        assert printed.count("(") >= 3 * 4, "every score with its error"
    assert "layers: " in (winner(run) or "") and "of the teacher's" in (winner(run) or "")
    names = [str(cell) for cell in summary_table(run).columns[0].cells]
    assert names == ["teacher", "untrained trim", "best candidate*", "retrained*"]
    found = evidence(run, "lm_loss")
    assert set(said) <= set(found["words"]) and json.loads(json.dumps(found["against_trims"])) == held(
        run, **{"search-a": "promoted"}
    )
    loaded = load_run(run)
    info = summary_info(loaded)
    assert "Training won nothing back" in info.outcome and info.harm == said
    page = summary_html(info)
    assert all(sentence in page and sentence in harm_warning(loaded) for sentence in said)
    (check,) = [check for check in health_info(loaded).checks if "untrained trims" in check.name]
    assert check.well is False and "retrained-a (rung 0, +1.000)" in check.found and "2 of 2 rungs" in check.found


def test_it_is_said_and_written_down_once_at_the_time(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    made = log(run, "search", "a", {0: 1.0, 100: 1.5})
    sentence = say_harm(run, made, made)
    assert sentence is not None and "search-a of a is WORSE than its own untrained trim after 100 tokens" in sentence
    assert sentence.split(":")[0] in " ".join(capsys.readouterr().out.split())
    assert say_harm(run, made, made) == sentence
    (event,) = [event for event in run.events() if event["event"] == "above_trim"]
    assert (event["trial"], event["rung"], event["message"]) == (made, 1, sentence)
    better = log(run, "search", "b", {0: 1.0, 100: 0.9})
    assert say_harm(run, better, better) is None
    untrained, retrained = log(run, "untrained", "a", {0: 1.0}), log(run, "retrained", "a", {400: 1.1})
    assert "retraining.learning_rate" in (say_harm(run, retrained, untrained) or "")


def test_the_model_card_warns(tmp_path: Path) -> None:
    origin = origin_of(teacher(tmp_path), *TEXTS)
    warned = model_card(origin, trial(), ROW, {}, harm="It is WORSE than its own untrained trim.")
    assert "> **Warning.** It is WORSE than its own untrained trim." in warned
    assert "Warning" not in model_card(origin, trial(), ROW, {})
