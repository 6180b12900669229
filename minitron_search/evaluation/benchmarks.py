"""Tables 1 and 2 of a run: teacher, students and references on every task, and the students paired with the teacher."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from minitron_search.config.types import Precision
from minitron_search.data.tokenizer_files import tokenizer_files
from minitron_search.evaluation.lm_eval_tasks import Task, reason
from minitron_search.evaluation.statistics import clustered, compared, mcnemar
from minitron_search.messages.console import say
from minitron_search.models.loading import weight_files
from minitron_search.records import cache
from minitron_search.records.cache import content_id, file_hash
from minitron_search.records.directory import RunDirectory
from minitron_search.teachers.sources import fingerprint, teacher_folder

Compute = Callable[[Path, Task, Precision, int | None], dict[str, Any]]
TEACHER = "teacher"


def models_of(run_dir: RunDirectory, teacher: str, folder: Path, students: int) -> dict[str, tuple[str, Path]]:
    """Return (name, folder) of a run's models, by what the run calls them: teacher, best, best-2, ..."""
    ours = {run_dir.best(rank).name: (run_dir.best(rank).name, run_dir.best(rank)) for rank in range(1, students + 1)}
    return {TEACHER: (teacher, folder), **ours}


def evaluate_all(
    run_dir: RunDirectory,
    models: Mapping[str, tuple[str, Path]],
    references: Sequence[str],
    tasks: Sequence[Task],
    precision: Precision,
    limit: int | None,
    compute: Compute,
) -> bool:
    """Evaluate every task on every model into evaluation.json, result by result, and return whether all of it could be
    done.

    compute: `lm_eval_run.evaluate`, wherever it runs. A task that fails becomes a line of `failures`, and the others go
    on. Results of other tasks or limits that are already there stay.
    """
    evaluation = run_dir.read_evaluation()
    if "results" not in evaluation:  # none yet, or of a version that wrote less
        evaluation = {"models": {}, "results": [], "failures": [], "differences": []}
    done = True
    for name, place in [*models.items(), *((name, (name, None)) for name in references)]:
        try:
            folder = place[1] or teacher_folder(name)
            model = {"name": place[0], "content": model_content(folder), "params": parameters(folder)}
        except Exception as error:  # a damaged file's is of no common kind
            failure = {"model": name, "task": "", "message": str(error)}
            evaluation["failures"] = [*_others(evaluation["failures"], name), failure]
            say(f"evaluation: {name}: {error}")
            run_dir.event("evaluation_failed", model=name, message=reason(error))
            done = False
            continue
        _forget_failure(evaluation, name, "")
        known = evaluation["models"].get(name)
        if known is not None and known["content"] != model["content"]:  # another model by this name
            evaluation["results"] = _others(evaluation["results"], name)
        evaluation["models"][name] = model
        for task in tasks:
            done &= _one(run_dir, evaluation, name, folder, task, precision, limit, compute)
    order = list(evaluation["models"])
    evaluation["results"] = sorted(evaluation["results"], key=lambda result: order.index(result["model"]))
    evaluation["differences"] = differences(evaluation["results"], [name for name in order if name != TEACHER])
    run_dir.write_evaluation(evaluation)
    return done


