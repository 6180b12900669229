"""What a distillation is asked to do: plain data, which a process that trains nothing reads without torch."""

from dataclasses import dataclass
from typing import Literal

Loss = Literal[
    "kld", "reverse_kld", "js", "tv", "mse", "cosine", "ce",
    "clm+kld", "clm+reverse_kld", "clm+js", "clm+tv", "clm+mse", "clm+cosine",
]  # fmt: skip
Precision = Literal["float32", "bfloat16"]
IntermediateLoss = Literal["mse", "cosine"]
Strategy = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class LoopSettings:
    """Tokens count input positions. Milestones are rounded up to whole batches, batches to whole windows."""

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
        return self.loss != "ce" or self.intermediate != 0

    def shards(self, world_size: int) -> bool:
        """Whether `world_size` processes hold a share each."""
        return self.strategy == "fsdp2" and world_size > 1
