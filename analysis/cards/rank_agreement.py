"""How well the order of an early rung foretold the order of the next, and of the retrained students."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from analysis.cards.evidence import METRICS, rungs
from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.tables import plain_table
from analysis.run_data import RunData, candidates

FEWEST = 3  # architectures; two cannot disagree with chance


class AgreementInfo(NamedTuple):
    """pairs: (before, after, rows) of every two neighbouring rungs that more than one architecture reached; a row per
    architecture of both: `before` and `after` in `objective`, means over its seeds, `promoted`, `hover`.
    tests: of `evidence.rungs`; empty while the run goes on."""

    objective: str
    pairs: tuple[tuple[str, str, pd.DataFrame], ...]
    tests: pd.DataFrame


def agreement_info(run: RunData) -> AgreementInfo:
    objective = str(run.evidence.get("objective") or "lm_loss")
    scored = run.trials[np.isfinite(run.trials[objective])]
    searched = candidates(scored)
    levels = {f"rung {rung:.0f}": rows for rung, rows in searched.groupby("rung")}
    retrained = scored[scored["arm"] == "retrained"]
    if len(retrained):
        levels["retrained"] = retrained
    promoted = set(searched.loc[searched["status"] == "promoted", "architecture"])
    pairs = []
    for before, after in zip(list(levels), list(levels)[1:], strict=False):
        means = pd.DataFrame(
            {
                side: levels[name].groupby("architecture")[objective].mean()
                for side, name in (("before", before), ("after", after))
            }
        ).dropna()
        if len(means) < 2:
            continue
        shapes = searched.drop_duplicates("architecture").set_index("architecture")
        rows = means.reset_index().assign(
            promoted=[name in promoted for name in means.index],
            hover=[
                f"<b>{f.in_figure(name)}</b><br>{f.architecture(shapes.loc[name])}<br>{before} "
                f"{f.fixed(row['before'], 3)}, {after} {f.fixed(row['after'], 3)}"
                for name, row in means.iterrows()
            ],
        )
        pairs.append((before, after, rows))
    tests = rungs(run.evidence) if run.evidence.get("rungs") else pd.DataFrame()
    return AgreementInfo(objective, tuple(pairs), tests)


def agreement_plot(info: AgreementInfo, before: str, after: str, rows: pd.DataFrame) -> go.Figure:
    figure = palette.new_figure(380)
    for mask, name, (colour, symbol), size in (
        (~rows["promoted"], "not promoted", palette.STATUS["complete"], 8),
        (rows["promoted"], "promoted", palette.STATUS["promoted"], 12),
    ):
        if mask.any():
            figure.add_scatter(
                x=rows.loc[mask, "before"], y=rows.loc[mask, "after"], mode="markers", name=name,
                marker={"color": colour, "symbol": symbol, "size": size}, hovertext=rows.loc[mask, "hover"],
                hoverinfo="text",
            )  # fmt: skip
    unit = METRICS[info.objective]
    figure.update_xaxes(title_text=f"{before}: {unit}")
    figure.update_yaxes(title_text=f"{after}: {unit}")
    return figure


def agreement_html(info: AgreementInfo) -> str:
    """A row per pair of rungs: what the run's own tests say, or, while it goes on, Kendall's tau alone."""
    if len(info.tests):
        lines = [_tested(row) for row in info.tests.to_dict("records")]
    else:
        sign = -1 if info.objective == "winogrande_margin" else 1  # lower is better from here on
        lines = [_untested(before, after, rows, sign) for before, after, rows in info.pairs]
    heads = ("from", "to", "architectures", "Kendall’s tau", "p", "best stayed best", "cost of the early choice",
             "pairs flipped")  # fmt: skip
    return plain_table(heads, lines, (0, 1, 5))


def _tested(row: dict[str, object]) -> list[str]:
    keys = ("n", "before_n", "kendall", "kendall_p", "kendall_low", "kendall_high", "regret")
    number = {key: f.number(row.get(key)) for key in keys}
    tau = f.fixed(number["kendall"], 2)
    if not f.missing(number["kendall_low"]):
        tau += f" ({f.fixed(number['kendall_low'], 2)} to {f.fixed(number['kendall_high'], 2)})"
    pairs = number["n"] * (number["n"] - 1) / 2
    flips = len([pair for pair in str(row["flips"]).split("; ") if pair])
    return [
        str(row["before"]), str(row["after"]), f"{number['n']:.0f} of {number['before_n']:.0f}", tau,
        f.MISSING if f.missing(number["kendall_p"]) else f"{number['kendall_p']:.2g}",
        "yes" if row["best_kept"] else "no", f.fixed(number["regret"], 4), f"{flips} of {pairs:.0f}",
    ]  # fmt: skip


def _untested(before: str, after: str, rows: pd.DataFrame, sign: int) -> list[str]:
    one, other = sign * rows["before"], sign * rows["after"]
    tau, p = stats.kendalltau(one, other) if len(rows) >= FEWEST else (float("nan"), float("nan"))
    differences = np.subtract.outer(one.to_numpy(), one.to_numpy()) * np.subtract.outer(
        other.to_numpy(), other.to_numpy()
    )
    return [
        before, after, str(len(rows)), f.fixed(float(tau), 2), f.MISSING if f.missing(float(p)) else f"{p:.2g}",
        "yes" if one.idxmin() == other.idxmin() else "no", f.fixed(float(other[one.idxmin()] - other.min()), 4),
        f"{int((differences < 0).sum()) // 2} of {len(rows) * (len(rows) - 1) // 2}",
    ]  # fmt: skip


def agreement_count(info: AgreementInfo) -> str:
    n = max((len(rows) for _, _, rows in info.pairs), default=0)
    interval = "the 95% interval of tau is a bootstrap over architectures, from eight on" if len(info.tests) else \
        "the tests and intervals come when the search ends"  # fmt: skip
    return (
        f"n = up to {f.plural(n, 'architecture')} a pair of rungs, means over seeds; {interval}. The cost of the early "
        f"choice is in {METRICS[info.objective].rpartition(', ')[2]}."
    )
