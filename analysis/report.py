"""`python -m analysis.report RUN_DIR` -> RUN_DIR/report.html: one file, offline, at any moment of a run.

Of several runs, one page that compares them, `comparison.html` or `--output FILE`. The data behind every figure is in
the page, as CSV to download, so that a report that is mailed or copied is still all of it. `--figures` writes each
figure as SVG and PNG besides, in a folder beside the page: a Chromium or Chrome on this machine draws them, and without
one the page's own figures have a button that saves what the browser shows.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from analysis.arguments import COMPARISON, add_arguments
from analysis.cards.health import health_info, span
from analysis.compared_cards import compare
from analysis.differences import labelled
from analysis.page import formatting as f
from analysis.page.card import Card
from analysis.page.page import page
from analysis.page.static_figures import write_beside
from analysis.run_cards import make_cards
from analysis.run_data import RunData, load_run
from minitron_search.messages.escaping import visible
from minitron_search.messages.failures import reading, run_command
from minitron_search.records.bucket import BucketCopy, bucket_copy
from minitron_search.records.directory import RunDirectory, replace_text
from minitron_search.records.paths import located


def write_report(run_directory: RunDirectory, output: Path | None = None) -> Path:
    """Write `report.html`, or `output`, from what the run has left on disk so far, and return its path.

    Raises ValueError where the folder holds no run.
    """
    path = output or run_directory.report
    write_page(path, [run_directory])
    return path


def write_page(path: Path, directories: Sequence[RunDirectory]) -> list[Card]:
    """Write the report of a run, or the comparison of several, and return its cards."""
    runs = [load_run(directory) for directory in directories]
    if len(runs) == 1:
        name, lines, cards, kind = runs[0].name, facts(runs[0]), make_cards(runs[0]), "report of a run"
    else:
        own = labelled(runs, [directory.root.resolve().name for directory in directories])
        name, lines, cards = " · ".join(run.name for run in own), [f.plural(len(own), "run")], compare(own)
        kind = "comparison of runs"
    replace_text(path, page(name, lines, cards, written(), kind))
    return cards


def written() -> str:
    return f"Written {datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')}."


def facts(run: RunData) -> list[str]:
    """Return the short lines at the head of the page: what was compressed, when, how far it is."""
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
    add_arguments(parser)
    return run_command(lambda: report(parser.parse_args(arguments)))


def report(chosen: argparse.Namespace) -> int:
    """Write the page that the arguments ask for; return the exit status."""
    buckets: list[BucketCopy] = []
    addresses = [located(address) for address in chosen.run_directories]
    directories = [RunDirectory(address) for address in addresses]
    for address, directory in zip(addresses, directories, strict=True):
        if bucket := bucket_copy(address, directory):
            bucket.pull()
            buckets.append(bucket)
    alone = directories[0].report if len(directories) == 1 else Path(COMPARISON)
    path = chosen.output.expanduser() if chosen.output else alone
    with reading(", ".join(addresses), "run directories as `python -m minitron_search.run` writes them"):
        cards = write_page(path, directories)
    if buckets and path == directories[0].report:
        buckets[0].put(path, PurePosixPath(path.name))  # nothing else has changed
    print(visible(path))
    if chosen.figures:
        write_beside(path, cards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
