"""How far a student's next-token distributions are from a teacher's, and the gradient to the student's logits.

    kld          KL(p || q), p the teacher's distribution, q the student's
    reverse_kld  KL(q || p)
    js           Jensen-Shannon: (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2
    tv           total variation: sum |p - q| / 2
    mse          squared difference of the logits, mean over the vocabulary (as NVIDIA Model-Optimizer's MSELoss)
    cosine       1 - cosine of the logit vectors

Nats where there is a logarithm. A new one is a function here and a line in `DIVERGENCES`: the configuration then takes
its name, alone and as `clm+<name>`.

The functions read tiles: rows of float32 logits, (rows, V), few enough to stay in a core's cache. They may overwrite
`q` and `teacher`, and make in place what is large. Every logarithm of a ratio comes from logits and log-sum-exps, never
from a quotient of probabilities, which is 0 or infinite where a tail has underflown.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# exp of more overflows float32; where p / q is this large, q adds nothing to a sum
LARGEST_LOG_RATIO = 80.0


class Comparison(NamedTuple):
    """What a divergence makes of a tile; `kl` is logged with every loss."""

    kl: Tensor  # (rows,) KL(p || q)
    value: Tensor  # (rows,) the divergence
    gradient: Tensor  # (rows, V) of `value`, to the student's logits


class Divergence(NamedTuple):
    """A way to compare two next-token distributions.

    compare: `(student, q, lse, teacher) -> Comparison`, of the logits (rows, V) of both, where `q, lse` is
        `softmax(student)`; may overwrite `q` and `teacher`.
    tau_power: the loss is multiplied by this power of the temperature, which keeps the size of its gradient: 2 where a
        divergence is quadratic in small differences of the logits (Hinton et al. 2015, section 2), 1 where it is
        linear, 0 where it reads the logits themselves, which have no temperature.
    """

    compare: Callable[[Tensor, Tensor, Tensor, Tensor], Comparison]
    tau_power: int


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax over the last axis and, from its largest entry, the log-sum-exp (rows, 1): no second exp."""
    probability = torch.softmax(logits, -1)
    return probability, logits.amax(-1, keepdim=True) - probability.amax(-1, keepdim=True).log()


