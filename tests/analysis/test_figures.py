"""The `_info` half of every figure: what is drawn, apart from how."""

import numpy as np
import pandas as pd
import pytest

from analysis.cards.convergence import POINTS_PER_TRIAL, loss_curves_info, thin
from analysis.cards.health import health_info
from analysis.cards.importance import COLUMNS, descending, importance_info, places, shrink
from analysis.cards.pareto import pareto_front, pareto_info
from analysis.cards.trials_table import trials_table_info
from analysis.outcome.summary import chance_warning, summary_info
from analysis.page import formatting as f
from analysis.run_data import best_candidate, common_rung, last_rungs, load_run
from minitron_search.records.directory import RunDirectory


def rows(*losses: tuple[str, int, float, int]) -> pd.DataFrame:
    """Candidates (trial, rung, lm_loss, params)."""
    frame = pd.DataFrame(losses, columns=["trial", "rung", "lm_loss", "params"])
    return frame.assign(arm="search", status="stopped", architecture="a")


def test_the_front_holds_exactly_what_nothing_beats():
    front = pareto_front(rows(("a", 0, 5.0, 10), ("b", 0, 4.0, 20), ("c", 0, 4.5, 30), ("d", 0, 3.0, 40)))
    assert list(front["trial"]) == ["a", "b", "d"]


def test_a_tie_in_size_or_loss_keeps_one():
    assert list(pareto_front(rows(("a", 0, 5.0, 10), ("b", 0, 4.0, 10), ("c", 0, 4.0, 20)))["trial"]) == ["b"]


def test_the_front_is_of_one_rung_even_where_one_trial_went_further():
    trials = rows(("a", 0, 5.0, 10), ("b", 0, 4.0, 20), ("b", 1, 3.0, 20))
    assert common_rung(trials) == 0
    assert common_rung(rows(("b", 1, 3.0, 20))) == 1
    assert common_rung(trials.iloc[:0]) is None


def test_a_diverged_trial_is_counted_and_never_best():
    trials = rows(("a", 0, np.nan, 10), ("b", 0, 4.0, 20))
    best = best_candidate(trials)
    assert best is not None and best[0]["trial"] == "b" and not best[1]


def test_a_finished_run_has_every_point_once(finished: RunDirectory):
    run = load_run(finished)
    info = pareto_info(run)
    assert info.points["trial"].is_unique
    assert len(info.points) == run.trials["trial"].nunique() - 1  # the failed one has no loss
    assert info.rung == 1 and set(info.level["rung"]) == {1}
    assert pareto_front(info.level)["lm_loss"].is_monotonic_decreasing
    assert all("hidden_size" in hover and "rung" in hover for hover in info.points["hover"])


def test_the_best_candidate_is_the_promoted_one_and_its_controls_are_its_own(finished: RunDirectory):
    info = summary_info(load_run(finished))
    assert list(info.rows) == ["Teacher", "Untrained trim", "Best candidate", "Retrained student"]
    assert info.rows["Best candidate"]["status"] == "promoted"
    assert len({row["architecture"] for title, row in info.rows.items() if title != "Teacher"}) == 1
    assert "retrained student" in info.outcome


@pytest.mark.parametrize(
    ("accuracy", "verdict", "warned"),
    [(0.52, None, True), (0.60, None, False), (float("nan"), None, False), (0.60, True, True), (0.52, False, False)],
)
def test_an_accuracy_at_chance_is_called_so_and_the_runs_own_verdict_counts(
    finished: RunDirectory, accuracy: float, verdict: bool | None, warned: bool
):
    run = load_run(finished)
    scored = {"winogrande_acc": accuracy, "winogrande_acc_stderr": 0.04, "winogrande_n": 120}
    trials = run.trials.copy()
    trials.loc[trials["arm"] == "teacher", list(scored)] = list(scored.values())
    evidence = {} if verdict is None else {"at_chance": {"winogrande_acc": {"at_chance": verdict}}}
    assert bool(chance_warning(run._replace(trials=trials, evidence=evidence))) == warned


def test_loss_curves_are_thinned_without_losing_a_trial(finished: RunDirectory):
    run = load_run(finished)
    info = loss_curves_info(run)
    assert info.steps.groupby("trial").size().max() <= POINTS_PER_TRIAL
    assert set(info.steps["trial"]) == set(run.steps["trial"])
    assert info.steps.groupby("trial")["tokens"].max().equals(run.steps.groupby("trial")["tokens"].max())
    assert "retrained" in info.kinds.values() and "promoted" in info.kinds.values()
    assert info.teacher == pytest.approx(3.214)


