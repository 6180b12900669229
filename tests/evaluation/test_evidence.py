"""What evidence.json says of a search follows from the rows and from nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.cards import evidence as card
from analysis.run_cards import evidence_card
from analysis.run_data import load_run
from minitron_search.evaluation.chance import refuse_at_chance
from minitron_search.evaluation.evidence import evidence, not_worse
from minitron_search.records.directory import RunDirectory
from minitron_search.records.metrics import METRICS

WINDOWS, QUESTIONS = 16, 30
HOSTILE = "<img src=x onerror=alert(1)>"


def log(
    run: RunDirectory, arm: str, architecture: str, losses: list[np.ndarray], seed: int = 0,
    precision: str = "float32", margin: np.ndarray | None = None, **given: Any,
) -> str:  # fmt: skip
    """A trial whose rung r has `losses[r]` (windows,); its id."""
    trial = f"{arm}-{architecture}-{seed}".replace("/", "")
    run.start_trial(trial, {"score_precision": precision})
    correct = np.random.default_rng(list(architecture.encode())).integers(0, 2, QUESTIONS)
    for rung, of_windows in enumerate(losses):
        margins = correct - 0.5 if margin is None else margin
        run.log_scores(trial, rung, lm_loss=of_windows.tolist(), kl=(of_windows / 2).tolist(),
                       winogrande_correct=correct.tolist(), winogrande_margin=margins.tolist(),
                       winogrande_twin=(np.arange(QUESTIONS) // 2).tolist())  # fmt: skip
        row = {"trial": trial, "architecture": architecture, "arm": arm, "seed": seed, "rung": rung, "proposal": 0,
               "tokens": 100 * (rung + 1), "lm_loss": float(of_windows.mean()), "kl": float(of_windows.mean()),
               "winogrande_margin": -float(of_windows.mean()), "winogrande_acc": 0.5, "winogrande_n": 400}  # fmt: skip
        row |= {"winogrande_acc_stderr": 0.025, "winogrande_margin_stderr": 0.1}
        run.log_rung(trial, {**row, **given})
    return trial


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
    assert found["finalists"][1]["winogrande_acc_against_best"]["n"] == QUESTIONS
    said = "\n".join(found["words"])
    assert "2 others" in said and "1 differ" in said and f"1 do not: {order[1]}." in said


def test_every_metric_is_paired_and_corrected_for_as_many_others(run: RunDirectory) -> None:
    best, *others = evidence(run, "lm_loss")["finalists"]
    assert best["stderr"] == pytest.approx(np.std(run.scores()["search-a-0", 1]["lm_loss"], ddof=1) / WINDOWS**0.5)
    for metric, n in (("lm_loss", WINDOWS), ("kl", WINDOWS), ("winogrande_margin", QUESTIONS / 2)):
        tests = [about[f"{metric}_against_best"] for about in others]
        assert all(test["n"] == n and test["low"] <= test["difference"] <= test["high"] for test in tests)
        ps = sorted(test["p"] for test in tests)
        corrected = [min(2 * ps[0], 1), min(max(2 * ps[0], ps[1]), 1)]
        assert sorted(test["p_holm"] for test in tests) == pytest.approx(corrected)
    far = others[1]
    assert far["kl_against_best"]["difference"] == pytest.approx(far["lm_loss_against_best"]["difference"] / 2)


def test_rungs_foretell_and_flips_are_named(run: RunDirectory) -> None:
    (step,) = evidence(run, "lm_loss")["rungs"]
    assert (step["before"], step["after"], step["n"]) == ("rung 0", "rung 1", 3)
    assert evidence(run, "winogrande_margin")["rungs"][0]["flips"] == step["flips"]  # a margin is better when higher
    for name, loss in (("a", 3.0), ("c", 2.9)):
        log(run, "retrained", name, [np.full(WINDOWS, loss)])
    run.write_trials({})
    _, last = evidence(run, "lm_loss")["rungs"]
    assert (last["after"], last["n"], last["best_kept"], last["flips"]) == ("retrained", 2, False, [["c", "a"]])


def test_a_rungs_choice_has_its_regret_and_its_narrowed_field(run: RunDirectory) -> None:
    found = evidence(run, "lm_loss")
    (step,) = found["rungs"]
    assert (step["chosen"], step["best"], step["best_kept"], step["before_n"]) == ("b", "a", False, 4)
    means = {about["architecture"]: about["lm_loss"] for about in found["finalists"]}
    assert step["regret"] == pytest.approx(means["b"] - means["a"]) and step["regret_p"] > 0.05  # a flip by noise
    assert step["top"] == [{"k": 1, "shared": 0, "by_chance": pytest.approx(1 / 3), "p": pytest.approx(1.0)}]
    said = "\n".join(found["words"])
    assert "1 pair of 3 flipped (b and a)" in said or "1 pair of 3 flipped (a and b)" in said
    assert "3 of 4 from rung 0" in said and "correlate less" in said and "too few for an interval" in said


def test_a_teacher_at_chance_is_said_to_be(run: RunDirectory) -> None:
    found = evidence(run, "lm_loss")
    assert {metric: of["at_chance"] for metric, of in found["at_chance"].items()} == {
        "winogrande_acc": True, "winogrande_margin": True}  # fmt: skip
    assert "accuracy and Winogrande margin are at chance" in found["words"][0] and "rank nothing" in found["words"][0]
    log(run, "teacher", "t", [np.zeros(WINDOWS)], winogrande_acc=0.9)
    run.write_trials({})
    assert evidence(run, "lm_loss")["at_chance"]["winogrande_acc"]["at_chance"] is False
    assert evidence(run, "lm_loss")["words"][0].startswith("Winogrande margin is at chance")


def test_a_margin_is_above_chance_by_a_one_sided_t_test_over_twins(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(40):
        margin = draw.normal(0.3, 1, QUESTIONS)
        run = RunDirectory(tmp_path / str(number))
        log(run, "teacher", "t", [np.ones(WINDOWS)], margin=margin)
        run.write_trials({})
        of = evidence(run, "lm_loss")["at_chance"]["winogrande_margin"]
        above = stats.ttest_1samp(margin.reshape(-1, 2).mean(1), 0, alternative="greater").pvalue < 0.05
        assert of["at_chance"] is not bool(above) and of["n"] == QUESTIONS / 2


def test_an_objective_at_chance_is_refused_with_another(tmp_path: Path) -> None:
    run, draw = RunDirectory(tmp_path), np.random.default_rng(0)
    blind = log(run, "teacher", "blind", [np.ones(WINDOWS)], margin=draw.normal(0, 1, QUESTIONS))
    with pytest.raises(ValueError, match=r"search\.objective: winogrande_margin .*n = 15.* valid: lm_loss or kl"):
        refuse_at_chance(run, blind, ["kl", "winogrande_margin"])
    refuse_at_chance(run, blind, ["lm_loss", "kl"])
    sees = log(run, "teacher", "sees", [np.ones(WINDOWS)], margin=draw.normal(2, 1, QUESTIONS))
    refuse_at_chance(run, sees, ["winogrande_margin"])


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


def test_windows_and_seeds_are_two_kinds_of_noise(run: RunDirectory) -> None:
    """b is above a by 0.1 in every window, by -0.4, 0.1 and 0.6 in three seeds."""
    text = np.random.default_rng(2).normal(4, 1, WINDOWS)
    for seed, above in ((0, -0.4), (1, 0.1), (2, 0.6)):
        log(run, "search", "a", [text, text], seed=seed)
        log(run, "search", "b", [text, text + above], seed=seed)
    run.write_trials({})
    found = {about["architecture"]: about for about in evidence(run, "lm_loss")["finalists"]}
    test = found["b"]["lm_loss_against_best"]
    assert test["seeds"] == 3 and test["difference"] == pytest.approx(0.1) and test["p"] < 0.001
    assert test["over_seeds"]["p"] == pytest.approx(stats.ttest_1samp([-0.4, 0.1, 0.6], 0).pvalue)
    assert test["over_seeds"]["p"] > 0.5 and test["over_seeds"]["difference"] == pytest.approx(0.1)
    spread = evidence(run, "lm_loss")["seeds"]
    assert spread["freedom"] == 4
    assert spread["sd"] == pytest.approx((np.var([-0.4, 0.1, 0.6], ddof=1) / 2) ** 0.5)  # a's three are equal


def test_unequal_seeds_are_compared_on_those_that_both_have(run: RunDirectory) -> None:
    for seed in (1, 2):
        log(run, "search", "c", [np.full(WINDOWS, 4.0), np.full(WINDOWS, 3.0)], seed=seed)  # better than its first
    run.write_trials({})
    found = evidence(run, "lm_loss")
    best = found["finalists"][0]
    assert (best["architecture"], best["seeds"]) == ("c", 3)
    test = found["finalists"][1]["lm_loss_against_best"]
    first = {name: np.array(run.scores()[f"search-{name}-0", 1]["lm_loss"]) for name in "abc"}
    other = found["finalists"][1]["architecture"]
    assert test["seeds"] == 1 and "over_seeds" not in test
    assert test["difference"] == pytest.approx((first[other] - first["c"]).mean()) and test["difference"] < 0
    assert "1 to 3 seeds" in "\n".join(found["words"])
    rows = [row for row in run.read_trials() if row["arm"] == "search" and row["rung"] == 1]
    assert not_worse(rows, run.scores(), "lm_loss")[0] == "c" and len(not_worse(rows, run.scores(), "lm_loss")) == 3


def test_rungs_are_ranked_by_the_seeds_that_all_ran_with_and_the_winner_is_one_that_was_promoted(
    run: RunDirectory,
) -> None:
    """a's further seeds are worse: by their mean c, of one lucky seed, would be before it, and its rungs would flip."""
    (before,) = evidence(run, "lm_loss")["rungs"]
    for seed in (1, 2):
        log(run, "search", "a", [np.full(WINDOWS, 1.0), np.full(WINDOWS, 9.0)], seed=seed)
    run.write_trials({f"search-a-{seed}": "promoted" for seed in range(3)})
    found = evidence(run, "lm_loss")
    assert [about["architecture"] for about in found["finalists"]] == ["a", "b", "c"]
    (after,) = found["rungs"]
    assert after == before
    log(run, "retrained", "a", [np.full(WINDOWS, 1.0)])
    log(run, "retrained", "c", [np.full(WINDOWS, 2.0)])
    run.write_trials({f"search-a-{seed}": "promoted" for seed in range(3)})
    last = evidence(run, "lm_loss")["rungs"][-1]
    assert last["after"] == "retrained" and last["flips"] == [["c", "a"]]  # the last rung's mean over all seeds


