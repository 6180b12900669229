"""Two trials of one run: what the teacher costs them, counted in the tokens that go through it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_search.data import winogrande, winogrande_packing
from minitron_search.distillation import loop
from minitron_search.distillation.loop import TrainResult
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher_cache import Request, ensure, in_this_process
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import whole
from minitron_search.models.loading import load_teacher
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import permute_teacher
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.runner import run_trial
from minitron_search.trials.trial import Trial
from tests import tiny

TRAINED, VOCAB = 4 * 64, len(tiny.tokenizer())
SETTINGS = LoopSettings(total_tokens=TRAINED, milestones=(TRAINED,), batch_tokens=64, warmup_steps=1, threads=1)


class Forwards:
    """Counts the tokens that go through any model as deep as the teacher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        self.results: list[TrainResult] = []
        train = loop.train

        def recorded(*given: Any, **named: Any) -> TrainResult:
            self.results.append(train(*given, **named))
            return self.results[-1]

        monkeypatch.setattr(loop, "train", recorded)

    def watch(self, model: PreTrainedModel) -> PreTrainedModel:
        def count(_: Any, __: Any, output: Any) -> None:
            self.tokens += output.last_hidden_state.shape[:2].numel()

        model.base_model.register_forward_hook(count)
        return model


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    return Forwards(monkeypatch)


def materials(folder: Path, forwards: Forwards, k: int | None, live: bool = False) -> TrialInputs:
    """Of a run with a tiny teacher; `ensure` is called as every run calls it."""
    tiny.teacher_folder(folder / "teacher")
    teacher = permute_teacher(
        folder / "teacher",
        Rankings.random(AutoModelForCausalLM.from_pretrained(folder / "teacher").config, 0),
        folder / "p",
    )
    draw = np.random.default_rng(0)
    train, validation = (draw.integers(0, VOCAB, (n, 32)).astype(np.int32) for n in (8, 3))

    def cached(windows: np.ndarray, k: int | None) -> Path:
        asked = Request("teacher", "data", windows, "float32", 24, VOCAB, k)
        return ensure(asked, in_this_process(asked, lambda: forwards.watch(load_teacher(teacher)))).path

    examples = winogrande.load_examples(str(tiny.winogrande_file(folder / "w.jsonl")))
    return TrialInputs(
        run_dir=RunDirectory(folder / "run"), teacher_folder=teacher, compute_folder=teacher, train=train,
        validation=validation, packed=winogrande_packing.pack(examples, tiny.tokenizer()),
        train_cache=None if live else cached(train, k), validation_cache=cached(validation, None),
        block_bi=np.zeros((5, 5)), precision="float32",
    )  # fmt: skip


def trials(teacher: Architecture, settings: LoopSettings = SETTINGS) -> list[Trial]:
    shapes = [replace(teacher, hidden_size=18), replace(teacher, layers=(0, 1, 3))]
    return [Trial(shape, "search", 0, number, "pruned", settings, "float32", {}) for number, shape in enumerate(shapes)]


def run_two(of: TrialInputs, settings: LoopSettings = SETTINGS) -> list[dict[str, Any]]:
    """Their last rows."""
    shape = whole(AutoModelForCausalLM.from_pretrained(of.teacher_folder).config)
    rows = []
    for trial in trials(shape, settings):
        run_trial(of, trial, decided=False)
        rows.append(of.run_dir.metrics(trial.id)[-1])
    return rows


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("k", [None, 9])
def test_two_trials_of_a_cache_pay_for_the_teacher_once(k: int | None, tmp_path: Path, forwards: Forwards) -> None:
    made = materials(tmp_path, forwards, k)
    paid = forwards.tokens
    assert paid == made.train.size + made.validation.size
    run_two(made)
    materials(tmp_path, forwards, k)  # as a run that is continued, or another of the same teacher and text
    assert forwards.tokens == paid
    assert [(result.tokens, result.teacher_tokens) for result in forwards.results] == [(TRAINED, 0)] * 2


def test_two_trials_of_a_live_teacher_each_pay_for_it(tmp_path: Path, forwards: Forwards) -> None:
    """Or the count above would show nothing."""
    run_two(materials(tmp_path, forwards, None, live=True))
    assert [result.teacher_tokens for result in forwards.results] == [TRAINED] * 2


@pytest.mark.parametrize("loss", ["kld", "clm+kld"])
def test_all_tokens_but_one_train_as_hidden_states_do(loss: Any, tmp_path: Path, forwards: Forwards) -> None:
    """With k = V - 1 nothing is lost but float16's rounding."""
    settings = replace(SETTINGS, loss=loss)
    exact = run_two(materials(tmp_path / "hidden", forwards, None), settings)
    sparse = run_two(materials(tmp_path / "topk", forwards, VOCAB - 1), settings)
    few = run_two(materials(tmp_path / "few", forwards, 3), settings)
    for row, same, other in zip(exact, sparse, few, strict=True):
        assert same["lm_loss"] == pytest.approx(row["lm_loss"], rel=1e-4)
        assert same["kl"] == pytest.approx(row["kl"], rel=1e-3)
        assert abs(other["kl"] - row["kl"]) > 10 * abs(same["kl"] - row["kl"])


def test_a_live_and_a_cached_teacher_train_alike(tmp_path: Path, forwards: Forwards) -> None:
    live = run_two(materials(tmp_path / "live", forwards, None, live=True))
    cached = run_two(materials(tmp_path / "cached", forwards, None))
    assert [row["lm_loss"] for row in cached] == pytest.approx([row["lm_loss"] for row in live], rel=1e-5)


def test_the_gradient_of_few_tokens_lowers_the_full_divergence(tmp_path: Path, forwards: Forwards) -> None:
    made = materials(tmp_path, forwards, 9)
    longer = replace(SETTINGS, total_tokens=40 * 64, milestones=(0, 40 * 64), learning_rate=3e-3)
    shape = whole(AutoModelForCausalLM.from_pretrained(made.teacher_folder).config)
    trial = trials(shape, longer)[0]
    asked = Request("teacher", "seen", made.train[:3], "float32", 24, VOCAB)
    path = ensure(asked, in_this_process(asked, lambda: load_teacher(made.teacher_folder))).path
    run_trial(replace(made, validation=asked.windows, validation_cache=path), trial, decided=False)
    before, after = (row["kl"] for row in made.run_dir.metrics(trial.id) if row["kind"] == "rung")
    assert after < 0.7 * before
