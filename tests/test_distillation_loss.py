"""The chunked output losses against float64 references on full logits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minitron_search.distillation_loss import IGNORE, Loss, OutputHead, output_loss, token_losses

KL: Loss = "kld"
CE: Loss = "ce"
BOTH: Loss = "clm+kld"


class Case:
    """Random hidden states and heads; every third target is absent."""

    def __init__(
        self,
        seed: int,
        tokens: int,
        vocab: int,
        student: int,
        teacher: int,
        scale: float,
        softcap: float | None,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.student = torch.randn(tokens, student, generator=rng)
        self.weight = torch.randn(vocab, student, generator=rng)
        self.bias = torch.randn(vocab, generator=rng)
        self.teacher = torch.randn(tokens, teacher, generator=rng)
        self.teacher_head = OutputHead(torch.randn(vocab, teacher, generator=rng), None, scale, softcap)
        self.scale, self.softcap = scale, softcap
        self.targets = torch.randint(vocab, (tokens,), generator=rng)
        self.targets[2::3] = IGNORE

    def chunked(self, loss: Loss, temperature: float, chunk: int, factor: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        inputs = [part.clone().requires_grad_() for part in (self.student, self.weight, self.bias)]
        head = OutputHead(inputs[1], inputs[2], self.scale, self.softcap)
        out = output_loss(
            loss, inputs[0], head, self.targets, self.teacher, self.teacher_head,
            temperature=temperature, chunk_tokens=chunk,
        )  # fmt: skip
        (factor * out.loss).backward()
        return out.loss.detach(), [part.grad for part in inputs]  # type: ignore[misc]

    def per_token(self, temperature: float, chunk: int = 512) -> tuple[Tensor, Tensor]:
        head = OutputHead(self.weight, self.bias, self.scale, self.softcap)
        ce, kl = token_losses(
            self.student, head, self.targets, self.teacher, self.teacher_head,
            temperature=temperature, chunk_tokens=chunk,
        )  # fmt: skip
        assert kl is not None
        return ce, kl

    def reference(self, loss: Loss, temperature: float) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """Loss, its gradients, ce and kl per token, on full logits in float64."""
        inputs = [part.double().requires_grad_() for part in (self.student, self.weight, self.bias)]
        student = self._cap(self.scale * (inputs[0] @ inputs[1].T + inputs[2]))
        teacher = self._cap(self.scale * self.teacher.double() @ self.teacher_head.weight.double().T)
        log_p = F.log_softmax(teacher / temperature, -1)
        kl = (log_p.exp() * (log_p - F.log_softmax(student / temperature, -1))).sum(-1)
        ce = F.cross_entropy(student, self.targets, reduction="none", ignore_index=IGNORE)
        value = temperature**2 * kl.mean() if loss != CE else torch.zeros(())
        value = value + (ce.sum() / (self.targets != IGNORE).sum() if loss != KL else 0)
        return value.detach(), list(torch.autograd.grad(value, inputs)), ce.detach(), kl.detach()

    def _cap(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm().clamp(min=1e-9)).item()


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 70),
    vocab=st.sampled_from([2, 50, 1001]),
    student=st.integers(1, 16),
    teacher=st.integers(1, 24),
    scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 5.0]),
)
temperatures = st.sampled_from([0.5, 1.0, 3.0])
chunks = st.sampled_from([1, 7, 16, 40, 512])


@settings(max_examples=60, deadline=None)
@given(case=cases, temperature=temperatures, chunk=chunks, loss=st.sampled_from([KL, CE, BOTH]))
def test_loss_and_gradients_equal_the_float64_reference(case: Case, temperature: float, chunk: int, loss: Loss) -> None:
    value, gradients = case.chunked(loss, temperature, chunk, factor=1.7)
    expected, references, _, _ = case.reference(loss, temperature)
    # a small KL is a difference of logits near 10 and has their rounding, which the loss multiplies by tau^2
    assert value == pytest.approx(expected.item(), rel=1e-5, abs=2e-6 * max(1.0, temperature**2))
    for gradient, reference in zip(gradients, references, strict=True):
        assert (gradient - 1.7 * reference).norm() <= 1e-4 * reference.norm() + 1e-7


@settings(max_examples=60, deadline=None)
@given(case=cases, temperature=temperatures, chunk=chunks)
def test_losses_per_token_equal_the_float64_reference(case: Case, temperature: float, chunk: int) -> None:
    ce, kl = case.per_token(temperature, chunk)
    _, _, reference_ce, reference_kl = case.reference(BOTH, temperature)
    # 1e-5 relative; a KL below a tenth of a nat is a small difference of logits near 10 and has their
    # rounding
    assert ((kl - reference_kl).abs() <= 1e-5 * reference_kl.clamp(min=0.1) + 1e-6).all()
    assert ((ce - reference_ce).abs() <= 1e-5 * reference_ce.abs() + 2e-6).all()
    assert (ce[case.targets == IGNORE] == 0).all()


def test_chunks_change_nothing_but_the_order_of_sums() -> None:
    case = Case(0, 100, 300, 8, 12, 1.0, None)
    for loss, temperature in itertools.product([KL, CE, BOTH], [1.0, 2.0]):
        whole, gradients = case.chunked(loss, temperature, 512)
        for chunk in (1, 16, 33):
            value, others = case.chunked(loss, temperature, chunk)
            assert value == pytest.approx(whole.item(), rel=1e-6)
            assert all(relative(a, b) < 1e-5 for a, b in zip(others, gradients, strict=True))


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    case = Case(1, 40, 500, 16, 16, 1.0, None)
    head = OutputHead(case.weight.requires_grad_())
    out = output_loss("kld", case.student, head, case.targets, case.student, head._replace(weight=case.weight.detach()))
    out.loss.backward()
    assert abs(out.loss.item()) < 1e-6
    assert case.weight.grad is not None and case.weight.grad.abs().max() < 1e-6


def test_a_tied_weight_gets_the_gradient_of_both_uses() -> None:
    case = Case(2, 30, 60, 8, 8, 1.0, None)
    ids = torch.arange(30)
    results = []
    for chunked in (True, False):
        weight = case.weight.clone().requires_grad_()
        hidden = F.embedding(ids, weight).tanh()
        if chunked:
            output_loss("ce", hidden, OutputHead(weight), case.targets).loss.backward()
        else:
            F.cross_entropy(hidden @ weight.T, case.targets, ignore_index=IGNORE).backward()
        results.append(weight.grad)
    assert relative(*results) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [KL, CE, BOTH])
def test_bfloat16_products_stay_near_the_reference(loss: Loss) -> None:
    case = Case(3, 200, 1001, 16, 24, 0.25, None)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradients = case.chunked(loss, 1.0, 64)
    expected, references, _, _ = case.reference(loss, 1.0)
    assert value.dtype == gradients[0].dtype == gradients[1].dtype == torch.float32
    assert value == pytest.approx(expected.item(), rel=1e-2)
    assert all(relative(a, b) < 1e-2 for a, b in zip(gradients, references, strict=True))


def test_no_tensor_of_all_logits_is_made() -> None:
    """The largest tensor that the loss makes, forward and backward, is the larger of a chunk and the head."""
    tokens, vocab, hidden = 256, 4096, 8

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, Tensor):
                    self.elements = max(self.elements, part.untyped_storage().nbytes() // part.element_size())
            return out

    case = Case(4, tokens, vocab, hidden, hidden, 1.0, None)
    with Largest() as largest:
        case.chunked(BOTH, 2.0, 32)
    assert largest.elements <= max(32 * vocab, vocab * hidden) < tokens * vocab // 4


def test_gradients_are_kept_for_one_backward_pass() -> None:
    case = Case(5, 4, 10, 3, 3, 1.0, None)
    out = output_loss("ce", case.student.requires_grad_(), OutputHead(case.weight), case.targets)
    out.loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward"):
        out.loss.backward()
