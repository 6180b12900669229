"""Rows of logits by Liger's fused Triton kernels, where `liger-kernel` (0.8.5 or later) is installed and on a GPU.

One kernel reads a row and leaves its gradient where the logits were; PyTorch alone reads and writes it ten times. Of
Liger only these kernels are used, not its fused linear losses: those return one number where our log has two (their
Jensen-Shannon and KL losses give no cross-entropy), take neither scale nor soft-cap everywhere, and cut the batch into
chunks of T * H / V tokens, 64 for a SmolLM2, each of which adds a gradient of the whole head.
"""

from functools import cache

import torch
from torch import Tensor

IMPLEMENTATION = "nvidia-triton"
OPERATIONS = ("cross_entropy_loss_and_grad", "kl_loss_and_grad")


def usable(device: str) -> bool:
    """Return whether Liger's kernels can compute on `device`."""
    return device == "cuda" and _installed()


@cache
def _installed() -> bool:
    try:
        import liger_kernel.functional  # noqa: F401 - declares the operations
        from liger_kernel.backends import available_impls
    except ImportError:  # not installed, or too old to have them
        return False
    return all(IMPLEMENTATION in available_impls(operation) for operation in OPERATIONS)


def cross_entropy(logits: Tensor, targets: Tensor, ignore: int, gradient: bool) -> Tensor:
    """Return nats (rows,), 0 where `targets` (rows,) are `ignore`; `logits` (rows, V) become the sum's gradient."""
    from liger_kernel.backends import dispatch

    # no weights, z-loss or smoothing; of a sum over rows, which the number of targets does not enter
    rows, *_ = dispatch(
        OPERATIONS[0], logits, targets, None, ignore, 0.0, 0.0, "sum", None, 1, 1.0, 0.0, False, False, False, gradient,
        impl=IMPLEMENTATION,
    )  # fmt: skip
    return rows


def forward_kl(student: Tensor, p: Tensor, temperature: float) -> Tensor:
    """Return KL(p || softmax(student / temperature)) (rows,); `student` (rows, V) becomes the gradient of the sum."""
    from liger_kernel.backends import dispatch

    rows, gradient = dispatch(
        OPERATIONS[1], student, p, None, 0, temperature, torch.finfo(p.dtype).tiny, 1.0, impl=IMPLEMENTATION
    )
    assert gradient is student
    return rows
