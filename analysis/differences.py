"""Students of several runs, or arms of an ablation, on the same validation windows: paired differences in LM loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from analysis.page import formatting as f
from analysis.page import palette
from analysis.run_data import RunData
from minitron_search.records.metrics import METRICS

LEVEL = 0.95
BySeed = Mapping[int, np.ndarray]  # LM loss of every validation window, (windows,), by seed


def window_losses(run: RunData, rows: pd.DataFrame) -> dict[int, np.ndarray]:
    """Return the LM loss of every window by seed, for rows of the trials table, one a seed; a row of an older version,
    which logged no windows, is left out."""
    losses = {}
    for trial, rung, seed in zip(rows["trial"], rows["rung"], rows["seed"], strict=True):
        if values := run.scores.get((trial, int(rung)), {}).get("lm_loss"):
            losses[-1 if f.missing(seed) else int(seed)] = np.array(values, float)
    return losses


def paired(baseline: BySeed, other: BySeed) -> dict[str, Any] | None:
    """Compare `other` minus `baseline`, nats per token, over the seeds both have, or over all of each where they share
    none.

    difference, low, high: over windows, each the mean over seeds: these very students on other text. seeds_low,
    seeds_high: over seeds, each the mean over windows: other students on this text; NaN for fewer than two shared
    seeds. Intervals are Student's, 95%. Returns None where the numbers of windows differ.
    """
    shared = sorted(baseline.keys() & other.keys())
    if not baseline or not other:
        return None
    both = [np.stack([side[seed] for seed in shared or sorted(side)]) for side in (baseline, other)]
    if both[0].shape[1] != both[1].shape[1]:
        return None
    one, two = both
    result = {"difference": float((two.mean(0) - one.mean(0)).mean()), "windows": one.shape[1], "seeds": len(shared)}
    for name, (a, b) in {
        "": (one.mean(0), two.mean(0)),
        "seeds_": (one.mean(1), two.mean(1)) if len(shared) > 1 else (np.empty(0), np.empty(0)),
    }.items():
        if len(a) > 1 and (b - a).std() > 0:
            low, high = stats.ttest_rel(b, a).confidence_interval(LEVEL)
            result |= {f"{name}low": float(low), f"{name}high": float(high)}
        else:
            result |= {f"{name}low": float("nan"), f"{name}high": float("nan")}
    return result


def differences(students: Mapping[str, BySeed], baseline: str) -> pd.DataFrame:
    """Return a row per student besides the baseline that can be paired with it, in the order given."""
    rows = [
        {"arm": name, **test}
        for name, losses in students.items()
        if name != baseline and (test := paired(students[baseline], losses)) is not None
    ]
    columns = ["arm", "difference", "low", "high", "seeds_low", "seeds_high", "windows", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def forest_plot(table: pd.DataFrame, baseline: str, metric: str = "lm_loss") -> go.Figure:
    """Draw a row per arm: the interval over windows, thick, and below it the one over seeds, thin."""
    figure = palette.new_figure(130 + 46 * len(table))
    places = np.arange(len(table), dtype=float)
    apart = 1.0 if table["seeds_low"].notna().any() else 0.0  # where both are drawn, one is above the other
    for name, low, high, shift, colour, symbol, width in (
        ("over windows: other text", "low", "high", -0.1, palette.BLUE, "circle", 2.6),
        ("over seeds: another training", "seeds_low", "seeds_high", 0.18, palette.ORANGE, "diamond", 1.6),
    ):
        rows = table[low].notna() | (low == "low")
        drawn, at = table[rows], places[rows.to_numpy()]
        if len(drawn):
            figure.add_scatter(
                x=drawn["difference"], y=at + apart * shift, mode="markers", name=name,
                marker={"color": colour, "symbol": symbol, "size": 10 if width > 2 else 8},
                error_x={"type": "data", "symmetric": False, "array": drawn[high] - drawn["difference"],
                         "arrayminus": drawn["difference"] - drawn[low], "thickness": width, "width": 4,
                         "color": colour},
                hovertext=[_label(row, low, high) for row in drawn.to_dict("records")], hoverinfo="text",
            )  # fmt: skip
    figure.add_vline(0, line_color=palette.INK, line_width=1)
    figure.update_yaxes(
        tickvals=places, ticktext=[f.in_figure(name) for name in table["arm"]], showgrid=False,
        range=[len(table) - 0.5, -0.5], tickfont={"size": 13, "color": palette.INK},
    )  # fmt: skip
    unit = "; ".join(part for part in (METRICS[metric].unit, "95% intervals") if part)
    figure.update_xaxes(title_text=f"{METRICS[metric].name} minus that of {f.in_figure(baseline)} ({unit})")
    return figure


def _label(row: Mapping[str, Any], low: str, high: str) -> str:
    n = f"{row['windows']:.0f} windows or examples" if low == "low" else f"{row['seeds']:.0f} seeds"
    return f"<b>{f.in_figure(row['arm'])}</b><br>{interval(row, low, high)}, n = {n}"


def interval(row: Mapping[str, Any], low: str = "low", high: str = "high") -> str:
    """Return `+0.120 (0.100 to 0.140)`."""
    value = f"{row['difference']:+.3f}".replace("-", "−")
    if f.missing(row[low]):
        return value
    return f"{value} ({f.fixed(row[low], 3)} to {f.fixed(row[high], 3)})"


def in_words(table: pd.DataFrame, baseline: str) -> list[str]:
    """Return a sentence per arm that a reader could repeat, and that claims no more than its intervals."""
    sentences = []
    for row in table.to_dict("records"):
        known = not f.missing(row["low"])
        text, training = (row[low] > 0 or row[high] < 0 for low, high in (("low", "high"), ("seeds_low", "seeds_high")))
        if not known:
            sure = "one window tells nothing about others"
        elif f.missing(row["seeds_low"]):
            sure = "other text would say the same" if text else "it could be chance"
            sure += "; one seed, so what another training would give is not known"
        else:
            sure = {
                (True, True): "no interval holds zero",
                (True, False): "other text would say the same, another training might not",
                (False, True): "another training would say the same, other text might not",
                (False, False): "it could be chance",
            }[text, training]
        if not f.missing(p := row.get("p_holm")):
            sure += f"; p over windows, corrected for the arms, is {p:.2g}"
        where = "above" if row["difference"] > 0 else "below"
        sentences.append(
            f"{row['arm']}: {abs(row['difference']):.3f} nats per token {where} {baseline}"
            + (f", 95% {f.fixed(row['low'], 3)} to {f.fixed(row['high'], 3)} over windows" if known else "")
            + f": {sure}."
        )
    return sentences


def labelled(runs: Sequence[RunData], folders: Sequence[str]) -> list[RunData]:
    """Return the runs with distinct names: where several have one name, the name of the folder, or a number, follows
    it."""
    names = [run.name for run in runs]
    named = zip(names, folders, strict=True)
    names = [f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in named]
    names = [f"{name} {at}" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]
    return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]
