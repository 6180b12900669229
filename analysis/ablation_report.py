"""`python -m analysis.ablation_report FOLDER` -> FOLDER/report.html: the arms of an ablation against its baseline.

FOLDER holds ablation.json and a run directory per arm, finished, going, failed or not begun.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import compared_cards, differences
from analysis.cards import configuration, health
from analysis.cards.trials_table import trials_table_html, trials_table_of
from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.page.page import page
from analysis.page.static_figures import write_beside
from analysis.page.tables import plain_table
from analysis.report import written
from analysis.run_cards import draw
from analysis.run_data import RunData, candidates, load_run
from minitron_search.messages.escaping import in_html, visible
from minitron_search.messages.failures import reading, run_command
from minitron_search.records.directory import ABLATION_FILE, ABLATION_TABLE, RunDirectory, replace_text, stage_seconds
from minitron_search.records.metrics import METRICS, scored

TESTS = ["arm", "metric", "tokens", "difference", "low", "high", "p_holm", "seeds_low", "seeds_high", "seeds_p_holm",
         "n", "seeds"]  # fmt: skip


class Ablation(NamedTuple):
    """What ablation.json asks, and the arms that have begun, each a run named after its arm.

    changes: what each arm changes; {} in an older file. broken: arm -> why its folder could not be read. tests: rows of
    ablation.parquet, which the ablation writes when its last arm has ended; empty until then.
    """

    name: str
    question: str
    figure: str
    baseline: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    tokens: int
    changes: dict[str, Any]
    tests: pd.DataFrame
    runs: dict[str, RunData]
    broken: dict[str, str]


def load_ablation(folder: Path) -> Ablation:
    """Load an ablation, finished or not. Raises ValueError where `folder` has no readable ablation.json."""
    path = folder / ABLATION_FILE
    try:
        definition: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        arms = tuple(str(arm) for arm in definition["arms"])
        header: dict[str, Any] = {
            "name": str(definition["name"]), "question": str(definition.get("question") or ""),
            "figure": str(definition.get("figure") or ""), "baseline": str(definition["baseline"]), "arms": arms,
            "seeds": tuple(int(seed) for seed in definition["seeds"]), "tokens": int(definition["tokens"]),
            "changes": dict(definition.get("changes") or {}),
        }  # fmt: skip
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}; an ablation's folder holds ablation.json with name, question, "
            "figure, baseline, arms, seeds and tokens, and a run directory per arm"
        ) from None
    runs, broken = {}, {}
    for arm in arms:
        if not (folder / arm).is_dir():
            continue
        try:
            runs[arm] = load_run(RunDirectory(folder / arm))._replace(name=arm)
        except ValueError as error:
            broken[arm] = str(error)
    try:
        written = folder / ABLATION_TABLE
        tests = pd.read_parquet(written) if written.exists() else pd.DataFrame(columns=TESTS)
        tests = tests[TESTS]
    except (OSError, ValueError, KeyError) as error:
        broken[ABLATION_TABLE], tests = f"{type(error).__name__}: {error}", pd.DataFrame(columns=TESTS)
    return Ablation(**header, tests=tests, runs=runs, broken=broken)


def students(run: RunData) -> pd.DataFrame:
    """Return the rows of the trials table that an arm is about: its candidates'. At one token count, one row a seed: of
    several, that of the lowest LM loss."""
    own = candidates(run.trials[np.isfinite(run.trials["lm_loss"])])
    return own.sort_values("lm_loss").drop_duplicates(["seed", "tokens"]).sort_values(["seed", "tokens"])


def compared_at(ablation: Ablation) -> tuple[float | None, dict[str, pd.DataFrame]]:
    """Return the largest token count that every arm with a student reached with the baseline, and their rows there."""
    students_of = {arm: rows for arm, run in ablation.runs.items() if len(rows := students(run))}
    if ablation.baseline not in students_of:
        return None, {}
    shared = set.intersection(*(set(rows["tokens"]) for rows in students_of.values()))
    if not shared:
        return None, {}
    tokens = max(shared)
    return tokens, {arm: rows[rows["tokens"] == tokens] for arm, rows in students_of.items()}


def question_card(ablation: Ablation) -> Card:
    title = "The question"
    read = "What was varied, and how far each arm is. All arms share tokens, seeds and validation text."
    tokens, rows = compared_at(ablation)
    lines = []
    for arm in ablation.arms:
        rows_of = students(ablation.runs[arm]) if arm in ablation.runs else pd.DataFrame(columns=["tokens", "seed"])
        last = rows_of[rows_of["tokens"] == rows_of["tokens"].max()]
        lines.append([
            arm + (" (baseline)" if arm == ablation.baseline else ""), _changed(ablation, arm), state(ablation, arm),
            f"{last['seed'].nunique()} of {len(ablation.seeds)}",
            f.tokens(rows_of["tokens"].max()) if len(rows_of) else f.MISSING,
            f.plus_minus(last["lm_loss"].mean(), last["lm_loss"].std(), 4) if len(rows_of) else f.MISSING,
        ])  # fmt: skip
    words = [ablation.question, f"In the paper: {ablation.figure}." if ablation.figure else ""]
    body = "".join(f'<p class="outcome">{in_html(line)}</p>' for line in words if line)
    if tokens is not None and tokens < ablation.tokens:
        body += (
            f'<p class="warning" role="note">Not finished: compared below at {f.tokens(tokens)} of '
            f"{f.tokens(ablation.tokens)} tokens, the most that every arm begun so far has reached.</p>"
        )
    heads = ("arm", "what it changes", "state", "seeds", "tokens", "LM loss ± standard deviation of seeds")
    sample = (
        f"n = {f.plural(len(ablation.arms), 'arm')}, {f.plural(len(ablation.seeds), 'seed')} each, "
        f"{f.tokens(ablation.tokens)} tokens a student. LM loss in nats per token."
    )
    return Card(title, read, sample, body + plain_table(heads, lines, (0, 1, 2)))


def _changed(ablation: Ablation, arm: str) -> str:
    changes = dict(configuration.dotted(ablation.changes.get(arm) or {}))
    return ", ".join(f"{key} {value}" for key, value in changes.items()) or f.MISSING


def state(ablation: Ablation, arm: str) -> str:
    """Return how far an arm is: not begun, not finished, finished, ..."""
    if arm in ablation.broken:
        return "unreadable"
    if arm not in ablation.runs:
        return "not begun"
    kinds = [event["event"] for event in ablation.runs[arm].events]
    last = max((place for place, kind in enumerate(kinds) if kind == "run_started"), default=0)
    if "run_failed" in kinds[last:]:
        return "failed"
    if "run_finished" in kinds[last:]:
        return "finished"
    done = students(ablation.runs[arm])
    done = done[done["tokens"] >= ablation.tokens]
    return "all students scored" if set(ablation.seeds) <= set(done["seed"]) else "not finished"


def differences_card(ablation: Ablation) -> Card:
    title = "Paired differences"
    read = (
        f"Every arm minus {ablation.baseline}, on the same windows: right of the line, or above it, is worse; for a "
        "margin or an accuracy, left is worse. Blue is the uncertainty for these students on other text, orange for "
        "students of other seeds on this text. Trust a difference that withstands both."
    )
    tokens, rows = compared_at(ablation)
    if tokens is None:
        return Card(title, read, reason=f"{ablation.baseline} and the other arms have no student at equal tokens yet.")
    by_tokens = differences_by_tokens(ablation, list(rows))
    table = by_tokens[by_tokens["tokens"] == tokens].drop(columns="tokens").reset_index(drop=True)
    if table.empty:
        return Card(title, read, reason="No other arm has scored the same windows yet.")
    table = table.assign(**corrected(ablation, table, tokens))
    words = "".join(f"<li>{in_html(line)}</li>" for line in differences.in_words(table, ablation.baseline))
    body = f"<ul>{words}</ul>"
    sample = (
        f"n = {int(table['windows'].max())} windows and up to {f.plural(int(table['seeds'].max()), 'shared seed')}, at "
        f"{f.tokens(tokens)} tokens; LM loss in nats per token. Intervals are Student’s, 95%, of paired differences, "
        f"each arm by itself; p, by the ablation itself when it ends, is corrected for {len(table)} arms (Holm)."
    )
    forest = differences.forest_plot(table, ablation.baseline)
    panels = [Panel("differences", forest, table, f"At {f.tokens(tokens)} tokens", columns=6)]
    if by_tokens["tokens"].nunique() > 1:
        figure = by_tokens_plot(ablation, by_tokens)
        panels.append(
            Panel("differences_by_tokens", figure, by_tokens, "By tokens; the band is the wider interval", columns=6)
        )
    for metric in (name for name in scored() if name != "lm_loss"):  # which way is worse is said on the card
        mine = ablation.tests[(ablation.tests["metric"] == metric) & (ablation.tests["tokens"] == tokens)]
        if len(mine):
            mine = mine.rename(columns={"n": "windows"}).reset_index(drop=True)
            figure = differences.forest_plot(mine, ablation.baseline, metric)
            panels.append(
                Panel(
                    f"differences_{metric}",
                    figure,
                    mine,
                    f"{f.capitalised(METRICS[metric].name)} at {f.tokens(tokens)} tokens",
                    columns=6,
                )
            )
    return Card(title, read, sample, body + _table(table), tuple(panels))


def corrected(ablation: Ablation, table: pd.DataFrame, tokens: float) -> dict[str, list[float]]:
    """Return `p_holm` and `seeds_p_holm` of the rows of `table`, as the ablation tested them; NaN where it has not, or
    where an arm has gone on since."""
    tests = ablation.tests
    at = tests[(tests["metric"] == "lm_loss") & (tests["tokens"] == tokens)].set_index("arm")
    columns: dict[str, list[float]] = {"p_holm": [], "seeds_p_holm": []}
    for row in table.to_dict("records"):
        known = row["arm"] in at.index and np.isclose(at.loc[row["arm"], "difference"], row["difference"], atol=1e-6)
        for name, values in columns.items():
            values.append(float(at.loc[row["arm"], name]) if known else float("nan"))
    return columns


def _table(table: pd.DataFrame) -> str:
    heads = ("arm", "difference (95% over windows)", "p", "95% over seeds", "p", "windows", "shared seeds")
    lines = [
        [
            row["arm"], differences.interval(row), _p(row["p_holm"]),
            f.MISSING if f.missing(row["seeds_low"]) else
            f"{f.fixed(row['seeds_low'], 3)} to {f.fixed(row['seeds_high'], 3)}",
            _p(row["seeds_p_holm"]), str(row["windows"]), str(row["seeds"]),
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    return plain_table(heads, lines)


def _p(value: float) -> str:
    return f.MISSING if f.missing(value) else f"{value:.2g}"


def differences_by_tokens(ablation: Ablation, arms: list[str]) -> pd.DataFrame:
    """Return `differences.differences` at every token count of the baseline, with the arms that have it, and a column
    `tokens`."""
    students_of = {arm: students(ablation.runs[arm]) for arm in arms}
    tables = []
    for tokens in sorted(students_of[ablation.baseline]["tokens"].unique()):
        losses = {
            arm: differences.window_losses(ablation.runs[arm], rows[rows["tokens"] == tokens])
            for arm, rows in students_of.items()
        }
        tables.append(differences.differences(losses, ablation.baseline).assign(tokens=tokens))
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def by_tokens_plot(ablation: Ablation, table: pd.DataFrame) -> go.Figure:
    """Draw every arm's difference by tokens; the band is the wider of the two intervals at each point."""
    figure = palette.new_figure(360)
    for place, arm in enumerate(ablation.arms):
        rows = table[table["arm"] == arm].sort_values("tokens")
        if rows.empty:
            continue
        low, high = rows[["low", "seeds_low"]].min(axis=1), rows[["high", "seeds_high"]].max(axis=1)
        hover = [
            f"{differences.interval(row)} nats per token over {row['windows']} windows"
            for row in rows.to_dict("records")
        ]
        _band(figure, place, arm, rows["tokens"], low, high)
        _line(figure, place, arm, rows["tokens"], rows["difference"], hover)
    figure.add_hline(0, line_color=palette.INK, line_width=1)
    figure.update_xaxes(title_text="tokens a student has seen", tickformat="~s")
    figure.update_yaxes(title_text="LM loss minus the baseline’s<br>(nats per token)")
    return figure


