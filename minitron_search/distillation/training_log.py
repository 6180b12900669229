"""The losses of a training, logged a few steps at a time and watched for divergence."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_search.distillation.parallel import Processes
from minitron_search.distillation.settings import LoopSettings

DIVERGED = 3.0  # times the mean loss of the first BASELINE_STEPS steps
BASELINE_STEPS = 10
LEAST_BASELINE = 1.0  # nats: a student that begins near its teacher may triple a loss of almost nothing


class DivergedError(RuntimeError):
    """The loss is not finite, or too far above where it began."""

    def __init__(self, step: int, value: float, limit: float) -> None:
        super().__init__(f"diverged at step {step}: loss {value:.4g}, limit {limit:.4g}")
        self.step, self.value, self.limit = step, value, limit

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process borders
        return type(self), (self.step, self.value, self.limit)


class TrainingLog:
    """Losses of the steps since the last flush, kept on the device: reading one would wait for it."""

    def __init__(
        self, settings: LoopSettings, batch_tokens: int, processes: Processes, log: Callable[[dict[str, float]], None]
    ) -> None:
        self.settings, self.batch_tokens, self.processes, self.log = settings, batch_tokens, processes, log
        self.first: list[float] = []  # losses of the first BASELINE_STEPS steps
        self.last = math.nan
        self.pending: list[tuple[int, Tensor, float]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count no time until now as training: tokens per second are those of the steps alone."""
        self.clock = time.monotonic()

    def add(self, step: int, means: Tensor, norm: Tensor, learning_rate: float) -> None:
        """Keep a step's [loss, ce, kl, intermediate] and gradient norm until the next flush."""
        self.pending.append((step, torch.cat([means, norm.reshape(1)]), learning_rate))

    def flush(self) -> None:
        """Log what is pending. Raises DivergedError, in every process alike."""
        if not self.pending:
            return
        values = torch.stack([row for _, row, _ in self.pending])
        if self.processes.world_size > 1:
            dist.all_reduce(values)
            values /= self.processes.world_size
        rows = values.tolist()  # waits for the device
        speed = len(rows) * self.batch_tokens / max(time.monotonic() - self.clock, 1e-9)
        for (step, _, learning_rate), (loss, ce, kl, intermediate, norm) in zip(self.pending, rows, strict=True):
            if self.processes.rank == 0:
                record = {
                    "step": step, "tokens": step * self.batch_tokens, "loss": loss, "lm_loss": ce, "kl": kl,
                    "learning_rate": learning_rate, "gradient_norm": norm, "tokens_per_second": speed,
                }  # fmt: skip
                if self.settings.loss == "ce":
                    del record["kl"]
                if self.settings.intermediate:
                    record["intermediate"] = intermediate
                self.log(record)
            self._check(step, loss)
            self.last = loss
        self.pending = []
        self.restart_clock()

    def _check(self, step: int, loss: float) -> None:
        if len(self.first) < BASELINE_STEPS:
            self.first.append(loss)
        limit = DIVERGED * max(sum(self.first) / len(self.first), LEAST_BASELINE)
        watched = step > max(BASELINE_STEPS, self.settings.warmup_steps)
        if not math.isfinite(loss) or (watched and loss > limit):
            raise DivergedError(step, loss, limit)