def finals(losses: np.ndarray) -> tuple[list[dict[str, Any]], dict[tuple[str, int], dict[str, list[float]]]]:
    """Rows and scores of a last rung: `losses` (architectures, windows)."""
    rows = [{"architecture": str(a), "trial": f"t{a}", "seed": 0, "rung": 1, "lm_loss": of.mean()}
            for a, of in enumerate(losses)]  # fmt: skip
    return rows, {(f"t{a}", 1): {"lm_loss": of.tolist()} for a, of in enumerate(losses)}


def test_what_is_not_worse_keeps_the_truly_best_and_drops_the_far() -> None:
    """Of four that tie none is left out more than about one time in forty; one that is far never stays."""
    draw, kept = np.random.default_rng(0), []
    for _ in range(300):
        losses = draw.normal(4, 1, 12) + draw.normal(0, 0.1, (5, 12)) + np.array([0, 0, 0, 0, 1])[:, None]
        rows, scores = finals(losses)
        found = not_worse(rows, scores, "lm_loss")
        assert "4" not in found and found[0] == str(losses.mean(1).argmin())
        kept.append([str(a) in found for a in range(4)])
    left_out = 1 - np.mean(kept, axis=0)
    assert (left_out < 0.05).all() and left_out.mean() < 0.03 and left_out.mean() > 0