def test_thinning_keeps_the_mean_and_a_single_step():
    tokens = np.arange(1, 1001, dtype=float)
    steps = pd.DataFrame({"trial": "a", "tokens": tokens, "loss": np.ones(1000)})
    lone = pd.DataFrame({"trial": ["b"], "tokens": [7.0], "loss": [2.0]})
    thinned, averaged = thin(pd.concat([steps, lone], ignore_index=True), 20)
    assert (thinned["trial"] == "a").sum() <= 20 and averaged > 1
    assert (thinned.loc[thinned["trial"] == "a", "loss"] == 1).all()
    assert thinned.loc[thinned["trial"] == "b", "tokens"].tolist() == [7.0]


def test_a_restarted_trial_counts_each_token_once(going: RunDirectory):
    going.log_step("t1", tokens=1024, loss=9.0)
    steps = load_run(going).steps
    again = steps[(steps["trial"] == "t1") & (steps["tokens"] == 1024)]
    assert again["loss"].tolist() == [9.0]


def test_importance_is_sorted_and_bounded(finished: RunDirectory):
    run = load_run(finished)
    info = importance_info(run)
    assert info is not None and run.importance is not None
    assert info.bi == pytest.approx(run.importance.block_bi.diagonal(1))
    assert info.mlp.shape == (30, COLUMNS) and info.heads.shape == (30, 9)
    assert (np.diff(info.mlp, axis=1) <= 0).all() and (np.diff(info.hidden) <= 0).all()
    assert info.mlp.mean() == pytest.approx(run.importance.mlp.mean(), rel=1e-5)  # 1536 = 8 * 192


def test_places_cover_the_axis_when_columns_do_not_divide_it():
    values = descending(np.arange(10.0)[None])
    assert shrink(values, 4).tolist() == [[8.0, 5.0, 2.0, 0.0]]
    assert places(4, 10).tolist() == [1.5, 4.5, 7.5, 9.5]


def test_the_table_has_each_trial_at_its_last_rung(finished: RunDirectory):
    info = trials_table_info(load_run(finished))
    assert info.rows["trial"].is_unique and len(info.all_rungs) > len(info.rows)
    assert (info.rows.loc[info.rows["status"] == "promoted", "rung"] == 1).all()


def test_health_names_what_failed_and_counts_candidates(finished: RunDirectory):
    info = health_info(load_run(finished))
    assert [trial for trial, _ in info.failed] == ["t004"] and "OutOfMemory" in info.failed[0][1]
    assert sum(info.statuses.values()) == 12


def test_a_run_that_is_going_shows_what_its_table_has_not_got_yet(going: RunDirectory):
    run = load_run(going)
    assert not going.trials_table.exists()
    assert run.trials["trial"].tolist() == ["t0"] and run.trials["status"].tolist() == ["running"]
    assert health_info(run).statuses == {"running": 2}
    assert set(loss_curves_info(run).kinds) == {"t0", "t1"}
    assert list(summary_info(run).rows) == ["Leading candidate"]


def test_an_empty_run_has_empty_figures(tmp_path):
    empty = RunDirectory(tmp_path)
    empty.write_config({"name": "empty"})
    run = load_run(empty)
    assert pareto_info(run).points.empty and pareto_info(run).level.empty
    assert loss_curves_info(run).steps.empty and importance_info(run) is None
    assert trials_table_info(run).rows.empty and last_rungs(run.trials).empty
    assert not summary_info(run).rows and health_info(run).statuses == {}


def test_what_is_missing_reads_as_missing():
    nan = float("nan")
    assert {f.fixed(nan, 2), f.plus_minus(nan, 0.1, 2), f.millions(nan), f.tokens(nan), f.bytes_(nan)} == {f.MISSING}
    assert f.plus_minus(-1.5, nan, 1) == "−1.5"
    assert (f.tokens(32768), f.tokens(4e9), f.millions(134_515_008)) == ("32.8K", "4B", "134.5 M")
    assert f.log_ticks(30, 400) == [10, 20, 50, 100, 200, 500]
