"""Tables 1 and 2 (arXiv:2408.11796): what lm-eval says of this run's models, and what the paper says of its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis.page import formatting as f
from analysis.page.card import Card
from analysis.page.tables import plain_table
from analysis.run_data import RunData
from minitron_search.messages.escaping import in_html

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published_tables.json").read_text())
TITLE = "Tables 1 and 2"
READ = (
    "A row is a model, a column a task of lm-eval with its shots; percent, where a metric is a share. Where the paper "
    "has the same model, by its Hub name, and the same task and shots, its number stands below, and ours minus it: "
    "another harness, prompt or version makes points of difference by itself. A difference from the teacher is on the "
    "same questions; one whose interval crosses zero could be chance."
)


class TablesInfo(NamedTuple):
    """What the card shows. results: a row per model and task, with `published`, in percent, where the paper has it.
    differences: the models minus their teacher. failures: what could not be evaluated, and why."""

    results: pd.DataFrame
    differences: pd.DataFrame
    failures: pd.DataFrame


def tables_info(runs: Sequence[RunData]) -> TablesInfo:
    results, differences, failures = [], [], []
    for run in runs:
        evaluation, several = run.evaluation, {"run": run.name} if len(runs) > 1 else {}
        for result in evaluation.get("results", []):
            model = evaluation["models"][result["model"]]
            mine = {key: result[key] for key in ("task", "label", "shots", "metric", "value", "stderr", "n", "limit")}
            columns = {"model": result["model"], "name": model["name"], "params": model["params"]}
            how = {key: result[key] for key in ("chance", "at_chance", "task_version", "precision", "chat_template")}
            paper = published(model["name"], result)
            results.append({**several, **columns, **mine, **how, **result["versions"], **paper})
        differences += [{**several, **row} for row in evaluation.get("differences", [])]
        failures += [{**several, **row} for row in evaluation.get("failures", [])]
    return TablesInfo(pd.DataFrame(results), pd.DataFrame(differences), pd.DataFrame(failures))


def published(model: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return the paper's number for `model`, a Hub name, in percent, and ours minus it; None where the paper has
    none."""
    for table in PUBLISHED["tables"]:
        for theirs in table["models"]:
            for benchmark in table["benchmarks"]:
                same = (benchmark["task"], benchmark["shots"]) == (result["task"], result["shots"])
                score = theirs["scores"][benchmark["name"]]
                if same and model in theirs["hub"] and score is not None:
                    where = f"{table['title']}, {theirs['name']}"
                    return {"published": score, "minus_published": 100 * result["value"] - score, "where": where}
    return {"published": None, "minus_published": None, "where": ""}


def metric_name(metric: str) -> str:
    """Return lm-eval's `metric,filter` without the filter that filters nothing."""
    return str(metric).replace(",none", "")


def percent(value: float, stderr: float | None) -> str:
    """Return a share as `55.6 ± 1.4`, and any other number as it is."""
    if 0 <= value <= 1:
        return f.plus_minus(100 * value, float("nan") if stderr is None else 100 * stderr, 1)
    return f.plus_minus(value, float("nan") if stderr is None else stderr, 3)


