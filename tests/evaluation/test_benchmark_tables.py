"""Every task of Tables 1 and 2 through lm-eval's own prompts, shots, filters and metrics, on made-up questions: the
real ones are on the Hub. A tiny model answers."""

import shutil
from pathlib import Path
from typing import Any

import datasets
import evaluate as hf_evaluate
import pytest

from minitron_search.evaluation import lm_eval_run
from minitron_search.evaluation.lm_eval_tasks import TABLES, Task
from tests import tiny

ROWS = 30  # as many as 25 shots need


def question(path: str, n: int) -> dict[str, Any]:
    """One of data set `path`, in its own columns."""
    options = [f"{word} {n}" for word in ("red", "green", "blue", "grey")]
    return {
        "allenai/winogrande": {"sentence": f"Ann met Bea {n} times, _ waved.", "option1": "Ann", "option2": "Bea",
                               "answer": str(1 + n % 2)},
        "allenai/ai2_arc": {"question": f"Which is {n}?", "choices": {"text": options, "label": list("ABCD")},
                            "answerKey": "ABCD"[n % 4]},
        "cais/mmlu": {"question": f"Which is {n}?", "choices": options, "answer": n % 4},
        "Rowan/hellaswag": {"ctx_a": f"A man {n}.", "ctx_b": "he", "activity_label": "Walking", "endings": options,
                            "label": str(n % 4)},
        "openai/gsm8k": {"question": f"{n} + 1?", "answer": f"It is {n + 1}. #### {n + 1}"},
        "truthfulqa/truthful_qa": {"question": f"Is it {n}?",
                                   "mc1_targets": {"choices": options, "labels": [1, 0, 0, 0]},
                                   "mc2_targets": {"choices": options, "labels": [1, 1, 0, 0]}},
        "Idavidrein/gpqa": {"Question": f"Which is {n}?", "Correct Answer": options[0],
                            **{f"Incorrect Answer {k}": options[k] for k in (1, 2, 3)}},
        "google-research-datasets/mbpp": {"text": f"Add {n}.", "code": "pass", "test_list": ["a", "b", "c"]},
        "openai/openai_humaneval": {"prompt": f"def add_{n}(a):\n", "test": "def check(f): pass",
                                    "entry_point": f"add_{n}"},
        "google/IFEval": {"key": n, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"],
                          "kwargs": [{}]},
    }[path]  # fmt: skip


class CodeEval:
    """Of the Hub's `code_eval`, which runs code: every other program passes, and none is run."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> tuple[dict, dict]:
        assert len(references) == len(predictions)
        return {"pass@1": sum(n % 2 for n in range(len(predictions[0]))) / len(predictions[0])}, {"n": predictions}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.teacher_folder(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=8192)


@pytest.mark.parametrize(("table", "task"), [
    (name, task) for name, tasks in TABLES.items() for task in tasks
], ids=lambda each: each.label.replace(" ", "-") if isinstance(each, Task) else each)  # fmt: skip
def test_a_task_of_the_tables_has_the_papers_metric_and_shots(
    model: Path, table: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task.name == "ifeval":
        pytest.importorskip("langdetect", reason="pip install lm-eval[ifeval]")
        pytest.importorskip("nltk")
    asked: list[str] = []

    def load_dataset(path: str, **_: Any) -> datasets.DatasetDict:
        asked.append(path)
        rows = datasets.Dataset.from_list([question(path, n) for n in range(ROWS)])
        return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hf_evaluate, "load", lambda *_: CodeEval())
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    short = {**task.changes, "generation_kwargs": {**task.changes.get("generation_kwargs", {}), "max_gen_toks": 4}}
    generated = task.name.startswith(("gsm8k", "mbpp", "humaneval", "ifeval"))
    found = lm_eval_run.evaluate(model, task._replace(changes=short) if generated else task, "float32", limit=2)
    subjects = 57 if task.name == "mmlu" else 1
    assert len(asked) == subjects and found["n"] == 2 * subjects
    assert found["metric"] == " + ".join(task.metrics) and 0 <= found["value"] <= 1
    assert found["shots"] == task.shots and len(found["samples"]) == found["n"]
    assert found["chance"] == {"winogrande": 0.5, "arc_challenge": 0.25, "mmlu": 0.25, "hellaswag": 0.25,
                               "gpqa_main_zeroshot": 0.25}.get(task.name)  # fmt: skip
    assert not found["chat_template"]  # this tokenizer has none
    if task.name == "humaneval":  # of twenty samples, of which ten pass
        assert found["value"] == 0.5


def test_a_chat_template_is_put_around_the_prompts_of_table_2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_list([question("openai/gsm8k", n) for n in range(ROWS)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows, test=rows))
    chatty = Path(shutil.copytree(model, tmp_path / "chatty"))
    text = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (chatty / "chat_template.jinja").write_text(text)
    (task,) = (task for task in TABLES["table_2"] if task.name == "gsm8k_cot_zeroshot")
    task = task._replace(changes={"generation_kwargs": {"max_gen_toks": 4}})
    assert lm_eval_run.evaluate(chatty, task, "float32", limit=2)["chat_template"]
    assert not lm_eval_run.evaluate(chatty, task._replace(chat=False), "float32", limit=2)["chat_template"]
