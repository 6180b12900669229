"""The chunked output losses against float64 references on full logits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minitron_search.config.types import Loss
from minitron_search.losses.divergences import loss_names
from minitron_search.losses.output_loss import IGNORE, TopK, output_loss, token_losses
from minitron_search.models.output_head import OutputHead
from tests.sparse import top_k
from tests.tiny import over

LOSSES: tuple[Loss, ...] = tuple(loss_names())
OF_LOGITS: tuple[Loss, ...] = ("mse", "cosine", "clm+mse", "clm+cosine")
KL: Loss = "kld"
CE: Loss = "ce"
BOTH: Loss = "clm+kld"
# of a gradient: q - p near 1 is off by 6e-8 in float32, times a row of weights of norm 4, times the factor 1.7
ROUNDING = 1e-6


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

    def chunked(
        self, loss: Loss, temperature: float, chunk: int, factor: float = 1.0, sparse: TopK | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        inputs = [part.clone().requires_grad_() for part in (self.student, self.weight, self.bias)]
        head = OutputHead(inputs[1], inputs[2], self.scale, self.softcap)
        out = output_loss(
            loss, inputs[0], head, self.targets, self.teacher if sparse is None else None, self.teacher_head,
            teacher_topk=sparse, temperature=temperature, chunk_tokens=chunk,
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
        student, teacher = self._logits(*inputs), self.teacher_logits()
        kl = divergence("kld", student, teacher, temperature) / temperature**2
        ce = F.cross_entropy(student, self.targets, reduction="none", ignore_index=IGNORE)
        value = torch.zeros(())
        if loss != CE:
            value = value + divergence(loss.removeprefix("clm+"), student, teacher, temperature).mean()
        if loss == CE or loss.startswith("clm+"):
            value = value + ce.sum() / (self.targets != IGNORE).sum()
        return value.detach(), list(torch.autograd.grad(value, inputs)), ce.detach(), kl.detach()

    def sparse_reference(self, loss: Loss, sparse: TopK) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of the k + 1 outcomes, those of the teacher taken from its own logits."""
        inputs = [part.double().requires_grad_() for part in (self.student, self.weight, self.bias)]
        student = self._logits(*inputs)
        log_q, log_p = (outcomes(logits, sparse.indices) for logits in (student, self.teacher_logits()))
        value = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0).sum(1).mean()
        if loss == BOTH:
            value = value + F.cross_entropy(student, self.targets, ignore_index=IGNORE)
        return value.detach(), list(torch.autograd.grad(value, inputs))

    def sign_flips(self, temperature: float) -> list[Tensor]:
        """How far the gradients of tv may be off where p and q are equal but for rounding."""
        q = torch.softmax(self._logits(self.student, self.weight, self.bias).double() / temperature, -1)
        p = torch.softmax(self.teacher_logits() / temperature, -1)
        flips = self.scale * q * ((p - q).abs() < 2e-5 * q) / len(q)
        student, weight = self.student.double().abs(), self.weight.double().abs()
        return [flips @ weight, flips.T @ student, flips.sum(0)]

    def sparse(self, k: int) -> TopK:
        return top_k(self.teacher, self.teacher_head, k)

    def teacher_logits(self) -> Tensor:
        return self._cap(self.scale * self.teacher.double() @ self.teacher_head.weight.double().T)

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._cap(self.scale * (hidden @ weight.T + bias))

    def _cap(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def divergence(name: str, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Of every row, with its factor of tau."""
    log_q, log_p = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    if name == "kld":
        return tau**2 * (p * (log_p - log_q)).sum(-1)
    if name == "reverse_kld":
        return tau**2 * (q * (log_q - log_p)).sum(-1)
    if name == "js":
        return tau**2 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    if name == "tv":
        return tau * (p - q).abs().sum(-1) / 2
    if name == "mse":
        return F.mse_loss(student, teacher, reduction="none").mean(-1)
    assert name == "cosine"
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def outcomes(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities (T, k + 1) of the tokens `indices` and of any other."""
    log_p = F.log_softmax(logits, -1)
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, indices, False)
    if not others.any():
        rest = torch.full_like(log_p[:, :1], -math.inf)
    else:
        rest = log_p[others].view(len(log_p), -1).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, indices), rest], 1)


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


