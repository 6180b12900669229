"""How sure the search may be of its winner: paired tests of the finalists, and what the early rungs foretold."""

import html
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis import formatting as f
from analysis import palette
from analysis.run_data import RunData


def finalists(found: dict[str, Any]) -> pd.DataFrame:
    """A row per architecture of the last rung, best first; differences are from the best, on the same windows."""
    rows = []
    for about in found["finalists"]:
        loss = about.get("lm_loss_against_best") or {}
        accuracy = about.get("accuracy_against_best") or {}
        rows.append({
            "architecture": about["architecture"],
            found["objective"]: about[found["objective"]],
            "seeds": about["seeds"],
            "error_over_seeds": about["error_over_seeds"],
            "lm_loss_minus_best": loss.get("difference"),
            "stderr": loss.get("stderr"),
            "p": loss.get("p"),
            "n": loss.get("n"),
            "accuracy_p": accuracy.get("p"),
        })  # fmt: skip
    return pd.DataFrame(rows)


def body(found: dict[str, Any]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in found["words"])


def differences_plot(table: pd.DataFrame) -> go.Figure:
    """LM loss above the best's, with two standard errors of the paired difference."""
    others = table.dropna(subset=["lm_loss_minus_best"])
    figure = go.Figure(go.Scatter(
        x=others["lm_loss_minus_best"], y=others["architecture"], mode="markers",
        error_x={"type": "data", "array": 2 * others["stderr"]}, marker={"color": palette.BLUE, "size": 9},
        customdata=others[["p", "n"]],
        hovertemplate="%{y}<br>%{x:.4f} nats above<br>p %{customdata[0]:.2g}, n %{customdata[1]}<extra></extra>",
    ))  # fmt: skip
    figure.add_vline(0, line_color=palette.INK, line_width=1)
    figure.update_layout(
        xaxis_title="LM loss minus the best’s, nats per token (± 2 standard errors)", height=120 + 28 * len(others)
    )
    return figure


def sample(run: RunData, table: pd.DataFrame) -> str:
    n = table["n"].dropna()
    return f"{f.plural(len(table), 'architecture')} at the last rung" + (f", {int(n.max())} windows" if len(n) else "")
