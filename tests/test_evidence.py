"""What evidence.json says of a search follows from the rows and from nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import evidence as card
from minitron_search.evidence import evidence
from minitron_search.run_directory import RunDirectory

WINDOWS, QUESTIONS = 16, 30


def log(run: RunDirectory, arm: str, architecture: str, losses: list[np.ndarray], seed: int = 0, **given: Any) -> None:
    """A trial whose rung r has `losses[r]` (windows,)."""
    trial = f"{arm}-{architecture}-{seed}"
    correct = np.random.default_rng(len(architecture)).integers(0, 2, QUESTIONS)
    for rung, of_windows in enumerate(losses):
        run.log_scores(trial, rung, lm_loss=of_windows.tolist(), winogrande_correct=correct.tolist(),
                       winogrande_margin=correct.tolist())  # fmt: skip
        row = {"trial": trial, "architecture": architecture, "arm": arm, "seed": seed, "rung": rung, "proposal": 0,
               "tokens": 100 * (rung + 1), "lm_loss": float(of_windows.mean()), "kl": float(of_windows.mean()),
               "winogrande_margin": -float(of_windows.mean()), "winogrande_acc": 0.5, "winogrande_n": 400}  # fmt: skip
        run.log_rung(trial, {**row, **given})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Three architectures: at rung 0 b leads, at rung 1 a does, by far before c and within noise before b."""
    made, draw = RunDirectory(tmp_path), np.random.default_rng(0)
    text = draw.normal(4.0, 1.0, WINDOWS)
    log(made, "teacher", "t", [text - 1])
    for name, first, last in (("a", 1.1, 0.5), ("b", 1.0, 0.505), ("c", 1.2, 0.9)):
        log(made, "search", name, [text + first, text + last + draw.normal(0, 0.05, WINDOWS)])
    log(made, "search", "d", [text + 2.0])  # stopped at the first rung
    made.write_trials({})
    return made


def test_finalists_are_paired_window_by_window(run: RunDirectory) -> None:
    found = evidence(run, "lm_loss")
    order = [about["architecture"] for about in found["finalists"]]
    assert sorted(order) == ["a", "b", "c"] and order[2] == "c"  # d saw fewer tokens
    close, far = (about["lm_loss_against_best"] for about in found["finalists"][1:])
    assert far["p"] < 0.001 and far["difference"] == pytest.approx(0.4, abs=0.06) and far["n"] == WINDOWS
    assert close["p"] > 0.05  # windows differ by 1 nat, the models by 0.01
    assert found["finalists"][1]["accuracy_against_best"]["n"] == QUESTIONS
    said = "\n".join(found["words"])
    assert "2 others" in said and "1 differ" in said and f"1 do not: {order[1]}." in said


def test_rungs_foretell_and_flips_are_named(run: RunDirectory) -> None:
    (step,) = evidence(run, "lm_loss")["rungs"]
    assert (step["before"], step["after"], step["n"]) == ("rung 0", "rung 1", 3)
    assert evidence(run, "winogrande_margin")["rungs"][0]["flips"] == step["flips"]  # a margin is better when higher
    for name, loss in (("a", 3.0), ("c", 2.9)):
        log(run, "retrained", name, [np.full(WINDOWS, loss)])
    run.write_trials({})
    _, last = evidence(run, "lm_loss")["rungs"]
    assert (last["after"], last["n"], last["best_kept"], last["flips"]) == ("retrained", 2, False, [["c", "a"]])


def test_a_teacher_at_chance_is_said_to_be(run: RunDirectory) -> None:
    assert evidence(run, "lm_loss")["at_chance"] is True
    assert "ranks nothing" in evidence(run, "lm_loss")["words"][0]
    log(run, "teacher", "t", [np.zeros(WINDOWS)], winogrande_acc=0.9)
    run.write_trials({})
    assert evidence(run, "lm_loss")["at_chance"] is False


def test_seeds_are_pooled_and_their_spread_is_told(run: RunDirectory) -> None:
    draw = np.random.default_rng(1)
    for seed in (1, 2):
        log(run, "search", "a", [np.full(WINDOWS, 4.0), 4.2 + draw.normal(0, 0.1, WINDOWS)], seed=seed)
    run.write_trials({})
    found = {about["architecture"]: about for about in evidence(run, "lm_loss")["finalists"]}
    assert (found["a"]["seeds"], found["b"]["seeds"]) == (3, 1)
    assert found["a"]["error_over_seeds"] > 0 and found["b"]["error_over_seeds"] is None
    rows = [row["lm_loss"] for row in run.read_trials() if row["architecture"] == "a" and row["rung"] == 1]
    assert found["a"]["lm_loss"] == pytest.approx(np.mean(rows))


def test_a_search_of_one_and_one_that_has_not_begun_say_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_trials({})
    assert evidence(run, "kl") == {"objective": "kl", "finalists": [], "rungs": [], "at_chance": None, "words": []}
    log(run, "search", "a", [np.ones(WINDOWS)])
    run.write_trials({})
    assert "compared with none" in evidence(run, "kl")["words"][0]


def test_the_card_shows_what_the_file_says(run: RunDirectory) -> None:
    found = json.loads(json.dumps(evidence(run, "lm_loss")))
    table = card.finalists(found)
    assert table["architecture"].tolist() == [about["architecture"] for about in found["finalists"]]
    assert table["lm_loss_minus_best"].isna().tolist() == [True, False, False]
    assert card.differences_plot(table).data[0].x.tolist() == table["lm_loss_minus_best"].dropna().tolist()
    assert card.body(found).count("<p>") == len(found["words"])
