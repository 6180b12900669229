"""The output losses of distillation, and their gradients, computed in chunks over positions.

    ce                                cross-entropy of the student against the next token (L_CLM)
    kld, reverse_kld, js, tv          a divergence of the next-token distributions at temperature tau (L_logits)
    mse, cosine                       the same of the logits themselves, without a temperature
    clm+kld, clm+reverse_kld, ...     L_CLM + L_logits

divergences.py defines them. They are averaged over tokens, and KL is summed over the vocabulary (2408.11796, section
2.3). A divergence is multiplied by the power of tau that keeps the size of its gradient as tau changes
(`Divergence.tau_power`). Gradients are computed chunk by chunk in the forward pass, where the logits already are, so
full-vocabulary logits of a batch never exist, not even for the backward pass. On a GPU with `liger-kernel` installed
the rows of ce and kld are computed by its kernels (liger.py).

Shapes: T tokens, V vocabulary, H hidden size (the student's and the teacher's may differ). Matrix products
run in the precision of the surrounding autocast; softmax, sums and weight gradients in float32.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron_search.config.types import Loss
from minitron_search.losses import liger
from minitron_search.losses.divergences import DIVERGENCES, divergence_of, has_ce, softmax, top_k_kl
from minitron_search.models.output_head import OutputHead

IGNORE = -100  # the target of a position without a next token

# Rows of logits per matrix product: fewer starve the product, more only take memory (512 bfloat16 rows of a
# 49K vocabulary are 50 MB). Measured on 2 Zen 4 cores: 150, 139, 137, 137 us a row at 128, 256, 512, 1024.
CHUNK_TOKENS = 512
# Rows per softmax on a CPU: the float32 rows in flight then stay in the cores' caches. Measured, all that is
# between the products: 67, 59, 57, 61, 82 us a row at 4, 8, 16, 32, 64.
CPU_TILE_TOKENS = 16
# Rows of a weight's gradient per product and sum, so that the product is still in cache when it is added: 203 us a
# token on one core, 280 for all rows at once.
SUM_ROWS = 8192


def next_tokens(ids: Tensor) -> Tensor:
    """Return the targets (n, length) of `ids` (n, length): at every position the next token, IGNORE at the last."""
    targets = torch.full_like(ids, IGNORE)
    targets[:, :-1] = ids[:, 1:]
    return targets


class TopK(NamedTuple):
    """The most probable next tokens of a teacher: log-probabilities, nats, at temperature 1."""

    indices: Tensor  # (T, k) int64, the most probable tokens, each once
    log_probabilities: Tensor  # (T, k) float32
    rest: Tensor  # (T,) float32, log of the probability of all other tokens; -inf where there are none


class OutputLoss(NamedTuple):
    """The loss, which carries the gradient, and two means for the log: nats per token, float32.

    `kl` is KL(teacher || student) whatever the loss, at the temperature, without tau^2, and None without a teacher;
    `ce` is at temperature 1.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor | None


class TokenLosses(NamedTuple):
    """Every token's losses: nats, float32, (T,). `ce` is 0 where the target is IGNORE, `kl` None without a teacher."""

    ce: Tensor
    kl: Tensor | None


