"""What finished ablations found, as docs/results.md tells it: a table of each, and one figure of all.

    python -m benchmarks.ablation_results RUN ... [--output docs/results.md] [--folder docs/ablations]

RUN is the folder of an ablation (`python -m minitron_search.run --config search_spaces/ablations/NAME.yaml`); it is
read only. Its differences are computed anew from its arms, and kept as `<folder>/NAME.parquet`. Tables of ablations
that are not given stay as they are, and the figure is of all that are kept.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.page.static_figures import write_figures
from benchmarks.document import between, replaced
from minitron_search.ablation.differences import SCHEMA, differences, read_arms
from minitron_search.evaluation.paired_scores import Row
from minitron_search.evaluation.statistics import LEVEL
from minitron_search.records.directory import ABLATION_FILE, RunDirectory, write_table

TITLE = "The papers' ablations at 135M parameters"
ROW_PIXELS = 22
SHOWN = (-0.6, 1.8)  # nats per token; what is farther away is written at the edge


class Found(NamedTuple):
    name: str
    about: dict[str, Any]
    rows: dict[str, list[Row]]
    tests: list[dict[str, Any]]
    minutes: float


def read(folder: Path) -> Found:
    about = json.loads((folder / ABLATION_FILE).read_text())
    rows, scores = read_arms(folder, about["arms"])
    tests = differences(rows, scores, about["baseline"])
    runs = [RunDirectory(each.parent) for each in folder.rglob("events.jsonl")]
    seconds = sum(event["seconds"] for run in runs for event in run.events() if event["event"] == "run_finished")
    return Found(folder.name, about, rows, tests, seconds / 60)


def mean(rows: list[Row], tokens: int) -> float | None:
    found = [row["lm_loss"] for row in rows if row["tokens"] == tokens]
    return sum(found) / len(found) if found else None


def test_of(found: Found, arm: str, tokens: int) -> dict[str, Any] | None:
    return next((test for test in found.tests if (test["arm"], test["metric"], test["tokens"]) ==
                 (arm, "lm_loss", tokens)), None)  # fmt: skip


def table(found: Found) -> str:
    """LM loss before and after, and each arm's difference from the baseline after."""
    tokens = max(row["tokens"] for row in found.rows[found.about["baseline"]])
    lines = [
        f"### {found.name}: {found.about['question']}",
        "",
        f"{len(found.about['seeds'])} seeds, {found.minutes:.0f} minutes of two cores beside other load.",
        "",
        f"| arm | parameters | LM loss untrained | at {tokens:,} tokens | minus `{found.about['baseline']}` "
        "| p, windows | 95% over seeds | p, seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in found.about["arms"]:
        rows = found.rows[arm]
        first, last = (mean(rows, at) for at in (0, tokens))
        values = ["" if value is None else f"{value:.3f}" for value in (first, last)]
        size = f"{rows[0]['params'] / 1e6:.1f}M" if rows else "failed"
        test = test_of(found, arm, tokens)
        compared = ("", "", "", "")
        if test is not None:
            over_seeds = ("", "")
            if test["seeds_low"] is not None:  # there is one seed, or all are alike
                over_seeds = (f"[{test['seeds_low']:+.3f}, {test['seeds_high']:+.3f}]", p(test["seeds_p_holm"]))
            difference = f"{test['difference']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}]"
            compared = (difference, p(test["p_holm"]), *over_seeds)
        lines.append("| " + " | ".join([arm, size, *values, *compared]) + " |")
    return "\n".join(lines)


def p(value: float) -> str:
    shown = "< 0.001" if value < 0.001 else f"{value:.3f}"
    return f"**{shown}**" if value < LEVEL else shown


def blocks(section: str) -> dict[str, str]:
    """The tables of a section, by the ablation's name."""
    parts = re.split(r"^(?=### )", section, flags=re.MULTILINE)
    return {part[4:].partition(":")[0]: part.strip() for part in parts if part.startswith("### ")}


def forest(every: pd.DataFrame) -> go.Figure:
    """Differences at the end with their intervals over windows and, lighter, over seeds; far ones are cut off."""
    losses = every[every["metric"] == "lm_loss"]
    ends = losses[losses["tokens"] == losses.groupby("ablation")["tokens"].transform("max")]
    tests = ends.to_dict("records")
    names = [f"{test['ablation']}: {test['arm']}" for test in tests]
    middles = [test["difference"] for test in tests]
    figure = palette.new_figure(ROW_PIXELS * len(names) + 60, yaxis={"autorange": "reversed"})
    for label, low, high, width, colour in (("over seeds", "seeds_low", "seeds_high", 2, palette.SKY),
                                            ("over windows", "low", "high", 5, palette.BLUE)):  # fmt: skip
        figure.add_scatter(
            x=middles, y=names, mode="markers", name=f"95% {label}", marker={"color": colour, "size": 6},
            error_x={"type": "data", "symmetric": False, "thickness": width, "width": 0, "color": colour,
                     "array": [test[high] - test["difference"] for test in tests],
                     "arrayminus": [test["difference"] - test[low] for test in tests]},
        )  # fmt: skip
    figure.add_vline(x=0, line={"color": palette.INK, "width": 1})
    for name, middle in zip(names, middles, strict=True):
        if not SHOWN[0] < middle < SHOWN[1]:
            figure.add_annotation(x=SHOWN[middle > 0], y=name, text=f"{middle:+.1f}", showarrow=False, xanchor="right")
    figure.update_xaxes(range=SHOWN, title="LM loss minus the baseline's (nats per token)")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--folder", type=Path, default=Path("docs/ablations"))
    options = parser.parse_args()
    all_found = [read(folder) for folder in options.runs]
    options.folder.mkdir(parents=True, exist_ok=True)
    for found in all_found:
        write_table(options.folder / f"{found.name}.parquet", pa.Table.from_pylist(found.tests, schema=SCHEMA))
    text = options.output.read_text() if options.output.exists() else ""
    tables = blocks(between(text, "ablations")) | {found.name: table(found) for found in all_found}
    kept = [pd.read_parquet(options.folder / f"{name}.parquet").assign(ablation=name) for name in tables]
    every = pd.concat(kept)
    panel = Panel("differences", forest(every), every, TITLE)
    written, problem = write_figures([Card(TITLE, "", panels=(panel,))], options.folder)
    print(problem or f"figures: {', '.join(map(str, written))}")
    section = "\n\n".join(tables.values())
    options.output.write_text(replaced(text, section, "ablations", TITLE))
    print(section)


if __name__ == "__main__":
    main()
