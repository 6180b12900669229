"""Importance of layers (BI), hidden channels, MLP neurons and heads, as the teacher showed it."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.run_data import RunData, best_candidate

COLUMNS = 192  # of a heat map, and points of the hidden curve: more than a screen tells apart


class ImportanceInfo(NamedTuple):
    """What the card shows. Every axis is sorted from most to least important; a figure's column is the mean of
    neighbours.

    bi: (layers,) block importance of each single layer. hidden: (<= COLUMNS,). mlp: (layers, <= COLUMNS). heads:
    (layers, num_attention_heads). sizes: the teacher's full axes; kept: the best candidate's, {} before there is one.
    """

    bi: np.ndarray
    hidden: np.ndarray
    mlp: np.ndarray
    heads: np.ndarray
    sizes: dict[str, int]
    kept: dict[str, int]
    dropped: tuple[int, ...]  # layers that the best candidate goes without
    metadata: dict[str, str]


def importance_info(run: RunData) -> ImportanceInfo | None:
    if run.importance is None:
        return None
    arrays = run.importance
    best = best_candidate(run.trials)
    sizes = {
        "hidden_size": arrays.hidden.size,
        "intermediate_size": arrays.mlp.shape[1],
        "num_attention_heads": arrays.heads.shape[1],
    }
    kept: dict[str, int] = {}
    dropped: tuple[int, ...] = ()
    if best is not None:
        kept = {axis: int(best[0][axis]) for axis in sizes if not f.missing(best[0][axis])}
        start, length = best[0]["drop_block_start"], best[0]["drop_block_length"]
        if not f.missing(start) and not f.missing(length):
            dropped = tuple(range(int(start), int(start + length)))
    return ImportanceInfo(
        bi=np.diagonal(arrays.block_bi, 1),
        hidden=shrink(descending(arrays.hidden)[None], COLUMNS)[0],
        mlp=shrink(descending(arrays.mlp), COLUMNS),
        heads=shrink(descending(arrays.heads), COLUMNS),
        sizes=sizes,
        kept=kept,
        dropped=dropped,
        metadata=arrays.metadata,
    )


def descending(values: np.ndarray) -> np.ndarray:
    return -np.sort(-values.astype(np.float64), axis=-1)


def shrink(rows: np.ndarray, columns: int) -> np.ndarray:
    """Average equal neighbourhoods, the last of which may be shorter: (n, size) -> (n, <= columns)."""
    width = -(-rows.shape[1] // columns)
    return np.stack([rows[:, at : at + width].mean(axis=1) for at in range(0, rows.shape[1], width)], axis=1)


def places(columns: int, size: int) -> np.ndarray:
    """Return the centre of each column, as a count of channels out of `size`."""
    width = -(-size // columns)
    starts = np.arange(columns) * width
    return (starts + np.minimum(starts + width, size)) / 2


def bi_plot(info: ImportanceInfo) -> go.Figure:
    figure = palette.new_figure(280)
    layers = np.arange(info.bi.size)
    gone = np.isin(layers, info.dropped)
    for mask, colour, name in (
        (~gone, palette.BLUE, "kept"),
        (gone, palette.ORANGE, "dropped by the best candidate"),
    ):
        if mask.any():
            figure.add_bar(
                x=layers[mask],
                y=info.bi[mask],
                name=name,
                marker={"color": colour, "line": {"width": 0}},
                hovertemplate="layer %{x}<br>BI %{y:.4f}<extra></extra>",
                showlegend=bool(gone.any()),
            )
    figure.update_layout(bargap=0.25, barmode="overlay")
    figure.update_xaxes(title_text="layer", showgrid=False, nticks=12)
    figure.update_yaxes(title_text="block importance", rangemode="tozero")
    return figure


def hidden_plot(info: ImportanceInfo) -> go.Figure:
    figure = palette.new_figure(280)
    size = info.sizes["hidden_size"]
    figure.add_scatter(
        x=places(info.hidden.size, size),
        y=info.hidden,
        mode="lines",
        line={"color": palette.BLUE, "width": 2.2},
        hovertemplate="channel %{x:.0f} in order<br>importance %{y:.4g}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text="hidden channels, most important first", range=[0, size], showgrid=False)
    vals = f.log_ticks(max(info.hidden.min(), 1e-9), max(info.hidden.max(), 1e-9))
    ticks = {"tickvals": vals, "ticktext": [f"{tick:g}" for tick in vals]}
    figure.update_yaxes(title_text="importance (logarithmic)", type="log", **ticks)
    _mark_kept(figure, info, "hidden_size", palette.ORANGE)
    return figure


def heat_map_plot(info: ImportanceInfo, axis: str) -> go.Figure:
    """Draw the log10 of importance over its layer's mean. axis: intermediate_size or num_attention_heads."""
    values = info.mlp if axis == "intermediate_size" else info.heads
    what = "MLP neurons" if axis == "intermediate_size" else "attention heads"
    size = info.sizes[axis]
    x = places(values.shape[1], size) if values.shape[1] < size else np.arange(size) + 0.5
    ratio = relative(values)
    shown = np.log10(np.maximum(ratio, ratio[ratio > 0].min(initial=1.0)))
    reach = float(np.quantile(np.abs(shown), 0.99)) or 1.0  # one dead neuron must not bleach the map
    figure = palette.new_figure(340)
    figure.add_heatmap(
        x=x,
        y=np.arange(values.shape[0]),
        z=shown.round(4),
        customdata=ratio.round(4),
        zmin=-reach,
        zmax=reach,
        colorscale=palette.colour_scale(),
        ygap=0.6,
        xgap=0.6 if values.shape[1] == size else 0,
        colorbar={
            "thickness": 8,
            "len": 1,
            "outlinewidth": 0,
            "tickfont": {"size": 11, "color": palette.MUTED},
            **ratio_ticks(reach),
        },
        hovertemplate="layer %{y}, place %{x:.0f}<br>%{customdata:.3g} × the layer's mean<extra></extra>",
    )
    figure.update_xaxes(title_text=f"{what}, most important first", range=[0, size], showgrid=False)
    figure.update_yaxes(title_text="layer", showgrid=False, nticks=8)
    _mark_kept(figure, info, axis, palette.ORANGE)
    return figure