def _band(figure: go.Figure, place: int, arm: str, tokens: pd.Series, low: pd.Series, high: pd.Series) -> None:
    """Draw the band of the arm at `place`, faint, under its line."""
    figure.add_scatter(
        x=[*tokens, *tokens[::-1]], y=[*high, *low[::-1]], fill="toself", mode="lines", line={"width": 0},
        fillcolor=palette.faint(palette.series(place)[0]), hoverinfo="skip", showlegend=False,
        legendgroup=f.in_figure(arm),
    )  # fmt: skip


def _line(figure: go.Figure, place: int, arm: str, tokens: pd.Series, values: pd.Series, hover: list[str]) -> None:
    (colour, dash), name = palette.series(place), f.in_figure(arm)
    figure.add_scatter(
        x=tokens, y=values, mode="lines+markers", name=name, legendgroup=name,
        line={"color": colour, "dash": dash, "width": 2.2}, marker={"color": colour, "size": 6}, hoverinfo="text",
        hovertext=[
            f"<b>{name}</b><br>{f.tokens(count)} tokens<br>{label}" for count, label in zip(tokens, hover, strict=True)
        ],
    )  # fmt: skip


def curves_card(ablation: Ablation) -> Card:
    title = "LM loss by tokens"
    read = (
        "The mean over seeds of each arm, at every token count it was scored at; the band reaches from the lowest seed "
        "to the highest."
    )
    figure, data = palette.new_figure(440), []
    for place, arm in enumerate(ablation.arms):
        if arm not in ablation.runs or not len(rows := students(ablation.runs[arm])):
            continue
        by_tokens = rows.groupby("tokens")["lm_loss"].agg(["mean", "min", "max", "count"]).reset_index()
        if (by_tokens["count"] > 1).any():
            _band(figure, place, arm, by_tokens["tokens"], by_tokens["min"], by_tokens["max"])
        hover = [
            f"LM loss {f.fixed(row['mean'], 4)} ({f.fixed(row['min'], 4)} to {f.fixed(row['max'], 4)}, "
            f"{f.plural(int(row['count']), 'seed')})"
            for row in by_tokens.to_dict("records")
        ]
        _line(figure, place, arm, by_tokens["tokens"], by_tokens["mean"], hover)
        data.append(by_tokens.assign(arm=arm))
    if not data:
        return Card(title, read, reason="No student has been scored yet.")
    _teacher(figure, ablation)
    figure.update_xaxes(title_text="tokens a student has seen", tickformat="~s")
    figure.update_yaxes(title_text="validation LM loss (nats per token)")
    both = pd.concat(data, ignore_index=True)
    sample = f"n = {f.plural(int(both['count'].max()), 'seed')} at most at a point."
    return Card(title, read, sample, panels=(Panel("lm_loss_by_tokens", figure, both),))


