"""Make the table at the end of a run, and say where training left a student worse than it was before.

Every rung of a candidate, and every retraining, is held against the untrained trim of the same architecture.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy  # its statistics only where they are asked for: half a second of every process
from rich.box import SIMPLE_HEAD
from rich.table import Table

from minitron_search.messages.console import say
from minitron_search.records.directory import RunDirectory
from minitron_search.records.metrics import METRICS, scored

Row = Mapping[str, Any]  # of the trials table
Scores = Mapping[tuple[str, int], Mapping[str, Any]]  # `RunDirectory.scores`
CONFIDENCE = 0.95
NAMED = 5  # trials in a sentence
WIDE = 100  # columns that the whole table takes
# arm -> the key to lower where its training makes students worse
RATES = {"search": "distillation.learning_rate", "retrained": "retraining.learning_rate"}


def summary_table(run_dir: RunDirectory, columns: int = WIDE) -> Table:
    """Return the table, a row for each of `chosen_rows`; a `*` marks a student that is above its untrained trim.

    columns: of the terminal. One of 80 has no room for the margin, which is in the report.
    """
    wide = columns >= WIDE
    title = f"losses{' and margin' if wide else ''} in nats; (standard error) in the last digits"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1) if wide else (0, 1, 0, 0))
    params, speed = ("parameters", "tokens/s") if wide else ("params", "tok/s")
    metrics = [(name, METRICS[name]) for name in scored() if wide or name != "winogrande_margin"]
    for name in ("", params, "tokens", *(metric.heading for _, metric in metrics), speed):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    rows = run_dir.read_trials()
    above = {(test["trial"], test["rung"]) for test in against_trims(rows, run_dir.scores()) if test["above"]}
    for name, row in chosen_rows(rows):
        table.add_row(
            f"{name}*" if (row["trial"], row["rung"]) in above else name,
            f"{row['params'] / 1e6:.1f}M",
            f"{row['tokens']:,}",
            *(with_error(row[name], row[metric.error]) for name, metric in metrics),
            f"{row['tokens_per_second']:.0f}" if row["tokens_per_second"] else "-",
        )
    return table


def winner(run_dir: RunDirectory) -> str | None:
    """Return the shape of the best student beside its teacher's size, in a line; None where none was promoted."""
    rows = chosen_rows(run_dir.read_trials())
    best = next((row for name, row in rows if name in ("retrained", "best candidate")), None)
    teacher = next((row for name, row in rows if name == "teacher"), None)
    if best is None or teacher is None:
        return None
    heads = f"heads {best['num_attention_heads']} in {best['num_key_value_heads']} groups"
    return (f"best: hidden {best['hidden_size']}, mlp {best['intermediate_size']}, {heads}, "
            f"{best['num_hidden_layers']} layers: {best['params'] / 1e6:.1f}M parameters, "
            f"{best['params'] / teacher['params']:.0%} of the teacher's")  # fmt: skip


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


def against_trims(rows: Iterable[Row], scores: Scores) -> list[dict[str, Any]]:
    """Hold the LM loss of every trained rung and every retraining against its untrained trim, on the same windows.

    The trim of a candidate is its own rung at 0 tokens, that of a retrained student the arm `untrained`: each was
    scored in the precision of what it is compared with. An entry has what names the row, its loss, that of the trim and
    `difference`, trained minus untrained; `low` and `high`, Student's 95% interval of it over the n windows, paired;
    whether it is `above` the trim at all, and whether that is `clear`: the interval is above 0. `trim` and `difference`
    are None where there is no untrained score, the interval also where a log has no values of windows, or only one.
    """
    rows = [row for row in rows if row["arm"] in RATES or row["arm"] == "untrained"]
    trims = {(row["arm"], _owner(row)): row for row in rows if row["tokens"] == 0 and _is_scored(row)}
    entries = []
    for row in rows:
        if row["tokens"] and _is_scored(row):
            trim = trims.get(("untrained" if row["arm"] == "retrained" else row["arm"], _owner(row)))
            about = {name: row[name] for name in ("trial", "architecture", "arm", "lm_loss")}
            about |= {name: int(row[name]) for name in ("rung", "tokens")}
            entries.append({**about, **_compared(row, trim, scores)})
    return entries


def _owner(row: Row) -> Any:
    return row["trial"] if row["arm"] == "search" else (row["architecture"], row["seed"])


def _is_scored(row: Row) -> bool:
    return row["lm_loss"] is not None and math.isfinite(row["lm_loss"])


