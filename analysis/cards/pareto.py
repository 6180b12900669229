"""What a candidate costs against its validation LM loss; Pareto fronts at the highest rung that several share."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.run_data import CONTROLS, RunData, candidates, common_rung, last_rungs

FAR = {
    "untrained": "untrained trim",
    "random_pruned": "random pruning",
    "random_init": "random weights",
    "random_pruned_retrained": "random pruning, retrained",
    "random_init_retrained": "random weights, retrained",
}


STOPPED = ("circle-open", "diamond-open", "square-open", "triangle-up-open")  # by rung: tokens are told by the shape
MOST = 0.75  # of the candidates are inside the axis whatever they are


class Axis(NamedTuple):
    """A column of the trials table as a cost: how it is named and shown, and whether more of it is better."""

    column: str
    name: str
    title: str
    unit: float
    more_is_better: bool = False


AXES = (
    Axis("params", "Parameters", "parameters (millions)", 1e6),
    Axis("non_embedding_params", "Without embedding", "non-embedding parameters (millions)", 1e6),
    Axis("memory_bytes", "Memory", "memory of the weights (MiB)", 2**20),
    Axis("tokens_per_second", "Speed", "speed (tokens per second)", 1.0, True),
)


class ParetoInfo(NamedTuple):
    """What the card shows. points: the last scored rung of every trial, rows of the trials table with a hover label.
    level: the candidates' rows of `rung`, at equal tokens, which fronts are made of. diverged: how many trials have no
    finite LM loss at their last rung."""

    points: pd.DataFrame
    level: pd.DataFrame
    rung: float | None
    diverged: int


def pareto_info(run: RunData) -> ParetoInfo:
    last = last_rungs(run.trials)
    scored = last[np.isfinite(last["lm_loss"]) & np.isfinite(last["params"])]
    points = scored.assign(hover=[f.hover(row) for row in scored.to_dict("records")])
    rung = common_rung(run.trials)
    level = candidates(run.trials)
    level = level[(level["rung"] == rung) & np.isfinite(level["lm_loss"])] if rung is not None else level.iloc[:0]
    diverged = last[(last["status"] != "failed") & ~np.isfinite(last["lm_loss"])]
    return ParetoInfo(points, level, rung, len(diverged))


def pareto_front(rows: pd.DataFrame, axis: Axis = AXES[0]) -> pd.DataFrame:
    """Return the rows that no other row equals or beats in both `axis` and `lm_loss`, cheapest first."""
    rows = rows[np.isfinite(rows[axis.column])].sort_values(
        [axis.column, "lm_loss"], ascending=[not axis.more_is_better, True]
    )
    return rows[rows["lm_loss"] < rows["lm_loss"].cummin().shift(fill_value=np.inf)]


def measured_axes(info: ParetoInfo) -> list[Axis]:
    """Return the axes on which a candidate has a number."""
    searched = candidates(info.points)
    return [axis for axis in AXES if np.isfinite((searched if len(searched) else info.points)[axis.column]).any()]


def pareto_plot(info: ParetoInfo, axis: Axis = AXES[0]) -> go.Figure:
    first = axis == AXES[0]
    figure = palette.new_figure(480 if first else 340, showlegend=first)  # the small ones share its legend
    front = pareto_front(info.level, axis)
    info = info._replace(points=info.points[np.isfinite(info.points[axis.column])])
    if len(front) > 1:
        figure.add_scatter(
            x=front[axis.column] / axis.unit,
            y=front["lm_loss"],
            mode="lines+markers",
            marker={"size": 4},
            line={"color": palette.BLUE, "width": 2, "shape": "hv"},
            opacity=0.8,
            hoverinfo="skip",
            name=f"Pareto front at {f.tokens(front['tokens'].max())} tokens",
        )
    searched = candidates(info.points)
    # What stopped early is drawn first and lies beneath what went further.
    for rung, status in sorted(
        set(zip(searched["rung"], searched["status"], strict=True)),
        key=lambda pair: (pair[1] == "promoted", pair[0], pair[1]),
    ):
        rows = searched[(searched["rung"] == rung) & (searched["status"] == status)]
        colour, symbol = palette.STATUS.get(status, palette.STATUS["running"])
        if status == "stopped":
            symbol = STOPPED[int(rung) % len(STOPPED)]
        _add_points(
            figure,
            axis,
            rows,
            f"{status} at {f.tokens(rows['tokens'].max())} tokens",
            colour,
            symbol,
            13 if status == "promoted" else 9,
        )
    named = {
        "untrained": (FAR["untrained"], palette.UNTRAINED, 10),
        "random_pruned": (FAR["random_pruned"], palette.RANDOM_PRUNED, 10),
        "random_init": (FAR["random_init"], palette.RANDOM_INIT, 10),
        "random_pruned_retrained": (FAR["random_pruned_retrained"], palette.RANDOM_PRUNED, 13),
        "random_init_retrained": (FAR["random_init_retrained"], palette.RANDOM_INIT, 13),
        "retrained": ("retrained", palette.RETRAINED, 13),
        "teacher": ("teacher", palette.TEACHER, 16),
    }
    for arm, (name, (colour, symbol), size) in named.items():
        rows = info.points[info.points["arm"] == arm]
        if len(rows):
            _add_points(figure, axis, rows, name, colour, symbol, size)
    figure.update_xaxes(title_text=axis.title)
    figure.update_yaxes(title_text="validation LM loss (nats per token)")
    _keep_in_focus(figure, axis, info.points)
    return figure


def _add_points(
    figure: go.Figure, axis: Axis, rows: pd.DataFrame, name: str, colour: str, symbol: str, size: int
) -> None:
    figure.add_scatter(
        x=rows[axis.column] / axis.unit,
        y=rows["lm_loss"],
        error_y={"array": rows["lm_loss_stderr"], "thickness": 1, "width": 0, "color": colour},
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 1.5, "color": colour}},
        hovertext=rows["hover"],
        hoverinfo="text",
        name=f.in_figure(name),
    )


def _keep_in_focus(figure: go.Figure, axis: Axis, points: pd.DataFrame) -> None:
    """Fit the axes to most candidates: what lies far off (an untrained trim by nats, the teacher by its size) is named
    at the edge it lies beyond, and a double click shows all."""
    near = points[~points["arm"].isin([*FAR, "teacher"])]
    if near.empty:
        return
    x, y = near[axis.column] / axis.unit, near["lm_loss"]
    teacher = points[points["arm"] == "teacher"]
    low = min([y.min(), *teacher["lm_loss"]])
    high = max([y.quantile(MOST), *y[near["status"].isin(["promoted", "complete"])]])
    span = max(high - low, 0.1)
    high = y.max() if y.max() <= high + 0.5 * span else high
    far = points[points["arm"].isin(list(FAR)) & (points["lm_loss"] > high + 0.5 * span)]
    above = int((y > high).sum())
    if len(far) or above:
        figure.update_yaxes(range=[low - 0.16 * span, high + 0.24 * span])
    note = [(x.mean(), f"{f.plural(above, 'candidate')} above, up to {f.fixed(y.max(), 2)} ↑", "")] if above else []
    note += [
        (row[axis.column] / axis.unit, f"{FAR[row['arm']]} at {f.fixed(row['lm_loss'], 2)} ↑", row["hover"])
        for row in far.to_dict("records")
    ]
    for line, (at, text, hover) in enumerate(note):  # those of one shape are above each other
        figure.add_annotation(
            x=at, y=1, yref="y domain", yanchor="top", yshift=-16 * line, showarrow=False, text=text,
            bgcolor=palette.SURFACE, font={"color": palette.INK, "size": 12}, **({"hovertext": hover} if hover else {}),
        )  # fmt: skip
    wide = max(x.max() - x.min(), 0.02 * x.max())
    for row in teacher.to_dict("records"):
        at = row[axis.column] / axis.unit
        if x.min() - wide < at < x.max() + wide:
            continue
        right = at > x.max()
        figure.update_xaxes(range=[x.min() - 0.12 * wide, x.max() + 0.12 * wide])
        figure.add_shape(
            type="line", xref="x domain", x0=0, x1=1, y0=row["lm_loss"], y1=row["lm_loss"],
            line={"color": palette.INK, "width": 1, "dash": "dot"},
        )  # fmt: skip
        named = f"teacher {f.fixed(row['lm_loss'], 3)} at {at:,.1f}"
        figure.add_annotation(
            xref="x domain", x=float(right), xanchor="right" if right else "left", y=row["lm_loss"], yanchor="top",
            showarrow=False, text=f"{named} →" if right else f"← {named}", hovertext=row["hover"],
            font={"color": palette.INK, "size": 12},
        )  # fmt: skip


def pareto_count(info: ParetoInfo) -> str:
    windows = info.points["lm_loss_n"].max()
    text = (
        f"n = {f.plural(candidates(info.points)['trial'].nunique(), 'candidate')}, each scored on the same "
        f"{f.integer(windows)} validation windows, so differences are known better than the bars (± one "
        "standard error) suggest. Speed is of one forward pass on a trial’s own threads, timed while other trials ran."
    )
    if info.diverged:
        text += f" Not drawn: {f.plural(info.diverged, 'trial')} without a finite LM loss."
    return text


def pareto_data(info: ParetoInfo, axis: Axis = AXES[0]) -> pd.DataFrame:
    """Return a row per point, and one per row of the front that its trial has since left behind."""
    front = pareto_front(info.level, axis)
    on_front = set(zip(front["trial"], front["rung"], strict=True))
    last = set(zip(info.points["trial"], info.points["rung"], strict=True))
    passed = front[[pair not in last for pair in zip(front["trial"], front["rung"], strict=True)]]
    columns = ["trial", "architecture", "arm", "status", "rung", "tokens", axis.column, "lm_loss", "lm_loss_stderr"]
    rows = pd.concat([info.points, passed], ignore_index=True)[columns]
    return rows.assign(
        on_front=[pair in on_front for pair in zip(rows["trial"], rows["rung"], strict=True)],
        control=rows["arm"].isin(CONTROLS),
    )


def pareto_card(run: RunData) -> Card:
    title = "Pareto fronts"
    read = (
        "Lower is better, and so is further left (for speed, further right). Compare points of one colour and shape: "
        "they saw equal tokens. The line is the front: at its tokens, no candidate is both cheaper and better than a "
        "point on it."
    )
    info = pareto_info(run)
    if info.points.empty:
        return Card(title, read, reason="No trial has finished a rung with a finite LM loss yet.")
    panels = tuple(
        Panel(
            f"pareto_{axis.column}",
            pareto_plot(info, axis),
            pareto_data(info, axis),
            axis.name,
            columns=6 if axis == AXES[0] else 2,
        )
        for axis in measured_axes(info)
    )
    return Card(title, read, pareto_count(info), panels=panels)