def test_what_logged_nothing_is_kept_and_a_margin_is_better_when_higher() -> None:
    draw = np.random.default_rng(0)
    rows, scores = finals(draw.normal(0, 0.1, (3, 12)) + np.array([0, 1, 2])[:, None])
    assert not_worse(rows, scores, "lm_loss") == ["0"] and not_worse(rows, {}, "lm_loss") == ["0", "1", "2"]
    rows = [{**row, "winogrande_margin": row["lm_loss"]} for row in rows]
    margins = {key: {"winogrande_margin": of["lm_loss"]} for key, of in scores.items()}
    assert not_worse(rows, margins, "winogrande_margin") == ["2"]


@pytest.fixture
def with_controls(run: RunDirectory) -> RunDirectory:
    """a is promoted: random pruning is 0.3 worse than it, random weights 2, its trim 3; the teacher is 1.5 better."""
    draw, a = np.random.default_rng(3), np.array(run.scores()["search-a-0", 1]["lm_loss"])
    for arm, worse, precision in (("random_pruned", 0.3, "bfloat16"), ("random_init", 2.0, "bfloat16")):
        log(run, arm, "a", [a + 5, a + worse + draw.normal(0, 0.05, WINDOWS)], precision=precision)
    log(run, "untrained", "a", [a + 3.0])
    log(run, "teacher", "t", [a - 1.5])
    for name in "abc":
        run.start_trial(f"search-{name}-0", {"score_precision": "bfloat16"})
    run.write_trials({"search-a-0": "promoted"})
    return run


