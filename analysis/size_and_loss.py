"""Parameters against validation LM loss, and the Pareto front of the highest rung that candidates share."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import formatting as f
from analysis import palette
from analysis.run_data import CONTROLS, RunData, candidates, common_rung, last_rungs

FAR = {"untrained": "untrained trim", "random_pruned": "random pruning", "random_init": "random weights"}


class SizeAndLossInfo(NamedTuple):
    """points: last scored rung of every trial: rows of the trials table, and its hover label
    front:      rows of `front_rung` that no row of the same rung beats in both size and loss, smallest first
    diverged:   trials whose last rung has no finite LM loss
    """

    points: pd.DataFrame
    front: pd.DataFrame
    front_rung: float | None
    diverged: int


def size_and_loss_info(run: RunData) -> SizeAndLossInfo:
    last = last_rungs(run.trials)
    scored = last[np.isfinite(last["lm_loss"]) & np.isfinite(last["params"])]
    points = scored.assign(hover=[f.hover(row) for row in scored.to_dict("records")])
    rung = common_rung(run.trials)
    level = candidates(run.trials)
    level = level[(level["rung"] == rung) & np.isfinite(level["lm_loss"])] if rung is not None else level.iloc[:0]
    diverged = last[(last["status"] != "failed") & ~np.isfinite(last["lm_loss"])]
    return SizeAndLossInfo(points, pareto_front(level), rung, len(diverged))


def pareto_front(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that no other row equals or beats in both `params` and `lm_loss`, smallest first."""
    rows = rows.sort_values(["params", "lm_loss"])
    return rows[rows["lm_loss"] < rows["lm_loss"].cummin().shift(fill_value=np.inf)]


def size_and_loss_plot(info: SizeAndLossInfo) -> go.Figure:
    figure = palette.new_figure(480)
    front = info.front
    if len(front) > 1:
        figure.add_scatter(
            x=front["params"] / 1e6,
            y=front["lm_loss"],
            mode="lines+markers",
            marker={"size": 4},
            line={"color": palette.BLUE, "width": 1.5, "shape": "hv"},
            opacity=0.55,
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
        _add_points(
            figure,
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
        "retrained": ("retrained", palette.RETRAINED, 13),
        "teacher": ("teacher", palette.TEACHER, 16),
    }
    for arm, (name, (colour, symbol), size) in named.items():
        rows = info.points[info.points["arm"] == arm]
        if len(rows):
            _add_points(figure, rows, name, colour, symbol, size)
    figure.update_xaxes(title_text="parameters (millions)")
    figure.update_yaxes(title_text="validation LM loss (nats per token)")
    _keep_in_focus(figure, info.points)
    return figure


def _add_points(figure: go.Figure, rows: pd.DataFrame, name: str, colour: str, symbol: str, size: int) -> None:
    figure.add_scatter(
        x=rows["params"] / 1e6,
        y=rows["lm_loss"],
        error_y={"array": rows["lm_loss_stderr"], "thickness": 1, "width": 0, "color": colour},
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 1.5, "color": colour}},
        hovertext=rows["hover"],
        hoverinfo="text",
        name=f.in_figure(name),
    )


def _keep_in_focus(figure: go.Figure, points: pd.DataFrame) -> None:
    """An untrained trim or a random student can be several nats off: say where it lies, and keep the scale for the
    others."""
    others = points[~points["arm"].isin(list(FAR))]
    far = points[points["arm"].isin(list(FAR))]
    if others.empty or far.empty:
        return
    stderr = others["lm_loss_stderr"].fillna(0)
    low, high = (others["lm_loss"] - stderr).min(), (others["lm_loss"] + stderr).max()
    span = max(high - low, 0.1)
    off = far[far["lm_loss"] > high + 0.5 * span]
    if off.empty:
        return
    figure.update_yaxes(range=[low - 0.08 * span, high + 0.16 * span])
    for line, row in enumerate(off.to_dict("records")):  # those of one shape are above each other
        figure.add_annotation(
            x=row["params"] / 1e6,
            y=1,
            yref="y domain",
            yanchor="top",
            yshift=-14 * line,
            showarrow=False,
            text=f"{FAR[row['arm']]} at {f.fixed(row['lm_loss'], 2)} ↑",
            font={"color": palette.INK, "size": 12},
            hovertext=row["hover"],
        )


def size_and_loss_count(info: SizeAndLossInfo) -> str:
    windows = info.points["lm_loss_n"].max()
    text = (
        f"n = {f.plural(candidates(info.points)['trial'].nunique(), 'candidate')}, each scored on the same "
        f"{f.integer(windows)} validation windows, so differences are known better than the bars (± one "
        "standard error) suggest."
    )
    if info.diverged:
        text += f" Not drawn: {f.plural(info.diverged, 'trial')} without a finite LM loss."
    return text


def size_and_loss_data(info: SizeAndLossInfo) -> pd.DataFrame:
    on_front = set(zip(info.front["trial"], info.front["rung"], strict=True))
    return info.points.drop(columns="hover").assign(
        on_front=[pair in on_front for pair in zip(info.points["trial"], info.points["rung"], strict=True)],
        control=info.points["arm"].isin(CONTROLS),
    )
