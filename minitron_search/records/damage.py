"""Find what is damaged in a run that goes on, and mend it from the rest, before anything reads it.

What cannot be read is set aside in `<output>/.damaged/`. Tables and the study are made again from the logs, rows of a
log from the table, and whatever a stage makes by that stage, which finds that it is not there. A line of a log that is
no such line is left where it is, and read by nobody. What nothing else holds is refused.
"""

import json
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from safetensors import safe_open

from minitron_search.messages.console import say
from minitron_search.messages.failures import described
from minitron_search.records.directory import AXES, DEPTH_SCHEMA, TRIALS_SCHEMA, RunDirectory
from minitron_search.records.lines import is_complete, is_row
from minitron_search.records.logs import Log, parsed, replace_text

ASIDE = ".damaged"
TRIED_AGAIN = "a stage that needs it makes it again"


def check_config(run_dir: RunDirectory) -> None:
    """Raise ValueError if the configuration of a run cannot be read: nothing else holds it."""
    try:
        if isinstance(yaml.safe_load(run_dir.config.read_bytes()), dict):
            return
        reason = "it holds no keys"
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = described(error)
    raise config_damage(run_dir.config, reason)


def config_damage(config: Path, reason: str) -> ValueError:
    """Return the error for a configuration of a run that cannot be read."""
    return ValueError(f"output: {config} is damaged ({reason}); valid: the file as it was, from a copy or written anew "
                      "with the values that the run began with; or another output")  # fmt: skip


def mend(run_dir: RunDirectory) -> list[str]:
    """Mend a run and return what was damaged, a line each. Called by the process that holds it, before it goes on.

    Raises ValueError for what nothing else holds, with what would do.
    """
    check_config(run_dir)
    _check_latency(run_dir)
    found = [*_log_files(run_dir), *damaged_lines(run_dir), *_unreadable(run_dir)]
    rows = _table_rows(run_dir)
    if rows is None:
        _set_aside(run_dir, run_dir.trials_table)
        found.append("trials.parquet cannot be read: made again from the trials' logs")
    for trial in sorted(path for path in (run_dir.root / "trials").glob("*") if path.is_dir()):
        found += _mend_trial(run_dir, trial, [row for row in rows or [] if row["trial"] == trial.name])
    if rows is None or any("trials/" in line for line in found):
        rebuild_table(run_dir)
    for line in found:
        say(f"damage: {line}")
        run_dir.event("damage_mended", message=line)
    return found


def rebuild_table(run_dir: RunDirectory) -> None:
    """Write trials.parquet from the trials' logs and from what the events say became of each trial."""
    statuses, messages = statuses_of(run_dir.events(), run_dir.rungs())
    known = {path.name for path in (run_dir.root / "trials").glob("*")}
    run_dir.write_trials(statuses, {trial: text for trial, text in messages.items() if trial in known})


