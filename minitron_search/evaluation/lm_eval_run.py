"""One of lm-eval's tasks on one model: its metric with the standard error, and the value of every question."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minitron_search.config.types import Precision
from minitron_search.evaluation import lm_eval_tasks
from minitron_search.evaluation.lm_eval_tasks import Task
from minitron_search.evaluation.statistics import chance_bar, standard_error
from minitron_search.models.device import device

VERSIONS = ("lm_eval", "transformers", "torch", "datasets")
BATCH_SIZE = 16  # on CPUs; a GPU takes what fits


def evaluate(folder: Path, task: Task, precision: Precision, limit: int | None = None) -> dict[str, Any]:
    """What `measured` says of the model in `folder`; of the first `limit` questions (of every task of a group).

    bfloat16 is of the products, around weights as they are stored, as everywhere in a run; the softmax is in float32.
    Raises whatever lm-eval does.
    """
    if task.unsafe:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # was allowed where the run was started
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = lm_eval_tasks.load(task)
    on = device()
    model = HFLM(
        pretrained=str(folder),
        device=str(on),
        batch_size="auto" if on.type == "cuda" else BATCH_SIZE,
        dtype="float32" if precision == "float32" else "auto",
        mixed_precision_dtype="bfloat16" if precision == "bfloat16" else None,
        softmax_dtype="float32",
    )
    chat = task.chat and getattr(model.tokenizer, "chat_template", None) is not None
    start = time.monotonic()
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=loaded,
        task_manager=TaskManager(include_defaults=False),  # its index takes 10 s, and nothing is looked up in it here
        limit=limit,
        apply_chat_template=chat,
        confirm_run_unsafe_code=task.unsafe,
    )
    assert found is not None  # None on other ranks than 0 only
    return {
        **measured(task, found),
        "limit": limit,
        "precision": precision,
        "chat_template": chat,
        "device": on.type,
        "seconds": time.monotonic() - start,
        "versions": {name: version(name) for name in VERSIONS},
    }


def measured(task: Task, found: Mapping[str, Any]) -> dict[str, Any]:
    """From what lm-eval returns: metric, value, stderr, n, shots, task_version, and all of its metrics as they are.

    chance: what a guess is right by, where it can be known, and at_chance: whether the value is no better (one-sided,
    p < 0.05). samples: a value for every question, of which `value` is the mean; None where the metric is no mean.
    twins: of Winogrande, equal numbers for questions with the same two options, which are not independent.
    questions: a digest of what was asked, in order; two models are compared question by question where it is equal.
    """
    name = task.name if task.name in found["results"] else next(iter(found["results"]))
    results = found["results"][name]
    metrics = task.metrics or (_first_metric(found, name),)
    value = float(np.mean([results[metric] for metric in metrics]))
    asked = [
        sample
        for leaf in sorted(found["samples"])
        for sample in sorted(found["samples"][leaf], key=lambda sample: sample["doc_id"])
        if sample["filter"] == metrics[0].rpartition(",")[2]
    ]
    values = _values(asked, [metric.rpartition(",")[0] for metric in metrics])
    if values is not None and not np.isclose(values.mean(), value, rtol=1e-5):
        values = None  # a metric that is no mean over questions, as perplexity
    stderr = results.get(metrics[0].replace(",", "_stderr,")) if len(metrics) == 1 else None
    if len(metrics) > 1 and values is not None and len(values) > 1:
        stderr = standard_error(values)
    guess = _chance(found, asked, metrics)
    return {
        "metric": " + ".join(metrics),
        "value": value,
        "stderr": stderr if isinstance(stderr, float) else None,
        "n": len(asked),
        "shots": found["n-shot"].get(name, task.shots),
        "higher_is_better": found["higher_is_better"].get(name, {}).get(metrics[0].rpartition(",")[0]) is not False,
        "chance": guess,
        "at_chance": None if guess is None else not value > chance_bar(len(asked), guess),
        "task_version": found["versions"].get(name),
        "metrics": {key: each for key, each in results.items() if "," in key and isinstance(each, int | float)},
        "samples": None if values is None else [round(each, 6) for each in values.tolist()],
        "twins": _twins([sample["doc"] for sample in asked]),
        "questions": _digest(sample["doc_hash"] for sample in asked),
    }


def _first_metric(found: Mapping[str, Any], name: str) -> str:
    listed = [key for key in found["results"][name] if "," in key and "_stderr," not in key]
    if not listed:
        raise ValueError(f"{name} has no metric of its own, but {', '.join(found['group_subtasks'].get(name, []))} may")
    return listed[0]


def _values(asked: list[dict[str, Any]], metrics: list[str]) -> np.ndarray | None:
    """(questions,), or None where a metric is no number of each. An instruction's value (IFEval) is scaled by how many
    its prompt has, so that the mean over prompts is that over instructions."""
    columns = []
    for metric in metrics:
        of: list[Any] = [sample.get(metric) for sample in asked]
        if all(isinstance(each, list) for each in of):
            per_prompt = np.mean([len(each) for each in of])
            columns.append(np.array([sum(each) for each in of]) / per_prompt)
        elif all(isinstance(each, int | float | np.number) for each in of):  # True and False among them
            columns.append(np.array(of, float))
        else:
            return None
    return np.mean(columns, axis=0) if asked else None


def _chance(found: Mapping[str, Any], asked: list[dict[str, Any]], metrics: tuple[str, ...]) -> float | None:
    """Of options equally likely: the mean of 1 / how many there are. A task that scores in a way of its own (the mass
    on several right options, as truthfulqa_mc2) has no such chance."""
    plain = all(
        found["configs"][leaf].get("output_type") == "multiple_choice"
        and not found["configs"][leaf].get("process_results")
        for leaf in found["samples"]
    )
    if not asked or not plain or metrics[0].partition(",")[0] not in ("acc", "acc_norm"):
        return None
    twice = 2 if "acc_mutual_info" in asked[0]["metrics"] else 1  # each option is also asked without its question
    return float(np.mean([twice / len(sample["resps"]) for sample in asked]))


def _twins(docs: list[Any]) -> list[int] | None:
    if not docs or not all(isinstance(doc, Mapping) and {"option1", "option2"} <= doc.keys() for doc in docs):
        return None
    numbers: dict[tuple[str, ...], int] = {}
    return [numbers.setdefault(tuple(sorted((doc["option1"], doc["option2"]))), len(numbers)) for doc in docs]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]