def _teacher(figure: go.Figure, ablation: Ablation) -> None:
    losses = [run.trials.loc[run.trials["arm"] == "teacher", "lm_loss"].min() for run in ablation.runs.values()]
    known = [loss for loss in losses if np.isfinite(loss)]
    if known and max(known) - min(known) < 1e-3:  # where the teacher is what is varied, there is no one line
        figure.add_hline(
            y=known[0], line={"color": palette.INK, "width": 1, "dash": "dot"},
            annotation={"text": f"teacher {f.fixed(known[0], 3)}", "font": {"size": 12, "color": palette.INK}},
        )  # fmt: skip


def trials_card(ablation: Ablation) -> Card:
    title = "Students"
    read = "One row per trial of every arm at its last rung. Click a heading to sort."
    runs = list(ablation.runs.values())
    if not runs or (info := trials_table_of(runs)).rows.empty:
        return Card(title, read, reason="No trial has a row yet.")
    sample = f"n = {f.plural(len(info.rows), 'trial')}; ± is one standard error over windows or examples."
    return Card(title, read, sample, trials_table_html(info, "arm of the ablation"), data=(("trials", info.all_rungs),))


def cost_card(ablation: Ablation) -> Card:
    title = "Cost"
    read = "What each arm cost. Time in stages is wall time; what was already in the cache cost nothing again."
    rows = []
    for arm, run in ablation.runs.items():
        last = run.trials.groupby("trial")["tokens"].max()
        stages = stage_seconds(run.events)
        flops = [event["flops"] for event in run.events if event["event"] == "stage_finished" and event.get("flops")]
        rows.append({
            "arm": arm, "trials": len(last), "tokens": float(last.sum()), "trial_seconds": run.trials["seconds"].sum(),
            "stage_seconds": sum(stages.values()) if stages else float("nan"),
            "flops": float(sum(flops)) if flops else float("nan"),
        })  # fmt: skip
    if not rows:
        return Card(title, read, reason="No arm has begun.")
    table = pd.DataFrame(rows)
    lines = [
        [row["arm"], f.integer(row["trials"]), f.tokens(row["tokens"]), f.duration(row["trial_seconds"]),
         f.duration(row["stage_seconds"]), f.MISSING if f.missing(row["flops"]) else f"{row['flops']:.3g}"]
        for row in rows
    ]  # fmt: skip
    heads = ("arm", "trials", "tokens trained on", "training and scoring", "all stages", "FLOPs")
    return Card(title, read, f"n = {f.plural(len(rows), 'arm')}.", plain_table(heads, lines), data=(("cost", table),))


