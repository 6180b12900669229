"""What the axes of the space have to do with the loss: parallel coordinates, and importance by PED-ANOVA."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.run_data import RunData, candidates
from minitron_search.records.directory import AXES

FEWEST = 10  # candidates to measure importance among: twice as many as are called the best
BEST = 5  # candidates at least, by the advice of PED-ANOVA's documentation; else the best tenth
RESAMPLES = 20  # of which the intervals are the whole range: half a second for 50 candidates, six for 500
THIRDS = (("lowest third", palette.BLUE), ("middle third", palette.SKY), ("highest third", palette.MUTED))


class AxesInfo(NamedTuple):
    """What the card shows. rows: the candidates of one rung with a finite LM loss, one per architecture, means over its
    seeds. varied: those of `AXES` that differ among them; dropped layers are counted by their block where blocks are
    dropped."""

    rows: pd.DataFrame
    rung: float
    varied: tuple[str, ...]


def axes_info(run: RunData) -> AxesInfo | None:
    """Return the candidates of the lowest trained rung that `FEWEST` reached, because later rungs hold only the best of
    an earlier one; otherwise those of the lowest rung. None before a candidate was scored."""
    scored = candidates(run.trials)
    scored = scored[np.isfinite(scored["lm_loss"])]
    if scored.empty:
        return None
    reached = scored[scored["tokens"] > 0].groupby("rung")["architecture"].nunique()
    reached = reached[reached >= FEWEST]
    rung = float(reached.index.min() if len(reached) else scored["rung"].min())
    level = scored[scored["rung"] == rung]
    means = level.groupby("architecture", sort=False)[["lm_loss", "params", "tokens", *AXES]].mean()
    rows = means.reset_index().assign(
        promoted=[
            bool((scored.loc[scored["architecture"] == name, "status"] == "promoted").any()) for name in means.index
        ]
    )
    varied = [axis for axis in AXES if _where_it_is(rows, axis)[axis].nunique() > 1]
    if "drop_block_length" in varied:
        varied.remove("num_hidden_layers")
    return AxesInfo(rows, rung, tuple(varied))


def parallel_plot(info: AxesInfo) -> go.Figure:
    """Draw a line a candidate over every axis, each from its lowest value to its highest; in SVG, as every other
    figure, where Plotly's own needs WebGL."""
    shown = [*info.varied, "params", "lm_loss"]
    rows = info.rows.sort_values("lm_loss", ignore_index=True)
    heights = np.stack([_spread(rows[name].to_numpy(float)) for name in shown], axis=1)  # (candidates, axes)
    spread = np.random.default_rng(0).uniform(-0.012, 0.012, (len(rows), 1))  # else lines lie on each other
    heights[:, :-1] += spread
    figure = palette.new_figure(430)
    for place in range(len(shown)):
        figure.add_shape(type="line", x0=place, x1=place, y0=-0.03, y1=1.03, line={"color": palette.GRID, "width": 1})
    third = np.minimum(np.arange(len(rows)) * 3 // max(len(rows), 1), 2)
    groups = [
        (
            f"{name} of LM loss",
            colour,
            1.0 if place else 2.0,
            0.6 if place else 0.85,
            (third == place) & ~rows["promoted"],
        )
        for place, (name, colour) in enumerate(THIRDS)
    ]
    for name, colour, width, opacity, mask in [*groups[::-1], ("promoted", palette.ORANGE, 3.0, 1.0, rows["promoted"])]:
        chosen = np.flatnonzero(mask)
        if len(chosen):
            figure.add_scatter(
                x=np.tile([*range(len(shown)), None], len(chosen)),
                y=[value for row in chosen for value in (*heights[row].round(4), None)],
                mode="lines+markers", name=name,
                line={"color": colour, "width": width}, marker={"size": 3.5, "color": colour},
                opacity=opacity, hoverinfo="text",
                hovertext=[label for row in chosen for label in (*_labels(rows.iloc[row], shown), "")],
            )  # fmt: skip
    for place, name in enumerate(shown):
        low, high = rows[name].min(), rows[name].max()
        for y, value, anchor in ((-0.03, low, "top"), (1.03, high, "bottom")):
            figure.add_annotation(
                x=place, y=y, yanchor=anchor, showarrow=False, text=_tick(name, value),
                font={"size": 12, "color": palette.INK},
            )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(range(len(shown))), ticktext=[_heading(name) for name in shown], showgrid=False,
        range=[-0.25, len(shown) - 0.75], tickangle=0,
    )  # fmt: skip
    figure.update_yaxes(visible=False, range=[-0.14, 1.14])
    return figure