def relative(values: np.ndarray) -> np.ndarray:
    """Return each layer's importances over their mean; a layer without any importance is 1 throughout."""
    mean = values.mean(axis=1, keepdims=True)
    return np.divide(values, mean, out=np.ones_like(values), where=mean > 0)


def ratio_ticks(reach: float) -> dict[str, list[float] | list[str]]:
    """Return the ticks of a colour bar over log10 ratios -reach..reach, named by the ratio."""
    ratios = [
        ratio
        for ratio in (0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0, 100.0, 1000.0)
        if abs(np.log10(ratio)) <= reach
    ]
    return {
        "tickvals": [float(np.log10(ratio)) for ratio in ratios],
        "ticktext": [f"{ratio:g}×" for ratio in ratios],
    }


def _mark_kept(figure: go.Figure, info: ImportanceInfo, axis: str, colour: str) -> None:
    kept = info.kept.get(axis, info.sizes[axis])
    if kept >= info.sizes[axis]:
        return
    figure.add_shape(
        type="line",
        x0=kept,
        x1=kept,
        yref="y domain",
        y0=0,
        y1=1,
        line={"color": colour, "width": 2, "dash": "dash"},
    )
    figure.add_annotation(
        x=kept,
        yref="y domain",
        y=1,
        yanchor="bottom",
        showarrow=False,
        text=f"kept: {kept}",
        font={"color": palette.INK, "size": 12},
    )
    figure.update_layout(margin={"t": 26})


def importance_count(info: ImportanceInfo) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in sorted(info.metadata.items()))
    return (
        f"n = {info.bi.size} layers, {info.sizes['hidden_size']} hidden channels, "
        f"{info.sizes['intermediate_size']} neurons and {info.sizes['num_attention_heads']} heads a layer"
        f"{f' ({settings})' if settings else ''}. BI is 1 − cosine, no unit; importance is in activations’ units."
    )


def heat_map_data(values: np.ndarray, size: int) -> pd.DataFrame:
    """Return a row per layer and column of a heat map; its place is among `size`, its importance a mean."""
    layers, columns = values.shape
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), columns),
            "place": np.tile(places(columns, size), layers),
            "importance": values.ravel(),
        }
    )


def importance_card(run: RunData) -> Card:
    title = "Importance"
    read = (
        "A low bar is a layer that changes the residual stream little. Each row of a map is one layer, its neurons or "
        "heads sorted by importance: a row that fades early has width to lose."
    )
    info = importance_info(run)
    if info is None:
        return Card(title, read, reason="No readable importance.safetensors: the stage has not finished.")
    layers = pd.DataFrame({"layer": range(info.bi.size), "bi": info.bi})
    hidden = heat_map_data(info.hidden[None], info.sizes["hidden_size"]).drop(columns="layer")
    return Card(
        title,
        read,
        importance_count(info),
        panels=(
            Panel("layer_importance", bi_plot(info), layers, "Layers"),
            Panel("hidden_importance", hidden_plot(info), hidden, "Hidden channels"),
            *(
                Panel(
                    name,
                    heat_map_plot(info, axis),
                    heat_map_data(values, info.sizes[axis]),
                    f"{what}, relative to the layer’s mean",
                )
                for name, axis, values, what in (
                    ("mlp_importance", "intermediate_size", info.mlp, "MLP neurons"),
                    ("head_importance", "num_attention_heads", info.heads, "Attention heads"),
                )
            ),
        ),
    )
