"""The report's cards, in order. A card is a function of a run; to add one, write it and put it in `CARDS`."""

import html
import json
import re
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
import yaml

from analysis import depth, evidence, health, importance, loss_curves, size_and_loss, spend, summary, trials_table
from analysis.run_data import RunData


class Panel(NamedTuple):
    """One figure of a card and the data behind it, which the page offers as `<name>.csv`."""

    name: str
    figure: go.Figure
    data: pd.DataFrame
    heading: str = ""


class Card(NamedTuple):
    """sample: n and units. body: HTML with every word from the run escaped. reason: why there is no more."""

    title: str
    how_to_read: str
    sample: str = ""
    body: str = ""
    panels: tuple[Panel, ...] = ()
    data: tuple[tuple[str, pd.DataFrame], ...] = ()  # downloads that belong to no figure
    reason: str = ""


def summary_card(run: RunData) -> Card:
    title = "Outcome"
    read = "Left to right: the start, what trimming broke, what the search found, what retraining made of it."
    info = summary.summary_info(run)
    if not info.rows:
        return Card(title, read, reason="No model has been scored yet: the trials table has no rows.")
    data = pd.DataFrame(list(info.rows.values())).assign(model=list(info.rows))
    return Card(title, read, summary.summary_count(info), summary.summary_html(info), data=(("outcome", data),))


def size_and_loss_card(run: RunData) -> Card:
    title = "Size against LM loss"
    read = "Lower and further left is better. Compare points of one colour and shape: they saw equal tokens."
    info = size_and_loss.size_and_loss_info(run)
    if info.points.empty:
        return Card(title, read, reason="No trial has finished a rung with a finite LM loss yet.")
    panel = Panel("size_and_loss", size_and_loss.size_and_loss_plot(info), size_and_loss.size_and_loss_data(info))
    return Card(title, read, size_and_loss.size_and_loss_count(info), panels=(panel,))


def loss_curves_card(run: RunData) -> Card:
    title = "Loss against tokens"
    read = (
        "Above, what a trial trains on; below, what it is ranked by at each rung. "
        "Faint lines were stopped, strong ones promoted."
    )
    info = loss_curves.loss_curves_info(run)
    if info.steps.empty and info.rungs.empty:
        return Card(title, read, reason="No trial has logged a training step or finished a rung yet.")
    panel = Panel("loss_curves", loss_curves.loss_curves_plot(info), loss_curves.loss_curves_data(info))
    return Card(title, read, loss_curves.loss_curves_count(info), panels=(panel,))


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


def evidence_card(run: RunData) -> Card:
    title = "Evidence"
    read = (
        "Right of the line is worse than the winner on the same windows (better, of a margin); an interval that "
        "crosses it could be chance. The controls say what pruning by importance is worth: same shape, same tokens."
    )
    if not run.evidence:
        return Card(title, read, reason="No evidence.json: the search has not ended.")
    found, objective = run.evidence, run.evidence["objective"]
    table, beside, rungs = evidence.finalists(found), evidence.controls(found), evidence.rungs(found)
    panels = []
    if len(table) and table[f"{objective}_minus_best"].notna().any():
        panels.append(Panel("finalists", evidence.differences_plot(table, objective), table, "Finalists"))
    if len(beside) and beside["lm_loss_minus_candidate"].notna().any():
        panels.append(Panel("controls", evidence.controls_plot(beside), beside, "Controls"))
    data = (("rungs", rungs),) if len(rungs) else ()
    return Card(title, read, evidence.sample(run, table), evidence.body(found), tuple(panels), data)


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


def configuration_card(run: RunData) -> Card:
    title = "Configuration and environment"
    read = "What is needed to run this again: the resolved configuration, the versions and the machine."
    if not run.config and not run.environment:
        return Card(title, read, reason="This folder holds neither config.yaml nor environment.json.")
    parts = []
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        parts.append(f"<details open><summary>config.yaml</summary><pre>{_coloured(text)}</pre></details>")
    if run.environment:
        text = json.dumps(run.environment, indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>environment.json</summary><pre>{_coloured(text)}</pre></details>")
    return Card(title, read, body="".join(parts))


def _coloured(text: str) -> str:
    """Escape, then set the keys of YAML or indented JSON apart from their values."""
    key = re.compile(r"^(\s*(?:- )?)((?:&quot;)?[\w.\-/]+(?:&quot;)?)(:)", re.MULTILINE)
    return key.sub(r'\1<span class="key">\2</span>\3', html.escape(text))


def health_card(run: RunData) -> Card:
    info = health.health_info(run)
    return Card(
        "Health",
        "What failed and why, and how often each thing happened. A run still going has running candidates.",
        health.health_count(info),
        health.health_html(info),
    )


CARDS: list[Callable[[RunData], Card]] = [
    summary_card,
    size_and_loss_card,
    loss_curves_card,
    importance_card,
    depth_card,
    evidence_card,
    trials_card,
    spend_card,
    configuration_card,
    health_card,
]


def make_cards(run: RunData) -> list[Card]:
    """Every card; one that fails says so in its place, because a report with a hole beats no report."""
    cards = []
    for make in CARDS:
        try:
            cards.append(make(run))
        except Exception as error:
            name = make.__name__.removesuffix("_card").replace("_", " ").capitalize()
            cards.append(Card(name, "", reason=f"This card could not be made: {type(error).__name__}: {error}"))
    return cards
