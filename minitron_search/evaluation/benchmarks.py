"""Tables 1 and 2 of a run: teacher, students and references on every task, and the students paired with the teacher."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from minitron_search.config.types import Precision
from minitron_search.evaluation.lm_eval_tasks import Task, reason
from minitron_search.evaluation.statistics import clustered, compared, mcnemar
from minitron_search.models.sources import TOKENIZER_FILES, file_hash, fingerprint, teacher_folder, weight_files
from minitron_search.records.directory import RunDirectory, replace_text
from minitron_search.records.paths import cache_folder

Compute = Callable[[Path, Task, Precision, int | None], dict[str, Any]]
TEACHER = "teacher"


def models_of(run: RunDirectory, teacher: str, folder: Path, students: int) -> dict[str, tuple[str, Path]]:
    """(name, folder) by what a run calls them: teacher, best, best-2, ..."""
    ours = {run.best(rank).name: (run.best(rank).name, run.best(rank)) for rank in range(1, students + 1)}
    return {TEACHER: (teacher, folder), **ours}


def evaluate_all(
    run: RunDirectory,
    models: Mapping[str, tuple[str, Path]],
    references: Sequence[str],
    tasks: Sequence[Task],
    precision: Precision,
    limit: int | None,
    compute: Compute,
    say: Callable[[str], None],
) -> bool:
    """Every task on every model, into evaluation.json as it comes; whether all of it could be done.

    `compute` is `evaluation.evaluate`, wherever it runs. A task that fails is a line of `failures`, and the others go
    on. What was there of other tasks or limits stays.
    """
    found = run.read_evaluation()
    if "results" not in found:  # none yet, or of a version that wrote less
        found = {"models": {}, "results": [], "failures": [], "differences": []}
    done = True
    for name, place in [*models.items(), *((name, (name, None)) for name in references)]:
        try:
            folder = place[1] or teacher_folder(name)
            model = {"name": place[0], "content": model_content(folder), "params": parameters(folder)}
        except Exception as error:  # a damaged file's is of no common kind
            found["failures"] = [*_others(found["failures"], name), {"model": name, "task": "", "message": str(error)}]
            say(f"evaluation: {name}: {error}")
            run.event("evaluation_failed", model=name, message=reason(error))
            done = False
            continue
        found["failures"] = [each for each in found["failures"] if (each["model"], each["task"]) != (name, "")]
        known = found["models"].get(name)
        if known is not None and known["content"] != model["content"]:  # another model by this name
            found["results"] = _others(found["results"], name)
        found["models"][name] = model
        for task in tasks:
            done &= _one(run, found, name, folder, task, precision, limit, compute, say)
    order = list(found["models"])
    found["results"] = sorted(found["results"], key=lambda result: order.index(result["model"]))
    found["differences"] = differences(found["results"], [name for name in order if name != TEACHER])
    run.write_evaluation(found)
    return done


def differences(results: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[dict[str, Any]]:
    """Each model minus the teacher, on the questions that both were asked, in one precision: `statistics.compared`;
    `test` says by what p is. Of right and wrong answers it is McNemar's, over questions; error and interval are over
    twins where questions have some. Empty without a teacher, and of a metric that is no mean over questions."""
    found = []
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
        found.append({**same, **test, "n": len(a), "units": int(len(pair[0]))})
    return found


def parameters(folder: Path) -> int:
    """Elements of all tensors in a folder's weights; tied ones are stored once."""
    total = 0
    for file in weight_files(folder):
        with safe_open(str(file), framework="numpy") as tensors:
            total += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return total


def _one(
    run: RunDirectory,
    found: dict[str, Any],
    name: str,
    folder: Path,
    task: Task,
    precision: Precision,
    limit: int | None,
    compute: Compute,
    say: Callable[[str], None],
) -> bool:
    key = cache_key(found["models"][name]["content"], task, precision, limit)
    about = {"model": name, "task": task.name, "label": task.label}
    same = [each for each in found["results"] if each["model"] == name and each["label"] == task.label
            and each["limit"] == limit]  # fmt: skip
    found["failures"] = [each for each in found["failures"] if (each["model"], each["task"]) != (name, task.label)]
    if any(each["key"] == key for each in same):
        return True
    result = read_cached(key)
    if result is None:
        say(f"evaluation: {task.label} on {name}")
        try:
            result = compute(folder, task, precision, limit)
        except Exception as error:  # of lm-eval, the Hub or Ray: a dozen types, and none may cost a run its results
            found["failures"] = [*found["failures"], {"model": name, "task": task.label, "message": reason(error)}]
            say(f"evaluation: {task.label} on {name} failed: {reason(error)}")
            run.event("evaluation_failed", model=name, task=task.label, message=reason(error))
            run.write_evaluation(found)
            return False
        write_cached(key, result)
    found["results"] = [each for each in found["results"] if each not in same] + [{**about, "key": key, **result}]
    run.write_evaluation(found)
    return True


def _others(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [row for row in rows if row["model"] != name]


def _asked(result: Mapping[str, Any]) -> tuple:
    return tuple(result[key] for key in ("label", "questions", "metric", "shots", "limit", "precision"))


FORMULA = 1  # raised where `evaluation` makes other numbers of the same answers


BESIDE_WEIGHTS = (*TOKENIZER_FILES, "generation_config.json")


def model_content(folder: Path) -> str:
    """Content id of all that a model answers by: `fingerprint` of its weights, its tokenizer, its defaults of
    generation."""
    files = sorted({file for pattern in BESIDE_WEIGHTS for file in folder.glob(pattern)})
    beside = "".join(f"{file.name} {file_hash(file)} " for file in files)
    return hashlib.sha256(f"{fingerprint(folder)} {beside}".encode()).hexdigest()[:16]


def cache_key(model: str, task: Task, precision: Precision, limit: int | None) -> str:
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


def read_cached(key: str) -> dict[str, Any] | None:
    try:
        return json.loads(_cache_path(key).read_text())
    except FileNotFoundError:
        return None


def write_cached(key: str, result: dict[str, Any]) -> None:
    replace_text(_cache_path(key), json.dumps(result))


def _cache_path(key: str) -> Path:
    return cache_folder() / "evaluation" / f"{key}.json"


def _without_paths(task: Task) -> dict[str, Any]:
    """Data files are in a task's `content`, wherever they lie."""
    changes = dict(task.changes)
    if "dataset_kwargs" in changes:
        changes["dataset_kwargs"] = {k: v for k, v in changes["dataset_kwargs"].items() if k != "data_files"}
    return changes
