"""How the search went on: the best LM loss so far at each rung, in the order in which rungs ended."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.page import formatting as f
from analysis.page import palette
from analysis.run_data import RunData, candidates

MOST = 0.75  # of the finished rungs are inside the axis whatever they are


class ConvergenceInfo(NamedTuple):
    """rows: one per finished rung of a candidate, in the order they ended: of the trials table, and

    place: 1, 2, ...      spent: tokens that all candidates had trained on by then      minutes: since the first event
    best:  the lowest LM loss at this rung so far, nats per token      hover: its label
    promoted: trials that the search promoted
    """

    rows: pd.DataFrame
    promoted: tuple[str, ...]


def convergence_info(run: RunData) -> ConvergenceInfo:
    rows = candidates(run.trials)
    rows = rows[np.isfinite(rows["lm_loss"])]
    ended = {
        (event.get("trial"), event.get("rung")): (place, float(event["time"]))
        for place, event in enumerate(run.events)
        if event["event"] == "rung_finished"
    }
    order = [
        ended.get((trial, rung), (len(run.events), float("nan")))
        for trial, rung in zip(rows["trial"], rows["rung"], strict=True)
    ]
    began = min((float(event["time"]) for event in run.events), default=float("nan"))
    rows = rows.assign(ended=[place for place, _ in order], minutes=[(time - began) / 60 for _, time in order])
    # What the log does not say comes last, as it was proposed: a rung before the one after it.
    rows = rows.sort_values(["ended", "rung", "proposal"], ignore_index=True)
    trained = rows["tokens"] - rows.groupby("trial")["tokens"].shift(fill_value=0)
    return ConvergenceInfo(
        rows.assign(
            place=np.arange(1, len(rows) + 1),
            spent=trained.cumsum(),
            best=rows.groupby("rung")["lm_loss"].cummin(),
            hover=[f.hover(row) for row in rows.to_dict("records")],
        ),
        tuple(rows.loc[rows["status"] == "promoted", "trial"].unique()),
    )


def convergence_plot(info: ConvergenceInfo) -> go.Figure:
    figure = palette.new_figure(360)
    last = len(info.rows)
    for place, (rung, rows) in enumerate(info.rows.groupby("rung")):
        colour, _ = palette.series(place)
        name = f"rung {rung:.0f}, {f.tokens(rows['tokens'].max())} tokens"
        about = [
            f"{hover}<br>after {f.tokens(spent)} tokens of all candidates, {f.duration(60 * minutes)}"
            for hover, spent, minutes in zip(rows["hover"], rows["spent"], rows["minutes"], strict=True)
        ]
        figure.add_scatter(
            x=rows["place"], y=rows["lm_loss"], mode="markers", name=name, legendgroup=name, showlegend=False,
            marker={"color": colour, "size": 6, "symbol": "circle-open"}, hovertext=about, hoverinfo="text",
        )  # fmt: skip
        figure.add_scatter(
            x=[*rows["place"], last], y=[*rows["best"], rows["best"].iloc[-1]], mode="lines",
            name=f"best so far at {name}", legendgroup=name, hoverinfo="skip",
            line={"color": colour, "width": 2.4, "shape": "hv"},
        )  # fmt: skip
    chosen = info.rows[info.rows["trial"].isin(info.promoted)]
    if len(chosen):
        figure.add_scatter(
            x=chosen["place"], y=chosen["lm_loss"], mode="markers", name="promoted", hovertext=chosen["hover"],
            hoverinfo="text", marker={"color": palette.ORANGE, "symbol": "square", "size": 11,
                                      "line": {"color": palette.INK, "width": 1}},
        )  # fmt: skip
    figure.update_xaxes(title_text="finished rungs of candidates, in order", showgrid=False, rangemode="tozero")
    figure.update_yaxes(title_text="validation LM loss (nats per token)")
    _leave_out(figure, info.rows)
    return figure


def _leave_out(figure: go.Figure, rows: pd.DataFrame) -> None:
    """A few candidates can be several nats off: the axis ends above the others, and says how many are beyond."""
    low, high = rows["lm_loss"].quantile([0, MOST])
    beyond = rows["lm_loss"] > high
    if rows["lm_loss"].max() <= high + 0.5 * max(high - low, 0.1):
        return
    figure.update_yaxes(range=[low - 0.06 * (high - low), high + 0.1 * (high - low)])
    figure.add_annotation(
        xref="x domain", x=1, xanchor="right", yref="y domain", y=1, yanchor="top", showarrow=False,
        text=f"{beyond.sum()} above, up to {f.fixed(rows['lm_loss'].max(), 2)} ↑",
        font={"size": 12, "color": palette.INK},
    )  # fmt: skip


def convergence_data(info: ConvergenceInfo) -> pd.DataFrame:
    columns = ["place", "trial", "architecture", "seed", "rung", "tokens", "spent", "minutes", "lm_loss",
               "lm_loss_stderr", "best", "status"]  # fmt: skip
    return info.rows[columns]
