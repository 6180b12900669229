"""The report's cards, in order. A card is a function of a run; to add one, write it and put it in `CARDS`."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from analysis import benchmark_tables
from analysis.cards import (
    configuration,
    convergence,
    depth,
    evidence,
    health,
    importance,
    pareto,
    search_axes,
    spend,
    summary,
    trials_table,
)
from analysis.cards import convergence as cards_convergence
from analysis.cards import evidence as cards_evidence
from analysis.page.card import Card, Panel
from analysis.run_data import RunData


def summary_card(run: RunData) -> Card:
    title = "Summary"
    read = "Left to right: the start, what trimming broke, what the search found, what retraining made of it."
    info = summary.summary_info(run)
    if not info.rows:
        return Card(title, read, reason="No model has been scored yet: the trials table has no rows.")
    data = pd.DataFrame(list(info.rows.values())).assign(model=list(info.rows))
    return Card(title, read, summary.summary_count(info), summary.summary_html(info), data=(("summary", data),))


def pareto_card(run: RunData) -> Card:
    title = "Pareto fronts"
    read = (
        "Lower is better, and further left; of speed, further right. Compare points of one colour and shape: they saw "
        "equal tokens. Nothing at the line’s tokens is both cheaper and better than a point on it."
    )
    info = pareto.pareto_info(run)
    if info.points.empty:
        return Card(title, read, reason="No trial has finished a rung with a finite LM loss yet.")
    panels = tuple(
        Panel(
            f"pareto_{axis.column}",
            pareto.pareto_plot(info, axis),
            pareto.pareto_data(info, axis),
            axis.name,
            columns=6 if axis == pareto.AXES[0] else 2,
        )
        for axis in pareto.measured_axes(info)
    )
    return Card(title, read, pareto.pareto_count(info), panels=panels)


def convergence_card(run: RunData) -> Card:
    title = "Convergence"
    read = (
        "First, the search: every circle is a candidate that finished a rung, a line the best at that rung so far. "
        "Then "
        "each trial: above, what it trains on; below, what it is ranked by at each rung. Faint lines were stopped, "
        "strong ones promoted; controls have the shape and tokens of the promoted candidate."
    )
    found, info = convergence.convergence_info(run), cards_convergence.loss_curves_info(run)
    panels = []
    if len(found.rows):
        figure, data = convergence.convergence_plot(found), convergence.convergence_data(found)
        panels.append(Panel("convergence", figure, data, "The best so far", columns=6))
    if len(info.steps) or len(info.rungs):
        figure, data = cards_convergence.loss_curves_plot(info), cards_convergence.loss_curves_data(info)
        panels.append(Panel("loss_curves", figure, data, "Loss against tokens", columns=6))
    if not panels:
        return Card(title, read, reason="No trial has logged a training step or finished a rung yet.")
    return Card(title, read, cards_convergence.loss_curves_count(info), panels=tuple(panels))


def depth_card(run: RunData) -> Card:
    title = "Depth"
    read = (
        "Each line: the model without a block of that many layers, by where the block starts. Dashed: as many layers "
        "chosen one by one, each by how little its removal alone raises the LM loss. (Figures 8 and 9 of 2408.11796 "
        "number a block by its last layer, from 1.)"
    )
    info = depth.depth_info(run)
    if info.rows.empty:
        return Card(title, read, reason="No depth.parquet: the stage has not run, or has not finished.")
    panels = [
        Panel(
            f"depth_{metric}",
            depth.position_plot(info, metric),
            info.rows[info.rows["metric"] == metric].drop(columns="hover"),
            depth.METRICS[metric][0],
        )
        for metric in info.metrics
    ]
    panels += [
        Panel(
            f"depth_map_{metric}",
            depth.heat_map_plot(info, metric),
            depth.of(info, metric, "contiguous").drop(columns="hover"),
            f"{depth.METRICS[metric][0]}, start × length",
        )
        for metric in info.metrics
        if metric not in depth.OF_TEACHER
    ]
    return Card(title, read, depth.depth_count(info), depth.depth_html(info), tuple(panels))


def importance_card(run: RunData) -> Card:
    title = "Importance"
    read = (
        "A low bar is a layer that changes the residual stream little. Each row of a map is one layer, "
        "sorted: one that fades early has width to lose."
    )
    info = importance.importance_info(run)
    if info is None:
        return Card(title, read, reason="No readable importance.safetensors: the stage has not finished.")
    layers = pd.DataFrame({"layer": range(info.bi.size), "bi": info.bi})
    hidden = importance.heat_map_data(info.hidden[None], info.sizes["hidden_size"]).drop(columns="layer")
    return Card(
        title,
        read,
        importance.importance_count(info),
        panels=(
            Panel("layer_importance", importance.bi_plot(info), layers, "Layers"),
            Panel("hidden_importance", importance.hidden_plot(info), hidden, "Hidden channels"),
            *(
                Panel(
                    name,
                    importance.heat_map_plot(info, axis),
                    importance.heat_map_data(values, info.sizes[axis]),
                    f"{what}, relative to the layer’s mean",
                )
                for name, axis, values, what in (
                    ("mlp_importance", "intermediate_size", info.mlp, "MLP neurons"),
                    ("head_importance", "num_attention_heads", info.heads, "Attention heads"),
                )
            ),
        ),
    )


def axes_card(run: RunData) -> Card:
    title = "Axes of the search"
    read = (
        "A line is an architecture, from axis to axis; strong blue ones have the lowest LM loss. Where they bunch, the "
        "axis matters. Importance says how much, by PED-ANOVA (arXiv:2304.10255): how unlike all the shapes tried the "
        "best tenth of them, or the best five, are. The correlation says which way: left of zero, more of it goes with "
        "a lower loss. A budget ties the axes together, so one may stand for another."
    )
    info = search_axes.axes_info(run)
    if info is None:
        return Card(title, read, reason="No candidate has been scored yet.")
    if len(info.rows) < 2 or not info.varied:
        return Card(title, read, reason="All scored candidates have one shape: no axis varies.")
    panels = [
        Panel("parallel_coordinates", search_axes.parallel_plot(info), info.rows, "Parallel coordinates", columns=6)
    ]
    body = ""
    if len(info.rows) < search_axes.FEWEST:
        body = (
            f"<p>Importance of the axes needs {search_axes.FEWEST} scored architectures at one rung; "
            f"there are {len(info.rows)}.</p>"
        )
    else:
        found = search_axes.importances(info)
        panels += [
            Panel("axis_importance", search_axes.importances_plot(found), found, "Importance"),
            Panel("axis_direction", search_axes.directions_plot(found), found, "Direction"),
        ]
    return Card(title, read, search_axes.axes_count(info), body, tuple(panels))


def evidence_card(run: RunData) -> Card:
    title = "Ablations and controls"
    read = (
        "Paired differences: right of the line is worse than the winner on the same windows (better, of a margin); an "
        "interval that crosses it could be chance. The controls say what pruning by importance is worth: same shape, "
        "same tokens, no ranking or no weights (Figure 6 of 2408.11796)."
    )
    if not run.evidence:
        return Card(title, read, reason="No evidence.json: the search has not ended.")
    found, objective = run.evidence, run.evidence["objective"]
    table, beside = evidence.finalists(found), evidence.controls(found)
    panels = []
    if len(beside) and beside["lm_loss_minus_candidate"].notna().any():
        panels.append(Panel("controls", evidence.controls_plot(beside), beside, "Controls"))
    if len(table) and table[f"{objective}_minus_best"].notna().any():
        panels.append(Panel("finalists", evidence.differences_plot(table, objective), table, "Finalists"))
    words = evidence.split_words(found)[1]
    if not panels and not words:
        return Card(title, read, reason="The search ended with one architecture and no controls: nothing to compare.")
    return Card(title, read, evidence.sample(table), evidence.body(words), tuple(panels))


def tables_card(run: RunData) -> Card:
    return benchmark_tables.tables_card([run])


def agreement_card(run: RunData) -> Card:
    title = "Rank agreement"
    read = (
        "A point is an architecture, left to right by an early rung, upwards by the next: on a rising line the early "
        "rung "
        "foretold the later. Only what a rung let go on is ranked again, so points are alike and tau is lower than it "
        "would be over all."
    )
    info = cards_evidence.agreement_info(run)
    if not info.pairs:
        return Card(
            title, read, reason="No two architectures have reached the same two rungs, so no order was foretold."
        )
    panels = tuple(
        Panel(
            f"agreement_{place}",
            cards_evidence.agreement_plot(info, before, after, rows),
            rows.drop(columns="hover"),
            f"{before} to {after}",
        )
        for place, (before, after, rows) in enumerate(info.pairs)
    )
    data = (("rungs", info.tests),) if len(info.tests) else ()
    words = evidence.split_words(run.evidence)[0] if run.evidence else []
    body = evidence.body(words) + cards_evidence.agreement_html(info)
    return Card(title, read, cards_evidence.agreement_count(info), body, panels, data)


def spend_card(run: RunData) -> Card:
    title = "Spend against forecast"
    read = (
        "A ratio above 1 took longer than forecast: more trials trained on than one in the reduction factor, the "
        "machine was shared, or the run was cut off. Well below 1, what a stage needed was in the cache. FLOPs spent "
        "are of the architectures that were trained."
    )
    if not run.forecast:
        return Card(title, read, reason="No forecast.json: the run is older than forecasts, or has not begun.")
    info = spend.spend_info(run)
    if info.rows["spent_hours"].isna().all():
        return Card(title, read, reason="Nothing has been spent yet: no stage has started.")
    panel = Panel("spend", spend.spend_plot(info), info.rows)
    return Card(title, read, spend.spend_count(info), spend.spend_html(info), (panel,))


def health_card(run: RunData) -> Card:
    info = health.health_info(run)
    data = (("incidents", info.incidents),) if len(info.incidents) else ()
    return Card(
        "Health",
        "What was looked for, and what was found; then what failed and why, and every incident with its time. A run "
        "still going has running candidates.",
        health.health_count(info),
        health.health_html(info),
        data=data,
    )


def trials_card(run: RunData) -> Card:
    title = "Trials"
    read = "One row per trial at its last rung. Click a heading to sort; ranks hold within one rung only."
    info = trials_table.trials_table_info(run)
    if info.rows.empty:
        return Card(title, read, reason="No trial has a row yet.")
    return Card(
        title,
        read,
        trials_table.trials_table_count(info),
        trials_table.trials_table_html(info),
        data=(("trials", info.all_rungs),),
    )


def configuration_card(run: RunData) -> Card:
    title = "Configuration and environment"
    read = "What is needed to run this again: the resolved configuration, the versions and the machine."
    if not run.config and not run.environment:
        return Card(title, read, reason="This folder holds neither config.yaml nor environment.json.")
    sample = f"n = {len(dict(configuration.dotted(run.config)))} settings; units are in their names, or in the README."
    return Card(title, read, sample, configuration.configuration_html(run))


CARDS: list[Callable[[RunData], Card]] = [
    summary_card,
    pareto_card,
    convergence_card,
    depth_card,
    importance_card,
    axes_card,
    evidence_card,
    tables_card,
    agreement_card,
    spend_card,
    health_card,
    trials_card,
    configuration_card,
]


def make_cards(run: RunData) -> list[Card]:
    return made(CARDS, run)


def made(cards: Sequence[Callable[[Any], Card]], of: Any) -> list[Card]:
    """Every card; one that fails says so in its place, because a report with a hole beats no report."""
    found = []
    for make in cards:
        try:
            found.append(make(of))
        except Exception as error:
            name = make.__name__.removesuffix("_card").replace("_", " ").capitalize()
            found.append(Card(name, "", reason=f"This card could not be made: {type(error).__name__}: {error}"))
    return found
