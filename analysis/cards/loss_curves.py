"""Training loss and validation LM loss of every trial against the tokens it has seen."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.page import formatting as f
from analysis.page import palette
from analysis.run_data import BESIDE, RunData

POINTS_PER_TRIAL = 120
OTHERS = ("retrained", *BESIDE, *(f"{arm}_retrained" for arm in BESIDE))  # drawn by arm, not by status
POINTS = 30_000  # of a whole figure: 100 candidates still make a page that a phone opens


class LossCurvesInfo(NamedTuple):
    """steps: trial, tokens, loss (the distillation objective, nats); at most `POINTS_PER_TRIAL` rows a trial
    rungs:     rows of the trials table with a finite LM loss that were trained
    kinds:     how each trial is drawn: a status of the table, "retrained", or the arm of a control
    averaged:  the largest number of steps that one point averages
    teacher:   the teacher's LM loss, nats per token, NaN where it was not scored
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
    arms = {trial: str(made.get("arm", "")) for trial, made in run.made.items()}
    arms |= {row["trial"]: row["arm"] for row in run.trials.to_dict("records")}
    kinds |= {trial: arms[trial].removesuffix("_retrained") for trial in kinds if arms.get(trial) in OTHERS}
    drawn = {*steps["trial"], *rungs["trial"]}
    kinds = {trial: kind for trial, kind in kinds.items() if trial in drawn}
    steps = steps[steps["trial"].isin(list(kinds))]
    thinned, averaged = thin(steps, min(POINTS_PER_TRIAL, max(20, POINTS // max(len(kinds), 1))))
    teacher = run.trials.loc[run.trials["arm"] == "teacher", "lm_loss"]
    return LossCurvesInfo(thinned, rungs, kinds, averaged, float(teacher.min()) if len(teacher) else float("nan"))


def thin(steps: pd.DataFrame, points: int) -> tuple[pd.DataFrame, int]:
    """At most `points` rows a trial: mean loss of the steps in each of equally wide bins of log tokens.

    A row stands at the last token count of its bin. Also the largest number of steps that one row averages.
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
    shown: set[str] = set()
    steps_of = dict(tuple(info.steps.groupby("trial")))
    rungs_of = dict(tuple(info.rungs.groupby("trial")))
    traces = []
    for kind in STRENGTH:
        colour, symbol, name = DRAWN[kind] if kind in DRAWN else (*palette.STATUS[kind], kind)
        width, opacity = STRENGTH[kind]
        common = {"legendgroup": kind, "name": name, "opacity": opacity, "line": {"color": colour, "width": width}}
        trials = sorted(trial for trial, of in info.kinds.items() if drawn_as(of) == kind)
        for trial in trials:
            if trial in steps_of:
                traces.append({
                    "x": steps_of[trial]["tokens"], "y": steps_of[trial]["loss"], "mode": "lines", **common,
                    "showlegend": kind not in shown,
                    # As text: a template or a tag inside a name would otherwise be read as one.
                    "text": f.in_figure(trial),
                    "hovertemplate": "<b>%{text}</b><br>%{x:.4s} tokens, training loss %{y:.3f}<extra></extra>",
                })  # fmt: skip
                shown.add(kind)
        scored = [rungs_of[trial] for trial in trials if trial in rungs_of]
        if scored:
            # One trace, its lines apart by a row of nothing: a browser takes its time over every trace.
            gap = pd.DataFrame([{"tokens": None, "lm_loss": None, "lm_loss_stderr": None}])
            rows = pd.concat([part for rungs in scored for part in (rungs, gap)], ignore_index=True)
            hover = [f.hover(row) if row["trial"] == row["trial"] else "" for row in rows.to_dict("records")]
            traces.append({
                "x": rows["tokens"], "y": rows["lm_loss"], "yaxis": "y2", "mode": "lines+markers", **common,
                "error_y": {"array": rows["lm_loss_stderr"], "thickness": 1, "width": 0, "color": colour},
                "marker": {"symbol": symbol, "size": 9 if width > 2 else 7, "color": colour},
                "hovertext": hover, "hoverinfo": "text", "showlegend": kind not in shown,
            })  # fmt: skip
            shown.add(kind)
        for rungs in scored if kind == "promoted" else []:
            _mark_promotion(figure, rungs)
    figure.add_traces([{"type": "scatter", **trace} for trace in traces])
    if not f.missing(info.teacher):
        figure.add_shape(
            type="line",
            xref="x domain",
            x0=0,
            x1=1,
            yref="y2",
            y0=info.teacher,
            y1=info.teacher,
            line={"color": palette.INK, "width": 1, "dash": "dot"},
        )
        figure.add_annotation(
            xref="x domain",
            x=1,
            xanchor="right",
            yref="y2",
            y=info.teacher,
            yanchor="bottom",
            text=f"teacher {f.fixed(info.teacher, 3)}",
            showarrow=False,
            font={"size": 12, "color": palette.INK},
        )
    return figure


def drawn_as(kind: str) -> str:
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
        "objective, so its scale is not that of LM loss."
    )


def loss_curves_data(info: LossCurvesInfo) -> pd.DataFrame:
    training = info.steps.rename(columns={"loss": "value"}).assign(quantity="training_loss")
    validation = info.rungs[["trial", "tokens", "lm_loss", "lm_loss_stderr"]]
    validation = validation.rename(columns={"lm_loss": "value", "lm_loss_stderr": "stderr"})
    both = pd.concat([training, validation.assign(quantity="validation_lm_loss")])
    both["status"] = both["trial"].map(info.kinds)
    return both[["trial", "status", "quantity", "tokens", "value", "stderr"]]
