"""What `benchmarks.throughput` measured, as docs/results.md tells it: a table and a figure.

    python -m benchmarks.throughput_results [RUN] [--output docs/results.md] [--folder docs]

RUN is the `--output` of `benchmarks.throughput` (runs/throughput unless given); its table is read, and kept in
`<folder>/throughput.parquet`.
"""

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.page import palette
from analysis.page.card import Card, Panel
from analysis.page.static_figures import write_figures
from benchmarks.document import replaced

TITLE = "Figure 10: how fast the students answer"
COLOURS = {"width": palette.BLUE, "depth": palette.ORANGE}
SETTING = ["input_tokens", "output_tokens", "batch_size"]


class Ratio(NamedTuple):
    """How many times as fast as the teacher: the median over repeats, and the least and the most of them."""

    median: float
    least: float
    most: float


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per setting, student and part (prefill, decode): `Ratio` to the teacher's time of the same repeat, beside
    which it was taken, and both medians in seconds."""
    found = []
    for setting, of in rows.groupby(SETTING, sort=False):
        teacher = of[of["model"] == "teacher"].set_index("repeat")
        for model in COLOURS:
            student = of[of["model"] == model].set_index("repeat")
            for part in ("prefill", "decode"):
                ours, theirs = student[f"{part}_seconds"], teacher[f"{part}_seconds"]
                if (ours > 0).all():  # no decoding where one token is asked for
                    times = theirs / ours
                    ratio = Ratio(times.median(), times.min(), times.max())
                    found.append({**dict(zip(SETTING, setting, strict=True)), "model": model, "part": part,
                                  "teacher_seconds": theirs.median(), "seconds": ours.median(),
                                  "repeats": len(times), **ratio._asdict()})  # fmt: skip
    return pd.DataFrame(found)


def name_of(setting: pd.Series) -> str:
    return f"{setting.input_tokens}/{setting.output_tokens} x {setting.batch_size}"


def figure(found: pd.DataFrame) -> go.Figure:
    """Prefill and decoding side by side; a bar a student and setting, as times the teacher's speed."""
    drawn = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=["prefill", "decode"])
    drawn.update_layout(palette.new_figure(360).layout, barmode="group")
    for column, part in enumerate(("prefill", "decode"), 1):
        for model, colour in COLOURS.items():
            of = found[(found["part"] == part) & (found["model"] == model)]
            drawn.add_bar(
                x=of.apply(name_of, axis=1), y=of["median"], name=f"{model} student", legendgroup=model,
                showlegend=column == 1, marker={"color": colour}, row=1, col=column,
                error_y={"array": of["most"] - of["median"], "arrayminus": of["median"] - of["least"],
                         "color": palette.INK, "thickness": 1, "width": 3},
            )  # fmt: skip
        drawn.add_hline(y=1, line={"color": palette.INK, "width": 1, "dash": "dot"}, row=1, col=column)
        drawn.update_xaxes(title="input/output tokens x batch size", row=1, col=column)
    drawn.update_yaxes(title="times the teacher's speed", col=1)
    return drawn


def table(rows: pd.DataFrame, found: pd.DataFrame) -> str:
    sizes, about = rows.groupby("model")["params"].first() / 1e6, rows.iloc[0]
    lines = [
        f"`python -m benchmarks.throughput`, {about['engine']}, {about['precision']}, {about['on']}: teacher "
        f"{sizes['teacher']:.1f}M parameters, width student {sizes['width']:.1f}M, depth student "
        f"{sizes['depth']:.1f}M. Of {found['repeats'].iloc[0]} repeats, in which all three take turns, the median, and "
        "in brackets the least and the most.",
        "",
        "| input/output tokens x batch | | teacher, seconds | width student | depth student |",
        "|---|---|---|---|---|",
    ]
    for (*_, part), of in found.groupby([*SETTING, "part"], sort=False):
        by_model = of.set_index("model")
        times = [f"{row['median']:.2f}x ({row.least:.2f} to {row.most:.2f})" for _, row in by_model.iterrows()]
        lines.append(f"| {name_of(of.iloc[0])} | {part} | {of.iloc[0].teacher_seconds:.3f} | {' | '.join(times)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/throughput"))
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--folder", type=Path, default=Path("docs"))
    chosen = parser.parse_args(arguments)
    source = chosen.run / "throughput.parquet"
    if not source.exists():
        parser.error(f"{source}: no such file; `python -m benchmarks.throughput` writes it")
    rows = pd.read_parquet(source)
    found = ratios(rows)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, chosen.folder / "throughput.parquet")
    panel = Panel("throughput", figure(found), found, TITLE)
    written, problem = write_figures([Card(TITLE, "", panels=(panel,))], chosen.folder)
    print(problem or f"figures: {', '.join(map(str, written))}")
    section = table(rows, found)
    text = chosen.output.read_text() if chosen.output.exists() else ""
    chosen.output.write_text(replaced(text, section, "throughput", TITLE))
    print(section)


if __name__ == "__main__":
    main()
