"""`python -m analysis.report RUN_DIR` -> RUN_DIR/report.html: one file, offline, at any moment of a run."""

import argparse
import datetime
import sys
from pathlib import Path

from analysis import formatting as f
from analysis.cards import make_cards
from analysis.health import health_info, span
from analysis.page import page
from analysis.run_data import RunData, load_run
from minitron_search.mirror import mirror_of
from minitron_search.run_directory import RunDirectory, replace_text


def write_report(run_directory: RunDirectory) -> Path:
    """Write `report.html` from what the run has left on disk so far, and return its path.

    Raises ValueError where the folder holds no run.
    """
    run = load_run(run_directory)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    replace_text(run_directory.report, page(run.name, facts(run), make_cards(run), f"Written {now}."))
    return run_directory.report


def facts(run: RunData) -> list[str]:
    """Short lines for the head of the page: what was compressed, when, how far it is."""
    health = health_info(run)
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(health.statuses.items()))
    teacher = run.config.get("teacher")
    model = teacher.get("model") if isinstance(teacher, dict) else None
    return [
        f"teacher {model}" if model else "",
        span(health.events),
        f"{f.plural(sum(health.statuses.values()), 'candidate')}: {statuses}" if statuses else "no candidates yet",
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description="Write RUN_DIR/report.html.")
    parser.add_argument("run_directory", metavar="RUN_DIR", help="the folder or address of a run, finished or not")
    chosen = parser.parse_args(arguments)
    try:
        run = RunDirectory(chosen.run_directory)
        if mirror := mirror_of(chosen.run_directory, run):
            mirror.pull()
        path = write_report(run)
        if mirror:
            mirror.push()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