@settings(max_examples=200, deadline=None)
@given(case=cases, temperature=temperatures, chunk=chunks, loss=st.sampled_from(LOSSES))
def test_loss_and_gradients_equal_the_float64_reference(case: Case, temperature: float, chunk: int, loss: Loss) -> None:
    temperature = 1.0 if loss in OF_LOGITS else temperature
    value, gradients = case.chunked(loss, temperature, chunk, factor=1.7)
    expected, references, _, _ = case.reference(loss, temperature)
    # a small KL is a difference of logits near 10 and has their rounding, which the loss multiplies by tau^2
    assert value == pytest.approx(expected.item(), rel=1e-5, abs=2e-6 * max(1.0, temperature**2))
    # a gradient of 1e-3 may be what is left of terms of several nats (reverse_kld, js) or of logits (mse, cosine)
    rounding = ROUNDING if loss in (KL, CE, BOTH) else 3 * ROUNDING
    slack = case.sign_flips(temperature) if loss.endswith("tv") else [torch.zeros(())] * 3
    for gradient, reference, flips in zip(gradients, references, slack, strict=True):
        assert (gradient - 1.7 * reference).norm() <= 1e-4 * reference.norm() + rounding + 1.7 * flips.norm()


@settings(max_examples=100, deadline=None)
@given(case=cases, chunk=chunks, kept=st.sampled_from([1, 2, 40, -1, 0]), loss=st.sampled_from([KL, BOTH]))
def test_a_sparse_teacher_is_a_kl_of_k_and_one_outcomes(case: Case, chunk: int, kept: int, loss: Loss) -> None:
    vocab = len(case.weight)
    sparse = case.sparse(min(kept, vocab) if kept > 0 else vocab + kept)
    value, gradients = case.chunked(loss, 1.0, chunk, factor=1.7, sparse=sparse)
    expected, references = case.sparse_reference(loss, sparse)
    assert value == pytest.approx(expected.item(), rel=1e-5, abs=2e-6)
    for gradient, reference in zip(gradients, references, strict=True):
        assert (gradient - 1.7 * reference).norm() <= 1e-4 * reference.norm() + ROUNDING


