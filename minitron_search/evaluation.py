"""`evaluation.tasks`: lm-eval's own tasks on the teacher and on every promoted student, shots as the tasks set them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_search.precision import device


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ValueError for a name that lm-eval does not know."""
    if not tasks:
        return
    import difflib

    from lm_eval.tasks import TaskManager  # indexing lm-eval's tasks takes seconds: only when there are some

    known = TaskManager().all_tasks
    for task in tasks:
        if task not in known:
            near = ", ".join(difflib.get_close_matches(task, known)) or "winogrande, arc_challenge, hellaswag"
            raise ValueError(f"evaluation.tasks: lm-eval has no task {task!r}; valid: {near}")


def evaluate(folder: Path, tasks: Sequence[str], batch_size: int = 16) -> dict[str, Any]:
    """{task: lm-eval's metrics with their standard errors, its version and n} for the model in `folder`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device=str(device()), batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks))
    assert found is not None  # None on other ranks than 0 only
    return {
        task: {
            **{key: value for key, value in found["results"][task].items() if isinstance(value, int | float)},
            "version": found["versions"].get(task),
            "n": found["n-samples"].get(task, {}).get("effective"),
        }
        for task in tasks
    }
