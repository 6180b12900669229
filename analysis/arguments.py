"""The arguments of the report's command, apart from what writes it, which takes a second to import."""

import argparse
from pathlib import Path

COMPARISON = "comparison.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m analysis.report` to a parser."""
    parser.add_argument(
        "run_directories", metavar="RUN_DIR", nargs="+", help="The folder or address of a run, finished or not."
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help=f"The page to write. By default RUN_DIR/report.html; of several runs, {COMPARISON} here.",
    )  # fmt: skip
    parser.add_argument(
        "--figures", action="store_true", help="Write every figure as SVG and PNG too, in a folder beside the page."
    )
