"""Several runs on one page: the same cards in the same order, each with what can be put side by side."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from analysis import differences
from analysis.cards import configuration, convergence, depth, evidence, health, pareto, search_axes, spend
from analysis.cards.evidence import agreement_info
from analysis.cards.trials_table import trials_table_html, trials_table_of
from analysis.outcome.benchmark_tables import tables_comparison
from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.page.tables import plain_table
from analysis.run_cards import draw
from analysis.run_data import RunData, best_candidate, candidates, of_arm
from minitron_search.messages.escaping import in_html
from minitron_search.records.directory import stage_seconds
from minitron_search.records.metrics import METRICS
from minitron_search.records.summary import against_trims, harm_sentences

Runs = Sequence[RunData]


def outcome(run: RunData) -> dict[str, object]:
    """Return one run in a line: what it found, how that scores, what it took."""
    teacher, best = of_arm(run.trials, "teacher"), best_candidate(run.trials)
    row = None if best is None else best[0]
    retrained = None if row is None else of_arm(run.trials, "retrained", str(row["architecture"]))
    seconds = stage_seconds(run.events)
    line: dict[str, object] = {"run": run.name, "candidates": candidates(run.trials)["trial"].nunique()}
    for name, source in (("teacher", teacher), ("best", row), ("retrained", retrained)):
        for column in ("lm_loss", "lm_loss_stderr", "params", "tokens"):
            line[f"{name}_{column}"] = float("nan") if source is None else source[column]
    shape = "" if row is None else str(row["architecture"])
    return {**line, "architecture": shape, "hours": sum(seconds.values()) / 3600 if seconds else float("nan")}


def summary_card(runs: Runs) -> Card:
    title, read = "Summary", "A row a run. Compare losses only where validation text and tokens are the same."
    table = pd.DataFrame([outcome(run) for run in runs])
    lines = [
        [
            row["run"], row["architecture"] or f.MISSING, f.millions(row["best_params"]),
            f.plus_minus(row["teacher_lm_loss"], row["teacher_lm_loss_stderr"], 3),
            f.plus_minus(row["best_lm_loss"], row["best_lm_loss_stderr"], 3), f.tokens(row["best_tokens"]),
            f.plus_minus(row["retrained_lm_loss"], row["retrained_lm_loss_stderr"], 3),
            f.tokens(row["retrained_tokens"]), f.integer(row["candidates"]), f.duration(3600 * row["hours"]),
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    heads = ("run", "best architecture", "parameters", "teacher’s LM loss", "candidate’s LM loss", "its tokens",
             "retrained LM loss", "its tokens", "candidates", "time")  # fmt: skip
    sample = f"n = {f.plural(len(runs), 'run')}. LM loss in nats per token, ± one standard error over windows."
    said = warning(runs) + "".join(map(harm_warning, runs))
    return Card(title, read, sample, said + plain_table(heads, lines, (0, 1)), data=(("summary", table),))


def harm_warning(run: RunData) -> str:
    """Say which students of a run training made worse than their untrained trims; "" for none."""
    said = harm_sentences(against_trims(run.trials.to_dict("records"), run.scores))
    return "".join(f'<p class="warning" role="note">{in_html(f"{run.name}: {line}")}</p>' for line in said)


def warning(runs: Runs) -> str:
    """Say why the losses of these runs are not comparable; "" where they are of the same text."""
    other = configuration.other_windows(runs)
    if not other:
        return ""
    return (
        f'<p class="warning" role="note">These runs differ in {in_html(", ".join(other))}: their validation '
        "windows are not the same, so their losses are not to be compared, and are not paired below.</p>"
    )


def pareto_card(runs: Runs) -> Card:
    title = "Pareto fronts"
    read = (
        "A colour a run, with the front of the highest rung that several of its candidates share. Fronts at different "
        "tokens (see the legend) say nothing about shapes."
    )
    infos = [pareto.pareto_info(run) for run in runs]
    panels = []
    for axis in pareto.AXES:
        first = axis == pareto.AXES[0]
        figure, rows = palette.new_figure(440 if first else 320, showlegend=first), []
        for place, (run, info) in enumerate(zip(runs, infos, strict=True)):
            level = info.level[np.isfinite(info.level[axis.column])]
            if level.empty:
                continue
            front = pareto.pareto_front(level, axis)
            colour, dash = palette.series(place)
            name = f.in_figure(run.name)
            figure.add_scatter(
                x=level[axis.column] / axis.unit, y=level["lm_loss"], mode="markers", legendgroup=name,
                showlegend=False, marker={"color": colour, "size": 6, "symbol": "circle-open"}, hoverinfo="text",
                hovertext=[f"<b>{name}</b><br>{f.hover(row)}" for row in level.to_dict("records")],
            )  # fmt: skip
            figure.add_scatter(
                x=front[axis.column] / axis.unit, y=front["lm_loss"], mode="lines+markers", legendgroup=name,
                name=f"{name}, {f.tokens(level['tokens'].max())} tokens", hoverinfo="skip",
                line={"color": colour, "dash": dash, "width": 1.8, "shape": "hv"}, marker={"color": colour, "size": 8},
            )  # fmt: skip
            rows.append(level.assign(run=run.name, on_front=level["trial"].isin(front["trial"])))
        if rows:
            figure.update_xaxes(title_text=axis.title)
            figure.update_yaxes(title_text="validation LM loss (nats per token)")
            wide = 6 if first else 2
            panels.append(Panel(f"pareto_{axis.column}", figure, pd.concat(rows), axis.name, wide))
    if not panels:
        return Card(title, read, reason="No run has a candidate that finished a rung with a finite LM loss yet.")
    n = ", ".join(f"{len(info.level)} of {run.name}" for run, info in zip(runs, infos, strict=True))
    return Card(title, read, f"n = candidates at the shared rung: {n}.", panels=tuple(panels))


def convergence_card(runs: Runs) -> Card:
    title = "Convergence"
    read = (
        "The lowest LM loss so far at the last rung that several candidates of a run reached, against the tokens that "
        "all of its candidates had trained on by then. Lower and further left is a better search."
    )
    figure, rows = palette.new_figure(420), []
    for place, run in enumerate(runs):
        finished = convergence.convergence_info(run).rows
        level = finished[finished["rung"] == pareto.common_rung(run.trials)] if len(finished) else finished
        if level.empty:
            continue
        colour, dash = palette.series(place)
        figure.add_scatter(
            x=level["spent"], y=level["best"], mode="lines+markers", hovertext=level["hover"], hoverinfo="text",
            name=f"{f.in_figure(run.name)}, {f.tokens(level['tokens'].max())} tokens a candidate",
            line={"color": colour, "dash": dash, "width": 2.2, "shape": "hv"}, marker={"color": colour, "size": 6},
        )  # fmt: skip
        rows.append(level.drop(columns="hover").assign(run=run.name))
    if not rows:
        return Card(title, read, reason="No run has a candidate that finished a rung yet.")
    figure.update_xaxes(title_text="tokens trained on by all candidates", rangemode="tozero", tickformat="~s")
    figure.update_yaxes(title_text="lowest LM loss so far (nats per token)")
    sample = f"n = {f.plural(len(rows), 'run')} with a scored candidate."
    return Card(title, read, sample, panels=(Panel("convergence", figure, pd.concat(rows)),))


def depth_card(runs: Runs) -> Card:
    title = "Depth"
    read = "Each metric of the depth sweep by where the removed block starts; a colour a run, a dash pattern a length."
    infos = [(run, depth.depth_info(run)) for run in runs if len(run.depth)]
    if not infos:
        return Card(title, read, reason="No run has a depth.parquet.")
    panels = []
    for metric in [metric for metric in METRICS if any(metric in info.metrics for _, info in infos)]:
        figure = palette.new_figure(360)
        for place, (run, info) in enumerate(infos):
            for which, length in enumerate(info.lengths):
                rows = depth.of(info, metric, "contiguous", length)
                if len(rows):
                    figure.add_scatter(
                        x=rows["start"], y=rows["value"], mode="lines+markers", marker={"size": 4},
                        line={"color": palette.series(place)[0], "dash": palette.DASHES[which % len(palette.DASHES)]},
                        name=f"{f.in_figure(run.name)}, {f.plural(length, 'layer')}", hovertext=rows["hover"],
                        hoverinfo="text",
                    )  # fmt: skip
        figure.update_xaxes(title_text="first removed layer (0 is the first)", showgrid=False)
        figure.update_yaxes(title_text=f.capitalised(METRICS[metric].title))
        data = pd.concat(
            [info.rows[info.rows["metric"] == metric].drop(columns="hover").assign(run=run.name) for run, info in infos]
        )
        panels.append(Panel(f"depth_{metric}", figure, data, f.capitalised(METRICS[metric].name)))
    counts = "; ".join(f"{run.name}: {depth.depth_count(info).partition('.')[0]}" for run, info in infos)
    return Card(title, read, f"{counts}.", panels=tuple(panels))


def importance_card(runs: Runs) -> Card:
    title = "Importance"
    read = (
        "Block importance of each single layer, a colour a run: a low point is a layer that changes the residual "
        "stream little."
    )
    figure, rows = palette.new_figure(340), []
    for place, run in enumerate(runs):
        if run.importance is not None:
            bi = np.diagonal(run.importance.block_bi, 1)
            colour, dash = palette.series(place)
            figure.add_scatter(
                y=bi, mode="lines+markers", name=f.in_figure(run.name), line={"color": colour, "dash": dash},
                marker={"color": colour, "size": 5},
            )  # fmt: skip
            rows.append(pd.DataFrame({"run": run.name, "layer": range(bi.size), "bi": bi}))
    if not rows:
        return Card(title, read, reason="No run has a readable importance.safetensors.")
    figure.update_xaxes(title_text="layer", showgrid=False)
    figure.update_yaxes(title_text="block importance (1 − cosine)", rangemode="tozero")
    sample = f"n = {f.plural(len(rows), 'run')}; heat-maps of neurons and heads are in each run’s own report."
    return Card(title, read, sample, panels=(Panel("layer_importance", figure, pd.concat(rows)),))


def axes_card(runs: Runs) -> Card:
    title = "Axes of the search"
    read = "How much each axis mattered for the LM loss, run by run: PED-ANOVA’s share, and its range over resamples."
    tables = []
    for run in runs:
        info = search_axes.axes_info(run)
        if info is not None and len(info.rows) >= search_axes.FEWEST and info.varied:
            tables.append((run, search_axes.importances(info)))
    if not tables:
        return Card(title, read, reason=f"No run has {search_axes.FEWEST} scored architectures at one rung.")
    figure = palette.new_figure(140 + 40 * max(len(table) for _, table in tables), barmode="group")
    for place, (run, table) in enumerate(tables):
        figure.add_bar(
            x=table["importance"], y=table["axis"], orientation="h", name=f.in_figure(run.name),
            marker={"color": palette.series(place)[0]},
            error_x={"type": "data", "symmetric": False, "array": table["importance_high"] - table["importance"],
                     "arrayminus": table["importance"] - table["importance_low"], "thickness": 1.2,
                     "color": palette.MUTED},
        )  # fmt: skip
    figure.update_xaxes(title_text="share of the importance, of 1", range=[0, 1])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    data = pd.concat([table.assign(run=run.name) for run, table in tables])
    return Card(title, read, f"n = {f.plural(len(tables), 'run')}.", panels=(Panel("axis_importance", figure, data),))


def differences_card(runs: Runs) -> Card:
    title = "Ablations and controls"
    first = runs[0]
    read = (
        f"The best student of each run against that of {first.name}, on the same validation windows: right of the "
        "line is worse. An interval that crosses it could be chance. What each run’s own controls say is below."
    )
    panels, body, sample = [], "", ""
    if other := configuration.other_windows(runs):
        body = f"<p>Not paired: the runs differ in {in_html(', '.join(other))}, so their windows are not the same.</p>"
    else:
        students, tokens = {}, {}
        for run in runs:
            row = student(run)
            if len(row):
                students[run.name] = differences.window_losses(run, row)
                tokens[run.name] = row["tokens"].max()
        table = differences.differences(students, first.name) if first.name in students else pd.DataFrame()
        if len(table):
            panels.append(Panel("differences", differences.forest_plot(table, first.name), table, "Best students"))
            words = "".join(f"<li>{in_html(line)}</li>" for line in differences.in_words(table, first.name))
            unequal = "" if len(set(tokens.values())) == 1 else (
                '<p class="warning" role="note">Not at equal tokens: '
                + in_html(", ".join(f"{name} {f.tokens(count)}" for name, count in tokens.items()))
                + ". A difference is also due to the tokens.</p>"
            )  # fmt: skip
            body = f"{unequal}<ul>{words}</ul>"
            sample = f"n = {int(table['windows'].max())} windows; differences in nats per token."
    controls = [(run, evidence.controls(run.evidence)) for run in runs if run.evidence]
    controls = [(run, table) for run, table in controls if len(table)]
    if controls:
        data = pd.concat([table.assign(run=run.name) for run, table in controls])
        lines = [
            [run.name, row["arm"], row["architecture"],
             differences.interval({"difference": row["lm_loss_minus_candidate"], "low": row["lm_loss_low"],
                                   "high": row["lm_loss_high"]})]
            for run, table in controls for row in table.dropna(subset=["lm_loss_minus_candidate"]).to_dict("records")
        ]  # fmt: skip
        heads = ("run", "control", "architecture", "LM loss minus the candidate’s (95%)")
        body += "<h3>Controls of each run</h3>" + plain_table(heads, lines, (0, 1, 2))
        return Card(title, read, sample, body, tuple(panels), (("controls", data),))
    if not panels and not body:
        return Card(title, read, reason="No two runs have students whose windows can be paired, and none has controls.")
    return Card(title, read, sample, body, tuple(panels))


def student(run: RunData) -> pd.DataFrame:
    """Return the retrained student of the best candidate, or else that candidate: a row of the trials table, or
    none."""
    best = best_candidate(run.trials)
    if best is None:
        return run.trials.iloc[:0]
    retrained = of_arm(run.trials, "retrained", str(best[0]["architecture"]))
    return pd.DataFrame([best[0] if retrained is None else retrained])


def agreement_card(runs: Runs) -> Card:
    title = "Rank agreement"
    read = "How well the order of an early rung predicted that of the next, run by run: 1 is perfectly, 0 not at all."
    rows = []
    for run in runs:
        tests = agreement_info(run).tests
        rows += [{"run": run.name, **row} for row in tests.to_dict("records")]
    if not rows:
        return Card(title, read, reason="No run has ended with two architectures at the same two rungs.")
    table = pd.DataFrame(rows)
    lines = [
        [row["run"], row["before"], row["after"], f"{row['n']} of {row['before_n']}",
         f.fixed(f.number(row["kendall"]), 2), "yes" if row["best_kept"] else "no", f.fixed(f.number(row["regret"]), 4)]
        for row in rows
    ]  # fmt: skip
    heads = ("run", "from", "to", "architectures", "Kendall’s tau", "best stayed best", "cost of the early choice")
    sample = f"n = {len(rows)} pairs of rungs; the cost is in the unit of each run’s objective."
    return Card(title, read, sample, plain_table(heads, lines, (0, 1, 2, 5)), data=(("rungs", table),))


def spend_card(runs: Runs) -> Card:
    title = "Spend against forecast"
    read = "Wall time of every stage of every run beside its forecast; a dash where there was no forecast."
    rows = [
        spend.spend_info(run).rows.assign(run=run.name) for run in runs if run.forecast or stage_seconds(run.events)
    ]
    rows = [table_of_run for table_of_run in rows if len(table_of_run)]
    if not rows:
        return Card(title, read, reason="No run has a forecast.json, or has begun a stage.")
    table = pd.concat(rows, ignore_index=True)
    heads = ("run", "stage", "time forecast", "time spent", "spent / forecast", "tokens spent", "FLOPs spent")
    lines = [
        [row["run"], row["stage"], f.duration(3600 * row["forecast_hours"]), f.duration(3600 * row["spent_hours"]),
         f.fixed(row["ratio"], 2), f.tokens(row["spent_tokens"]), spend.quantity("flops", row["spent_flops"])]
        for row in table.to_dict("records")
    ]  # fmt: skip
    figure = palette.new_figure(340, barmode="stack")
    stages = list(dict.fromkeys(table["stage"]))
    for place, stage in enumerate(stages):
        of_stage = table[table["stage"] == stage]
        figure.add_bar(
            x=of_stage["spent_hours"] * 60, y=[f.in_figure(name) for name in of_stage["run"]], orientation="h",
            name=f.in_figure(stage), marker={"color": palette.series(place)[0]},
        )  # fmt: skip
    figure.update_layout(height=140 + 40 * len(rows))
    figure.update_xaxes(title_text="minutes of wall time")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return Card(title, read, f"n = {f.plural(len(rows), 'run')}.", plain_table(heads, lines, (0, 1)),
                (Panel("spend", figure, table),))  # fmt: skip


def health_card(runs: Runs) -> Card:
    title, read = "Health", "What was checked in each run, and what was found; details are in its own report."
    infos = [(run.name, health.health_info(run)) for run in runs]
    rows = ""
    for name, info in infos:
        amiss = [check for check in info.checks if check.well is False]
        unknown = [check.name for check in info.checks if check.well is None]
        cells = "".join(
            f'<div class="mark look">{in_html(check.name)}: {in_html(check.found)}</div>' for check in amiss
        )
        known = len(info.checks) - len(amiss) - len(unknown)
        cells += f'<div class="mark well">{f.plural(known, "other check")}</div>' if known else ""
        cells += f'<div class="mark unknown">not known: {in_html(", ".join(unknown))}</div>' if unknown else ""
        rows += f'<tr><th scope="row">{in_html(name)}</th><td>{cells}</td></tr>'
    failed = "".join(
        f"<li>{in_html(f'{name}: {trial}: {message}')}</li>"
        for name, info in infos for trial, message in info.failed
    )  # fmt: skip
    failures = f'<h3>Failed trials</h3><ul class="warning">{failed}</ul>' if failed else ""
    table = f'<div class="scroll"><table class="plain wrapped"><tbody>{rows}</tbody></table></div>'
    return Card(title, read, f"n = {f.plural(len(runs), 'run')}.", table + failures)


def trials_card(runs: Runs) -> Card:
    title = "Trials"
    read = "One row per trial at its last rung. Click a heading to sort; compare trials of one rung of one run only."
    info = trials_table_of(runs)
    if info.rows.empty:
        return Card(title, read, reason="No run has a trial with a row yet.")
    sample = f"n = {f.plural(len(info.rows), 'trial')} of {f.plural(len(runs), 'run')}; ± is one standard error."
    return Card(title, read, sample, trials_table_html(info, "run"), data=(("trials", info.all_rungs),))


def configuration_card(runs: Runs) -> Card:
    title, read = "Configuration and environment", "Settings, versions and machines that differ between the runs."
    table = configuration.differing(runs)
    if table.empty:
        return Card(title, read, reason="Nothing differs but names and folders.")
    lines = [
        [str(row["key"]), str(row["file"]), *(str(row[run.name]) for run in runs)] for row in table.to_dict("records")
    ]
    heads = ("key", "file", *(run.name for run in runs))
    sample = f"n = {f.plural(len(table), 'key')} that differ, of {f.plural(len(runs), 'run')}."
    body = plain_table(heads, lines, tuple(range(len(heads)))).replace("plain", "plain wrapped", 1)
    return Card(title, read, sample, body, data=(("configuration", table),))


COMPARISONS: dict[str, Callable[[Runs], Card]] = {
    "summary": summary_card,
    "pareto": pareto_card,
    "convergence": convergence_card,
    "depth": depth_card,
    "importance": importance_card,
    "axes": axes_card,
    "differences": differences_card,
    "tables": tables_comparison,
    "agreement": agreement_card,
    "spend": spend_card,
    "health": health_card,
    "trials": trials_card,
    "configuration": configuration_card,
}


def compare(runs: Runs) -> list[Card]:
    """Return every card of several runs, which have names of their own (`differences.labelled`)."""
    return draw(COMPARISONS, runs)