def differences(results: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[dict[str, Any]]:
    """Return each model minus the teacher, on the questions that both were asked in one precision:
    `statistics.compared`, and `test`, which p is from.

    For right and wrong answers p is McNemar's, over questions; error and interval are over twin pairs where questions
    have twins. Empty without a teacher, and for a metric that is no mean over questions.
    """
    rows = []
    teacher = {_asked(result): result for result in results if result["model"] == TEACHER}
    for result in results:
        one = teacher.get(_asked(result))
        if result["model"] not in models or one is None or one["samples"] is None or result["samples"] is None:
            continue
        a, b = np.array(one["samples"], float), np.array(result["samples"], float)
        twins = one["twins"]
        pair = (a, b) if twins is None else (clustered(a, np.array(twins)), clustered(b, np.array(twins)))
        # sums of twins differ by rounding alone where the two models are alike
        test: dict[str, Any] = {name: round(value, 12) + 0.0 for name, value in compared(*pair).items()}
        test["test"] = "signs"
        if set(np.unique([a, b])) <= {0.0, 1.0}:
            exact = mcnemar(a, b)
            test |= {"p": exact["p"], "only_teacher": exact["only_best"], "only_model": exact["only_other"],
                     "test": "McNemar"}  # fmt: skip
        same = {key: result[key] for key in ("model", "task", "shots", "metric", "limit")}
        rows.append({**same, **test, "n": len(a), "units": int(len(pair[0]))})
    return rows


def parameters(folder: Path) -> int:
    """Return the number of elements in a folder's weights; tied tensors are stored once."""
    total = 0
    for file in weight_files(folder):
        with safe_open(str(file), framework="numpy") as tensors:
            total += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return total


def _one(
    run_dir: RunDirectory,
    evaluation: dict[str, Any],
    name: str,
    folder: Path,
    task: Task,
    precision: Precision,
    limit: int | None,
    compute: Compute,
) -> bool:
    """Evaluate one task on one model, unless it is known, into `found`; return whether that could be done."""
    key = cache_key(evaluation["models"][name]["content"], task, precision, limit)
    labels = {"model": name, "task": task.name, "label": task.label}
    same = [row for row in evaluation["results"] if row["model"] == name and row["label"] == task.label
            and row["limit"] == limit]  # fmt: skip
    _forget_failure(evaluation, name, task.label)
    if any(row["key"] == key for row in same):
        return True
    result = read_cached(key)
    if result is None:
        say(f"evaluation: {task.label} on {name}")
        try:
            result = compute(folder, task, precision, limit)
        except Exception as error:  # of lm-eval, the Hub or Ray: a dozen types, and none may cost a run its results
            failure = {"model": name, "task": task.label, "message": reason(error)}
            evaluation["failures"] = [*evaluation["failures"], failure]
            say(f"evaluation: {task.label} on {name} failed: {reason(error)}")
            run_dir.event("evaluation_failed", model=name, task=task.label, message=reason(error))
            run_dir.write_evaluation(evaluation)
            return False
        write_cached(key, result)
    others = [row for row in evaluation["results"] if row not in same]
    evaluation["results"] = [*others, {**labels, "key": key, **result}]
    run_dir.write_evaluation(evaluation)
    return True


def _forget_failure(evaluation: dict[str, Any], model: str, task: str) -> None:
    failures = evaluation["failures"]
    evaluation["failures"] = [row for row in failures if (row["model"], row["task"]) != (model, task)]


def _others(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [row for row in rows if row["model"] != name]


def _asked(result: Mapping[str, Any]) -> tuple:
    return tuple(result[key] for key in ("label", "questions", "metric", "shots", "limit", "precision"))


def model_content(folder: Path) -> str:
    """Return the content id of all that a model's answers depend on: the `fingerprint` of its weights, its tokenizer,
    its generation defaults."""
    names = sorted({*tokenizer_files(folder), "generation_config.json"})
    beside = "".join(f"{name} {file_hash(folder / name)} " for name in names if (folder / name).is_file())
    return content_id(f"{fingerprint(folder)} {beside}".encode(), digits=16)


def cache_key(model: str, task: Task, precision: Precision, limit: int | None) -> str:
    """Return the key of a result of the model whose content id is `model`. A data set on the Hub is in it only by its
    task's name: what was asked is in the result, as `questions`."""
    made_from = {
        "model": model,
        "task": {**task._asdict(), "yaml": None if task.content else task.yaml, "changes": _without_paths(task)},
        "precision": precision,
        "limit": limit,
        "formula": cache.FORMULA["evaluation"],
        "versions": {name: version(name) for name in ("lm_eval", "transformers")},
    }
    return content_id(made_from, digits=32)


def read_cached(key: str) -> dict[str, Any] | None:
    """Return a result of the cache, or None."""
    return cache.read_kept(_cache_path(key), lambda path: json.loads(path.read_text()))


def write_cached(key: str, result: dict[str, Any]) -> None:
    cache.replace(_cache_path(key), lambda into: into.write_text(json.dumps(result)), durable=True)


def _cache_path(key: str) -> Path:
    return cache.entry("evaluation", key, ".json")


def _without_paths(task: Task) -> dict[str, Any]:
    """Return a task's changes without its data files, whose content is in the task's `content` wherever they lie."""
    changes = dict(task.changes)
    if "dataset_kwargs" in changes:
        changes["dataset_kwargs"] = {k: v for k, v in changes["dataset_kwargs"].items() if k != "data_files"}
    return changes
