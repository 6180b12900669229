"""Compare every arm of an ablation with its baseline, paired, at every rung: ablation.parquet, and a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from minitron_search.evaluation.paired_scores import Row, Scores, against
from minitron_search.evaluation.statistics import LEVEL, holm, mean_and_error
from minitron_search.messages.escaping import visible
from minitron_search.records.directory import ABLATION_TABLE, RunDirectory, write_table
from minitron_search.records.metrics import compared_metrics
from minitron_search.records.summary import with_error

# One row per arm (but the baseline), rung and metric: the arm minus the baseline, of means over the seeds both have.
# `difference` to `p_holm` are over windows (twin questions); `seeds_*` over seeds, null where all are alike. p_holm
# is p after Holm's correction for as many arms. An arm's kl is from its own teacher.
SCHEMA = pa.schema([
    ("arm", pa.string()), ("baseline", pa.string()), ("metric", pa.string()), ("rung", pa.int64()),
    ("tokens", pa.int64()), ("value", pa.float64()), ("baseline_value", pa.float64()), ("seeds", pa.int64()),
    *((name, pa.float64()) for name in ("difference", "stderr", "low", "high", "p", "p_holm")), ("n", pa.int64()),
    *((f"seeds_{name}", pa.float64()) for name in ("stderr", "low", "high", "p", "p_holm")),
])  # fmt: skip


def read_arms(root: Path, arms: Sequence[str]) -> tuple[dict[str, list[Row]], Scores]:
    """Return, by arm, the rows of its trials that have not failed; and the scores of all of them.

    A trial is called <arm>/<trial>: two arms may have one of the same id.
    """
    rows: dict[str, list[Row]] = {}
    scores: dict[tuple[str, int], Mapping[str, Any]] = {}
    for arm in arms:
        run_dir = RunDirectory(root / arm)
        rows[arm] = [
            {**row, "trial": f"{arm}/{row['trial']}"} for row in run_dir.read_trials()
            if row["arm"] == "search" and row["status"] != "failed" and row["lm_loss"] is not None
        ]  # fmt: skip
        scores |= {(f"{arm}/{trial}", rung): logged for (trial, rung), logged in run_dir.scores().items()}
    return rows, scores


def differences(rows: Mapping[str, Sequence[Row]], scores: Scores, baseline: str) -> list[dict[str, Any]]:
    """Return the rows of `SCHEMA`: every arm but the baseline, at every rung, in every metric."""
    compared = []
    for rung in sorted({row["rung"] for row in rows[baseline]}):
        here = {arm: [row for row in trials if row["rung"] == rung] for arm, trials in rows.items()}
        tests = {arm: against(here[baseline], here[arm], scores) for arm in rows if arm != baseline and here[arm]}
        for metric in compared_metrics():
            tested = {arm: test[metric] for arm, test in tests.items() if metric in test}
            by_window = holm([test["p"] for test in tested.values()])
            several = {arm: test["over_seeds"]["p"] for arm, test in tested.items() if "over_seeds" in test}
            by_seed = dict(zip(several, holm(list(several.values())), strict=True))
            for (arm, test), p_holm in zip(tested.items(), by_window, strict=True):
                over_seeds = test.get("over_seeds", {})
                compared.append({
                    "arm": arm, "baseline": baseline, "metric": metric, "rung": rung,
                    "tokens": here[arm][0]["tokens"], "value": _mean(here[arm], metric),
                    "baseline_value": _mean(here[baseline], metric), "seeds": test["seeds"],
                    **{name: test.get(name) for name in ("difference", "stderr", "low", "high", "p", "n")},
                    "p_holm": p_holm,
                    **{f"seeds_{name}": over_seeds.get(name) for name in ("stderr", "low", "high", "p")},
                    "seeds_p_holm": by_seed.get(arm),
                })  # fmt: skip
    return compared


def write_differences(root: Path, compared: Sequence[dict[str, Any]]) -> None:
    """Write the rows of `differences` into ablation.parquet."""
    write_table(root / ABLATION_TABLE, pa.Table.from_pylist(list(compared), schema=SCHEMA))


def shown(
    about: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], compared: Sequence[Mapping[str, Any]]
) -> Table:  # fmt: skip
    """Return a table: every arm's LM loss as it begins and ends, and its difference from the baseline at the end."""
    table = Table(
        title=f"{escape(visible(about['question']))}\nLM loss, nats per token, {len(about['seeds'])} seeds; (standard "
        f"error over them) in the last digits\n95% intervals of arm - {about['baseline']}; p after Holm's correction "
        "for the arms",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # eight columns in the 120 of a job's log
    )
    at = [f"at {tokens:,}" for tokens in (0, about["tokens"])]
    for name in ("", "size", *at, "over windows", "p", "over seeds", "p"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for arm in about["arms"]:
        mine = rows[arm]
        if not mine:
            table.add_row(arm, "failed")
            continue
        first, last = [row for row in mine if not row["tokens"]], _last(mine)
        test = next((row for row in compared if row["arm"] == arm and row["metric"] == "lm_loss"
                     and row["rung"] == last[0]["rung"]), None)  # fmt: skip
        table.add_row(
            arm, f"{last[0]['params'] / 1e6:.1f}M", f"{_mean(first, 'lm_loss'):.3f}" if first else "",
            _with_error(last), *(_against(test) if test else ("", "", "", "")),
        )  # fmt: skip
    return table


def _against(test: Mapping[str, Any]) -> tuple[str, str, str, str]:
    def interval(low: float | None, high: float | None) -> str:
        return "" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"

    def p(value: float | None) -> str:
        shown = "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
        return f"{shown} *" if value is not None and value < LEVEL else shown

    return (f"{test['difference']:+.3f} {interval(test['low'], test['high'])}", p(test["p_holm"]),
            interval(test["seeds_low"], test["seeds_high"]), p(test["seeds_p_holm"]))  # fmt: skip


def _last(rows: Sequence[Row]) -> list[Row]:
    rung = max(row["rung"] for row in rows)
    return [row for row in rows if row["rung"] == rung]


def _with_error(rows: Sequence[Row]) -> str:
    mean, stderr, n = mean_and_error(np.array([row["lm_loss"] for row in rows]))
    return with_error(mean, stderr) if n > 1 else f"{mean:.3f}"


def _mean(rows: Sequence[Row], metric: str) -> float:
    return float(np.mean([row[metric] for row in rows]))
