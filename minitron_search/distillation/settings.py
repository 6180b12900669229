"""The settings of a distillation and of a teacher correction: plain data, read without torch."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from minitron_search.config.types import IntermediateLoss, Loss, Precision, Strategy


@dataclass(frozen=True)
class LoopSettings:
    """How one training runs. Tokens are input positions; milestones are rounded up to whole batches, batches to whole
    windows."""

    total_tokens: int
    loss: Loss = "kld"
    temperature: float = 1.0
    intermediate: float | Literal["auto"] = 0.0  # alpha of L_is; auto: L_logits / L_is, of every micro-batch
    intermediate_loss: IntermediateLoss = "mse"
    intermediate_layers: int | Literal["all"] = "all"  # how many of the student's, from the last
    embedding: bool = False  # whether L_is compares the embedding's output too
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.0  # where cosine ends
    warmup_steps: int = 10
    schedule: Literal["constant", "cosine"] = "constant"
    batch_tokens: int = 2048
    micro_batch_tokens: int = 4096  # at most so many tokens a process runs through the model at once
    milestones: tuple[int, ...] = ()
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    precision: Precision = "float32"
    seed: int = 0
    checkpoint_tokens: int | None = None  # between checkpoints
    log_steps: int = 10  # between calls of `log`
    threads: int | None = None  # torch's own choice
    strategy: Strategy = "ddp"  # of several processes; one process holds everything
    gradient_checkpointing: bool = False  # layers are computed again in the backward pass
    compile: bool = False  # the decoder layers, by torch.compile

    @property
    def asks_teacher(self) -> bool:
        """Return whether the loss reads a teacher."""
        return self.loss != "ce" or self.intermediate != 0

    def shards(self, world_size: int) -> bool:
        """Return whether `world_size` processes hold a share each."""
        return self.strategy == "fsdp2" and world_size > 1


Method = Literal["full", "lora", "norms"]
METHODS: tuple[Method, ...] = ("full", "lora", "norms")
# 2408.11796, section 3. A correction much shorter than the paper's 100B tokens would be over before 120 steps have
# warmed it up: it takes a tenth of its steps.
LEARNING_RATE, WARMUP_STEPS, WARMUP_SHARE = 1 / 5, 120, 1 / 10
PREFIX = "corrected-"  # of a correcting trial's initialization


@dataclass(frozen=True)
class CorrectionSettings:
    """How a teacher is corrected (2408.11796, section 3).

    warmup_steps: None for `WARMUP_STEPS`, or `WARMUP_SHARE` of all steps where that is fewer.
    """

    method: Method
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int | None
    seed: int

    @property
    def initialization(self) -> str:
        """Return the initialization of the trial that makes a correction: it begins with the teacher itself."""
        return PREFIX + self.method

    def loop_settings(self, training: LoopSettings) -> LoopSettings:
        """Return the settings of the teacher's steps in a training like `training`: plain LM loss, the same schedule
        from its own peak."""
        steps = math.ceil(training.total_tokens / training.batch_tokens)
        warmup = min(WARMUP_STEPS, int(WARMUP_SHARE * steps)) if self.warmup_steps is None else self.warmup_steps
        low = min(self.min_learning_rate, self.learning_rate)
        return replace(
            training, loss="ce", intermediate=0.0, embedding=False,
            learning_rate=self.learning_rate, min_learning_rate=low, warmup_steps=warmup,
        )  # fmt: skip


def method_of(initialization: str) -> Method | None:
    """Return the method of a trial that corrects the teacher; None for one that makes a student."""
    return next((method for method in METHODS if initialization == PREFIX + method), None)
