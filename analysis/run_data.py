"""One run directory as frames: the whole input of the report."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from safetensors import safe_open

from minitron_search.records.damage import damaged_lines, statuses_of
from minitron_search.records.directory import ABLATION_FILE, DEPTH_SCHEMA, TRIALS_SCHEMA, RunDirectory

# The arms that are not candidates; every other arm is the search's. A control of a promoted
# architecture has its tokens of the search, or, `_retrained`, those of the retraining.
BESIDE = ("random_pruned", "random_init")
CONTROLS = ("teacher", "untrained", "retrained", *BESIDE, *(f"{arm}_retrained" for arm in BESIDE))
STEP_COLUMNS = ("trial", "tokens", "loss", "learning_rate", "tokens_per_second")


class Importance(NamedTuple):
    """The arrays of importance.safetensors, float32. `block_bi[i, i + 1]` is the BI of layer i."""

    hidden: np.ndarray  # (hidden_size,)
    mlp: np.ndarray  # (layers, intermediate_size)
    heads: np.ndarray  # (layers, num_attention_heads)
    block_bi: np.ndarray  # (layers + 1, layers + 1)
    metadata: dict[str, str]  # samples, batch, sequence


class RunData(NamedTuple):
    """What a run has written so far. A part that does not exist yet is empty, or None.

    trials: rows of `TRIALS_SCHEMA`; numbers are float64 with NaN where unknown, text is "" where unknown. steps: a row
    per logged training step: trial, tokens, loss, learning_rate, tokens_per_second. scores: what a rung's means are
    taken over, by trial and rung: a value for every window, or question. made: architecture.json of each trial folder.
    depth: rows of `DEPTH_SCHEMA`; recommendation: depth.json; evidence, forecast, evaluation, generations: the
    JSON of that name.
    problems: one line per artifact that exists but cannot be read.
    """

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    trials: pd.DataFrame
    steps: pd.DataFrame
    scores: dict[tuple[str, int], dict[str, Any]]
    made: dict[str, dict[str, Any]]
    events: list[dict[str, Any]]
    importance: Importance | None
    depth: pd.DataFrame
    recommendation: dict[str, Any]
    evidence: dict[str, Any]
    forecast: dict[str, dict[str, Any]]
    evaluation: dict[str, Any]
    generations: dict[str, Any]
    problems: list[str]


def load_run(directory: RunDirectory) -> RunData:
    """Read a run directory, finished or not.

    Raises ValueError where the folder holds none of a run's artifacts.
    """
    artifacts = (
        directory.config,
        directory.trials_table,
        directory.events_log,
        directory.importance,
        directory.depth,
        directory.evaluation,
        directory.root / "trials",
    )
    if (directory.root / ABLATION_FILE).exists():
        raise ValueError(
            f"{directory.root}: an ablation, whose arms are runs; valid: one of them, or "
            f"`python -m analysis.ablation_report {directory.root}`"
        )
    if not any(path.exists() for path in artifacts):
        raise ValueError(
            f"{directory.root}: no run here; valid: a run directory, with {directory.config.name}, "
            f"{directory.events_log.name} and trials/, as `python -m minitron_search.run` writes it"
        )
    problems: list[str] = []

    def read(what: str, reader: Callable[[], Any], otherwise: Any) -> Any:
        # The report must come out of a run whose disk filled up: what is damaged is named, the rest is shown.
        try:
            return reader()
        except Exception as error:
            problems.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    config = read("config.yaml", directory.read_config, {}) if directory.config.exists() else {}
    config = config if isinstance(config, dict) else {}
    events = read("events.jsonl", directory.events, [])
    rungs = read("trials/*/metrics.jsonl", directory.rungs, [])
    rows = read("trials.parquet", directory.read_trials, None)
    if rows is None:  # the logs hold all of it
        statuses, messages = statuses_of(events, rungs)
        rows = [{**row, "status": statuses.get(row["trial"], "complete"), "message": messages.get(row["trial"], "")}
                for row in rungs]  # fmt: skip
    problems += read("events.jsonl", lambda: list(damaged_lines(directory)), [])
    folders = sorted(path.name for path in (directory.root / "trials").glob("*") if path.is_dir())
    return RunData(
        name=str(config.get("name") or directory.root.resolve().name),
        config=config,
        environment=read("environment.json", directory.read_environment, {}),
        trials=trials_frame(rows, rungs),
        steps=read("trials/*/metrics.jsonl", lambda: steps_frame(directory, folders), steps_of([])),
        scores=read("trials/*/metrics.jsonl", directory.scores, {}),
        made=read("trials/*/architecture.json", lambda: read_made(directory, folders), {}),
        events=events,
        importance=read("importance.safetensors", lambda: read_importance(directory), None),
        depth=pd.DataFrame(read("depth.parquet", directory.read_depth, []), columns=DEPTH_SCHEMA.names),
        recommendation=read("depth.json", directory.read_depth_recommendation, {}),
        evidence=read("evidence.json", directory.read_evidence, {}),
        forecast=read("forecast.json", directory.read_forecast, {}),
        evaluation=read("evaluation.json", directory.read_evaluation, {}),
        generations=read("generations.json", directory.read_generations, {}),
        problems=problems,
    )


def trials_frame(rows: list[dict[str, Any]], rungs: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the trials table, with the rungs that ended after it was written, in their trial's status."""
    statuses = {row["trial"]: row["status"] for row in rows}
    known = {(row["trial"], row["rung"]) for row in rows}
    new = [
        {**rung, "status": statuses.get(rung["trial"], "running")}
        for rung in rungs
        if (rung["trial"], rung["rung"]) not in known
    ]
    frame = pd.DataFrame([*rows, *new], columns=TRIALS_SCHEMA.names)
    for field in TRIALS_SCHEMA:
        column = frame[field.name]
        if pa.types.is_string(field.type):
            frame[field.name] = column.astype(object).where(column.notna(), "").astype(str)
        else:
            frame[field.name] = pd.to_numeric(column, errors="coerce").astype(np.float64)
    return frame


