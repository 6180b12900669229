"""Read and write a run directory: its artifacts and their schemas. Nothing else writes tables.

    config.yaml  environment.json  importance.safetensors  trials.parquet  events.jsonl  study.db
    depth.parquet  depth.json  depth_pieces/  layer_merge.json  latency.json  forecast.json  evidence.json
    evaluation.json  learning_rate.json
    trials/<id>/ architecture.json, metrics.jsonl, decisions.jsonl, checkpoint/, events.out.tfevents
    best/     report.html
    .lock     .owner     who writes it (ownership.owner)     .damaged/    what was set aside (records.damage)

What is true is in `trials/<id>/metrics.jsonl`: a line per logged step and a line per finished rung, written
by the trial itself when the rung ends, so a driver that is killed loses no finished row. `trials.parquet` is
those rung lines with the status the search gave each trial. Every table is replaced in one rename: a reader
never sees half of one.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from minitron_search.messages.failures import first_line
from minitron_search.records.lines import COUNTS, SPEED
from minitron_search.records.logs import LOCAL, Files, Log, append_line, read_lines, replace_text
from minitron_search.records.metrics import score_columns
from minitron_search.records.paths import working_folder
from minitron_search.records.transfer import NodeTransfer

ABLATION_FILE, ABLATION_TABLE = "ablation.json", "ablation.parquet"  # of an ablation, beside its runs
AXES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "drop_block_start",
    "drop_block_length",
)

SHAPE = AXES[:5]  # on which the speed depends

# One row per trial and rung. Losses in nats per token, margins in nats per example, seconds of wall time.
# `status` is the trial's, repeated on each of its rows: a stopped trial is never mistaken for a complete one.
TRIALS_SCHEMA = pa.schema(
    [
        ("trial", pa.string()),
        ("architecture", pa.string()),
        ("arm", pa.string()),  # search | random_pruned | random_init | teacher | untrained | retrained
        ("seed", pa.int64()),
        ("rung", pa.int64()),
        ("tokens", pa.int64()),
        *((name, pa.int64() if name in COUNTS else pa.float64()) for name in score_columns()),
        ("bi", pa.float64()),  # block importance, in the teacher, of the block this architecture drops
        ("params", pa.int64()),
        ("non_embedding_params", pa.int64()),
        ("memory_bytes", pa.int64()),
        # of a forward pass, in the run's precision, on the trial's threads; its error over repeats, null where it was
        # measured beside other trials, as earlier versions did
        ("tokens_per_second", pa.float64()),
        ("tokens_per_second_stderr", pa.float64()),
        ("status", pa.string()),  # running | stopped | complete | failed | promoted
        ("seconds", pa.float64()),  # training and scoring from the rung before to this one
        ("message", pa.string()),  # why a failed trial failed
        ("proposal", pa.int64()),  # order in which the search proposed it
        *((axis, pa.int64()) for axis in AXES),
    ]
)
# One row per metric, and cut of the depth sweep: layers `start`..`start + length - 1` of a contiguous block, the
# comma-separated `layers` of any cut. Losses in nats per token, margins in nats per example.
DEPTH_SCHEMA = pa.schema(
    [
        ("start", pa.int64()),  # the first removed layer; 0 for the teacher
        ("length", pa.int64()),  # how many are removed; 0 for the teacher
        ("metric", pa.string()),  # lm_loss | winogrande_acc | winogrande_margin | bi | angular | taylor
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("n", pa.int64()),  # validation windows, or Winogrande examples
        ("kind", pa.string()),  # contiguous | one_by_one | teacher
        ("layers", pa.string()),
    ]
)
FINISHED = ("stopped", "complete", "promoted", "failed")


class RunDirectory:
    """One run's folder. Creating the object touches nothing on disk.

    `files`: how its logs are reached. `transfer`: how its folders travel between nodes whose disks are their own; None
    if none has to. Tables are read and written by the driver alone.
    """

    def __init__(self, root: str | Path, files: Files = LOCAL, transfer: NodeTransfer | None = None):
        self.root = working_folder(str(root))
        self.files, self.transfer = files, transfer
        self.config = self.root / "config.yaml"
        self.environment = self.root / "environment.json"
        self.importance = self.root / "importance.safetensors"
        self.depth = self.root / "depth.parquet"
        self.depth_recommendation = self.root / "depth.json"
        self.depth_pieces = self.root / "depth_pieces"  # what a killed sweep goes on from
        self.trials_table = self.root / "trials.parquet"
        self.events_log = self.root / "events.jsonl"
        self.evaluation = self.root / "evaluation.json"
        self.study = self.root / "study.db"
        self.evidence = self.root / "evidence.json"
        self.latency = self.root / "latency.json"
        self.forecast = self.root / "forecast.json"
        self.learning_rate = self.root / "learning_rate.json"
        self.generations = self.root / "generations.json"
        self.report = self.root / "report.html"
        self.scratch = self.root / ".ray"  # what Ray writes of its own; gone when the run ends
        self._followed: dict[Path, Log] = {}
        self._speeds: dict[tuple, dict[str, float]] = {}
        self._rungs: dict[tuple[str, int], dict[str, Any]] = {}

    def __reduce__(self) -> tuple:
        return RunDirectory, (self.root, self.files, self.transfer)  # what it has read stays where it was read

    def trial(self, trial: str) -> Path:
        return self.root / "trials" / trial

    def _metrics(self, trial: str) -> Path:
        return self.trial(trial) / "metrics.jsonl"

    def tensorboard(self, trial: str) -> Path:
        """Return the file for TensorBoard, made from metrics.jsonl (`tracking.curves`)."""
        return self.trial(trial) / "events.out.tfevents"

    def checkpoint(self, trial: str) -> Path:
        return self.trial(trial) / "checkpoint"

    @property
    def ray_storage(self) -> str:
        """The folder or address of Ray's own files: all nodes have to see it, though nobody here reads it."""
        travels = self.transfer is not None and self.transfer.travels(self.scratch)
        return self.transfer.address(self.scratch.name) if self.transfer is not None and travels else str(self.scratch)

    def best(self, rank: int = 1) -> Path:
        """Return the folder of the student promoted `rank`-th: best/, best-2/, ..."""
        return self.root / ("best" if rank == 1 else f"best-{rank}")

    def write_config(self, config: Mapping[str, Any]) -> None:
        replace_text(self.config, yaml.safe_dump(dict(config), sort_keys=False))

    def read_config(self) -> dict[str, Any]:
        return _read(self.config, lambda path: _object(yaml.safe_load(path.read_text())))

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        replace_text(self.environment, json.dumps(environment, indent=1))

    def read_environment(self) -> dict[str, Any]:
        return _read_json(self.environment)

    def write_evaluation(self, scores: Mapping[str, Any]) -> None:
        """Write evaluation.json: models by name in the run; results, failures and differences, an entry a line."""
        lines = ",\n".join(
            f"{json.dumps(name)}: "
            + (json.dumps(value) if isinstance(value, Mapping) else f"[{','.join(_lines(value))}\n]")
            for name, value in scores.items()
        )
        replace_text(self.evaluation, f"{{\n{lines}\n}}\n")

    def read_evaluation(self) -> dict[str, Any]:
        return _read_json(self.evaluation)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event with its Unix time in seconds, durable when this returns."""
        append_line(self.events_log, {"time": time.time(), "event": kind, **fields}, files=self.files)

    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.events_log, self.files)

    def start_trial(self, trial: str, architecture: Mapping[str, Any]) -> None:
        """Write down what makes a trial: axes, kept layers, arm, seed, proposal."""
        replace_text(self.trial(trial) / "architecture.json", json.dumps(architecture, indent=1))

    def log_step(self, trial: str, **metrics: Any) -> None:
        append_line(self._metrics(trial), {"kind": "step", **metrics}, durable=False, files=self.files)

    def log_rung(self, trial: str, row: Mapping[str, Any]) -> None:
        """Append one finished rung: a row of `TRIALS_SCHEMA`, whose status is still the search's to set."""
        append_line(self._metrics(trial), {"kind": "rung", **row}, files=self.files)

    def log_scores(self, trial: str, rung: int, **scores: list[float]) -> None:
        """Append what a rung's means are taken over, before the rung itself: a value for every window, or example.

        `winogrande_twin` numbers the examples, twins alike.
        """
        line = {"kind": "scores", "rung": rung, **scores}
        append_line(self._metrics(trial), line, durable=False, files=self.files)

    def scores(self) -> dict[tuple[str, int], dict[str, list[float]]]:
        """Return, by trial and rung, what `log_scores` was given."""
        return {
            (log.parent.name, line["rung"]): line
            for log in sorted((self.root / "trials").glob("*/metrics.jsonl"))
            for line in read_lines(log) if line["kind"] == "scores"
        }  # fmt: skip

    def write_evidence(self, evidence: Mapping[str, Any]) -> None:
        replace_text(self.evidence, json.dumps(evidence, indent=1))

    def read_evidence(self) -> dict[str, Any]:
        return _read_json(self.evidence)

    def write_latency(self, measured: Mapping[str, Any]) -> None:
        """Write what `pipeline.latency.measure_tables` measured: a run's space is what these tables leave of it."""
        replace_text(self.latency, json.dumps(measured, indent=1))

    def read_latency(self) -> dict[str, Any]:
        return _read_json(self.latency)

    def write_learning_rate(self, found: Mapping[str, Any]) -> None:
        """Write learning_rate.json: what `auto` became, and every rate that a probe tried."""
        replace_text(self.learning_rate, json.dumps(found, indent=1))

    def write_forecast(self, stages: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what each stage will cost: tokens, flops, seconds, gpus, gpu_seconds, price_per_hour, cost, basis."""
        replace_text(self.forecast, json.dumps(stages, indent=1))

    def read_forecast(self) -> dict[str, dict[str, Any]]:
        return _read_json(self.forecast)

    def write_generations(self, written: Mapping[str, Any]) -> None:
        """Write what models wrote after the same prompts, by model, a text each; and `student`, the trial's id."""
        replace_text(self.generations, json.dumps(written, indent=1, ensure_ascii=False))

    def read_generations(self) -> dict[str, Any]:
        return _read_json(self.generations)

    def speeds(self) -> dict[tuple, dict[str, float]]:
        """Return the columns of `SPEED` of every shape that was measured alone."""
        log = self._followed.setdefault(self.events_log, Log(self.events_log, self.files))
        for event in log.new():
            numbers = (event.get(name) for name in (*SHAPE, *SPEED))
            if event["event"] == "speed_measured" and all(isinstance(number, float | int) for number in numbers):
                self._speeds[shape_of(event)] = {name: event[name] for name in SPEED}
        return dict(self._speeds)

    def decide(self, trial: str, rung: int, decision: str) -> None:
        """Record whether a trial may train past a rung: `continue` or `stop`."""
        line = {"rung": rung, "decision": decision, "time": time.time()}
        append_line(self.trial(trial) / "decisions.jsonl", line, files=self.files)

    def decisions(self, trial: str) -> dict[int, dict[str, Any]]:
        """Return the decision lines of a trial, by rung."""
        return {line["rung"]: line for line in read_lines(self.trial(trial) / "decisions.jsonl", self.files)}

    def metrics(self, trial: str) -> list[dict[str, Any]]:
        return read_lines(self._metrics(trial), self.files)

    def follow(self, trial: str) -> "Log":
        """Return the log of the lines of `metrics`, which can be read as it grows."""
        return Log(self._metrics(trial), self.files)

    def rungs(self) -> list[dict[str, Any]]:
        """Return every finished rung of every trial; a rung that a restarted trial wrote twice counts once."""
        for log in (self.root / "trials").glob("*/metrics.jsonl"):
            for line in self._followed.setdefault(log, Log(log)).new():  # each is read once, however often it is asked
                if line.pop("kind") == "rung":
                    self._rungs[line["trial"], line["rung"]] = line
        return [dict(self._rungs[key]) for key in sorted(self._rungs)]

    def write_trials(self, statuses: Mapping[str, str], messages: Mapping[str, str] | None = None) -> None:
        """Rebuild `trials.parquet` from the trials' own logs and the search's status of each of its trials.

        A row of a trial outside the search (teacher, untrained, retrained) is written when it is complete.
        """
        messages, speeds = messages or {}, self.speeds()
        rows = [
            {
                **row,
                **(speeds.get(shape_of(row), {}) if row.get("tokens_per_second") is None else {}),
                "status": statuses.get(row["trial"], "complete"),
                "message": messages.get(row["trial"], ""),
            }
            for row in self.rungs()
        ]
        seen = {row["trial"] for row in rows}
        for trial in messages.keys() - seen:  # failed before its first rung: still a row that says so
            definition = json.loads((self.trial(trial) / "architecture.json").read_text())
            known = {name: definition[name] for name in TRIALS_SCHEMA.names if name in definition}
            rows.append({**known, "trial": trial, "rung": 0, "tokens": 0, "status": "failed",
                         "message": messages[trial]})  # fmt: skip
        rows.sort(key=lambda row: (row["proposal"], row["arm"], row["trial"], row["rung"]))
        complete = [{name: row.get(name) for name in TRIALS_SCHEMA.names} for row in rows]
        write_table(self.trials_table, pa.Table.from_pylist(complete, schema=TRIALS_SCHEMA))

    def write_depth(self, rows: list[dict[str, Any]]) -> None:
        write_table(self.depth, pa.Table.from_pylist(rows, schema=DEPTH_SCHEMA))

    def read_depth(self) -> list[dict[str, Any]]:
        return _read_rows(self.depth)

    def write_depth_recommendation(self, advice: Mapping[str, Any]) -> None:
        replace_text(self.depth_recommendation, json.dumps(advice, indent=1))

    def read_depth_recommendation(self) -> dict[str, Any]:
        return _read_json(self.depth_recommendation)

    def read_trials(self) -> list[dict[str, Any]]:
        return _read_rows(self.trials_table)


def chosen_rate(run_dir: RunDirectory) -> dict[str, Any] | None:
    """Return which learning rate `auto` became in a run, by its event, or by its file where the event was damaged; None
    if none has been chosen yet."""
    said = next((event for event in run_dir.events() if event["event"] == "learning_rate"), None)
    return said or _read_json(run_dir.learning_rate) or None


def shape_of(row: Mapping[str, Any]) -> tuple:
    """Return what the speed of a row's architecture depends on."""
    return tuple(row.get(name) for name in SHAPE)


def stage_seconds(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds that each stage took, over all sessions of a run.

    A stage that was cut off, or still runs, lasts to the last event of its session.
    """
    seconds: dict[str, float] = {}
    begun: dict[str, float] = {}
    last = 0.0
    for event in [*events, {"event": "run_started", "time": None}]:
        if event["event"] == "run_started":
            for stage, time_begun in begun.items():
                seconds[stage] = seconds.get(stage, 0.0) + last - time_begun
            begun = {}
        elif event["event"] == "stage_started":
            begun[event["stage"]] = event["time"]
        elif event["event"] == "stage_finished" and event["stage"] in begun:
            stage = event["stage"]
            seconds[stage] = seconds.get(stage, 0.0) + event["time"] - begun.pop(stage)
        last = event["time"] or last
    return seconds


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Return what `reader` makes of a file. Raises ValueError, which names the file, where it cannot."""
    try:
        return reader(path)
    except (OSError, ValueError, pa.ArrowException, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); valid: the file as it was written; --resume "
                         "mends what the rest of the run holds") from error  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    return _read(path, lambda path: _object(json.loads(path.read_text()))) if path.exists() else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return _read(path, lambda path: pq.ParquetFile(path).read().to_pylist()) if path.exists() else []


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not keys and values")
    return value


def _lines(values: Iterable[Any]) -> Iterable[str]:
    return (f"\n{json.dumps(value)}" for value in values)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, temporary)
    os.replace(temporary, path)