def configuration_card(ablation: Ablation) -> Card:
    title = "Differences of configuration"
    read = "Every setting that differs between the arms: what was varied, and nothing else."
    if len(ablation.runs) < 2:
        return Card(title, read, reason="Fewer than two arms have started.")
    return compared_cards.configuration_card(list(ablation.runs.values()))._replace(title=title, how_to_read=read)


def health_card(ablation: Ablation) -> Card:
    title, read = "Health", "What was checked in each arm, and what was found."
    broken = "".join(f"<li>{in_html(f'{arm}: {why}')}</li>" for arm, why in ablation.broken.items())
    body = f'<ul class="warning">{broken}</ul>' if broken else ""
    if not ablation.runs:
        return Card(title, read, body=body) if body else Card(title, read, reason="No arm has begun.")
    card = compared_cards.health_card(list(ablation.runs.values()))
    return card._replace(how_to_read=read, sample=f"n = {f.plural(len(ablation.runs), 'arm')}.", body=body + card.body)


CARDS: dict[str, Callable[[Ablation], Card]] = {
    "question": question_card,
    "differences": differences_card,
    "curves": curves_card,
    "trials": trials_card,
    "cost": cost_card,
    "health": health_card,
    "configuration": configuration_card,
}


def write_ablation_report(folder: Path) -> Path:
    """Write `report.html` in `folder` from what its arms have left so far, and return its path.

    Raises ValueError where there is no readable ablation.json.
    """
    path, ablation = folder / "report.html", load_ablation(folder)
    replace_text(path, page(ablation.name, facts(ablation), draw(CARDS, ablation), written(), "report of an ablation"))
    return path


def facts(ablation: Ablation) -> list[str]:
    """Return the short lines under the page's name."""
    ended = [run for run in ablation.runs.values() if run.events]
    begun = [health.health_info(run).events for run in ended]
    return [
        ablation.figure,
        f"{f.plural(len(ablation.arms), 'arm')}, {f.plural(len(ablation.seeds), 'seed')} each, "
        f"{f.tokens(ablation.tokens)} tokens a student",
        health.span(pd.concat(begun)) if begun else "",
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.ablation_report", description="Write FOLDER/report.html.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder of an ablation, finished or not")
    parser.add_argument(
        "--figures", action="store_true", help="also every figure as SVG and PNG, in FOLDER/report_figures"
    )
    return run_command(lambda: report(parser.parse_args(arguments)))


def report(chosen: argparse.Namespace) -> int:
    """Write the page that the arguments ask for; return the exit status."""
    folder = chosen.folder.expanduser()
    with reading(str(folder), "the folder of an ablation as `python -m minitron_search.run` writes it"):
        path = write_ablation_report(folder)
    print(visible(path))
    if chosen.figures:
        write_beside(path, draw(CARDS, load_ablation(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
