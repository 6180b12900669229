"""The depth sweep: what removing each block of layers does, as 2408.11796 draws it (Figures 8 and 9)."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.run_data import RunData
from minitron_search.messages.escaping import in_html
from minitron_search.records.metrics import METRICS

SENTENCES = 6  # more of them are folded away, above the figures
OF_TEACHER = ("bi", "angular", "taylor")  # read from the whole teacher: nothing is removed
LENGTH_COLOURS = (palette.BLUE, palette.ORANGE, palette.GREEN, palette.PURPLE, palette.VERMILLION, palette.SKY)
# 2408.11796, "Depth Pruning Metrics": Llama 3.1 8B without 16 of its 32 layers, Winogrande accuracy.
PUBLISHED = (("16 layers one by one", 0.5, "diamond-open"), ("layers 16–31", 0.595, "diamond"))
PUBLISHED_START = 16
PUBLISHED_MODEL = "Llama 3.1 8B, another model (2408.11796)"


class DepthInfo(NamedTuple):
    """What the card shows. rows: the depth table with a hover label each. metrics: those measured, in the order of
    `METRICS`. words: the recommendation's sentences. at_chance: whether the teacher's Winogrande accuracy is at chance;
    None where it was not measured."""

    rows: pd.DataFrame
    metrics: tuple[str, ...]
    lengths: tuple[int, ...]
    words: tuple[str, ...]
    at_chance: bool | None


def depth_info(run: RunData) -> DepthInfo:
    rows = run.depth.assign(hover=[hover(row) for row in run.depth.to_dict("records")])
    return DepthInfo(
        rows=rows,
        metrics=tuple(metric for metric in METRICS if (rows["metric"] == metric).any()),
        lengths=tuple(sorted(int(length) for length in rows["length"].unique() if length)),
        words=tuple(map(str, run.recommendation.get("words", ()))),
        at_chance=run.recommendation.get("at_chance"),
    )


def hover(row: dict[str, object]) -> str:
    """Return which layers are removed, the value, its standard error and n."""
    layers = str(row["layers"]).split(",")
    gone = "the whole teacher" if row["kind"] == "teacher" else f"without layers {', '.join(layers)}"
    if row["kind"] == "contiguous":
        gone = f"without layer {layers[0]}" if len(layers) == 1 else f"without layers {layers[0]}–{layers[-1]}"
    chosen = " (chosen one by one)" if row["kind"] == "one_by_one" else ""
    known = METRICS.get(str(row["metric"]))
    name = known.name if known else str(row["metric"])
    value = f.plus_minus(float(row["value"]), float(row["stderr"]), 4)  # type: ignore[arg-type]
    return f.in_figure(f"{gone}{chosen}") + f"<br>{f.in_figure(name)} {value}, n = {f.integer(float(row['n']))}"  # type: ignore[arg-type]


def of(info: DepthInfo, metric: str, kind: str, length: int | None = None) -> pd.DataFrame:
    """Return the rows of one metric and kind, and of one length if given."""
    rows = info.rows[(info.rows["metric"] == metric) & (info.rows["kind"] == kind)]
    return rows if length is None else rows[rows["length"] == length].sort_values("start")


def position_plot(info: DepthInfo, metric: str) -> go.Figure:
    """Draw the metric against the first removed layer, a line a length; dashed: as many layers chosen one by one."""
    figure = palette.new_figure(360)
    for place, length in enumerate(info.lengths):
        colour = LENGTH_COLOURS[place % len(LENGTH_COLOURS)]
        rows = of(info, metric, "contiguous", length)
        if rows.empty:
            continue
        _band(figure, rows, colour, f"length {length}")
        figure.add_scatter(
            x=rows["start"], y=rows["value"], mode="lines+markers", name=f.plural(length, "layer"),
            line={"color": colour, "width": 2}, marker={"size": 5, "color": colour},
            legendgroup=f"length {length}", hovertext=rows["hover"], hoverinfo="text",
        )  # fmt: skip
        if length > 1:  # of one layer it is the lowest point of the line
            _level(figure, of(info, metric, "one_by_one", length), rows, colour, "dash", f"length {length}",
                   f"{f.plural(length, 'layer')}, one by one")  # fmt: skip
    whole = info.rows[(info.rows["metric"] == metric) & (info.rows["kind"] == "contiguous")]
    _level(figure, of(info, metric, "teacher"), whole, palette.INK, "dot", "teacher", "teacher")
    if metric == "winogrande_acc":
        _published(figure)
        figure.add_hline(y=0.5, line={"color": palette.MUTED, "width": 1})
    figure.update_xaxes(title_text="first removed layer (0 is the first)", showgrid=False, nticks=12)
    figure.update_yaxes(title_text=f.capitalised(METRICS[metric].title))
    return figure


def _band(figure: go.Figure, rows: pd.DataFrame, colour: str, group: str) -> None:
    """Draw one standard error to either side."""
    error = rows["stderr"].fillna(0)
    figure.add_scatter(
        x=[*rows["start"], *rows["start"][::-1]],
        y=[*(rows["value"] + error), *(rows["value"] - error)[::-1]],
        fill="toself", fillcolor=palette.faint(colour), line={"width": 0}, mode="lines",
        hoverinfo="skip", showlegend=False, legendgroup=group,
    )  # fmt: skip


def _level(
    figure: go.Figure, row: pd.DataFrame, across: pd.DataFrame, colour: str, dash: str, group: str, name: str
) -> None:
    """Draw a horizontal line over the positions of `across`."""
    if row.empty or across.empty:
        return
    value, label = row["value"].iloc[0], row["hover"].iloc[0]
    ends = np.unique([across["start"].min(), across["start"].max()])
    figure.add_scatter(
        x=np.linspace(ends[0], ends[-1], 9), y=np.full(9, value), mode="lines", name=name,
        line={"color": colour, "width": 1.6, "dash": dash}, legendgroup=group, hovertext=[label] * 9, hoverinfo="text",
    )  # fmt: skip


def _published(figure: go.Figure) -> None:
    """Mark the two numbers that the paper's text states, at their block, so that nobody takes them for ours."""
    for what, value, symbol in PUBLISHED:
        figure.add_scatter(
            x=[PUBLISHED_START], y=[value], mode="markers", name=f"{what}: {PUBLISHED_MODEL}",
            hovertext=[f"{PUBLISHED_MODEL}<br>without {what}: {value:g}"], hoverinfo="text",
            marker={"symbol": symbol, "size": 11, "color": palette.MUTED},
        )  # fmt: skip