def _compared(row: Row, trim: Row | None, scores: Scores) -> dict[str, Any]:
    if trim is None:
        return {"trim": None, "difference": None, "low": None, "high": None, "n": 0, "above": False, "clear": False}
    trained, untrained = (
        np.array(scores.get((side["trial"], side["rung"]), {}).get("lm_loss", []), float) for side in (row, trim)
    )
    difference = row["lm_loss"] - trim["lm_loss"]
    found = {"trim": trim["lm_loss"], "difference": difference, "low": None, "high": None,
             "n": len(trained), "above": bool(difference > 0), "clear": False}  # fmt: skip
    if len(trained) != len(untrained) or len(trained) < 2:
        return found
    differences = trained - untrained
    half = float(
        scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(trained) - 1) * differences.std(ddof=1) / len(trained) ** 0.5
    )
    low, high = float(differences.mean()) - half, float(differences.mean()) + half
    return {**found, "low": low, "high": high, "clear": low > 0}


def say_harm(run_dir: RunDirectory, trial: str, trim: str) -> str | None:
    """Say so, and write it down as an event, if the newest rung of a trial is above its untrained trim: a candidate's
    clearly, a retraining's at all. `trim`: whose log has the trim. Returns the sentence."""
    rows, scores = [], {}
    for name in dict.fromkeys((trim, trial)):
        for line in run_dir.metrics(name):
            if line["kind"] == "rung":
                rows.append(line)
            elif line["kind"] == "scores":
                scores[name, line["rung"]] = line
    test = next((test for test in reversed(against_trims(rows, scores)) if test["trial"] == trial), None)
    if test is None or not (test["clear"] or test["above"] and test["arm"] == "retrained"):
        return None
    sentence = harm_sentence(test)
    said = [(event["trial"], event["rung"]) for event in run_dir.events() if event["event"] == "above_trim"]
    if (trial, test["rung"]) not in said:
        run_dir.event("above_trim", trial=trial, rung=test["rung"], message=sentence)
    say(sentence)
    return sentence


def harm_of(run_dir: RunDirectory) -> list[str]:
    """Return `harm_sentences` of a run as it is now."""
    return harm_sentences(against_trims(run_dir.read_trials(), run_dir.scores()))


def harm_sentences(tests: Sequence[Row]) -> list[str]:
    """Return what there is to say of `against_trims`; nothing where every student is better than its trim, and that it
    is not known where nothing was scored untrained.

    A rung is named where some of its trials are clearly worse; a retrained student wherever it is not below its trim.
    """
    said = [harm_sentence(test) for test in tests if test["arm"] == "retrained" and test["above"]]
    searched = [test for test in tests if test["arm"] == "search"]
    if tests and all(test["trim"] is None for test in tests):
        return ["Whether training helped is not known: search.rungs does not begin at 0, so no candidate was scored "
                "untrained."]  # fmt: skip
    for rung in sorted({test["rung"] for test in searched}, reverse=True):
        said += _on_rung([test for test in searched if test["rung"] == rung])
    return said


def harm_sentence(test: Row) -> str:
    """Say of one student that is above its untrained trim by how much, how sure that is, and what to lower."""
    which = "The retrained student" if test["arm"] == "retrained" else test["trial"]
    how = "is WORSE than its own untrained trim" if test["clear"] else "is no better than its own untrained trim"
    text = (f"{which} of {test['architecture']} {how} after {test['tokens']:,} tokens: LM loss {test['lm_loss']:.3f} "
            f"against {test['trim']:.3f}, {test['difference']:.3f} above{_interval(test)}")  # fmt: skip
    return f"{text}; a lower {RATES[test['arm']]} may help."


def _interval(test: Row) -> str:
    if test["low"] is None:
        return " (whether beyond noise is not known: there are no two windows to pair)"
    noise = "" if test["clear"] else ", within noise"
    return f" (paired over {test['n']} windows, 95% {test['low']:.3f} to {test['high']:.3f}{noise})"


def _on_rung(tests: Sequence[Row]) -> list[str]:
    """Say how many trials of a rung training made worse, if any."""
    worse = [test for test in tests if test["clear"]]
    known = [test for test in tests if test["trim"] is not None]
    where = f"rung {tests[0]['rung']}, after {tests[0]['tokens']:,} tokens"
    if not worse:
        return []
    many = f"{len(worse)} of {len(known)} trials" if len(worse) < len(known) else "Every trial"
    verb, trims = ("are", "their own untrained trims") if 1 < len(worse) < len(known) else ("is", "its untrained trim")
    names = ", ".join(test["trial"] for test in worse[:NAMED]) + (", ..." if len(worse) > NAMED else "")
    lowest, highest = (pick(test["difference"] for test in worse) for pick in (min, max))
    by = f"{lowest:.3f}" if len(worse) == 1 else f"{lowest:.3f} to {highest:.3f}"
    return [f"{many} at {where}, {verb} WORSE than {trims}, by {by} nats (paired over {worse[0]['n']} windows, each "
            f"95% interval above 0): {names}; a lower {RATES['search']} may help."]  # fmt: skip
