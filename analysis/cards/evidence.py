"""How sure the search may be of its winner: paired tests of the finalists, its controls, what early rungs predicted."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.page.tables import plain_table
from analysis.run_data import RunData, candidates
from minitron_search.messages.escaping import in_html
from minitron_search.records.metrics import METRICS, scored

ARMS = {
    "random_pruned": ("random pruning", palette.RANDOM_PRUNED),
    "random_init": ("random weights", palette.RANDOM_INIT),
    "untrained": ("untrained trim", palette.UNTRAINED),
    "teacher": ("teacher", palette.TEACHER),
}


def finalists(evidence: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row per architecture of the last rung, best first; differences from the best are on the same windows (or
    twin questions), with their 95% interval."""
    rows = []
    for entry in evidence["finalists"]:
        tests = {metric: entry.get(f"{metric}_against_best") or {} for metric in scored()}
        rows.append({
            "architecture": entry["architecture"],
            evidence["objective"]: entry[evidence["objective"]],
            "stderr": entry.get("stderr"),
            "seeds": entry["seeds"],
            "error_over_seeds": entry["error_over_seeds"],
            **{f"{metric}_{name}": test.get(key) for metric, test in tests.items() for name, key in (
                ("minus_best", "difference"), ("low", "low"), ("high", "high"), ("p", "p"), ("p_holm", "p_holm"),
                ("n", "n"))},
            **{f"{metric}_p_over_seeds": (test.get("over_seeds") or {}).get("p") for metric, test in tests.items()},
        })  # fmt: skip
    return pd.DataFrame(rows)