def output_loss(
    loss: Loss,
    student_hidden: Tensor,
    student_head: OutputHead,
    targets: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    *,
    teacher_topk: TopK | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> OutputLoss:
    """Return the loss of `student_hidden` (T, H), with gradients to it and to the student head's weight and bias.

    `targets` (T,) int64 are next tokens, or IGNORE. A divergence averages over all T, cross-entropy over those with a
    target, and `ce` reads no teacher. Every other loss reads the teacher's hidden states (T, H_teacher) and head. For
    `kld` and `clm+kld` at temperature 1 `teacher_topk` may take the place of the hidden states: KL is then that of
    k + 1 outcomes, the last of them any other token, and the teacher's head is not read. The loss can be backpropagated
    once.
    """
    divergence = divergence_of(loss)
    if divergence is None:
        teacher_hidden = teacher_head = teacher_topk = None
    elif teacher_topk is None:
        assert teacher_hidden is not None and teacher_head is not None
        assert temperature == 1 or DIVERGENCES[divergence].tau_power, "logits have no temperature"
    else:
        assert teacher_hidden is None
        teacher_head = None
        assert divergence == "kld" and temperature == 1, "a sparse teacher is one of kld at temperature 1"
    with torch.no_grad():
        chunked = _ChunkedPass(
            student_hidden, student_head, targets, teacher_hidden, teacher_head, temperature, chunk_tokens,
            teacher_topk=teacher_topk, divergence=divergence, with_ce=has_ce(loss),
        )  # fmt: skip
    return OutputLoss(*_ChunkedLoss.apply(student_hidden, student_head.weight, student_head.bias, chunked))


@torch.no_grad()
def token_losses(
    student_hidden: Tensor,
    student_head: OutputHead,
    targets: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenLosses:
    """Return cross-entropy and KL(teacher || student) of every token, no gradients; arguments as `output_loss`."""
    chunked = _ChunkedPass(
        student_hidden, student_head, targets, teacher_hidden, teacher_head, temperature, chunk_tokens,
        divergence="kld", with_ce=True,
    )  # fmt: skip
    for _ in chunked.run():
        pass
    return TokenLosses(chunked.ce, chunked.kl)


class _ChunkedLoss(torch.autograd.Function):
    """The mean losses of a `_ChunkedPass`; their gradients are made in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, student_hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: "_ChunkedPass"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens, targeted = len(chunked.targets), (chunked.targets != IGNORE).sum()
        # gradients are those of tokens * loss, and divided once, in backward
        ce_weight = tokens / targeted if chunked.with_ce else None
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(student_hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if for_bias else None
        for rows, grad_logits in chunked.run(any(ctx.needs_input_grad), ce_weight, grad_bias):
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ chunked.student_weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), chunked.student_hidden[rows])
        ctx.gradients, ctx.tokens = (grad_hidden, grad_weight, grad_bias), tokens
        ce = chunked.ce.sum() / targeted
        kl = None if chunked.kl is None else chunked.kl.mean()
        loss = torch.zeros_like(ce)
        if chunked.divergence is not None:
            value = kl if chunked.value is None else chunked.value.mean()
            assert value is not None
            loss = chunked.temperature**chunked.tau_power * value
        if chunked.with_ce:
            loss = loss + ce
        ctx.mark_non_differentiable(*(part for part in (ce, kl) if part is not None))
        return loss, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of a loss are kept for one backward pass"
        gradients = [part if part is None else part.mul_(grad_loss / ctx.tokens) for part in ctx.gradients]
        ctx.gradients = None  # autograd takes these tensors over instead of copying them
        return *gradients, None


class _ChunkedPass:
    """One pass over the positions with the logits of one chunk at a time; `run` fills in the losses of every token.

    Of a chunk's logits, products of hidden states and head in the precision of the surrounding autocast, a tile at a
    time is made float32 and compared, and its gradient put in its place.
    """

    def __init__(
        self,
        student_hidden: Tensor,
        student_head: OutputHead,
        targets: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: OutputHead | None,
        temperature: float,
        chunk_tokens: int,
        *,
        divergence: str | None,
        with_ce: bool,
        teacher_topk: TopK | None = None,
    ) -> None:
        self.device = student_hidden.device.type
        autocast = torch.is_autocast_enabled(self.device)
        dtype = torch.get_autocast_dtype(self.device) if autocast else student_hidden.dtype
        self.student_hidden = student_hidden.to(dtype)
        self.student_weight = student_head.weight.to(dtype)
        self.student_head, self.teacher_head = student_head, teacher_head
        self.targets, self.temperature = targets, temperature
        self.teacher_topk, self.divergence, self.with_ce = teacher_topk, divergence, with_ce
        self.tau_power = 0 if divergence is None else DIVERGENCES[divergence].tau_power
        self.liger = liger.usable(self.device)
        self.chunk = min(chunk_tokens, len(targets))
        self.tile = CPU_TILE_TOKENS if self.device == "cpu" else self.chunk
        self.ce = torch.empty(len(targets), device=student_hidden.device)
        self.kl = None if teacher_head is None and teacher_topk is None else torch.empty_like(self.ce)
        # of the divergence, where it is not that KL
        self.value = None if divergence in (None, "kld") else torch.empty_like(self.ce)
        # one chunk's product, reused for every chunk; the student's becomes its gradient in place
        self.student_logits = self.student_hidden.new_empty(self.chunk, len(self.student_weight))
        if teacher_head is not None:
            assert teacher_hidden is not None
            self.teacher_hidden, self.teacher_weight = teacher_hidden.to(dtype), teacher_head.weight.to(dtype)
            self.teacher_logits = torch.empty_like(self.student_logits)

    def run(
        self, gradient: bool = False, ce_weight: Tensor | None = None, grad_bias: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, student's logits before bias, scale and cap) of each chunk, its losses filled in.

        With `gradient` they are already the gradient, to them, of the sum over rows of the divergence with its
        power of tau (with a teacher) + ce_weight * ce (where given); `grad_bias` takes its sum over rows.
        """
        for start in range(0, len(self.targets), self.chunk):
            rows = slice(start, min(start + self.chunk, len(self.targets)))
            with torch.autocast(self.device, enabled=False):
                student, teacher = self._products(rows)
                for low in range(0, rows.stop - start, self.tile):
                    tile = slice(low, min(low + self.tile, rows.stop - start))
                    tokens = slice(start + tile.start, start + tile.stop)
                    logits, slope = _logits(student[tile], self.student_head, gradient)
                    teacher_logits = None
                    if self.teacher_head is not None and teacher is not None:
                        teacher_logits, _ = _logits(teacher[tile], self.teacher_head)
                    grad = self._compare_tile(tokens, logits, teacher_logits, gradient, ce_weight)
                    if gradient:
                        grad = grad if slope is None else grad.mul_(slope)
                        student[tile].copy_(grad)
                        if grad_bias is not None:
                            grad_bias.add_(grad.sum(0))
                yield rows, student

    def _products(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Compute student's and teacher's hidden states times head weights, (rows, V), into the chunk's buffers."""
        count = rows.stop - rows.start
        student = self.student_logits[:count]
        torch.mm(self.student_hidden[rows], self.student_weight.t(), out=student)
        if self.teacher_head is None:
            return student, None
        teacher = self.teacher_logits[:count]
        torch.mm(self.teacher_hidden[rows], self.teacher_weight.t(), out=teacher)
        return student, teacher

    def _compare_tile(
        self, tokens: slice, student: Tensor, teacher: Tensor | None, gradient: bool, ce_weight: Tensor | None
    ) -> Tensor:
        """Fill in the losses of `tokens` and return the gradient to the student's float32 logits (rows, V).

        `student` and `teacher` (rows, V) are overwritten.
        """
        if self.liger and gradient and self.teacher_topk is None:
            if teacher is None:
                return self._liger_cross_entropy(tokens, student, ce_weight)
            if self.divergence == "kld" and ce_weight is None:
                return self._liger_kl(tokens, student, teacher)
        targets = self.targets[tokens, None]
        valid, targets = (targets != IGNORE).float(), targets.clamp(min=0)
        weight = valid * ce_weight if gradient and ce_weight is not None else None
        at_target = student.gather(1, targets)
        if self.teacher_topk is not None:
            assert self.kl is not None
            indices, log_probabilities, rest = (part[tokens] for part in self.teacher_topk)
            lse, self.kl[tokens], grad = top_k_kl(student, indices, log_probabilities, rest, weight)
        else:
            probability, lse = softmax(student)
            grad = probability if weight is None else probability * weight
        self.ce[tokens] = ((lse - at_target) * valid).squeeze(1)
        if weight is not None:
            grad.scatter_add_(1, targets, -weight)
        if teacher is not None:
            divergence_grad = self._diverge(tokens, student, probability, lse, teacher, gradient)
            if gradient:
                grad = divergence_grad if weight is None else grad.add_(divergence_grad)
        return grad

    def _diverge(
        self, tokens: slice, student: Tensor, probability: Tensor, lse: Tensor, teacher: Tensor, gradient: bool
    ) -> Tensor:
        """Fill in KL and divergence of `tokens`; return the divergence's gradient (rows, V) with its power of tau."""
        assert self.kl is not None and self.divergence is not None
        tau = self.temperature
        if tau != 1:
            probability, lse = softmax(student.mul_(1 / tau))
            teacher.mul_(1 / tau)
        comparison = DIVERGENCES[self.divergence].compare(student, probability, lse, teacher)
        self.kl[tokens] = comparison.kl
        if self.value is not None:
            self.value[tokens] = comparison.value
        if gradient and tau != 1:  # it is to logits / tau
            comparison.gradient.mul_(tau ** (self.tau_power - 1))
        return comparison.gradient

    def _liger_cross_entropy(self, tokens: slice, student: Tensor, ce_weight: Tensor | None) -> Tensor:
        """Do as `_compare_tile` does without a teacher."""
        assert ce_weight is not None
        self.ce[tokens] = liger.cross_entropy(student, self.targets[tokens], IGNORE, gradient=True)
        return student.mul_(ce_weight)

    def _liger_kl(self, tokens: slice, student: Tensor, teacher: Tensor) -> Tensor:
        """Do as `_compare_tile` does for kld."""
        assert self.kl is not None
        targets, tau = self.targets[tokens], self.temperature
        # clamped: of a row without a target Liger makes zeros, even where it is asked for no gradient
        ce = liger.cross_entropy(student, targets.clamp(min=0), IGNORE, gradient=False)
        self.ce[tokens] = ce * (targets != IGNORE)
        self.kl[tokens] = liger.forward_kl(
            student, torch.softmax(teacher if tau == 1 else teacher.mul_(1 / tau), -1), tau
        )
        return student if tau == 1 else student.mul_(tau**2)


def _logits(product: Tensor, head: OutputHead, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return float32 logits (rows, V) of `product`, a copy, and d logits / d product where it is not 1."""
    logits = product.to(torch.float32, copy=True)
    if head.bias is not None:
        logits.add_(head.bias)
    if head.scale != 1:
        logits.mul_(head.scale)
    slope = torch.full_like(logits[:, :1], head.scale) if with_slope and head.scale != 1 else None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        if with_slope:
            slope = (1 - logits.square()).mul_(head.scale)
        logits.mul_(head.softcap)
    return logits, slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` (float32)."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    else:  # no product adds bfloat16 into float32: each chunk is rounded once, their sum is not
        for start in range(0, len(total), SUM_ROWS):
            rows = slice(start, start + SUM_ROWS)
            total[rows].add_(left[rows] @ right)
