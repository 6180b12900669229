"""The student's shape inside its teacher's, drawn to scale: which layers it keeps, and how wide they are."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from analysis.outcome.summary import COLOURS, columns_of
from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.run_data import RunData

WIDTHS = ("hidden_size", "num_attention_heads", "intermediate_size")
LAYER_PX, LEAST_PX, MOST_PX = 11, 240, 620  # of the figure's height


class ShapeInfo(NamedTuple):
    """What the card shows. teacher, student: rows of the trials table. title: what the student is called. kept: the
    teacher's layers that it keeps, in order."""

    teacher: pd.Series
    student: pd.Series
    title: str
    colour: str
    kept: tuple[int, ...]


def shape_info(run: RunData) -> ShapeInfo | None:
    """Return the teacher's shape and that of the student furthest on; None before there are both."""
    columns, _ = columns_of(run)
    (_, teacher), _, *students = columns.items()
    there = [
        (title, row, colour) for (title, row), colour in zip(students, COLOURS[2:], strict=True) if row is not None
    ]
    if teacher is None or not there:
        return None
    title, student, colour = there[-1]
    kept = run.made.get(str(student["trial"]), {}).get("layers")
    if kept is None:
        kept = contiguous(student, int(teacher["num_hidden_layers"]))
    return ShapeInfo(teacher, student, title, colour, tuple(map(int, kept)))


def contiguous(student: pd.Series, layers: int) -> Sequence[int]:
    """Return the layers that a student keeps by the block that its row says is dropped."""
    start, length = student["drop_block_start"], student["drop_block_length"]
    if f.missing(start) or f.missing(length):
        return range(int(student["num_hidden_layers"]))
    return [layer for layer in range(layers) if not start <= layer < start + length]


def shape_plot(info: ShapeInfo) -> go.Figure:
    """Draw a bar for every layer of the teacher and, over it, one for every layer that the student keeps; a panel a
    width."""
    layers = int(info.teacher["num_hidden_layers"])
    height = min(MOST_PX, max(LEAST_PX, 90 + LAYER_PX * layers))
    figure = palette.new_figure(height, barmode="overlay", bargap=0.25)
    figure.set_subplots(cols=len(WIDTHS), shared_yaxes=True, horizontal_spacing=0.03)
    for column, width in enumerate(WIDTHS, 1):
        whole, left = float(info.teacher[width]), float(info.student[width])
        for name, colour, rows, value in (
            ("teacher", palette.faint(palette.MUTED), range(layers), whole),
            (info.title.lower(), info.colour, info.kept, left),
        ):
            figure.add_bar(
                x=[value] * len(rows), y=list(rows), orientation="h", row=1, col=column, name=name, legendgroup=name,
                showlegend=column == 1, marker={"color": colour, "line": {"width": 0}}, hoverinfo="text",
                hovertext=[f"layer {layer}, {name}<br>{width} {f.integer(value)}" for layer in rows],
            )  # fmt: skip
        figure.update_xaxes(title_text=width, range=[0, whole * 1.02], nticks=5, row=1, col=column)
    figure.update_yaxes(showgrid=False, range=[-0.6, layers - 0.4], nticks=8)
    figure.update_yaxes(title_text="layer of the teacher (0 is the first)", row=1, col=1)
    return figure


def in_words(info: ShapeInfo) -> str:
    """Return the shape as a sentence."""
    layers = int(info.teacher["num_hidden_layers"])
    gone = [layer for layer in range(layers) if layer not in set(info.kept)]
    without = f" (without {spans(gone)})" if gone else ""
    widths = "; ".join(f"{width} {f.integer(info.student[width])} of {f.integer(info.teacher[width])}"
                       for width in (*WIDTHS, "num_key_value_heads"))  # fmt: skip
    return f"{len(info.kept)} of {layers} layers{without}; {widths}."


def spans(layers: Sequence[int]) -> str:
    """Return layers in short: 3, 7–9."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def shape_data(info: ShapeInfo) -> pd.DataFrame:
    """Return a row a layer of the teacher: its widths, and those of the student's layer, NaN where it has none."""
    layers = range(int(info.teacher["num_hidden_layers"]))
    table: dict[str, Sequence[float]] = {"layer": layers}
    for width in WIDTHS:
        table[f"teacher_{width}"] = [float(info.teacher[width])] * len(layers)
        left = float(info.student[width])
        table[f"student_{width}"] = [left if layer in set(info.kept) else float("nan") for layer in layers]
    return pd.DataFrame(table)


def shape_card(run: RunData) -> Card:
    title = "Shape"
    read = "Grey: the teacher. Coloured: what the student keeps, to the same scale. A grey row is a layer that is gone."
    info = shape_info(run)
    if info is None:
        return Card(title, read, reason="There is no student yet.")
    panel = Panel("shape", shape_plot(info), shape_data(info), columns=6)
    return Card(title, read, in_words(info), panels=(panel,))
