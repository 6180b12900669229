"""Liger's kernels against our own rows: on a GPU, or without one where TRITON_INTERPRET=1 was set from the start."""

import os

import pytest
import torch
from torch import Tensor

from minitron_search.config.types import Loss
from minitron_search.losses import liger
from minitron_search.losses.output_loss import IGNORE, OutputLoss, output_loss
from minitron_search.models.output_head import OutputHead

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytest.importorskip("liger_kernel", exc_type=ImportError)
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)


def run(loss: Loss, vocab: int, temperature: float, scale: float, softcap: float | None) -> tuple[OutputLoss, list]:
    rng = torch.Generator().manual_seed(vocab)
    sizes = [(37, 8), (vocab, 8), (vocab,), (37, 12), (vocab, 12)]
    hidden, weight, bias, teacher, teacher_weight = (torch.randn(size, generator=rng).to(DEVICE) for size in sizes)
    targets = torch.randint(vocab, (37,), generator=rng).to(DEVICE)
    targets[::3] = IGNORE
    inputs = [part.requires_grad_() for part in (hidden, weight, bias)]
    out = output_loss(
        loss, hidden, OutputHead(weight, bias, scale, softcap), targets,
        teacher, OutputHead(teacher_weight, None, scale, softcap), temperature=temperature, chunk_tokens=16,
    )  # fmt: skip
    (1.7 * out.loss).backward()
    return out, [part.grad for part in inputs]


@pytest.mark.parametrize("head", [(1.0, None), (0.25, 5.0)])
@pytest.mark.parametrize("vocab", [2, 100, 1001])
@pytest.mark.parametrize(("loss", "temperature"), [("ce", 1.0), ("kld", 1.0), ("kld", 2.5), ("kld", 0.5)])
def test_ligers_rows_are_ours(
    loss: Loss, temperature: float, vocab: int, head: tuple[float, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: object, kernel: object = None, **kwargs: object) -> Tensor:
        calls.append(1)
        return kernel(*args, **kwargs)  # type: ignore[operator,no-any-return]

    assert liger._installed()
    monkeypatch.setattr(liger, "usable", lambda device: False)
    ours, references = run(loss, vocab, temperature, *head)
    monkeypatch.setattr(liger, "usable", lambda device: True)
    kernel = liger.cross_entropy
    monkeypatch.setattr(liger, "cross_entropy", lambda *a, **k: counted(*a, kernel=kernel, **k))
    theirs, gradients = run(loss, vocab, temperature, *head)
    assert len(calls) == 3  # chunks: of 16 rows, on a GPU a tile each, on a CPU a tile too
    for value, reference in zip(theirs, ours, strict=True):
        assert (value is None) == (reference is None)
        assert value is None or value.item() == pytest.approx(reference.item(), rel=1e-5, abs=2e-6)
    for gradient, reference in zip(gradients, references, strict=True):
        assert (gradient - reference).norm() <= 1e-4 * reference.norm() + 1e-7