def results_html(info: TablesInfo) -> str:
    results = info.results
    several = "run" in results
    columns = list(dict.fromkeys(zip(results["label"], results["limit"].fillna(0), strict=True)))
    heads = "".join(f'<th scope="col" class="number">{_head(results, *column)}</th>' for column in columns)
    rows = ""
    for model, of_model in results.groupby(["run", "model"] if several else ["model"], sort=False):
        first = of_model.iloc[0]
        name = "" if first["name"] == first["model"] else str(first["name"])
        small = " · ".join(part for part in (name, f"{f.millions(first['params'])} parameters") if part)
        rows += f'<tr><th scope="row">{in_html(" · ".join(model))}<small>{in_html(small)}</small></th>'
        for label, limit in columns:
            cells = of_model[(of_model["label"] == label) & (of_model["limit"].fillna(0) == limit)]
            rows += f'<td class="number">{_cell(cells.iloc[-1]) if len(cells) else f.MISSING}</td>'
        rows += "</tr>"
    return (
        f'<div class="scroll"><table class="plain"><thead><tr><th scope="col">model</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _head(results: pd.DataFrame, label: str, limit: float) -> str:
    column = results[(results["label"] == label) & (results["limit"].fillna(0) == limit)]
    shots = f"{f.integer(column['shots'].iloc[0])}-shot"
    questions = f"{'first ' if limit else ''}{' or '.join(f.integer(n) for n in sorted(set(column['n'])))} questions"
    small = [in_html(metric_name(column["metric"].iloc[0])), f"{shots}, {questions}"]
    return in_html(str(column["task"].iloc[0])) + "".join(f"<small>{part}</small>" for part in small)


def _cell(row: pd.Series) -> str:
    text = in_html(percent(row["value"], row["stderr"]))
    if row["at_chance"]:
        text += f"<small>not above chance, {100 * row['chance']:.0f}</small>"
    if not f.missing(row["published"]):
        minus = f"{row['minus_published']:+.1f}".replace("-", "−")
        text += f"<small>paper {row['published']:g}, ours {minus}</small>"
    return text


def differences_html(info: TablesInfo) -> str:
    if info.differences.empty:
        return ""
    lines = []
    for row in info.differences.to_dict("records"):
        same = info.results[(info.results["task"] == row["task"]) & (info.results["metric"] == row["metric"])]
        scale, digits = (100, 1) if same["value"].between(0, 1).all() else (1, 3)  # a share, as in the table above
        low, high = (f.fixed(scale * row[end], digits) for end in ("low", "high"))
        run = f"{row['run']} · " if "run" in row else ""
        lines.append([
            f"{run}{row['model']}", f"{row['task']} {row['shots']}-shot", metric_name(row["metric"]),
            f.plus_minus(scale * row["difference"], scale * row["stderr"], digits), f"{low} to {high}",
            f"{row['p']:.2g}", row["test"], f.integer(row["n"]),
        ])  # fmt: skip
    heads = ("model", "task", "metric", "minus the teacher", "95% interval", "p", "test", "n")
    return f"<h3>Against the teacher, on the same questions</h3>{plain_table(heads, lines, text=(0, 1, 2, 6))}"


def failures_html(info: TablesInfo) -> str:
    if info.failures.empty:
        return ""
    lines = "".join(
        f"<li>{in_html(' on '.join(part for part in (row['task'], row['model']) if part))}: "
        f"{in_html(str(row['message']))}</li>"
        for row in info.failures.to_dict("records")
    )
    return f'<h3>What failed</h3><ul class="warning">{lines}</ul>'


def published_html() -> str:
    """Return the paper's own rows as a table; `*` marks a number it took from other papers."""
    tables = ""
    for table in PUBLISHED["tables"]:
        lines = []
        for key, name in (("params", "Total Params"), ("non_embedding_params", "Non-Emb. Params"),
                          ("training_tokens", "Training Tokens")):  # fmt: skip
            if key in table["models"][0]:
                lines.append([name, *(model[key] for model in table["models"]), ""])
        for benchmark in table["benchmarks"]:
            name = benchmark["name"]
            here = f"not here: {benchmark['cannot']}" if benchmark["cannot"] else benchmark["task"]
            scores = [
                f.MISSING if model["scores"][name] is None
                else f"{model['scores'][name]:g}{'*' if name in model['elsewhere'] else ''}"
                for model in table["models"]
            ]  # fmt: skip
            lines.append([name, *scores, here])
        heads = ("", *(model["name"] for model in table["models"]), "lm-eval’s task")
        tables += (
            f"<details><summary>{PUBLISHED['source']}, {table['title']}: {table['caption']}</summary>"
            f'<div style="color:var(--muted)">{plain_table(heads, lines, text=(0, len(heads) - 1))}</div></details>'
        )
    return f"<h3>The paper’s own rows</h3>{tables}"


def sample(info: TablesInfo) -> str:
    results = info.results
    used = ", ".join(
        f"{name} {' and '.join(sorted(set(results[column].dropna().astype(str))))}"
        for name, column in (("lm-eval", "lm_eval"), ("transformers", "transformers"), ("precision", "precision"))
    )
    return (
        f"{f.plural(results['model'].nunique(), 'model')}, n of each task in its column; ± is one standard error, over "
        f"questions. {used}."
    )


def published_frame() -> pd.DataFrame:
    return pd.DataFrame([
        {"table": table["title"], "model": model["name"], "hub": " ".join(model["hub"]), "benchmark": name,
         "score": score, "from_another_paper": name in model["elsewhere"]}
        for table in PUBLISHED["tables"] for model in table["models"] for name, score in model["scores"].items()
    ])  # fmt: skip


def tables_card(run: RunData) -> Card:
    """Return the card of one run."""
    return tables_comparison([run])


def tables_comparison(runs: Sequence[RunData]) -> Card:
    """Return the card of several runs side by side."""
    if not any(run.evaluation for run in runs):
        return Card(TITLE, READ, reason="No evaluation.json: evaluation.tasks was empty, or nothing is retrained yet.")
    info = tables_info(runs)
    if info.results.empty and info.failures.empty:
        return Card(TITLE, READ, reason="evaluation.json is of a version that did not say what it asked.")
    body = failures_html(info)
    data = []
    if len(info.results):
        body = results_html(info) + differences_html(info) + body
        data = [("evaluation", info.results)]
    if len(info.differences):
        data.append(("against_teacher", info.differences))
    data.append(("published_tables", published_frame()))
    return Card(TITLE, READ, sample(info) if len(info.results) else "", body + published_html(), data=tuple(data))
