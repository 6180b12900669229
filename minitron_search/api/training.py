"""Distillation in this process: the loop that a search runs, on a student in memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from minitron_search.api.html import table
from minitron_search.api.model import Model, load
from minitron_search.api.text import token_count
from minitron_search.config.types import Loss
from minitron_search.distillation.loop import train
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher import live_teacher
from minitron_search.losses.divergences import loss_names
from minitron_search.models.device import resolve
from minitron_search.trials.settings import CPU_MICRO_BATCH, GPU_MICRO_BATCH, rate_by_size

WARMUP_SHARE = 0.05


@dataclass(frozen=True, repr=False)
class Distillation:
    """What a distillation did. `steps`: a row for each step: tokens, loss, lm_loss and kl (nats per token),
    learning_rate, gradient_norm. `tokens` trained on, in `seconds`."""

    steps: pd.DataFrame
    tokens: int
    seconds: float

    def __repr__(self) -> str:
        first, last = self.steps["lm_loss"].iloc[0], self.steps["lm_loss"].iloc[-1]
        return (f"{self.tokens:,} tokens in {len(self.steps)} steps and {self.seconds:.0f} s: LM loss of the batches "
                f"{first:.3f} to {last:.3f}")  # fmt: skip

    def _repr_html_(self) -> str:
        shown = self.steps.iloc[:: max(1, len(self.steps) // 8)]
        rows = [(f"{row.tokens:,.0f}", f"{row.loss:.4f}", f"{row.lm_loss:.4f}") for row in shown.itertuples()]
        return table(("tokens", "loss", "LM loss"), rows)


def distill(
    student: Model,
    teacher: "Model | PreTrainedModel | str | Path",
    windows: np.ndarray,
    *,
    tokens: int | str | None = None,
    loss: Loss = "kld",
    learning_rate: float | Literal["auto"] = "auto",
    schedule: Literal["constant", "cosine"] = "cosine",
    batch_tokens: int | str = 2048,
    warmup_steps: int | None = None,
    seed: int = 0,
    precision: str = "auto",
    log: Callable[[dict[str, float]], None] = lambda record: None,
) -> Distillation:
    """Train `student`, in place, to say what `teacher` says of `windows` (n, length), and return how it went.

    `tokens`: how many to train on, as 1M; by default every window once; more of them read the windows again, in another
    order. `loss`: kld, the forward KL of all logits (2408.11796, section 2.3), another divergence, ce, or clm+kld.
    `learning_rate`: auto falls with the teacher's size from 3e-4 at 135M. `log` is called with every step's numbers.

    Raises ValueError for settings that do not fit, and DivergedError where the loss is not a number any more.
    """
    if not isinstance(student, Model):
        raise ValueError("student: it is trained in place, and has to be a Model; valid: trim(...) or load(...)")
    if loss not in loss_names():
        raise ValueError(f"loss: {loss!r} is not a loss; valid: {', '.join(loss_names())}")
    source, resolved = load(teacher), resolve(precision)
    if source.config.vocab_size != student.config.vocab_size:
        raise ValueError(f"teacher: {source.name} has a vocabulary of {source.config.vocab_size:,} and the student one "
                         f"of {student.config.vocab_size:,}; valid: the model that it was trimmed from")  # fmt: skip
    total = windows.size if tokens is None else token_count("tokens", tokens)
    batch = token_count("batch_tokens", batch_tokens)
    if not len(windows) or total < 1 or batch < 1:
        raise ValueError(f"tokens: {total} on {len(windows)} windows; valid: at least one of each")
    rate = rate_by_size(source.shape.params) if learning_rate == "auto" else learning_rate
    steps = math.ceil(total / (math.ceil(batch / windows.shape[1]) * windows.shape[1]))
    gpu = student.model.device.type == "cuda"
    settings = LoopSettings(
        total_tokens=total, loss=loss, learning_rate=rate, schedule=schedule, batch_tokens=batch, seed=seed,
        warmup_steps=max(1, round(WARMUP_SHARE * steps)) if warmup_steps is None else warmup_steps,
        micro_batch_tokens=GPU_MICRO_BATCH if gpu else CPU_MICRO_BATCH, precision=resolved, log_steps=1,
    )  # fmt: skip
    records: list[dict[str, float]] = []

    def keep(record: dict[str, float]) -> None:
        records.append(record)
        log(record)

    teaches = live_teacher(source.model, resolved) if settings.asks_teacher else None
    result = train(student.model.float(), windows, settings, teaches, log=keep)
    student.model.eval()
    return Distillation(pd.DataFrame(records), result.tokens, result.seconds)
