"""Make the table at the end of a run: teacher, untrained trim, best candidate, retrained student."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from minitron_search.records.directory import RunDirectory
from minitron_search.records.metrics import METRICS, scored


def summary_table(run_dir: RunDirectory) -> Table:
    """Return the table, a row for each of `chosen_rows`."""
    table = Table(title="losses and margin in nats; (standard error) in the last digits", box=SIMPLE_HEAD)
    metrics = [(name, METRICS[name]) for name in scored()]
    for name in ("", "parameters", "tokens", *(metric.heading for _, metric in metrics), "tokens/s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, row in chosen_rows(run_dir.read_trials()):
        table.add_row(
            name,
            f"{row['params'] / 1e6:.1f}M",
            f"{row['tokens']:,}",
            *(with_error(row[name], row[metric.error]) for name, metric in metrics),
            f"{row['tokens_per_second']:.0f}" if row["tokens_per_second"] else "-",
        )
    return table


def with_error(value: float, error: float) -> str:
    """Return a value with its standard error in the last digits: 3.142(27) is 3.142 +- 0.027."""
    return f"{value:.3f}({round(1000 * error)})"


def chosen_rows(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, row) of the teacher and of every promoted candidate before, during and after its training."""
    chosen = [("teacher", row) for row in rows if row["arm"] == "teacher"]
    promoted = [row for row in rows if row["arm"] == "search" and row["status"] == "promoted"]
    first = min((row["seed"] for row in promoted), default=0)  # of several seeds one is shown
    promoted = [row for row in promoted if row["seed"] == first]
    last = max((row["rung"] for row in promoted), default=0)
    for candidate in (row for row in promoted if row["rung"] == last):
        same = [row for row in rows if row["architecture"] == candidate["architecture"]]
        chosen += [("untrained trim", row) for row in same if row["arm"] == "untrained"]
        chosen += [("best candidate", candidate)]
        chosen += [("retrained", row) for row in same if row["arm"] == "retrained"]
    return chosen
