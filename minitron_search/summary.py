"""The table at the end of a run: teacher, untrained trim, best candidate, retrained student."""

from typing import Any

from rich.table import Table

from minitron_search.run_directory import RunDirectory


def summary_table(run: RunDirectory) -> Table:
    table = Table(title=f"{run.root}: LM loss and KL in nats per token, +- standard error")
    for name in ("", "parameters", "tokens", "LM loss", "KL", "Winogrande", "margin", "tokens/s"):
        table.add_column(name, justify="left" if not name else "right")
    for name, row in chosen_rows(run.read_trials()):
        table.add_row(
            name,
            f"{row['params'] / 1e6:.1f}M",
            f"{row['tokens']:,}",
            f"{row['lm_loss']:.3f} +- {row['lm_loss_stderr']:.3f}",
            f"{row['kl']:.3f} +- {row['kl_stderr']:.3f}",
            f"{row['winogrande_acc']:.3f} +- {row['winogrande_acc_stderr']:.3f}",
            f"{row['winogrande_margin']:+.3f} +- {row['winogrande_margin_stderr']:.3f}",
            f"{row['tokens_per_second']:.0f}" if row["tokens_per_second"] else "-",
        )
    return table


def chosen_rows(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(name, row) of the teacher and of every promoted candidate before, during and after its training."""
    chosen = [("teacher", row) for row in rows if row["arm"] == "teacher"]
    promoted = [row for row in rows if row["arm"] == "search" and row["status"] == "promoted"]
    last = max((row["rung"] for row in promoted), default=0)
    for candidate in (row for row in promoted if row["rung"] == last):
        same = [row for row in rows if row["architecture"] == candidate["architecture"]]
        chosen += [("untrained trim", row) for row in same if row["arm"] == "untrained"]
        chosen += [("best candidate", candidate)]
        chosen += [("retrained student", row) for row in same if row["arm"] == "retrained"]
    return chosen
