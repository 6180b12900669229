"""The real teacher, end to end: a small run of the embedded default, and what it promises of `best/`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron_search.data.corpus import load_corpus
from minitron_search.teachers.sources import load_tokenizer
from tests.runs import Command, events, rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    command = Command(folder, {
        "corpus": {"sequence_length": 128, "calibration_samples": 4, "validation_samples": 4},
        "winogrande": {"limit": 10},
        "search": {"trials": 2, "rungs": ["128", "256"], "controls": False},
        "distillation": {"batch_tokens": "128"},
        "retraining": {"tokens": "768", "learning_rate": "3e-4", "warmup_steps": 2},
    })  # fmt: skip
    del command.environment["MINITRON_SEARCH_CACHE"]  # the teacher is fetched once for all tests
    command.run(folder / "run")
    return folder / "run"


def test_the_reloaded_student_has_the_loss_of_its_row_and_is_inside_the_budget(output: Path) -> None:
    student, info = AutoModelForCausalLM.from_pretrained(output / "best", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert abs(student.num_parameters() - 90e6) <= 0.05 * 90e6
    row = next(row for row in rows(output) if row["arm"] == "retrained")
    assert student.num_parameters() == row["params"]
    corpus = load_corpus(
        "docstrings", "docstrings", load_tokenizer("smollm2-135m"), sequence_length=128, calibration_samples=4,
        validation_samples=4, train_tokens=768, seed=0,
    )  # fmt: skip
    ids = torch.from_numpy(corpus.validation.astype(np.int64))
    with torch.no_grad():
        assert float(student(ids, labels=ids).loss) == pytest.approx(row["lm_loss"], abs=1e-5)


def test_the_retrained_student_is_better_than_its_untrained_trim(output: Path) -> None:
    found = {row["arm"]: row for row in rows(output)}
    assert found["retrained"]["lm_loss"] < found["untrained"]["lm_loss"] - 0.2
    assert found["teacher"]["lm_loss"] < found["retrained"]["lm_loss"]
    assert found["teacher"]["kl"] < 0.01  # of itself: only the cache's bfloat16


def test_two_trials_ran_at_once(output: Path) -> None:
    # the first time of each: one of them waits at its rung, and goes on later
    began = {event["trial"]: event["time"] for event in reversed(events(output, "trial_started"))}
    ended = {event["trial"]: event["time"] for event in reversed(events(output, "trial_finished"))}
    first, second = (trial for trial in began if trial.startswith("search-"))
    assert began[second] < ended[first] and began[first] < ended[second]