@settings(max_examples=30, deadline=None)
@given(case=cases, chunk=chunks)
def test_a_sparse_teacher_nears_the_whole_one_from_below(case: Case, chunk: int) -> None:
    """Outcomes that are told apart can only add to a KL; k = V - 1 tells all apart."""
    vocab = len(case.weight)
    whole, references = case.chunked(KL, 1.0, chunk)
    last = 0.0
    for k in sorted({1, min(5, vocab), vocab // 2, vocab - 1, vocab}):
        value, gradients = case.chunked(KL, 1.0, chunk, sparse=case.sparse(k))
        assert value >= last - 1e-5
        last = value.item()
        if k >= vocab - 1:
            assert value == pytest.approx(whole.item(), rel=1e-5, abs=2e-6)
            for gradient, reference in zip(gradients, references, strict=True):
                assert (gradient - reference).norm() <= 1e-4 * reference.norm() + ROUNDING


@settings(max_examples=30, deadline=None)
@given(case=cases, kept=st.sampled_from([1, 2, 40, -1, 0]))
def test_what_is_kept_of_a_teacher_are_its_most_probable_tokens(case: Case, kept: int) -> None:
    vocab = len(case.weight)
    k = min(kept, vocab) if kept > 0 else vocab + kept
    sparse = top_k(case.teacher, case.teacher_head, k)
    reference = outcomes(case.teacher_logits(), sparse.indices)
    kept_mass = F.softmax(case.teacher_logits(), -1).topk(k).values.sum(1)
    assert sparse.indices.shape == sparse.log_probabilities.shape == (len(case.teacher), k)
    assert torch.allclose(sparse.log_probabilities.exp().sum(1).double(), kept_mass, rtol=1e-5)
    assert torch.allclose(sparse.log_probabilities.double(), reference[:, :-1], atol=1e-5)
    assert torch.allclose(sparse.rest.double(), reference[:, -1], atol=1e-5)
    assert (sparse.rest == -math.inf).all() == (k == vocab)


@over([20.0, 60.0, 300.0])
def test_the_rest_keeps_its_digits_where_the_kept_tokens_have_all_the_probability(depth: float) -> None:
    """1 - sum of the kept is 0 in float32 from 17 nats on; from 104 nats on even exp is."""
    student = torch.tensor([[0.0, 0.3, -depth, -depth - 1.0]], requires_grad=True)
    for teacher in (torch.tensor([[0.5, 0.0, -1.0, -2.0]]), torch.tensor([[0.5, 0.0, -depth, -depth]])):
        sparse = top_k(teacher, OutputHead(torch.eye(4)), 2)
        out = output_loss(KL, student, OutputHead(torch.eye(4)), torch.tensor([0]), teacher_topk=sparse)
        (gradient,) = torch.autograd.grad(out.loss, student)
        logits = student.detach().double().requires_grad_()
        log_q, log_p = (outcomes(part, sparse.indices) for part in (logits, teacher.double()))
        expected = (log_p.exp() * (log_p - log_q)).sum()
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (reference,) = torch.autograd.grad(expected, logits)
        assert (gradient - reference).abs().max() < 1e-6


def test_a_rest_without_probability_asks_nothing() -> None:
    """As a cache in half precision may say of it."""
    case = Case(6, 20, 30, 8, 8, 1.0, None)
    sparse = case.sparse(29)
    none = torch.full_like(sparse.rest, -math.inf)
    kept = sparse._replace(log_probabilities=sparse.log_probabilities.log_softmax(1), rest=none)
    value, gradients = case.chunked(BOTH, 1.0, 512, sparse=kept)
    assert math.isfinite(value.item()) and all(part.isfinite().all() for part in gradients)


@over([{"loss": "js"}, {"loss": "clm+mse"}, {"temperature": 2.0}])
def test_a_sparse_teacher_is_one_of_kl_at_temperature_1(wrong: dict[str, object]) -> None:
    case = Case(6, 20, 30, 8, 8, 1.0, None)
    arguments: dict[str, object] = {"loss": KL, "temperature": 1.0, "chunk": 512, **wrong}
    with pytest.raises(AssertionError, match="sparse teacher"):
        case.chunked(sparse=case.sparse(5), **arguments)  # type: ignore[arg-type]


@over(OF_LOGITS)
def test_logits_have_no_temperature(loss: Loss) -> None:
    with pytest.raises(AssertionError, match="no temperature"):
        Case(6, 20, 30, 8, 8, 1.0, None).chunked(loss, 2.0, 512)


def test_every_loss_logs_the_same_kl_and_ce() -> None:
    case = Case(7, 50, 200, 8, 12, 0.25, 5.0)
    _, _, reference_ce, reference_kl = case.reference(KL, 1.0)
    head = OutputHead(case.weight, case.bias, case.scale, case.softcap)
    for loss in LOSSES:
        out = output_loss(loss, case.student, head, case.targets, case.teacher, case.teacher_head)
        assert out.ce == pytest.approx((reference_ce.sum() / (case.targets != IGNORE).sum()).item(), rel=1e-5)
        assert (out.kl is None) == (loss == CE)
        assert out.kl is None or out.kl == pytest.approx(reference_kl.mean().item(), rel=1e-5)


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


@over([loss for loss in LOSSES if loss != CE and not loss.startswith("clm+")])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(loss: Loss) -> None:
    case = Case(1, 40, 500, 16, 16, 1.0, None)
    head, teacher = OutputHead(case.weight.clone().requires_grad_()), OutputHead(case.weight)
    out = output_loss(loss, case.student, head, case.targets, case.student, teacher)
    out.loss.backward()
    assert abs(out.loss.item()) < 1e-6
    assert head.weight.grad is not None and head.weight.grad.abs().max() < 1e-6


@over([1, 20, 500])
def test_a_student_equal_to_its_sparse_teacher_has_no_loss_and_no_gradient(kept: int) -> None:
    case = Case(1, 40, 500, 16, 16, 1.0, None)
    head, sparse = OutputHead(case.weight.clone().requires_grad_()), top_k(case.student, OutputHead(case.weight), kept)
    out = output_loss(KL, case.student, head, case.targets, teacher_topk=sparse)
    out.loss.backward()
    assert abs(out.loss.item()) < 1e-6
    assert head.weight.grad is not None and head.weight.grad.abs().max() < 1e-6


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


@over([loss for loss in LOSSES if not loss.endswith("tv")])  # its gradient is a sign
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
    sparse = top_k(case.teacher, case.teacher_head, 64)
    with Largest() as largest:
        for loss in LOSSES:
            case.chunked(loss, 1.0 if loss in OF_LOGITS else 2.0, 32)
        case.chunked(BOTH, 1.0, 32, sparse=sparse)
    assert largest.elements >= 32 * vocab  # it does see them
    assert largest.elements <= max(32 * vocab, vocab * hidden) < tokens * vocab // 4


def test_gradients_are_kept_for_one_backward_pass() -> None:
    case = Case(5, 4, 10, 3, 3, 1.0, None)
    out = output_loss("ce", case.student.requires_grad_(), OutputHead(case.weight), case.targets)
    out.loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward"):
        out.loss.backward()


@over([1, 5, 50])
def test_a_small_kl_of_a_sparse_teacher_keeps_its_digits_where_logits_are_large(kept: int) -> None:
    """Logits that float32 holds exactly, near 1000, where it rounds a log-sum-exp by up to 3e-5 nats."""
    rng = torch.Generator().manual_seed(8)
    teacher = torch.randint(-2048, 2048, (40, 50), generator=rng) / 1024
    student = 1000 + teacher + torch.randint(-32, 32, (40, 50), generator=rng) / 1024
    sparse = top_k(teacher, OutputHead(torch.eye(50)), kept)
    targets = torch.zeros(40, dtype=torch.int64)
    kl = output_loss(KL, student, OutputHead(torch.eye(50)), targets, teacher_topk=sparse).loss
    log_q, log_p = (outcomes(part.double(), sparse.indices) for part in (student, teacher))
    expected = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0).sum(1).mean()
    assert kl.item() == pytest.approx(expected.item(), abs=2e-7)
