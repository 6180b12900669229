"""Say which lines a run's logs may hold: whatever reads a log leaves out every other line, and `damage` names it."""

from collections.abc import Callable, Mapping
from typing import Any

from minitron_search.records.metrics import METRICS, score_columns

COUNTS = {metric.n for metric in METRICS.values()}
WORDS = ("trial", "architecture", "arm")  # of a finished rung
WHOLE = ("seed", "rung", "tokens", "proposal")
SHAPE = (
    "params", "non_embedding_params", "memory_bytes", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "num_hidden_layers", "drop_block_start", "drop_block_length",
)  # fmt: skip
SPEED = ("tokens_per_second", "tokens_per_second_stderr")
NUMBERS = (*(name for name in score_columns() if name not in COUNTS), "bi", *SPEED, "seconds")
# What readers take from an event of a kind, besides its time.
EVENTS: dict[str, tuple[str, ...]] = {
    "above_trim": ("trial", "message"),
    "promoted": ("architecture",),
    "stage_finished": ("stage",),
    "stage_started": ("stage",),
    "trial_failed": ("trial", "message"),
    "trial_finished": ("trial", "status"),
    "trial_started": ("trial",),
}
ENDED = ("trial_finished", "trial_failed", "trial_continued")  # of a trial: one that is continued had ended before


def is_event(line: Mapping[str, Any]) -> bool:
    """Return whether a line of events.jsonl is one."""
    kind = line.get("event")
    return isinstance(kind, str) and _is_time(line.get("time")) and _are_words(line, EVENTS.get(kind, ()))


def is_metric(line: Mapping[str, Any]) -> bool:
    """Return whether a line of a trial's metrics.jsonl is a step, the scores of a rung, or a finished rung."""
    kind, values = line.get("kind"), {key: value for key, value in line.items() if key != "kind"}
    if kind == "step":
        return all(_is_number(value) for value in values.values())
    if kind == "scores":
        lists = [value for key, value in values.items() if key != "rung"]
        return _is_whole(line.get("rung")) and all(
            isinstance(value, list) and all(map(_is_number, value)) for value in lists
        )
    return kind == "rung" and is_row(line)


def is_row(row: Mapping[str, Any]) -> bool:
    """Return whether a finished rung says which one it is, and no column of it is of another type than its own."""
    return (
        isinstance(row.get("trial"), str)
        and _is_whole(row.get("rung"))
        and all(row.get(name) is None or isinstance(row[name], str) for name in WORDS)
        and all(row.get(name) is None or _is_whole(row[name]) for name in (*WHOLE, *SHAPE, *COUNTS))
        and all(row.get(name) is None or _is_number(row[name]) for name in NUMBERS)
    )


def is_complete(row: Mapping[str, Any]) -> bool:
    """Return whether a sound row has what a search goes on from."""
    return all(row.get(name) is not None for name in (*WORDS, *WHOLE, "lm_loss"))


def is_decision(line: Mapping[str, Any]) -> bool:
    """Return whether a line of a trial's decisions.jsonl says whether it may train past a rung."""
    return _is_whole(line.get("rung")) and line.get("decision") in ("continue", "stop")


SOUND: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "events.jsonl": is_event,
    "metrics.jsonl": is_metric,
    "decisions.jsonl": is_decision,
}


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1e11  # in seconds; beyond, a date has no year


def _are_words(line: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    return all(isinstance(line.get(name), str) for name in names)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63
