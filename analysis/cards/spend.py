"""What each stage was forecast to cost and what it has cost so far."""

from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.run_data import BESIDE, RunData
from minitron_search.messages.escaping import in_html
from minitron_search.records.directory import stage_seconds

AFTER_SEARCH = ("untrained", "retrained")  # arms of stage `retrain`
OF_NO_STAGE = ("teacher", *(f"{arm}_retrained" for arm in BESIDE))  # is not trained; is trained by a benchmark
QUANTITIES = ("tokens", "flops", "hours", "gpu_hours", "cost")
HEADINGS = {"tokens": "tokens", "flops": "FLOPs", "hours": "time", "gpu_hours": "GPU-hours", "cost": "money"}


class SpendInfo(NamedTuple):
    """What the card shows. rows: one per stage: `stage`, for each of `QUANTITIES` `forecast_*` and `spent_*` (NaN where
    not known), `ratio` of the hours. bases: what the forecast's times come from."""

    rows: pd.DataFrame
    bases: list[str]


def spend_info(run: RunData) -> SpendInfo:
    seconds = stage_seconds(run.events)
    stages = [*run.forecast, *(stage for stage in seconds if stage not in run.forecast)]
    rows = pd.DataFrame([row(run, stage, seconds.get(stage)) for stage in stages])
    bases = list(dict.fromkeys(str(stage_forecast["basis"]) for stage_forecast in run.forecast.values()))
    return SpendInfo(rows, bases)


def row(run: RunData, stage: str, seconds: float | None) -> dict[str, Any]:
    stage_forecast = run.forecast.get(stage, {})
    ended = [event for event in run.events if event["event"] == "stage_finished" and event.get("stage") == stage]
    hours = None if seconds is None else seconds / 3600
    has_gpus = stage_forecast.get("gpu_seconds") is not None
    forecast = {
        "tokens": stage_forecast.get("tokens"),
        "flops": stage_forecast.get("flops"),
        "hours": stage_forecast["seconds"] / 3600 if stage_forecast else None,
        "gpu_hours": stage_forecast["gpu_seconds"] / 3600 if has_gpus else None,
        "cost": stage_forecast.get("cost"),
    }
    price = stage_forecast.get("price_per_hour")
    spent = {
        "tokens": spent_tokens(run, stage),
        "flops": ended[-1].get("flops") if ended else None,
        "hours": hours,
        "gpu_hours": hours * stage_forecast["gpus"] if has_gpus and hours is not None else None,
        "cost": hours * price if price is not None and hours is not None else None,
    }
    numbers: dict[str, Any] = {}
    for name in QUANTITIES:
        numbers |= {f"forecast_{name}": f.number(forecast[name]), f"spent_{name}": f.number(spent[name])}
    forecast_hours = numbers["forecast_hours"]
    ratio = numbers["spent_hours"] / forecast_hours if forecast_hours > 0 else float("nan")
    return {"stage": stage, **numbers, "ratio": ratio}


def spent_tokens(run: RunData, stage: str) -> float | None:
    """Return the tokens that a stage trained on, or put through the teacher, over all sessions; None where the log does
    not say."""
    if stage in ("search", "retrain"):
        arms = run.trials["arm"]
        after = arms.isin(AFTER_SEARCH)
        mine = run.trials[after if stage == "retrain" else ~after & ~arms.isin(OF_NO_STAGE)]
        return float(mine.groupby("trial")["tokens"].max().sum()) if len(mine) else None
    kind = {"teacher": "teacher_asked", "correction": "teacher_corrected"}.get(stage)
    events = [event for event in run.events if event["event"] == kind]
    # a teacher corrected for another run was found in the cache
    return float(sum(event["tokens"] for event in events if event.get("made_now", True))) if events else None


def spend_plot(info: SpendInfo) -> go.Figure:
    """Draw the hours of each stage, forecast above spent."""
    unit, per_hour = ("hours", 1) if info.rows[["forecast_hours", "spent_hours"]].max().max() >= 2 else ("minutes", 60)
    figure = palette.new_figure(150 + 48 * len(info.rows), barmode="group", bargap=0.35)
    for kind, colour in (("forecast", palette.MUTED), ("spent", palette.BLUE)):
        hours = info.rows[f"{kind}_hours"]
        figure.add_bar(
            x=hours * per_hour,
            y=[f.in_figure(stage) for stage in info.rows["stage"]],
            orientation="h",
            marker={"color": colour},
            name=kind,
            hovertext=[f"{kind} {f.duration(3600 * value)}" for value in hours],
            hoverinfo="y+text",
        )
    figure.update_xaxes(title_text=f"{unit} of wall time", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return figure


def spend_html(info: SpendInfo) -> str:
    known = {name: info.rows[[f"forecast_{name}", f"spent_{name}"]] for name in QUANTITIES}
    shown = [name for name in QUANTITIES if (known[name] > 0).any(axis=None)]  # no GPU-hours on CPUs
    heads = "".join(
        f'<th scope="col" class="number">{HEADINGS[name]} {kind}</th>'
        for name in shown
        for kind in ("forecast", "spent")
    )
    body = ""
    for row in info.rows.to_dict("records"):
        cells = "".join(
            f'<td class="number">{quantity(name, row[f"{kind}_{name}"])}</td>'
            for name in shown for kind in ("forecast", "spent")
        )  # fmt: skip
        ratio = f.MISSING if f.missing(row["ratio"]) else f"{row['ratio']:.2f}"
        body += f'<tr><th scope="row">{in_html(str(row["stage"]))}</th><td class="number">{ratio}</td>{cells}</tr>'
    return (
        f"<p>{in_html(in_words(info))}</p>"
        f'<div class="scroll"><table class="plain"><thead><tr><th scope="col">stage</th>'
        f'<th scope="col" class="number">time, spent / forecast</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def quantity(name: str, value: float) -> str:
    if name == "hours":
        return f.duration(3600 * value)
    if f.missing(value):
        return f.MISSING
    return f.tokens(value) if name == "tokens" else f"{value:.3g}"


def in_words(info: SpendInfo) -> str:
    """Say what the stages that were forecast and have run were to cost, and what they cost."""
    both = info.rows.dropna(subset=["forecast_hours", "spent_hours"])
    if both.empty:
        return "None of the stages that have run was forecast."
    forecast, taken = both["forecast_hours"].sum(), both["spent_hours"].sum()
    left = info.rows[info.rows["spent_hours"].isna()]["stage"].tolist()
    text = f"Of {f.duration(3600 * forecast)} forecast, {f.duration(3600 * taken)} were spent"
    text += f", {taken / forecast:.2f} times as much" if forecast > 0 else ""
    return text + (f"; {', '.join(left)} still to run." if left else ".")


def spend_count(info: SpendInfo) -> str:
    return "Forecast: " + "; ".join(info.bases) + "."


def spend_card(run: RunData) -> Card:
    title = "Spend against forecast"
    read = (
        "A ratio above 1 means that the stage took longer than forecast: more trials went on than one in the reduction "
        "factor, the machine was shared, or the run was cut off. Well below 1, what the stage needed was in the cache. "
        "FLOPs spent are those of the architectures that were trained."
    )
    if not run.forecast:
        return Card(
            title, read, reason="No forecast.json: the run has not begun, or is of a version that made no forecast."
        )
    info = spend_info(run)
    if info.rows["spent_hours"].isna().all():
        return Card(title, read, reason="Nothing has been spent yet: no stage has started.")
    panel = Panel("spend", spend_plot(info), info.rows)
    return Card(title, read, spend_count(info), spend_html(info), (panel,))