def controls(evidence: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row per promoted architecture and control: the control's LM loss and margin, and how far they are above
    the candidate's on the same windows and questions, with the 95% interval."""
    rows = []
    for entry in evidence.get("controls", []):
        for control in entry["controls"]:
            candidate_precision = entry["candidate"]["precision"]
            row = {"architecture": entry["architecture"], "arm": control["arm"], "tokens": control["tokens"],
                   "precision": control["precision"], "candidate_precision": candidate_precision}  # fmt: skip
            for metric in ("lm_loss", "winogrande_margin"):
                test = control["against_candidate"].get(metric) or {}
                row |= {metric: control[metric], f"{metric}_minus_candidate": test.get("difference")}
                row |= {f"{metric}_{key}": test.get(key) for key in ("low", "high", "p", "n")}
            rows.append(row)
    return pd.DataFrame(rows)


def rungs(evidence: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row per pair of rungs: how well the order of the first predicted that of the second."""
    rows = []
    for entry in evidence["rungs"]:
        low, high = entry.get("kendall_interval") or (None, None)
        rows.append({
            **{key: value for key, value in entry.items() if key not in ("flips", "top", "kendall_interval")},
            "kendall_low": low, "kendall_high": high,
            **{f"top_{top['k']}_{key}": top[key] for top in entry.get("top", []) for key in ("shared", "by_chance")},
            "flips": "; ".join(" and ".join(pair) for pair in entry["flips"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def split_words(evidence: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return evidence.json's sentences in two parts: those on how rungs predicted each other, and the others."""
    steps = (f"{entry['before']} to {entry['after']}, " for entry in evidence["rungs"])
    starts = (*steps, "Only what a rung let go on")
    of_rungs = [line for line in evidence["words"] if line.startswith(starts)]
    return of_rungs, [line for line in evidence["words"] if line not in of_rungs]


def paragraphs(words: Iterable[str]) -> str:
    return "".join(f"<p>{in_html(line)}</p>" for line in words)


def differences_plot(table: pd.DataFrame, objective: str) -> go.Figure:
    """Draw how far the finalists are above the best in the objective, with the 95% interval of the paired
    difference."""
    others = table.dropna(subset=[f"{objective}_minus_best"])
    figure = palette.new_figure(120 + 28 * len(others))
    figure.add_scatter(
        **_intervals(others, objective, "minus_best"), y=others["architecture"].map(f.in_figure), mode="markers",
        marker={"color": palette.BLUE, "size": 9}, name="",
        customdata=others[[f"{objective}_p_holm", f"{objective}_n"]],
        hovertemplate="%{y}<br>%{x:.4f} above<br>p %{customdata[0]:.2g} (Holm), n %{customdata[1]}<extra></extra>",
    )  # fmt: skip
    figure.add_vline(0, line_color=palette.INK, line_width=1)
    figure.update_yaxes(type="category", autorange="reversed")  # the best of them on top
    figure.update_xaxes(title_text=f"{METRICS[objective].title} minus the best’s, with its 95% interval")
    return figure


def controls_plot(table: pd.DataFrame) -> go.Figure:
    """Draw the controls' LM loss above their candidate's, with the 95% interval of the paired difference."""
    rows = table.dropna(subset=["lm_loss_minus_candidate"])
    several = rows["architecture"].nunique() > 1
    figure = palette.new_figure(140 + 28 * len(rows))
    for arm, (name, (colour, symbol)) in ARMS.items():
        of_arm = rows[rows["arm"] == arm]
        if len(of_arm):
            figure.add_scatter(
                **_intervals(of_arm, "lm_loss", "minus_candidate"),
                y=[name + (f", {f.in_figure(which)}" if several else "") for which in of_arm["architecture"]],
                mode="markers", marker={"color": colour, "symbol": symbol, "size": 11}, name=name, showlegend=False,
                customdata=of_arm[["lm_loss", "lm_loss_p", "lm_loss_n"]],
                hovertemplate="%{y}: %{customdata[0]:.3f}<br>%{x:.4f} nats above the candidate<br>"
                "p %{customdata[1]:.2g}, n %{customdata[2]}<extra></extra>",
            )  # fmt: skip
    figure.add_vline(0, line_color=palette.INK, line_width=1)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_xaxes(title_text="LM loss − the candidate’s (nats per token, 95%)")
    return figure


def _intervals(rows: pd.DataFrame, metric: str, name: str) -> dict[str, Any]:
    """Return values and the bars around them; an interval need not be equal on both sides."""
    at = rows[f"{metric}_{name}"]
    bars = {"array": rows[f"{metric}_high"] - at, "arrayminus": at - rows[f"{metric}_low"]}
    return {"x": at, "error_x": {"type": "data", "symmetric": False, "thickness": 1.5, **bars}}


def sample(table: pd.DataFrame) -> str:
    n = table["lm_loss_n"].dropna() if len(table) else table
    windows = f", {int(n.max())} windows" if len(n) else ""
    return f"{f.plural(len(table), 'architecture')} at the last rung{windows}; p of several others is Holm’s."


FEWEST = 3  # architectures; two cannot disagree with chance


class AgreementInfo(NamedTuple):
    """What the card shows. pairs: (before, after, rows) for every two neighbouring rungs that more than one
    architecture reached; a row per architecture of both: `before` and `after` in `objective`, means over its seeds,
    `promoted`, `hover`. tests: those of `rungs`; empty while the run goes on."""

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
    title = METRICS[info.objective].title
    figure.update_xaxes(title_text=f"{title} at {before}")
    figure.update_yaxes(title_text=f"{title} at {after}")
    return figure


def agreement_html(info: AgreementInfo) -> str:
    """Return a row per pair of rungs: what the run's own tests say, or, while it goes on, Kendall's tau alone."""
    if len(info.tests):
        lines = [_tested(row) for row in info.tests.to_dict("records")]
    else:
        sign = METRICS[info.objective].sign  # lower is better from here on
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
        f"choice is in {METRICS[info.objective].unit}."
    )


def evidence_card(run: RunData) -> Card:
    title = "Ablations and controls"
    read = (
        "Paired differences: right of the line is worse than the winner on the same windows (for a margin, better); "
        "where the interval crosses the line, it could be chance. The controls say what pruning by importance is "
        "worth: same shape, same tokens, but no ranking or no weights (Figure 6 of 2408.11796)."
    )
    if not run.evidence:
        return Card(title, read, reason="No evidence.json: the search has not ended.")
    evidence, objective = run.evidence, run.evidence["objective"]
    table, beside = finalists(evidence), controls(evidence)
    panels = []
    if len(beside) and beside["lm_loss_minus_candidate"].notna().any():
        panels.append(Panel("controls", controls_plot(beside), beside, "Controls"))
    if len(table) and table[f"{objective}_minus_best"].notna().any():
        panels.append(Panel("finalists", differences_plot(table, objective), table, "Finalists"))
    words = split_words(evidence)[1]
    if not panels and not words:
        return Card(title, read, reason="The search ended with one architecture and no controls: nothing to compare.")
    return Card(title, read, sample(table), paragraphs(words), tuple(panels))


def agreement_card(run: RunData) -> Card:
    title = "Rank agreement"
    read = (
        "Each point is an architecture: an early rung to the right, the next one upwards. The closer the points are to "
        "a rising line, the better the early rung predicted the later. Only what a rung let go on is ranked again, so "
        "the points are alike and tau is lower than it would be over all architectures."
    )
    info = agreement_info(run)
    if not info.pairs:
        return Card(
            title, read, reason="No two architectures have reached the same two rungs, so there is no order to compare."
        )
    panels = tuple(
        Panel(
            f"agreement_{place}",
            agreement_plot(info, before, after, rows),
            rows.drop(columns="hover"),
            f"{before} to {after}",
        )
        for place, (before, after, rows) in enumerate(info.pairs)
    )
    data = (("rungs", info.tests),) if len(info.tests) else ()
    words = split_words(run.evidence)[0] if run.evidence else []
    body = paragraphs(words) + agreement_html(info)
    return Card(title, read, agreement_count(info), body, panels, data)