def steps_frame(directory: RunDirectory, folders: list[str]) -> pd.DataFrame:
    return steps_of(
        [{**line, "trial": trial} for trial in folders for line in directory.metrics(trial) if line["kind"] == "step"]
    )


def steps_of(lines: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(lines, columns=list(STEP_COLUMNS))
    for name in STEP_COLUMNS[1:]:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(np.float64)
    # A trial restarted from its last rung logs the same tokens twice; the second time is what counts.
    return frame.drop_duplicates(["trial", "tokens"], keep="last").sort_values(["trial", "tokens"], ignore_index=True)


def read_made(directory: RunDirectory, folders: list[str]) -> dict[str, dict[str, Any]]:
    files = {trial: directory.trial(trial) / "architecture.json" for trial in folders}
    return {trial: json.loads(path.read_text()) for trial, path in files.items() if path.exists()}


def read_importance(directory: RunDirectory) -> Importance | None:
    if not directory.importance.exists():
        return None
    with safe_open(str(directory.importance), framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in ("hidden", "mlp", "heads", "block_bi")}
        return Importance(**arrays, metadata=dict(file.metadata() or {}))


def last_rungs(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the row of each trial's highest rung, in the table's order."""
    return trials.loc[trials.groupby("trial", sort=False)["rung"].idxmax().sort_values()] if len(trials) else trials


def candidates(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the search's own trials."""
    return trials[~trials["arm"].isin(CONTROLS)]


def common_rung(trials: pd.DataFrame) -> float | None:
    """Return the highest scored rung that more than one candidate reached; only within a rung is anything ranked."""
    scored = candidates(trials)
    scored = scored[np.isfinite(scored["lm_loss"])]
    reached = scored.groupby("rung")["trial"].nunique()
    if reached.empty:
        return None
    shared = reached[reached > 1]
    return float((shared if len(shared) else reached).index.max())


def best_candidate(trials: pd.DataFrame) -> tuple[pd.Series, bool] | None:
    """Return the candidate of lowest LM loss and whether it was promoted; before a promotion, the leader of its
    rung."""
    scored = candidates(trials)
    scored = scored[np.isfinite(scored["lm_loss"])]
    promoted = scored[scored["status"] == "promoted"]
    if len(promoted):
        last = last_rungs(promoted)
        last = last[last["rung"] == last["rung"].max()]
        return last.loc[last["lm_loss"].idxmin()], True
    rung = common_rung(trials)
    if rung is None:
        return None
    level = scored[scored["rung"] == rung]
    return level.loc[level["lm_loss"].idxmin()], False


def of_arm(trials: pd.DataFrame, arm: str, architecture: str | None = None) -> pd.Series | None:
    """Return the last rung of lowest loss in one arm, of `architecture` where that one has a row in it."""
    rows = last_rungs(trials[trials["arm"] == arm])
    same = rows[rows["architecture"] == architecture] if architecture is not None else rows
    rows = same if len(same) else rows
    return None if rows.empty else rows.sort_values("lm_loss", na_position="last").iloc[0]