def log_ratios(student: Tensor, lse: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and log p - log q, both (rows, V); `teacher` becomes the second."""
    p, teacher_lse = softmax(teacher)
    return p, teacher.sub_(student).sub_(teacher_lse - lse)


def forward_kl(p: Tensor, q: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) (rows,) and q - p (rows, V), and leave the arguments as they are.

    The sum of q - p is zero but for rounding: it takes the rounding of both log-sum-exps out of a small KL.
    """
    difference = q - p
    return (log_ratio * p).sum(1) + difference.sum(1), difference


def _kld(student: Tensor, q: Tensor, lse: Tensor, teacher: Tensor) -> Comparison:
    p, log_ratio = log_ratios(student, lse, teacher)
    # `forward_kl` in place: this is the default loss
    kl = log_ratio.mul_(p).sum(1)
    gradient = q.sub_(p)
    kl.add_(gradient.sum(1))
    return Comparison(kl, kl, gradient)


def _reverse_kld(student: Tensor, q: Tensor, lse: Tensor, teacher: Tensor) -> Comparison:
    p, log_ratio = log_ratios(student, lse, teacher)
    kl, difference = forward_kl(p, q, log_ratio)
    mean = (q * log_ratio).sum(1, keepdim=True)
    value = -mean.squeeze(1) - difference.sum(1)
    return Comparison(kl, value, log_ratio.sub_(mean).mul_(q).neg_())


def _jensen_shannon(student: Tensor, q: Tensor, lse: Tensor, teacher: Tensor) -> Comparison:
    """Compare by Jensen-Shannon: expm1 and log1p keep the digits of a small one, log((p + q) / 2) would not."""
    p, log_ratio = log_ratios(student, lse, teacher)
    kl, _ = forward_kl(p, q, log_ratio)
    log_ratio = log_ratio.clamp_(max=LARGEST_LOG_RATIO)
    log_q_to_m = log_ratio.expm1().mul_(0.5).log1p_().neg_()  # log q - log m
    student_kl = (log_q_to_m * q).sum(1, keepdim=True)
    teacher_kl = log_ratio.add_(log_q_to_m).mul_(p).sum(1)
    value = (teacher_kl + student_kl.squeeze(1)).mul_(0.5)
    return Comparison(kl, value, log_q_to_m.sub_(student_kl).mul_(q).mul_(0.5))


def _total_variation(student: Tensor, q: Tensor, lse: Tensor, teacher: Tensor) -> Comparison:
    p, log_ratio = log_ratios(student, lse, teacher)
    kl, difference = forward_kl(p, q, log_ratio)
    value, sign = difference.abs().sum(1).mul_(0.5), difference.sign_()
    return Comparison(kl, value, sign.sub_((sign * q).sum(1, keepdim=True)).mul_(q).mul_(0.5))


def _mean_squared(student: Tensor, q: Tensor, lse: Tensor, teacher: Tensor) -> Comparison:
    difference = student - teacher
    value, gradient = difference.square().mean(1), difference.mul_(2 / student.shape[1])
    p, log_ratio = log_ratios(student, lse, teacher)
    return Comparison(forward_kl(p, q, log_ratio)[0], value, gradient)


def _cosine(student: Tensor, q: Tensor, lse: Tensor, teacher: Tensor) -> Comparison:
    """Compare by half the squared distance of the unit vectors: it keeps the digits that 1 - cosine loses near 1."""
    size = student.norm(dim=1, keepdim=True)
    unit = student / size
    difference = unit - teacher / teacher.norm(dim=1, keepdim=True)
    value = difference.square().sum(1, keepdim=True).mul_(0.5)
    gradient = difference.sub_(unit.mul_(value)).div_(size)
    p, log_ratio = log_ratios(student, lse, teacher)
    return Comparison(forward_kl(p, q, log_ratio)[0], value.squeeze(1), gradient)


DIVERGENCES: dict[str, Divergence] = {
    "kld": Divergence(_kld, tau_power=2),
    "reverse_kld": Divergence(_reverse_kld, tau_power=2),
    "js": Divergence(_jensen_shannon, tau_power=2),
    "tv": Divergence(_total_variation, tau_power=1),
    "mse": Divergence(_mean_squared, tau_power=0),
    "cosine": Divergence(_cosine, tau_power=0),
}


def loss_names() -> list[str]:
    """Return every value that `distillation.loss` may have."""
    return [*DIVERGENCES, "ce", *(f"clm+{name}" for name in DIVERGENCES)]


def divergence_of(loss: str) -> str | None:
    """Return the name of the divergence that `loss` minimises; None for `ce`, which has no teacher."""
    return None if loss == "ce" else loss.removeprefix("clm+")


def has_ce(loss: str) -> bool:
    """Return whether the LM loss is all or part of `loss`."""
    return loss == "ce" or loss.startswith("clm+")


def top_k_kl(
    student: Tensor, indices: Tensor, log_probabilities: Tensor, rest: Tensor, lse_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(p || q) of k + 1 outcomes, k tokens and any other: (lse (rows, 1), kl (rows,), gradient (rows, V)).

    `indices` and `log_probabilities` (rows, k) and `rest` (rows,) are the teacher's, `student` the logits, which are
    overwritten. The gradient is that of kl + lse_weight * lse, lse_weight (rows, 1).

    The one softmax is over the other tokens alone: with q_rest the student's probability of them, their gradient is
    (q_rest - p_rest) times it, and log q_rest is never taken from 1 minus a sum near 1. That is as many passes over
    the vocabulary as plain cross-entropy takes.
    """
    kept = student.gather(1, indices)
    # not -inf: with k = V there is no other token, and a softmax of -inf alone is nan
    others, others_lse = softmax(student.scatter_(1, indices, torch.finfo(student.dtype).min))
    outcomes = torch.cat([kept, others_lse], 1)
    lse = outcomes.logsumexp(1, keepdim=True)
    log_p, log_q = torch.cat([log_probabilities, rest[:, None]], 1), outcomes - lse
    p, q = log_p.exp(), log_q.exp()
    # log_p may be -inf where p is 0; q - p sums to zero but for rounding, as in `forward_kl`
    kl = torch.where(p > 0, p * (log_p - log_q), 0).add_(q - p).sum(1)
    weight = p.sum(1, keepdim=True)
    gradient = q * (weight if lse_weight is None else weight + lse_weight) - p
    return lse, kl, others.mul_(gradient[:, -1:]).scatter_(1, indices, gradient[:, :-1])
