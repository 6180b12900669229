"""One of lm-eval's tasks on one model: its metric with the standard error, and the value of every question."""

import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minitron_search.config.types import Precision
from minitron_search.evaluation import lm_eval_tasks
from minitron_search.evaluation.lm_eval_tasks import Task
from minitron_search.evaluation.statistics import chance_bar, standard_error
from minitron_search.models import patches  # noqa: F401  (no generation default keeps a model from its questions)
from minitron_search.models.device import device
from minitron_search.models.loading import check_loaded
from minitron_search.records.cache import content_id

VERSIONS = ("lm_eval", "transformers", "torch", "datasets")
BATCH_SIZE = 16  # on CPUs; a GPU takes what fits


def evaluate(folder: Path, task: Task, precision: Precision, limit: int | None = None) -> dict[str, Any]:
    """Evaluate one task on the model in `folder`, on the first `limit` questions (of every task of a group), and return
    what `measured` reads from it.

    bfloat16 is used for products, around weights as they are stored, as everywhere in a run; the softmax is in float32.
    Raises whatever lm-eval does.
    """
    if task.unsafe:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # was allowed where the run was started
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class WholeModel(HFLM):
        """A model of lm-eval of which no weight is left to chance either."""

        def _create_model(self, *arguments: Any, **options: Any) -> None:
            super()._create_model(*arguments, use_safetensors=True, output_loading_info=True, **options)
            self._model, info = self._model  # type: ignore[has-type]
            check_loaded(str(folder), info)

    loaded = lm_eval_tasks.load(task)
    on = device()
    model = WholeModel(
        pretrained=str(folder),
        device=str(on),
        batch_size="auto" if on.type == "cuda" else BATCH_SIZE,
        dtype="float32" if precision == "float32" else "auto",
        mixed_precision_dtype="bfloat16" if precision == "bfloat16" else None,
        softmax_dtype="float32",
        trust_remote_code=False,
    )
    chat = task.chat and getattr(model.tokenizer, "chat_template", None) is not None
    start = time.monotonic()
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=loaded,
        task_manager=TaskManager(include_defaults=False),  # its index takes 10 s, and nothing is looked up in it here
        limit=limit,
        apply_chat_template=chat,
        confirm_run_unsafe_code=task.unsafe,
    )
    assert results is not None  # None on other ranks than 0 only
    return {
        **measured(task, results),
        "limit": limit,
        "precision": precision,
        "chat_template": chat,
        "device": on.type,
        "seconds": time.monotonic() - start,
        "versions": {name: version(name) for name in VERSIONS},
    }


def measured(task: Task, output: Mapping[str, Any]) -> dict[str, Any]:
    """Read from what lm-eval returns: metric, value, stderr, n, shots, task_version, and all of its metrics as they
    are.

    chance: how often a guess is right, where it can be known; at_chance: whether the value is no better (one-sided, p <
    0.05). samples: a value for every question, whose mean is `value`; None where the metric is no mean. twins: for
    Winogrande, equal numbers for questions with the same two options, which are not independent. questions: a digest of
    what was asked, in order; two models are compared question by question where it is equal.
    """
    name = task.name if task.name in output["results"] else next(iter(output["results"]))
    results = output["results"][name]
    metrics = task.metrics or (_first_metric(output, name),)
    value = float(np.mean([results[metric] for metric in metrics]))
    samples = [
        sample
        for leaf in sorted(output["samples"])
        for sample in sorted(output["samples"][leaf], key=lambda sample: sample["doc_id"])
        if sample["filter"] == metrics[0].rpartition(",")[2]
    ]
    values = _values(samples, [metric.rpartition(",")[0] for metric in metrics])
    if values is not None and not np.isclose(values.mean(), value, rtol=1e-5):
        values = None  # a metric that is no mean over questions, as perplexity
    stderr = results.get(metrics[0].replace(",", "_stderr,")) if len(metrics) == 1 else None
    if len(metrics) > 1 and values is not None and len(values) > 1:
        stderr = standard_error(values)
    guess = _chance(output, samples, metrics)
    return {
        "metric": " + ".join(metrics),
        "value": value,
        "stderr": stderr if isinstance(stderr, float) else None,
        "n": len(samples),
        "shots": output["n-shot"].get(name, task.shots),
        "higher_is_better": output["higher_is_better"].get(name, {}).get(metrics[0].rpartition(",")[0]) is not False,
        "chance": guess,
        "at_chance": None if guess is None else not value > chance_bar(len(samples), guess),
        "task_version": output["versions"].get(name),
        "metrics": {key: item for key, item in results.items() if "," in key and isinstance(item, int | float)},
        "samples": None if values is None else [round(item, 6) for item in values.tolist()],
        "twins": _twins([sample["doc"] for sample in samples]),
        "questions": content_id([sample["doc_hash"] for sample in samples], digits=16),
    }


def _first_metric(output: Mapping[str, Any], name: str) -> str:
    listed = [key for key in output["results"][name] if "," in key and "_stderr," not in key]
    if not listed:
        members = ", ".join(output["group_subtasks"].get(name, []))
        raise ValueError(f"{name} has no metric of its own, but {members} may")
    return listed[0]


def _values(samples: list[dict[str, Any]], metrics: list[str]) -> np.ndarray | None:
    """Return the value of every question, (questions,), or None where a metric is no number of each. An instruction's
    value (IFEval) is scaled by how many its prompt has, so that the mean over prompts is that over instructions."""
    columns = []
    for metric in metrics:
        per_question: list[Any] = [sample.get(metric) for sample in samples]
        if all(isinstance(value, list) for value in per_question):
            per_prompt = np.mean([len(value) for value in per_question])
            columns.append(np.array([sum(value) for value in per_question]) / per_prompt)
        elif all(isinstance(value, int | float | np.number) for value in per_question):  # True and False among them
            columns.append(np.array(per_question, float))
        else:
            return None
    return np.mean(columns, axis=0) if samples else None


def _chance(output: Mapping[str, Any], samples: list[dict[str, Any]], metrics: tuple[str, ...]) -> float | None:
    """Return how often a guess is right where options are equally likely: the mean of 1 / their number. A task that
    scores in a way of its own (the mass on several right options, as truthfulqa_mc2) has no such chance: None."""
    plain = all(
        output["configs"][leaf].get("output_type") == "multiple_choice"
        and not output["configs"][leaf].get("process_results")
        for leaf in output["samples"]
    )
    if not samples or not plain or metrics[0].partition(",")[0] not in ("acc", "acc_norm"):
        return None
    twice = 2 if "acc_mutual_info" in samples[0]["metrics"] else 1  # each option is also asked without its question
    return float(np.mean([twice / len(sample["resps"]) for sample in samples]))


def _twins(docs: list[Any]) -> list[int] | None:
    if not docs or not all(isinstance(doc, Mapping) and {"option1", "option2"} <= doc.keys() for doc in docs):
        return None
    numbers: dict[tuple[str, ...], int] = {}
    return [numbers.setdefault(tuple(sorted((doc["option1"], doc["option2"]))), len(numbers)) for doc in docs]