def statuses_of(events: list[dict[str, Any]], rungs: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return what events say became of each trial of the search, and why those that failed did."""
    statuses = {row["trial"]: "running" for row in rungs if row.get("arm") not in ("teacher", "untrained", "retrained")}
    messages: dict[str, str] = {}
    for event in events:
        if event["event"] == "trial_failed":
            statuses[event["trial"]], messages[event["trial"]] = "failed", event["message"]
        elif event["event"] == "trial_finished":
            statuses[event["trial"]] = event["status"]
            messages.pop(event["trial"], None)
    promoted = {event["architecture"] for event in events if event["event"] == "promoted"}
    for row in rungs:
        complete = statuses.get(row["trial"]) == "complete"
        if complete and row.get("arm") == "search" and row.get("architecture") in promoted:
            statuses[row["trial"]] = "promoted"
    return statuses, messages


class CheckpointDamage:
    """Say which checkpoints were damaged, from now on, as trials write it into the events."""

    def __init__(self, run_dir: RunDirectory):
        self._events = Log(run_dir.events_log, run_dir.files)
        self._events.new()

    def say_new(self) -> None:
        for event in self._events.new():
            if event["event"] == "checkpoint_damaged":
                say(f"{event.get('trial')}: {event.get('message')}")


# Files


def _check_latency(run_dir: RunDirectory) -> None:
    if run_dir.latency.exists() and not _reads(_json_object, run_dir.latency):
        raise ValueError(f"output: {run_dir.latency} is damaged, and the run's space is what it leaves; valid: the "
                         "file from a copy, or delete it: it is measured again, as another machine may")  # fmt: skip


def _log_files(run_dir: RunDirectory) -> Iterator[str]:
    """Set aside what is in the place of a log and is no file."""
    for log in (run_dir.events_log, *run_dir.root.glob("trials/*/*.jsonl")):
        if log.exists() and not log.is_file():
            _set_aside(run_dir, log)
            yield f"{_name(run_dir, log)} is no file: begun again"


def damaged_lines(run_dir: RunDirectory) -> Iterator[str]:
    """Name every line of a log that is no line of such a log, and that is read by nobody."""
    for log in (run_dir.events_log, *sorted(run_dir.root.glob("trials/*/*.jsonl"))):
        if log.is_file():
            text = log.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]  # a kill may have cut the last one short
            for number, line in enumerate(parsed(log.name, whole), 1):
                if line is None:
                    yield f"{_name(run_dir, log)}, line {number}, is no line of such a log: left out"


def _unreadable(run_dir: RunDirectory) -> Iterator[str]:
    """Set aside every file that a stage can make again and that cannot be read; of a pair, both."""
    readers: dict[Path, Callable[[Path], Any]] = {
        run_dir.importance: _tensors,
        run_dir.environment: _json_object,
        run_dir.evidence: _json_object,
        run_dir.evaluation: _json_object,
        run_dir.forecast: _json_object,
        run_dir.generations: _json_object,
        run_dir.depth_recommendation: _json_object,
        run_dir.depth: lambda path: _columns(path, DEPTH_SCHEMA.names),
        run_dir.root / "layer_merge.json": lambda path: json.loads(path.read_bytes()),
        run_dir.study: _database,
        run_dir.report: lambda path: path.read_bytes(),
        **dict.fromkeys(run_dir.root.glob("depth_pieces/*.npz"), _archive),
        **dict.fromkeys(run_dir.root.glob("best*"), _student),
        **dict.fromkeys(run_dir.root.glob("trials/*/events.out.tfevents"), lambda path: path.read_bytes()),
    }
    for path, reader in readers.items():
        if path.exists() and not _reads(reader, path):
            _set_aside(run_dir, path)
            yield f"{_name(run_dir, path)} cannot be read: set aside; {TRIED_AGAIN}"
    if run_dir.depth_recommendation.exists() != run_dir.depth.exists():  # the stage looks for one, and writes both
        for path in (run_dir.depth_recommendation, run_dir.depth):
            if path.exists():
                _set_aside(run_dir, path)


def _table_rows(run_dir: RunDirectory) -> list[dict[str, Any]] | None:
    """Return the sound rows of trials.parquet; None if it is damaged."""
    if not run_dir.trials_table.exists():
        return []
    try:
        rows = pq.read_table(run_dir.trials_table).to_pylist()
    except Exception:  # pyarrow raises almost anything of bytes that are no table
        return None
    return rows if all(is_row(row) for row in rows) and _columns(run_dir.trials_table, TRIALS_SCHEMA.names) else None


# Trials


def _mend_trial(run_dir: RunDirectory, folder: Path, table: list[dict[str, Any]]) -> Iterator[str]:
    """Give a trial back what its log has lost; where that is nowhere, let it train again from there."""
    trial = folder.name
    logged = {line["rung"]: line for line in run_dir.metrics(trial) if line["kind"] == "rung" and is_complete(line)}
    for row in table:
        if row["rung"] not in logged and is_complete(row):
            logged[row["rung"]] = row
            run_dir.log_rung(trial, {name: value for name, value in row.items() if name not in ("status", "message")})
            yield f"trials/{trial}/metrics.jsonl lacks rung {row['rung']}: taken from trials.parquet"
    yield from _mend_description(run_dir, folder, logged)
    if folder.exists():
        first = next(rung for rung in range(len(logged) + 1) if rung not in logged)
        if any(rung > first for rung in logged) or _incomplete(run_dir, trial):
            _begin_again_at(run_dir, trial, first)
            yield f"trials/{trial}/metrics.jsonl has lost rung {first}: trained again from there"


def _incomplete(run_dir: RunDirectory, trial: str) -> bool:
    return any(line["kind"] == "rung" and not is_complete(line) for line in run_dir.metrics(trial))


def _begin_again_at(run_dir: RunDirectory, trial: str, rung: int) -> None:
    """Forget what a trial did from `rung` on: its checkpoint is behind it, so that it begins with its trim."""
    lines = run_dir.metrics(trial)
    kept = [line for line in lines if line["kind"] == "step" or line["rung"] < rung]
    decided = [line for number, line in sorted(run_dir.decisions(trial).items()) if number < rung]
    for path, content in (("metrics.jsonl", kept), ("decisions.jsonl", decided)):
        if (run_dir.trial(trial) / path).exists():
            _set_aside(run_dir, run_dir.trial(trial) / path)
            replace_text(run_dir.trial(trial) / path, "".join(json.dumps(line) + "\n" for line in content))
    if run_dir.checkpoint(trial).exists():
        _set_aside(run_dir, run_dir.checkpoint(trial))


def _mend_description(run_dir: RunDirectory, folder: Path, logged: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Make a trial's architecture.json again from its rows; without any, forget the trial: it has done nothing."""
    path = folder / "architecture.json"
    if _reads(_description, path):
        return
    name = _name(run_dir, path)
    described = _from_row(run_dir, next(iter(logged.values()), {}))
    if path.exists():
        _set_aside(run_dir, path)
    if described is not None:
        run_dir.start_trial(folder.name, described)
        yield f"{name} cannot be read: made again from the trial's rows"
    else:
        _set_aside(run_dir, folder)
        yield f"{name} cannot be read: the trial is set aside, and proposed again if it is its turn"


def _from_row(run_dir: RunDirectory, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return what makes a trial, from a row of it, and from the layers of one that drops none."""
    if any(row.get(name) is None for name in AXES):
        return None
    depth = row["num_hidden_layers"] + row["drop_block_length"]
    dropped = range(row["drop_block_start"], row["drop_block_start"] + row["drop_block_length"])
    known = {name: value for name, value in row.items() if name in TRIALS_SCHEMA.names and value is not None}
    controls = {"random_pruned": "random_pruned", "random_init": "random"}
    arm = str(row["arm"]).removesuffix("_retrained")
    initialization = controls.get(arm, run_dir.read_config().get("distillation", {}).get("initialization", "pruned"))
    layers = [layer for layer in range(depth) if layer not in dropped]
    return {**known, "initialization": initialization, "layers": layers}


# Readers: each raises something, or returns False, for a file that is not as it was written


def _json_object(path: Path) -> bool:
    return isinstance(json.loads(path.read_bytes()), dict)


def _description(path: Path) -> bool:
    content = json.loads(path.read_bytes())
    numbers = ("seed", "proposal", *AXES[:4])
    return (
        isinstance(content["arm"], str)
        and all(type(content[name]) is int for name in numbers)
        and all(type(layer) is int for layer in content["layers"])
    )


def _tensors(path: Path) -> bool:
    with safe_open(str(path), framework="numpy") as file:  # which compares the header with the size of the file
        return bool(list(file.keys()))


def _student(folder: Path) -> bool:
    weights = list(folder.glob("*.safetensors"))
    return bool(weights) and all(map(_tensors, weights)) and _json_object(folder / "config.json")


def _columns(path: Path, names: list[str]) -> bool:
    table = pq.read_table(path)
    return set(names) >= set(table.column_names) and len(table.column_names) > 1


def _database(path: Path) -> bool:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        sound = database.execute("pragma quick_check").fetchone() == ("ok",)
        return sound and database.execute("select count(*) from studies").fetchone() == (1,)


def _archive(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def _reads(reader: Callable[[Path], Any], path: Path) -> bool:
    try:
        return reader(path) is not False
    except Exception:  # of bytes that are no such file a reader raises almost anything
        return False


def _set_aside(run_dir: RunDirectory, path: Path) -> None:
    """Move what is damaged to where nothing reads it."""
    name = "--".join(path.relative_to(run_dir.root).parts)
    aside = run_dir.root / ASIDE
    aside.mkdir(exist_ok=True)
    number = 1
    while (aside / f"{name}.{number}").exists():
        number += 1
    path.rename(aside / f"{name}.{number}")


def _name(run_dir: RunDirectory, path: Path) -> str:
    return str(path.relative_to(run_dir.root))
