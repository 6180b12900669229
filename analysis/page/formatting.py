"""Numbers and names as the reader sees them. What is missing reads as an en dash, never as nan."""

import math
from collections.abc import Mapping
from typing import Any

from minitron_search.messages.escaping import in_html
from minitron_search.records.directory import AXES

MISSING = "–"


def missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def fixed(value: float, digits: int) -> str:
    """Return a number with so many digits."""
    return MISSING if missing(value) else f"{value:.{digits}f}".replace("-", "−")


def integer(value: float) -> str:
    return MISSING if missing(value) else f"{value:,.0f}".replace("-", "−")


def plus_minus(value: float, stderr: float, digits: int) -> str:
    """Return `3.214 ± 0.052`, without the second half where no standard error is known."""
    if missing(value) or missing(stderr):
        return fixed(value, digits)
    return f"{fixed(value, digits)} ± {stderr:.{digits}f}"


def millions(value: float) -> str:
    return MISSING if missing(value) else f"{value / 1e6:.{1 if value >= 1e7 else 3}f} M"


def tokens(value: float) -> str:
    """Return a count in short: 32768 -> 32.8K, 256000 -> 256K, 4e9 -> 4B."""
    if missing(value):
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def bytes_(value: float) -> str:
    if missing(value):
        return MISSING
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    if missing(seconds):
        return MISSING
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... from the decade of `low` to that of `high`; powers of ten where there are many."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(decades) < 4 else (1,)
    return [digit * 10.0**decade for decade in decades for digit in digits]


def number(value: Any) -> float:
    """Return a number of a JSON file; NaN for null."""
    return float("nan") if value is None else float(value)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def capitalised(text: str) -> str:
    """Return a name as the first word of a heading."""
    return text[:1].upper() + text[1:]


def in_figure(text: object) -> str:
    """Escape text of a run for a Plotly label, which reads a few HTML tags: none of them may come from the run."""
    return in_html(text, quote=False)


def architecture(row: Mapping[str, Any]) -> str:
    """Return every axis of one row of the trials table under its Hugging Face name, in two lines of a label."""
    axes = [f"{axis} {integer(row[axis])}" for axis in AXES if not axis.startswith("drop_block")]
    lines = [", ".join(axes[:3]), ", ".join(axes[3:])]
    length, start = row["drop_block_length"], row["drop_block_start"]
    if not missing(length) and length > 0 and not missing(start):
        lines[1] += f", without layers {start:.0f}–{start + length - 1:.0f}"
    return "<br>".join(lines)


def hover(row: Mapping[str, Any]) -> str:
    """Return the hover label of one row of the trials table: which trial, which architecture, how far, how good."""
    return "<br>".join(
        [
            f"<b>{in_figure(row['trial'])}</b> · {in_figure(row['arm'])} · {in_figure(row['status'])}",
            architecture(row),
            f"{millions(row['params'])} parameters, {millions(row['non_embedding_params'])} non-embedding",
            f"rung {integer(row['rung'])}, {tokens(row['tokens'])} tokens",
            f"LM loss {plus_minus(row['lm_loss'], row['lm_loss_stderr'], 3)}, "
            f"KL {plus_minus(row['kl'], row['kl_stderr'], 3)} nats per token",
        ]
    )


def speed(row: Any) -> str:
    """Return the tokens per second of a row with their error over repeats. One without was measured beside other
    trials, as earlier versions did, which may have slowed it threefold."""
    value, error = row["tokens_per_second"], row.get("tokens_per_second_stderr")
    if missing(value):
        return integer(value)
    return f"{integer(value)} beside others" if missing(error) else f"{integer(value)} ± {integer(error)}"