def _spread(values: np.ndarray) -> np.ndarray:
    """Scale values to 0..1; what does not vary lies in the middle."""
    low, high = np.nanmin(values), np.nanmax(values)
    return np.full(len(values), 0.5) if high == low else (values - low) / (high - low)


def _labels(row: pd.Series, shown: Sequence[str]) -> list[str]:
    """Return a label a point, with the whole shape where the line ends: at every point, it would be a tenth of a page
    of 500."""
    name = f"<b>{f.in_figure(row['architecture'])}</b>"
    score = f"{f.millions(row['params'])} parameters, LM loss {f.fixed(row['lm_loss'], 3)}"
    whole = f"{name}<br>{f.architecture(row)}<br>{score}"
    return [*(f"{name}<br>{axis} {_tick(axis, row[axis])}" for axis in shown[:-1]), whole]


def _tick(name: str, value: float) -> str:
    if name == "lm_loss":
        return f.fixed(value, 2)
    return f"{value / 1e6:.1f} M" if name == "params" else f.integer(value)


def _heading(name: str) -> str:
    names = {"params": "parameters", "lm_loss": "LM loss"}
    return names[name] if name in names else name.replace("_", "_<br>", name.count("_"))


def importances(info: AxesInfo) -> pd.DataFrame:
    """Return a row per varied axis, most important first: `importance`, the share PED-ANOVA gives it, and `spearman`,
    its rank correlation with the LM loss (below 0: more of it goes with a lower loss); each with its range (`_low`,
    `_high`) over `RESAMPLES` resamples of the candidates."""
    rows, axes = info.rows, info.varied
    generator = np.random.default_rng(0)
    draws = [rows.iloc[generator.integers(0, len(rows), len(rows))] for _ in range(RESAMPLES)]
    measured = {
        "importance": (ped_anova(rows, axes), [ped_anova(draw, axes) for draw in draws]),
        "spearman": (spearman(rows, axes), [spearman(draw, axes) for draw in draws]),
    }
    table = pd.DataFrame({"axis": axes})
    for name, (values, resampled) in measured.items():
        table[name] = values
        table[[f"{name}_low", f"{name}_high"]] = np.array(
            [np.nanmin(resampled, axis=0), np.nanmax(resampled, axis=0)]
        ).T
    return table.sort_values("importance", ascending=False, ignore_index=True)


def ped_anova(rows: pd.DataFrame, axes: Sequence[str]) -> list[float]:
    """Return the shares of importance, of 1, by PED-ANOVA, Optuna's default (arXiv:2304.10255): how far the values of
    the best tenth of the candidates, or the best `BEST`, are from those of all. It is about the shapes that were tried,
    which a budget ties together, and not about shapes outside it, as fANOVA would be."""
    import optuna  # takes seconds to import, and most reports of a run that is going need it not

    known = {axis: _where_it_is(rows, axis) for axis in axes}
    ranges = {
        axis: optuna.distributions.IntDistribution(int(known_rows[axis].min()), int(known_rows[axis].max()))
        for axis, known_rows in known.items()
        if known_rows[axis].nunique() > 1
    }
    if not ranges:  # a resample of one candidate
        return [float("nan")] * len(axes)
    trials = []
    for place, loss in rows["lm_loss"].reset_index(drop=True).items():
        has = {axis: int(rows[axis].iloc[place]) for axis in ranges if rows.index[place] in known[axis].index}
        where: dict[str, optuna.distributions.BaseDistribution] = {axis: ranges[axis] for axis in has}
        trials.append(optuna.trial.create_trial(value=loss, params=has, distributions=where))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.add_trials(trials)
    with warnings.catch_warnings(action="ignore"):  # about a resample that holds few of one kind: the interval tells
        best = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, BEST / len(rows)))
        shares = optuna.importance.get_param_importances(study, evaluator=best)
    return [shares.get(axis, 0.0) for axis in axes]


