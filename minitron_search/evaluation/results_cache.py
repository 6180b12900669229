"""Results of tasks, kept by all that made them: a model that was evaluated once is not evaluated again."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron_search.distillation.settings import Precision
from minitron_search.evaluation.lm_eval_tasks import Task
from minitron_search.models.sources import TOKENIZER_FILES, file_hash, fingerprint
from minitron_search.records.directory import replace_text
from minitron_search.records.paths import cache_folder

FORMULA = 1  # raised where `evaluation` makes other numbers of the same answers
BESIDE_WEIGHTS = (*TOKENIZER_FILES, "generation_config.json")


def content(folder: Path) -> str:
    """Content id of all that a model answers by: `fingerprint` of its weights, its tokenizer, its defaults of
    generation."""
    files = sorted({file for pattern in BESIDE_WEIGHTS for file in folder.glob(pattern)})
    beside = "".join(f"{file.name} {file_hash(file)} " for file in files)
    return hashlib.sha256(f"{fingerprint(folder)} {beside}".encode()).hexdigest()[:16]


def key(model: str, task: Task, precision: Precision, limit: int | None) -> str:
    """Of the model whose `content` is given. A data set on the Hub is in it by its task's name alone: what was asked is
    in the result, as `questions`."""
    made = {
        "model": model,
        "task": {**task._asdict(), "yaml": None if task.content else task.yaml, "changes": _without_paths(task)},
        "precision": precision,
        "limit": limit,
        "formula": FORMULA,
        "versions": {name: version(name) for name in ("lm_eval", "transformers")},
    }
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]


def read(key: str) -> dict[str, Any] | None:
    try:
        return json.loads(_path(key).read_text())
    except FileNotFoundError:
        return None


def write(key: str, result: dict[str, Any]) -> None:
    replace_text(_path(key), json.dumps(result))


def _path(key: str) -> Path:
    return cache_folder() / "evaluation" / f"{key}.json"


def _without_paths(task: Task) -> dict[str, Any]:
    """Data files are in a task's `content`, wherever they lie."""
    changes = dict(task.changes)
    if "dataset_kwargs" in changes:
        changes["dataset_kwargs"] = {k: v for k, v in changes["dataset_kwargs"].items() if k != "data_files"}
    return changes
