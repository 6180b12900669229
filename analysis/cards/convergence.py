"""How the search went on: the best LM loss so far at each rung, in the order in which rungs ended."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.run_data import BESIDE, RunData, candidates

MOST = 0.75  # of the finished rungs are inside the axis whatever they are


class ConvergenceInfo(NamedTuple):
    """What the figure of the best so far shows.

    rows: rows of the trials table, one per finished rung of a candidate, in the order they ended, with place: 1, 2,
    ...; spent: tokens that all candidates had trained on by then; minutes: since the first event; best: the lowest LM
    loss at this rung so far, nats per token; hover: its label. promoted: trials that the search promoted.
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
        labels = [
            f"{hover}<br>after {f.tokens(spent)} tokens of all candidates, {f.duration(60 * minutes)}"
            for hover, spent, minutes in zip(rows["hover"], rows["spent"], rows["minutes"], strict=True)
        ]
        figure.add_scatter(
            x=rows["place"], y=rows["lm_loss"], mode="markers", name=name, legendgroup=name, showlegend=False,
            marker={"color": colour, "size": 6, "symbol": "circle-open"}, hovertext=labels, hoverinfo="text",
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
    """Let the axis end above most candidates, and say how many are beyond: a few can be several nats off."""
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


POINTS_PER_TRIAL = 120


OTHERS = ("retrained", *BESIDE, *(f"{arm}_retrained" for arm in BESIDE))  # drawn by arm, not by status


POINTS = 30_000  # of a whole figure: 100 candidates still make a page that a phone opens


class LossCurvesInfo(NamedTuple):
    """What the loss curves show.

    steps: trial, tokens, loss (the distillation objective, nats); at most `POINTS_PER_TRIAL` rows a trial. rungs: rows
    of the trials table with a finite LM loss that were trained. kinds: how each trial is drawn: a status of the table,
    "retrained", or the arm of a control. averaged: the largest number of steps that one point averages. teacher: the
    teacher's LM loss, nats per token, NaN where it was not scored.
    """

    steps: pd.DataFrame
    rungs: pd.DataFrame
    kinds: dict[str, str]
    averaged: int
    teacher: float


def loss_curves_info(run: RunData) -> LossCurvesInfo:
    rungs = run.trials[~run.trials["arm"].isin(["teacher", "untrained"]) & np.isfinite(run.trials["lm_loss"])]
    rungs = rungs[rungs["tokens"] > 0]
    steps = run.steps[np.isfinite(run.steps["loss"]) & (run.steps["tokens"] > 0)]
    kinds = {trial: "running" for trial in steps["trial"].unique()}
    kinds |= {row["trial"]: row["status"] for row in run.trials.to_dict("records")}
    arms = {trial: str(described.get("arm", "")) for trial, described in run.made.items()}
    arms |= {row["trial"]: row["arm"] for row in run.trials.to_dict("records")}
    kinds |= {trial: arms[trial].removesuffix("_retrained") for trial in kinds if arms.get(trial) in OTHERS}
    drawn = {*steps["trial"], *rungs["trial"]}
    kinds = {trial: kind for trial, kind in kinds.items() if trial in drawn}
    steps = steps[steps["trial"].isin(list(kinds))]
    thinned, averaged = thin(steps, min(POINTS_PER_TRIAL, max(20, POINTS // max(len(kinds), 1))))
    teacher = run.trials.loc[run.trials["arm"] == "teacher", "lm_loss"]
    return LossCurvesInfo(thinned, rungs, kinds, averaged, float(teacher.min()) if len(teacher) else float("nan"))


def thin(steps: pd.DataFrame, points: int) -> tuple[pd.DataFrame, int]:
    """Return at most `points` rows a trial, each the mean loss of the steps in one of equally wide bins of log tokens.

    A row stands at the last token count of its bin. Also returns the largest number of steps that one row averages.
    """
    trials = steps.groupby("trial")["tokens"]
    place = np.log(steps["tokens"] / trials.transform("min")) / np.log(
        trials.transform("max") / trials.transform("min")
    )
    bins = np.floor(place.fillna(0) * points).clip(upper=points - 1)  # a single step has no width: 0 / 0
    groups = steps.assign(bin=bins).groupby(["trial", "bin"], sort=True)
    thinned = groups.agg(tokens=("tokens", "last"), loss=("loss", "mean"), averaged=("loss", "size")).reset_index()
    return thinned[["trial", "tokens", "loss"]], int(thinned["averaged"].max()) if len(thinned) else 1


# How strongly each kind is drawn: width and opacity of the line. Later in the list is nearer to the reader.
STRENGTH = {
    "stopped": (1.0, 0.45),
    "failed": (1.2, 0.7),
    "running": (1.5, 0.8),
    "complete": (1.5, 0.8),
    "random_pruned": (1.8, 0.9),
    "random_init": (1.8, 0.9),
    "promoted": (2.6, 1.0),
    "retrained": (2.6, 1.0),
}


# Colour, symbol and name of what is drawn by its arm.
DRAWN = {
    "retrained": (*palette.RETRAINED, "retrained"),
    "random_pruned": (*palette.RANDOM_PRUNED, "random pruning"),
    "random_init": (*palette.RANDOM_INIT, "random weights"),
}


def loss_curves_plot(info: LossCurvesInfo) -> go.Figure:
    figure = palette.new_figure(620)
    seen = pd.concat([info.steps["tokens"], info.rungs["tokens"]])
    ticks = f.log_ticks(seen.min(), seen.max())
    figure.update_layout(
        grid={"rows": 2, "columns": 1, "subplots": [["xy"], ["xy2"]], "ygap": 0.12},
        yaxis={"title": {"text": "training loss (nats)"}},
        yaxis2={"title": {"text": "validation LM loss<br>(nats per token)"}},
        xaxis={
            "title": {"text": "tokens seen (logarithmic)"},
            "type": "log",
            "tickvals": ticks,
            "ticktext": [f.tokens(tick) for tick in ticks],
        },
    )
    steps_of = dict(tuple(info.steps.groupby("trial")))
    rungs_of = dict(tuple(info.rungs.groupby("trial")))
    traces = []
    for kind in STRENGTH:
        trials = sorted(trial for trial, status in info.kinds.items() if drawn_as(status) == kind)
        training = [_training_trace(kind, trial, steps_of[trial]) for trial in trials if trial in steps_of]
        scored = [rungs_of[trial] for trial in trials if trial in rungs_of]
        of_kind = [*training, _validation_trace(kind, scored)] if scored else training
        traces += [{"type": "scatter", **trace, "showlegend": place == 0} for place, trace in enumerate(of_kind)]
        for rungs in scored if kind == "promoted" else []:
            _mark_promotion(figure, rungs)
    figure.add_traces(traces)  # all at once: one by one each takes longer than the one before
    if not f.missing(info.teacher):
        _mark_teacher(figure, info.teacher)
    return figure


def _style(kind: str) -> dict[str, Any]:
    colour, _, name = _look(kind)
    width, opacity = STRENGTH[kind]
    return {"legendgroup": kind, "name": name, "opacity": opacity, "line": {"color": colour, "width": width}}


def _look(kind: str) -> tuple[str, str, str]:
    """Return the colour, symbol and name of a kind."""
    return DRAWN[kind] if kind in DRAWN else (*palette.STATUS[kind], kind)


def _training_trace(kind: str, trial: str, steps: pd.DataFrame) -> dict[str, Any]:
    return {
        "x": steps["tokens"], "y": steps["loss"], "mode": "lines", **_style(kind),
        # As text: a template or a tag inside a name would otherwise be read as one.
        "text": f.in_figure(trial),
        "hovertemplate": "<b>%{text}</b><br>%{x:.4s} tokens, training loss %{y:.3f}<extra></extra>",
    }  # fmt: skip


def _validation_trace(kind: str, scored: list[pd.DataFrame]) -> dict[str, Any]:
    """Return one trace of all trials, their lines separated by an empty row: a browser takes its time over every
    trace."""
    colour, symbol, _ = _look(kind)
    gap = pd.DataFrame([{"tokens": None, "lm_loss": None, "lm_loss_stderr": None}])
    rows = pd.concat([part for rungs in scored for part in (rungs, gap)], ignore_index=True)
    return {
        "x": rows["tokens"], "y": rows["lm_loss"], "yaxis": "y2", "mode": "lines+markers", **_style(kind),
        "error_y": {"array": rows["lm_loss_stderr"], "thickness": 1, "width": 0, "color": colour},
        "marker": {"symbol": symbol, "size": 9 if STRENGTH[kind][0] > 2 else 7, "color": colour},
        "hovertext": [f.hover(row) if row["trial"] == row["trial"] else "" for row in rows.to_dict("records")],
        "hoverinfo": "text",
    }  # fmt: skip


def _mark_teacher(figure: go.Figure, loss: float) -> None:
    figure.add_shape(
        type="line", xref="x domain", x0=0, x1=1, yref="y2", y0=loss, y1=loss,
        line={"color": palette.INK, "width": 1, "dash": "dot"},
    )  # fmt: skip
    figure.add_annotation(
        xref="x domain", x=1, xanchor="right", yref="y2", y=loss, yanchor="bottom", showarrow=False,
        text=f"teacher {f.fixed(loss, 3)}", font={"size": 12, "color": palette.INK},
    )  # fmt: skip


def drawn_as(kind: str) -> str:
    """Return the kind whose line style a trial gets."""
    return kind if kind in STRENGTH else "complete"


def _mark_promotion(figure: go.Figure, rungs: pd.DataFrame) -> None:
    row = rungs.loc[rungs["tokens"].idxmax()]
    figure.add_annotation(
        x=np.log10(row["tokens"]),
        y=row["lm_loss"],
        yref="y2",
        text="promoted",
        showarrow=True,
        arrowhead=0,
        arrowwidth=1,
        arrowcolor=palette.ORANGE,
        ax=22,
        ay=0,
        xanchor="left",
        standoff=6,
        font={"size": 12, "color": palette.INK},
    )


def loss_curves_count(info: LossCurvesInfo) -> str:
    averaged = f"; a training point averages up to {info.averaged} steps" if info.averaged > 1 else ""
    return (
        f"n = {f.plural(len(info.kinds), 'trial')}; validation bars are ± one standard error over "
        f"{f.integer(info.rungs['lm_loss_n'].max())} windows{averaged}. Training loss is the distillation "
        "objective, which is on another scale than LM loss."
    )


def loss_curves_data(info: LossCurvesInfo) -> pd.DataFrame:
    training = info.steps.rename(columns={"loss": "value"}).assign(quantity="training_loss")
    validation = info.rungs[["trial", "tokens", "lm_loss", "lm_loss_stderr"]]
    validation = validation.rename(columns={"lm_loss": "value", "lm_loss_stderr": "stderr"})
    both = pd.concat([training, validation.assign(quantity="validation_lm_loss")])
    both["status"] = both["trial"].map(info.kinds)
    return both[["trial", "status", "quantity", "tokens", "value", "stderr"]]


def convergence_card(run: RunData) -> Card:
    title = "Convergence"
    read = (
        "First the search: each circle is a candidate that finished a rung, each line the best at that rung so far. "
        "Then every trial: its training loss above, and below, the loss that rungs rank by. Faint lines were stopped, "
        "strong ones promoted; controls have the shape and tokens of the promoted candidate."
    )
    best, info = convergence_info(run), loss_curves_info(run)
    panels = []
    if len(best.rows):
        figure, data = convergence_plot(best), convergence_data(best)
        panels.append(Panel("convergence", figure, data, "The best so far", columns=6))
    if len(info.steps) or len(info.rungs):
        figure, data = loss_curves_plot(info), loss_curves_data(info)
        panels.append(Panel("loss_curves", figure, data, "Loss against tokens", columns=6))
    if not panels:
        return Card(title, read, reason="No trial has logged a training step or finished a rung yet.")
    return Card(title, read, loss_curves_count(info), panels=tuple(panels))