def test_controls_are_paired_with_the_winner_at_its_own_tokens(with_controls: RunDirectory) -> None:
    found = evidence(with_controls, "lm_loss")
    (of,) = found["controls"]
    assert of["architecture"] == "a" and of["candidate"]["tokens"] == 200
    above = {control["arm"]: control["against_candidate"]["lm_loss"] for control in of["controls"]}
    assert list(above) == ["random_pruned", "random_init", "untrained", "teacher"]
    for arm, expected in (("random_pruned", 0.3), ("random_init", 2.0), ("untrained", 3.0), ("teacher", -1.5)):
        test = above[arm]
        assert test["difference"] == pytest.approx(expected, abs=0.05) and test["p"] < 0.001
        assert test["low"] - 1e-9 <= test["difference"] <= test["high"] + 1e-9
    assert [control["tokens"] for control in of["controls"]] == [200, 200, 100, 100]
    assert all("winogrande_margin" in control["against_candidate"] for control in of["controls"])
    said = "\n".join(found["words"])
    assert "below random pruning of the same shape" in said and "1.500 above the teacher (95% 1.500 to 1.500)" in said
    assert "scored in bfloat16, its untrained trim in float32 and the teacher in float32" in said


def test_controls_of_one_precision_say_nothing_of_it_and_missing_ones_are_left_out(run: RunDirectory) -> None:
    a = np.array(run.scores()["search-a-0", 1]["lm_loss"])
    log(run, "random_pruned", "a", [a + 5])  # it stopped before the last rung
    log(run, "untrained", "b", [a + 5])  # another's
    run.write_trials({"search-a-0": "promoted"})
    found = evidence(run, "lm_loss")
    assert [control["arm"] for control in found["controls"][0]["controls"]] == ["teacher"]
    assert "float32" not in "\n".join(found["words"])


def test_too_few_windows_are_said_to_be(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for name, loss in (("a", 1.0), ("b", 2.0)):
        log(run, "search", name, [np.full(4, loss)])
    run.write_trials({})
    assert "4 windows are too few to tell 2 architectures apart" in "\n".join(evidence(run, "lm_loss")["words"])
    log(run, "untrained", "a", [np.full(4, 1.5)])
    run.write_trials({"search-a-0": "promoted"})
    said = evidence(run, "lm_loss")["words"][-1]
    assert "0.500 below its untrained trim (95% 0.500 to 0.500, n = 4: too few)" in said


def test_a_search_of_one_and_one_that_has_not_begun_say_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_trials({})
    assert evidence(run, "kl") == {"objective": "kl", "finalists": [], "seeds": None, "rungs": [], "at_chance": None,
                                   "controls": [], "against_trims": [], "words": []}  # fmt: skip
    log(run, "search", "a", [np.ones(WINDOWS)])
    run.write_trials({})
    assert "compared with none" in evidence(run, "kl")["words"][-1]


def test_the_card_shows_what_the_file_says(with_controls: RunDirectory) -> None:
    found = json.loads(json.dumps(evidence(with_controls, "lm_loss"), allow_nan=False))
    table = card.finalists(found)
    assert table["architecture"].tolist() == [about["architecture"] for about in found["finalists"]]
    assert table["lm_loss_minus_best"].isna().tolist() == [True, False, False]
    assert card.differences_plot(table, "lm_loss").data[0].x.tolist() == table["lm_loss_minus_best"].dropna().tolist()
    assert card.paragraphs(found).count("<p>") == len(found["words"])
    beside = card.controls(found)
    assert beside["arm"].tolist() == list(card.ARMS)
    drawn = {trace.y[0]: trace for trace in card.controls_plot(beside).data}
    assert list(drawn) == [name for name, _ in card.ARMS.values()]
    teacher = found["controls"][0]["controls"][-1]["against_candidate"]["lm_loss"]
    assert drawn["teacher"].x[0] == teacher["difference"]
    assert drawn["teacher"].x[0] + drawn["teacher"].error_x.array[0] == pytest.approx(teacher["high"])
    assert card.rungs(found)["flips"].tolist()[0] in ("a and b", "b and a")


def test_the_card_of_each_objective_is_drawn_by_it(run: RunDirectory) -> None:
    for objective in ("kl", "winogrande_margin"):
        run.write_evidence(evidence(run, objective))
        (panel,) = evidence_card(load_run(run)).panels
        assert len(panel.figure.data[0].x) == 2 and METRICS[objective].title in panel.figure.layout.xaxis.title.text


def test_no_word_of_a_run_becomes_a_tag_of_the_card(run: RunDirectory) -> None:
    text = np.array(run.scores()["search-a-0", 1]["lm_loss"])
    for shift, name in ((0.2, HOSTILE), (-0.5, f"best{HOSTILE}")):
        trial = log(run, "search", name, [text + 1, text + shift])
        log(run, "random_init", name, [text + 1, text + 2])
    run.write_trials({trial: "promoted"})
    run.write_evidence(evidence(run, "lm_loss"))
    made = evidence_card(load_run(run))
    assert "<img" not in made.body and "&lt;img" in made.body and len(made.panels) == 2
    for panel in made.panels:
        assert all("<img" not in str(value) for trace in panel.figure.data for value in trace.y)
