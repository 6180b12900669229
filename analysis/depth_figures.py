"""Draw the depth sweep: `python -m analysis.depth_figures RUN_DIR`.

The figures are written to RUN_DIR/depth_figures.html (interactive, opens offline), and each to depth_<figure>.svg and
.png.

The static files are drawn by a Chromium or Chrome of this machine; where there is none, the page is written, the static
files are not, and the command says so.
"""

import argparse
import sys
from pathlib import Path

from analysis.cards.depth import depth_card
from analysis.page.page import page
from analysis.page.static_figures import write_figures as write_static
from analysis.run_data import load_run
from minitron_search.messages.escaping import visible
from minitron_search.messages.failures import reading, run_command
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import located


def write_figures(directory: RunDirectory) -> tuple[list[Path], str]:
    """Write the figures, and return (the files written, why there is only the page; '' where there are others).

    Raises ValueError where the folder holds no sweep.
    """
    run = load_run(directory)
    if run.depth.empty:
        raise ValueError(f"{directory.root}: no {directory.depth.name} here; the stage `depth` writes it")
    card = depth_card(run)
    path = directory.root / "depth_figures.html"
    foot = f"Made from {directory.depth.name} and {directory.depth_recommendation.name}."
    path.write_text(page(run.name, ["the depth sweep"], [card], foot), encoding="utf-8")
    static, reason = write_static([card], directory.root)
    return [path, *static], reason


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.depth_figures", description="The depth sweep's figures.")
    parser.add_argument("run_directory", help="the folder of a run whose depth stage has finished")
    return run_command(lambda: figures(parser.parse_args(arguments).run_directory))


def figures(run_directory: str) -> int:
    """Write the figures of a run; return the exit status."""
    with reading(run_directory, "the folder of a run whose depth stage has finished"):
        written, reason = write_figures(RunDirectory(located(run_directory)))
    for path in written:
        print(visible(path))
    if reason:
        print(f"no static figures: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
