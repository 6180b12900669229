"""Scores are their definitions: means over next tokens, KL over positions, errors over windows."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from minitron_search.data import winogrande, winogrande_packing
from minitron_search.data.winogrande_packing import PackedOptions
from minitron_search.evaluation import scoring
from minitron_search.evaluation import winogrande as evaluation_winogrande
from minitron_search.evaluation.scoring import Score, score, window_losses
from minitron_search.evaluation.statistics import standard_error
from minitron_search.models.families import final_hidden
from minitron_search.models.output_head import output_head
from minitron_search.records.directory import TRIALS_SCHEMA
from tests import tiny

VOCAB = len(tiny.tokenizer())


def config(seed: int = 0, **given: object) -> PretrainedConfig:
    return tiny.random_config(seed, vocab_size=VOCAB, max_position_embeddings=256, sliding_window=None, **given)


def windows(count: int = 11, length: int = 14) -> np.ndarray:
    return tiny.tokens(config(), count, length).numpy().astype(np.int32)


def hidden_of(teacher: PreTrainedModel, texts: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return final_hidden(teacher, torch.from_numpy(texts).long())


@pytest.fixture
def packed(tmp_path: Path) -> PackedOptions:
    examples = winogrande.load_examples(str(tiny.winogrande_file(tmp_path / "w.jsonl", 6)))
    return winogrande_packing.pack(examples, tiny.tokenizer())


@tiny.over(range(4))
def test_window_losses_are_those_of_the_whole_logits(seed: int) -> None:
    student, teacher, texts = tiny.model(config(seed), 1), tiny.model(config(seed + 10), 2), windows()
    ce, kl = window_losses(student, texts, hidden_of(teacher, texts), output_head(teacher), "float32")
    ids = torch.from_numpy(texts).long()
    log_p, log_q = (tiny.logits(model, ids).double().log_softmax(-1) for model in (teacher, student))
    for row in range(len(texts)):
        of_next = [-float(log_q[row, at, texts[row, at + 1]]) for at in range(texts.shape[1] - 1)]
        assert ce[row] == pytest.approx(np.mean(of_next), rel=1e-4)
        divergence = (log_p[row].exp() * (log_p[row] - log_q[row])).sum(-1)  # summed over the vocabulary
        assert kl[row] == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-5)
    assert ce.shape == kl.shape == (len(texts),) and ce.dtype == kl.dtype == np.float64


def test_lm_loss_is_transformers_own() -> None:
    student, texts = tiny.model(config()), windows()
    ids = torch.from_numpy(texts).long()
    with torch.no_grad():
        expected = float(student(ids, labels=ids).loss)
    ce, _ = window_losses(student, texts, hidden_of(student, texts), output_head(student), "float32")
    assert float(ce.mean()) == pytest.approx(expected, rel=1e-5)


def test_the_teacher_has_no_divergence_from_itself() -> None:
    teacher, texts = tiny.model(config(3)), windows()
    _, kl = window_losses(teacher, texts, hidden_of(teacher, texts), output_head(teacher), "float32")
    assert np.abs(kl).max() < 1e-5


def test_how_windows_are_batched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, texts = tiny.model(config(1), 1), tiny.model(config(2), 2), windows()
    hidden, head = hidden_of(teacher, texts), output_head(teacher)
    together = window_losses(student, texts, hidden, head, "float32")
    for rows in (1, 3, 100):
        monkeypatch.setattr(scoring, "ROWS_AT_ONCE", rows)
        apart = window_losses(student, texts, hidden, head, "float32")
        np.testing.assert_allclose(apart, together, rtol=1e-4, atol=1e-6)


def test_a_score_holds_means_errors_and_how_many(packed: PackedOptions) -> None:
    student, teacher, texts = tiny.model(config(1), 1), tiny.model(config(2), 2), windows()
    hidden, head = hidden_of(teacher, texts), output_head(teacher)
    scored, by_window, kl_by_window, correct, margin = score(student, texts, hidden, head, packed, "float32")
    ce, kl = window_losses(student, texts, hidden, head, "float32")
    assert (scored.lm_loss, scored.kl) == (ce.mean(), kl.mean())
    assert (scored.lm_loss_stderr, scored.kl_stderr) == (standard_error(ce), standard_error(kl))
    assert scored.lm_loss_n == len(texts)
    choices = evaluation_winogrande.evaluate(student, packed)
    assert (scored.winogrande_acc, scored.winogrande_margin) == (choices.accuracy, choices.margin)
    assert scored.winogrande_n == 6
    assert np.array_equal(by_window, ce) and np.array_equal(kl_by_window, kl)
    assert (correct.mean(), margin.mean()) == (choices.accuracy, choices.margin)
    assert {field.name for field in fields(Score)} <= set(TRIALS_SCHEMA.names)


def test_half_precision_is_near(packed: PackedOptions) -> None:
    student, teacher, texts = tiny.model(config(1), 1), tiny.model(config(2), 2), windows()
    full, half = (
        score(student, texts, hidden_of(teacher, texts), output_head(teacher), packed, precision).score
        for precision in ("float32", "bfloat16")
    )
    assert half.lm_loss == pytest.approx(full.lm_loss, rel=0.02) and half.kl == pytest.approx(full.kl, rel=0.05)


def test_the_standard_error_is_that_of_a_mean() -> None:
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    draw = np.random.default_rng(0)
    means = [draw.normal(0, 2, 50).mean() for _ in range(2000)]
    assert standard_error(draw.normal(0, 2, 50)) == pytest.approx(np.std(means), rel=0.3)
