"""How a teacher is corrected: plain data, which a process that trains nothing reads without torch."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from minitron_search.distillation.settings import LoopSettings

Method = Literal["full", "lora", "norms"]
METHODS: tuple[Method, ...] = ("full", "lora", "norms")
# 2408.11796, section 3. A correction much shorter than the paper's 100B tokens would be over before 120 steps have
# warmed it up: it takes a tenth of its steps.
LEARNING_RATE, WARMUP_STEPS, WARMUP_SHARE = 1 / 5, 120, 1 / 10
PREFIX = "corrected-"


@dataclass(frozen=True)
class Correction:
    """warmup_steps: None for `WARMUP_STEPS`, or `WARMUP_SHARE` of all steps where that is fewer."""

    method: Method
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int | None
    seed: int

    @property
    def initialization(self) -> str:
        """Of the trial that makes a correction: it begins with the teacher itself."""
        return PREFIX + self.method

    def settings(self, training: LoopSettings) -> LoopSettings:
        """Of the teacher's steps in a training like `training`: plain LM loss, the same schedule from its own peak."""
        steps = math.ceil(training.total_tokens / training.batch_tokens)
        warmup = min(WARMUP_STEPS, int(WARMUP_SHARE * steps)) if self.warmup_steps is None else self.warmup_steps
        low = min(self.min_learning_rate, self.learning_rate)
        return replace(
            training, loss="ce", intermediate=0.0, embedding=False,
            learning_rate=self.learning_rate, min_learning_rate=low, warmup_steps=warmup,
        )  # fmt: skip


def method_of(initialization: str) -> Method | None:
    """The method of a trial that corrects the teacher; None for one that makes a student."""
    return next((method for method in METHODS if initialization == PREFIX + method), None)