def heat_map_plot(info: DepthInfo, metric: str) -> go.Figure:
    """Draw where a block starts against its length. LM loss is coloured by the logarithm of its increase: one lost
    first layer must not bleach the map."""
    rows = of(info, metric, "contiguous")
    teacher = of(info, metric, "teacher")
    shown = rows["value"].astype(float)
    scale: dict[str, object] = {"thickness": 8, "outlinewidth": 0, "tickfont": {"size": 11, "color": palette.MUTED}}
    if metric == "lm_loss" and len(teacher):
        increase = (shown - float(teacher["value"].iloc[0])).clip(lower=1e-3)
        shown = np.log10(increase)
        ticks = f.log_ticks(float(increase.min()), float(increase.max()))
        scale |= {"tickvals": np.log10(ticks), "ticktext": [f"+{tick:g}" for tick in ticks]}
    figure = palette.new_figure(60 + 44 * max(3, len(info.lengths)))
    figure.add_heatmap(
        x=rows["start"], y=rows["length"].astype(int).astype(str), z=shown, colorscale=palette.colour_scale(),
        colorbar=scale, hovertext=rows["hover"], hoverinfo="text", xgap=1, ygap=1,
    )  # fmt: skip
    figure.update_xaxes(title_text="first removed layer", showgrid=False, nticks=12)
    figure.update_yaxes(
        title_text="removed layers", type="category", showgrid=False,
        categoryorder="array", categoryarray=[str(length) for length in info.lengths],
    )  # fmt: skip
    return figure


def depth_html(info: DepthInfo) -> str:
    """Return the recommendation in words; the warning about chance first, as the run wrote it."""
    items = "".join(f"<li>{in_html(line)}</li>" for line in info.words)
    if len(info.words) > SENTENCES:
        return f"<details><summary>What to drop, in {len(info.words)} sentences</summary><ul>{items}</ul></details>"
    return f"<ul>{items}</ul>" if items else ""


def depth_count(info: DepthInfo) -> str:
    counts = []
    for metric in info.metrics:
        n = info.rows.loc[info.rows["metric"] == metric, "n"].max()
        unit = f"{METRICS[metric].independent}s"
        counts.append(f"{METRICS[metric].name} {f.integer(n)} {unit}")
    return (
        f"n: {', '.join(counts)}. Bands are ± one standard error. Blocks share their windows, so their differences are "
        "more certain than that: see the paired tests above."
    )


def depth_card(run: RunData) -> Card:
    title = "Depth"
    read = (
        "Each line is the model without a block of that many layers, by where the block starts. Dashed: as many layers "
        "chosen one by one, each by how little its own removal raises the LM loss. (Figures 8 and 9 of "
        "2408.11796 number a block by its last layer, from 1.)"
    )
    info = depth_info(run)
    if info.rows.empty:
        return Card(title, read, reason="No depth.parquet: the stage has not run, or has not finished.")
    panels = [
        Panel(
            f"depth_{metric}",
            position_plot(info, metric),
            info.rows[info.rows["metric"] == metric].drop(columns="hover"),
            f.capitalised(METRICS[metric].name),
        )
        for metric in info.metrics
    ]
    panels += [
        Panel(
            f"depth_map_{metric}",
            heat_map_plot(info, metric),
            of(info, metric, "contiguous").drop(columns="hover"),
            f"{f.capitalised(METRICS[metric].name)}, start × length",
        )
        for metric in info.metrics
        if metric not in OF_TEACHER
    ]
    return Card(title, read, depth_count(info), depth_html(info), tuple(panels))
