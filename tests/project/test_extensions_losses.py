"""A divergence from outside: one line in `DIVERGENCES`, and the configuration, the loss and the training have it."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minitron_search.config.loading import load_config
from minitron_search.distillation.loop import train
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher import live_teacher
from minitron_search.losses.divergences import DIVERGENCES, Comparison, Divergence, forward_kl, log_ratios, loss_names
from minitron_search.losses.output_loss import output_loss
from minitron_search.models.output_head import OutputHead
from minitron_search.planning.checks import check_loss
from tests import tiny

LENGTH, VOCAB = 16, 61
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (20, LENGTH)).astype(np.int32)


def squared_hellinger(student: Tensor, q: Tensor, lse: Tensor, teacher: Tensor) -> Comparison:
    """1 - sum sqrt(p q) of each row."""
    p, log_ratio = log_ratios(student, lse, teacher)
    kl, _ = forward_kl(p, q, log_ratio)
    root = (p * q).sqrt()
    overlap = root.sum(1, keepdim=True)
    return Comparison(kl, 1 - overlap.squeeze(1), (q * overlap - root) / 2)


@pytest.fixture(autouse=True)
def hellinger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIVERGENCES, "hellinger", Divergence(squared_hellinger, tau_power=2))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_gradient_is_autograds_on_dense_logits(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (50, 8), (50, 12), (VOCAB, 8), (VOCAB, 12)
    hidden, teacher_hidden, weight, teacher_weight = (torch.randn(*shape, generator=generator) for shape in shapes)
    targets = torch.randint(0, VOCAB, (50,), generator=generator)

    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    chunked = output_loss(
        "clm+hellinger", hidden, OutputHead(weight), targets, teacher_hidden, OutputHead(teacher_weight),
        temperature=temperature, chunk_tokens=33,
    )  # fmt: skip
    gradients = torch.autograd.grad(chunked.loss, (hidden, weight))

    logits, teacher_logits = hidden.double() @ weight.double().T, teacher_hidden.double() @ teacher_weight.double().T
    p, q = (part.div(temperature).softmax(1) for part in (teacher_logits, logits))
    dense = temperature**2 * (1 - (p * q).sqrt().sum(1)).mean() + F.cross_entropy(logits, targets)
    expected = torch.autograd.grad(dense, (hidden, weight))

    assert chunked.loss.item() == pytest.approx(dense.item(), rel=1e-5)
    dense_kl = (p * (p / q).log()).sum(1).mean()
    assert chunked.kl is not None and chunked.kl.item() == pytest.approx(dense_kl.item(), rel=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient - reference).norm() < 1e-5 * reference.norm()


def test_a_student_trains_with_it() -> None:
    settings = LoopSettings(
        total_tokens=30 * 64, batch_tokens=64, learning_rate=3e-3, warmup_steps=3, threads=1, loss="hellinger"
    )
    student, teacher = (tiny.model(tiny.config("llama", vocab_size=VOCAB), seed) for seed in (1, 2))
    losses: list[float] = []
    train(student, WINDOWS, settings, live_teacher(teacher, "float32"), log=lambda line: losses.append(line["loss"]))
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_the_configuration_takes_its_name_alone_and_with_the_lm_loss() -> None:
    for name in ("hellinger", "clm+hellinger"):
        check_loss(load_config(None, ["--distillation.loss", name, "--distillation.temperature", "2"]))


def test_an_unknown_name_is_refused_with_every_valid_one() -> None:
    with pytest.raises(ValueError, match="distillation.loss: 'l2' is not a loss; valid: ") as error:
        check_loss(load_config(None, ["--distillation.loss", "l2"]))
    assert str(error.value).split("valid: ")[1].split(", ") == loss_names()
    assert {"kld", "hellinger", "ce", "clm+hellinger"} <= set(loss_names())


@pytest.mark.parametrize(("loss", "temperature"), [("mse", "2"), ("clm+cosine", "0.5")])
def test_a_divergence_of_logits_has_no_temperature(loss: str, temperature: str) -> None:
    config = load_config(None, ["--distillation.loss", loss, "--distillation.temperature", temperature])
    with pytest.raises(ValueError, match=f"temperature: {temperature} with loss .*{loss[-3:]}.*valid: 1, or"):
        check_loss(config)
