"""How far a student's next-token distributions are from a teacher's, and the gradient to the student's logits.

    kld          KL(p || q), p the teacher's distribution, q the student's
    reverse_kld  KL(q || p)
    js           Jensen-Shannon: (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2
    tv           total variation: sum |p - q| / 2
    mse          squared difference of the logits, mean over the vocabulary (as NVIDIA Model-Optimizer's MSELoss)
    cosine       1 - cosine of the logit vectors

Nats where there is a logarithm. Tiles are rows of float32 logits, (rows, V), few enough to stay in a core's cache: what
is large here is made in place where it can be. Every logarithm of a ratio comes from logits and log-sum-exps, never
from a quotient of probabilities, which is 0 or infinite where a tail has underflown.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Divergence = Literal["kld", "reverse_kld", "js", "tv", "mse", "cosine"]

# exp of more overflows float32; where p / q is this large, q adds nothing to a sum
LARGEST_LOG_RATIO = 80.0


class Compared(NamedTuple):
    kl: Tensor  # (rows,) KL(p || q), whatever the divergence
    value: Tensor  # (rows,) the divergence
    gradient: Tensor  # (rows, V) of `value`, to the student's logits


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and, from its largest entry, log-sum-exp (rows, 1): no second exp."""
    probability = torch.softmax(logits, -1)
    return probability, logits.amax(-1, keepdim=True) - probability.amax(-1, keepdim=True).log()


def compare(name: Divergence, student: Tensor, q: Tensor, lse: Tensor, teacher: Tensor) -> Compared:
    """Of the logits of both, where `q, lse` is `softmax(student)`; `q` and `teacher` are overwritten."""
    if name == "mse":
        of_logits = _mean_squared(student, teacher)
    elif name == "cosine":
        of_logits = _cosine(student, teacher)
    p, teacher_lse = softmax(teacher)
    log_ratio = teacher.sub_(student).sub_(teacher_lse - lse)  # log p - log q
    if name == "kld":
        kl = log_ratio.mul_(p).sum(1)
        gradient = q.sub_(p)
        # zero but for rounding: it takes the rounding of both log-sum-exps out of a small KL
        kl.add_(gradient.sum(1))
        return Compared(kl, kl, gradient)
    difference = q - p
    kl = (log_ratio * p).sum(1) + difference.sum(1)
    if name == "reverse_kld":
        mean = (q * log_ratio).sum(1, keepdim=True)
        value, gradient = -mean.squeeze(1) - difference.sum(1), log_ratio.sub_(mean).mul_(q).neg_()
    elif name == "js":
        value, gradient = _jensen_shannon(p, q, log_ratio)
    elif name == "tv":
        value, sign = difference.abs().sum(1).mul_(0.5), difference.sign_()
        gradient = sign.sub_((sign * q).sum(1, keepdim=True)).mul_(q).mul_(0.5)
    else:
        value, gradient = of_logits
    return Compared(kl, value, gradient)


def _jensen_shannon(p: Tensor, q: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """A small one is a small difference: expm1 and log1p keep its digits, log((p + q) / 2) would not."""
    log_ratio = log_ratio.clamp_(max=LARGEST_LOG_RATIO)
    student = log_ratio.expm1().mul_(0.5).log1p_().neg_()  # log q - log m
    student_kl = (student * q).sum(1, keepdim=True)
    teacher_kl = log_ratio.add_(student).mul_(p).sum(1)
    return (teacher_kl + student_kl.squeeze(1)).mul_(0.5), student.sub_(student_kl).mul_(q).mul_(0.5)


def _mean_squared(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    difference = student - teacher
    return difference.square().mean(1), difference.mul_(2 / student.shape[1])


def _cosine(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Half the squared distance of the unit vectors, which keeps the digits that 1 - cosine loses near 1."""
    size = student.norm(dim=1, keepdim=True)
    unit = student / size
    difference = unit - teacher / teacher.norm(dim=1, keepdim=True)
    value = difference.square().sum(1, keepdim=True).mul_(0.5)
    return value.squeeze(1), difference.sub_(unit.mul_(value)).div_(size)


def top_k_kl(
    student: Tensor, indices: Tensor, log_probabilities: Tensor, rest: Tensor, lse_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q) of k + 1 outcomes, k tokens and any other: (lse (rows, 1), kl (rows,), gradient (rows, V)).

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
    # log_p may be -inf where p is 0; q - p sums to zero but for rounding, as in `compare`
    kl = torch.where(p > 0, p * (log_p - log_q), 0).add_(q - p).sum(1)
    weight = p.sum(1, keepdim=True)
    gradient = q * (weight if lse_weight is None else weight + lse_weight) - p
    return lse, kl, others.mul_(gradient[:, -1:]).scatter_(1, indices, gradient[:, :-1])
