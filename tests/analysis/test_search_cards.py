"""Pareto fronts, convergence, axes, rank agreement and health: what is drawn of a search, apart from how."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import run_cards
from analysis.cards import convergence, evidence, health, pareto, search_axes
from analysis.cards import convergence as cards_convergence
from analysis.run_data import candidates, load_run
from minitron_search.records.directory import AXES, RunDirectory, append_line
from tests.analysis.conftest import CONTROLS, RUNGS


def level(**columns: list[float]) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    return pd.DataFrame({"trial": list("abcdefgh")[:count], "rung": 0, **columns})


def test_more_speed_is_better_and_less_of_anything_else():
    rows = level(
        params=[1.0, 2.0, 3.0, 4.0], tokens_per_second=[9.0, 7.0, np.nan, 5.0], lm_loss=[4.0, 3.0, 2.5, 3.5],
    )  # fmt: skip
    by = {axis.column: axis for axis in pareto.AXES}
    assert pareto.pareto_front(rows, by["params"])["trial"].tolist() == ["a", "b", "c"]
    assert pareto.pareto_front(rows, by["tokens_per_second"])["trial"].tolist() == ["a", "b"]  # c was not measured


@pytest.mark.parametrize("axis", pareto.AXES, ids=lambda axis: axis.column)
def test_nothing_of_the_level_beats_a_point_of_the_front(finished: RunDirectory, axis: pareto.Axis):
    info = pareto.pareto_info(load_run(finished))
    front = pareto.pareto_front(info.level, axis)
    sign = -1 if axis.more_is_better else 1
    for point in front.to_dict("records"):
        cheaper = sign * info.level[axis.column] <= sign * point[axis.column]
        better = info.level["lm_loss"] < point["lm_loss"]
        assert not (cheaper & better).any()
    data = pareto.pareto_data(info, axis)
    assert data["on_front"].sum() == len(front) and axis.column in data


def test_stopped_trials_of_other_tokens_have_another_shape(finished: RunDirectory):
    figure = pareto.pareto_plot(pareto.pareto_info(load_run(finished)))
    looks = [
        (trace.marker.color, trace.marker.symbol, trace.marker.size) for trace in figure.data if trace.mode == "markers"
    ]
    assert len(looks) == len(set(looks)) > 5


def test_what_is_far_off_is_named_at_the_edge(finished: RunDirectory):
    figure = pareto.pareto_plot(pareto.pareto_info(load_run(finished)))
    said = [note.text for note in figure.layout.annotations]
    assert any("untrained trim at 7" in text or "untrained trim at 8" in text for text in said)
    assert any(text.startswith("teacher 3.214 at 134.5") for text in said)
    low, high = figure.layout.yaxis.range
    assert low < 3.214 and high < 7


def test_controls_are_no_candidates_and_are_drawn_as_themselves(finished: RunDirectory):
    run = load_run(finished)
    assert set(candidates(run.trials)["arm"]) == {"search"}
    info = cards_convergence.loss_curves_info(run)
    (promoted,) = (trial for trial, kind in info.kinds.items() if kind == "promoted")
    trained = [arm for arm, _, tokens in CONTROLS if tokens]
    assert {arm: info.kinds[f"{promoted}-{arm}"] for arm in trained} == {
        "retrained": "retrained", "random_pruned": "random_pruned", "random_init": "random_init",
        "random_init_retrained": "random_init",
    }  # fmt: skip
    assert f"{promoted}-untrained" not in info.kinds
    names = {trace.name for trace in cards_convergence.loss_curves_plot(info).data}
    assert {"random pruning", "random weights", "promoted", "retrained"} < names


def test_every_scored_rung_is_a_point_of_the_curves_once(finished: RunDirectory):
    info = cards_convergence.loss_curves_info(load_run(finished))
    scored = [trace for trace in cards_convergence.loss_curves_plot(info).data if trace.yaxis == "y2"]
    points = sum(int(pd.Series(trace.x).notna().sum()) for trace in scored)
    assert points == len(info.rungs) and len(scored) == len(
        {cards_convergence.drawn_as(k) for k in info.kinds.values()}
    )


def test_the_best_so_far_falls_at_each_rung_and_tokens_add_up(finished: RunDirectory):
    run = load_run(finished)
    info = convergence.convergence_info(run)
    assert info.rows["place"].tolist() == list(range(1, len(info.rows) + 1))
    for _, rows in info.rows.groupby("rung"):
        assert (rows["best"].diff().dropna() <= 0).all() and rows["best"].iloc[-1] == rows["lm_loss"].min()
    assert info.rows["spent"].is_monotonic_increasing
    assert info.rows["spent"].iloc[-1] == candidates(run.trials).groupby("trial")["tokens"].max().sum()
    assert len(info.promoted) == 1 and (info.rows["minutes"] >= 0).all()


def test_rungs_are_in_the_order_they_ended_and_those_the_log_lacks_come_last(tmp_path: Path):
    run = RunDirectory(tmp_path)
    for proposal, trial in enumerate(("a", "b", "c")):
        made = {"trial": trial, "architecture": trial, "arm": "search", "seed": 0, "proposal": proposal}
        run.start_trial(trial, made)
        run.log_rung(trial, {**made, "rung": 0, "tokens": 10, "lm_loss": 5.0 - proposal})
    for time, trial in ((60.0, "c"), (120.0, "a")):
        append_line(run.events_log, {"time": time, "event": "rung_finished", "trial": trial, "rung": 0})
    rows = convergence.convergence_info(load_run(run)).rows
    assert rows["trial"].tolist() == ["c", "a", "b"]
    assert rows["best"].tolist() == [3.0, 3.0, 3.0] and rows["spent"].tolist() == [10, 20, 30]
    assert rows["minutes"].tolist()[:2] == [0.0, 1.0] and np.isnan(rows["minutes"].iloc[2])


def searched(tmp_path: Path, shapes: int, loss: Callable[[dict[str, int]], float]) -> RunDirectory:
    """Candidates of two axes, of which `loss` knows one; a layer count that its block decides."""
    run, rng = RunDirectory(tmp_path), np.random.default_rng(0)
    for proposal in range(shapes):
        length = int(rng.integers(0, 3))
        axes = {"hidden_size": int(rng.integers(4, 10)) * 64, "intermediate_size": int(rng.integers(4, 10)) * 64,
                "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30 - length,
                "drop_block_start": int(rng.integers(3, 9)) if length else 0, "drop_block_length": length}  # fmt: skip
        made = {"trial": f"t{proposal}", "architecture": f"a{proposal}", "arm": "search", "seed": 0,
                "proposal": proposal, "params": 1_000_000, **axes}  # fmt: skip
        run.start_trial(made["trial"], made)
        run.log_rung(made["trial"], {**made, "rung": 0, "tokens": 8, "lm_loss": loss(axes) + 0.01 * rng.random()})
    return run


def test_the_axis_that_decides_the_loss_is_the_important_one_and_its_sign_is_told(tmp_path: Path):
    run = searched(tmp_path, 40, lambda axes: 6 - axes["hidden_size"] / 200)
    info = search_axes.axes_info(load_run(run))
    assert info is not None
    assert info.varied == ("hidden_size", "intermediate_size", "drop_block_start", "drop_block_length")
    found = search_axes.importances(info)
    assert found["axis"].iloc[0] == "hidden_size" and found["importance"].sum() == pytest.approx(1)
    row = found.iloc[0]
    assert row["importance"] > 0.5 and row["spearman"] < -0.9
    assert (found["spearman_low"] <= found["spearman_high"]).all()


def test_every_architecture_is_one_line_over_every_varied_axis(tmp_path: Path):
    run = searched(tmp_path, 12, lambda axes: axes["hidden_size"] / 100)
    info = search_axes.axes_info(load_run(run))
    assert info is not None
    figure = search_axes.parallel_plot(info)
    lines = sum(sum(value is None for value in trace.y) for trace in figure.data)
    assert lines == 12
    axes = len(figure.layout.xaxis.ticktext)
    assert axes == len(info.varied) + 2 and all(len(trace.y) % (axes + 1) == 0 for trace in figure.data)
    assert all(len(trace.hovertext) == len(trace.y) for trace in figure.data)


def test_few_architectures_are_drawn_and_not_measured_and_one_shape_says_so(tmp_path: Path):
    few = run_cards.axes_card(load_run(searched(tmp_path / "few", 4, lambda axes: axes["hidden_size"])))
    assert [panel.name for panel in few.panels] == ["parallel_coordinates"] and "there are 4" in few.body
    one = run_cards.axes_card(load_run(searched(tmp_path / "one", 1, lambda axes: 1.0)))
    assert "no axis varies" in one.reason


def test_axes_are_looked_at_where_candidates_were_trained_and_are_many(finished: RunDirectory):
    info = search_axes.axes_info(load_run(finished))
    assert info is not None and info.rung == 0 and len(info.rows) == 11  # the second rung has a third of them
    assert set(info.varied) <= set(AXES) and info.rows["tokens"].unique().tolist() == [RUNGS[0]]


def test_rank_agreement_pairs_what_reached_both_rungs(finished: RunDirectory):
    run = load_run(finished)
    info = evidence.agreement_info(run)
    ((before, after, rows),) = info.pairs
    assert (before, after) == ("rung 0", "rung 1") and len(rows) == 3 and rows["promoted"].sum() == 1
    card = run_cards.agreement_card(run)
    assert card.data[0][0] == "rungs" and "2 of 9" in card.body  # as the run's own evidence has it


def test_rank_agreement_of_a_run_that_is_going_is_counted_here(finished: RunDirectory):
    run = load_run(finished)._replace(evidence={})
    info = evidence.agreement_info(run)
    rows = info.pairs[0][2]
    kept = "yes" if rows["before"].idxmin() == rows["after"].idxmin() else "no"
    assert f"<td>{kept}</td>" in evidence.agreement_html(info)
    assert "when the search ends" in evidence.agreement_count(info)
    assert not evidence.agreement_info(run._replace(trials=run.trials.iloc[:0])).pairs


def health_of(run: RunDirectory) -> dict[str, health.Check]:
    return {check.name: check for check in health.health_info(load_run(run)).checks}


def test_health_finds_what_is_wrong(make_run: Callable[..., RunDirectory], tmp_path: Path):
    run = make_run(tmp_path)
    run.log_step("t001", tokens=99, loss=float("nan"))
    made = {"trial": "again", "architecture": "a0000001", "arm": "search", "seed": 0, "proposal": 99}
    run.start_trial("again", made)
    run.log_rung("again", {**made, "rung": 0, "tokens": 8192, "lm_loss": float("nan")})
    run.event("run_started", stages=[])
    found = health_of(run)
    assert not found["Failed trials"].well and found["Failed trials"].found.startswith("1 of ")
    assert found["LM loss is not finite"].found == "1 trial: again"
    assert found["Training loss is not finite"].found == "1 step: t001"
    assert found["Architectures trained twice with one seed"].found == "1 of 12 architectures: a0000001 (search)"
    assert found["Metrics on which the teacher is at chance"].found.startswith("Winogrande accuracy: ")
    assert found["Restarted trials"].found == "1 restart" and found["Hosts lost"].found == "1 lost, 1 joined"
    assert found["Storage"].well and "1 outage, 1 of them over" in found["Storage"].found
    assert not found["Sessions"].well and "2 killed or still running" in found["Sessions"].found


def test_a_run_without_trouble_is_well_and_what_is_not_known_is_not_called_well(tmp_path: Path):
    run = searched(tmp_path, 3, lambda axes: 1.0)
    found = health_of(run)
    assert found["Failed trials"].well and found["LM loss is not finite"].well
    assert found["Training loss is not finite"].well is None
    assert found["Metrics on which the teacher is at chance"].well is None


def test_every_incident_is_a_line_with_its_time(finished: RunDirectory):
    info = health.health_info(load_run(finished))
    told = info.incidents["event"].tolist()
    assert told == ["node_lost", "node_joined", "trial_restarted", "storage_failed", "storage_back"]
    body = health.health_html(info)
    assert "node 10.0.0.2" in body and "message timed out" in body and body.count("class=trouble") == 3
    many = info._replace(incidents=pd.concat([info.incidents] * 100))
    assert f"{500 - health.LINES} more are in the CSV" in health.health_html(many)