def spearman(rows: pd.DataFrame, axes: Sequence[str]) -> list[float]:
    """Return each axis's rank correlation with the LM loss."""
    correlations = []
    for axis in axes:
        known = _where_it_is(rows, axis)
        varies = known[axis].nunique() > 1 and known["lm_loss"].nunique() > 1
        correlations.append(float(stats.spearmanr(known[axis], known["lm_loss"]).statistic) if varies else float("nan"))
    return correlations


def _where_it_is(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Return the rows in which an axis means something: a block starts somewhere only where one is dropped."""
    return rows[rows["drop_block_length"] > 0] if axis == "drop_block_start" else rows


def importances_plot(table: pd.DataFrame) -> go.Figure:
    return _bars(table, "importance", "share of the importance (PED-ANOVA), of 1", [0, 1])


def directions_plot(table: pd.DataFrame) -> go.Figure:
    figure = _bars(table, "spearman", "Spearman’s rank correlation with LM loss", [-1, 1])
    figure.add_vline(0, line_color=palette.INK, line_width=1)
    return figure


def _bars(table: pd.DataFrame, name: str, title: str, reach: list[float]) -> go.Figure:
    figure = palette.new_figure(110 + 34 * len(table))
    figure.add_bar(
        x=table[name], y=table["axis"], orientation="h", marker={"color": palette.BLUE}, showlegend=False,
        error_x={"type": "data", "symmetric": False, "array": table[f"{name}_high"] - table[name],
                 "arrayminus": table[name] - table[f"{name}_low"], "thickness": 1.5, "color": palette.MUTED},
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text=title, range=reach)
    return figure


def axes_count(info: AxesInfo) -> str:
    tokens = f.tokens(info.rows["tokens"].max())
    return (
        f"n = {f.plural(len(info.rows), 'architecture')} at rung {info.rung:.0f} ({tokens} tokens each); bars are the "
        f"range over {RESAMPLES} resamples of them. Losses in nats per token; importance has no unit."
    )


def axes_card(run: RunData) -> Card:
    title = "Axes of the search"
    read = (
        "Each line is an architecture, from axis to axis; strong blue ones have the lowest LM loss. An axis on which "
        "they bunch together matters. Importance says how much, by PED-ANOVA (arXiv:2304.10255): how far the best "
        "tenth of the shapes tried, or the best five, are from all of them. The correlation says in which direction: "
        "left of zero, a larger value goes with a lower loss. A budget ties the axes together, so one may stand for "
        "another."
    )
    info = axes_info(run)
    if info is None:
        return Card(title, read, reason="No candidate has been scored yet.")
    if len(info.rows) < 2 or not info.varied:
        return Card(title, read, reason="All scored candidates have one shape: no axis varies.")
    panels = [Panel("parallel_coordinates", parallel_plot(info), info.rows, "Parallel coordinates", columns=6)]
    body = ""
    if len(info.rows) < FEWEST:
        body = (
            f"<p>Importance of the axes needs {FEWEST} scored architectures at one rung; "
            f"there are {len(info.rows)}.</p>"
        )
    else:
        table = importances(info)
        panels += [
            Panel("axis_importance", importances_plot(table), table, "Importance"),
            Panel("axis_direction", directions_plot(table), table, "Direction"),
        ]
    return Card(title, read, axes_count(info), body, tuple(panels))
