"""The training loop of distillation, written once; it is placed elsewhere, and knows nothing of placement.

`L = L_CLM + L_logits + alpha * L_is`, each switchable (2408.11796, section 2.3). The teacher is a source of hidden
states, live or cached, and an output head. Same inputs and same thread count give the same numbers, bit for
bit, on a CPU; so does a run continued from a checkpoint.

Order of data: an endless stream of windows, epoch after epoch, each a permutation made from (seed, epoch).
Batch k is the same windows whatever the number of processes, and every run with the same seed reads the same
stream.
"""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, masking_utils

from minitron_search.distillation import checkpoints, parallel
from minitron_search.distillation.objective import Objective
from minitron_search.distillation.prefetch import feed
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher import Teacher
from minitron_search.distillation.training_log import TrainingLog
from minitron_search.models.families import decoder_layers
from minitron_search.records.transfer import Depot


class Milestone(NamedTuple):
    """Handed to `on_milestone` in every process. Every process calls `save(folder)`, which writes a checkpoint, or
    none does; it may run in a thread of its own as long as it ends before `on_milestone` does."""

    tokens: int  # as asked for in LoopSettings.milestones
    tokens_seen: int  # whole batches
    step: int
    student: PreTrainedModel | None  # whole; of a sharded one a copy in the first process, None in the others
    save: Callable[[Path], None]


class TrainResult(NamedTuple):
    student: PreTrainedModel
    step: int
    tokens: int
    last_loss: float
    teacher_tokens: int  # put through the teacher by this process in this call
    seconds: float
    stopped: bool  # by on_milestone, before total_tokens


def train(
    student: PreTrainedModel,
    windows: np.ndarray,
    settings: LoopSettings,
    teacher: Teacher | None,
    *,
    on_milestone: Callable[[Milestone], bool | None] = lambda milestone: None,
    log: Callable[[dict[str, float]], None] = lambda record: None,
    checkpoint_folder: Path | None = None,
    depot: Depot | None = None,
    resume: Path | None = None,
    world_size: int = 1,
    rank: int = 0,
) -> TrainResult:
    """Trains `student`, where it is (its device, in place), on `windows` (n, length) int32.

    `teacher` may be None for the loss `ce`. `on_milestone` is called at every milestone and returns False to
    stop there. `log` gets a record per step, several steps at a time: step, tokens, loss, lm_loss, kl (nats
    per token; kl only with a teacher), learning_rate, gradient_norm, tokens_per_second and intermediate (L_is before
    alpha; only where asked for). `resume` is a checkpoint; `depot` carries them between nodes.

    With `world_size` > 1, called by every process of an initialised torch.distributed group, each of which
    trains on its share of every batch; the loss and its gradient are the mean over the batch. `log` is called on
    rank 0. Under `ddp` rank 0's weights are everyone's; under `fsdp2` all have to bring the same, and `student`
    is left sharded, on the device of the run.

    Raises ValueError where the settings do not fit the windows, the number of processes or the checkpoint,
    and DivergedError when a loss is not finite, or, after the warm-up and 10 steps, is above 3 times the mean
    of the first 10 steps (taken as at least 1 nat).
    """
    length = windows.shape[1]
    batch = math.ceil(settings.batch_tokens / length)
    if batch % world_size:
        valid = math.ceil(batch / world_size) * world_size * length
        raise ValueError(
            f"distillation.batch_tokens: {settings.batch_tokens} is {batch} windows of {length} tokens, "
            f"which {world_size} processes cannot share equally; valid: {valid}"
        )
    assert teacher is not None or not settings.asks_teacher
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    began, shards = time.monotonic(), settings.shards(world_size)
    teacher_tokens_before = teacher.forward_tokens() if teacher else 0
    steps = math.ceil(settings.total_tokens / (batch * length))
    milestones = {math.ceil(tokens / (batch * length)): tokens for tokens in sorted(settings.milestones)}
    checkpoint_steps = math.ceil((settings.checkpoint_tokens or 0) / (batch * length))  # 0: none

    if settings.gradient_checkpointing:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # transformers 6 gives it another name
            student.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        for layer in decoder_layers(student):
            layer.compile(dynamic=False)  # a graph a shape: which one runs does not depend on what ran before
    objective: nn.Module = Objective(student, settings, teacher and teacher.head)
    if world_size > 1:
        objective = parallel.sharded(objective, student) if shards else parallel.replicated(objective)
    device = student.device
    optimizer = make_optimizer(student, settings)
    start, losses = 0, TrainingLog(settings, batch * length, world_size, rank, log)
    corrected = teacher and teacher.correction
    if resume is not None:
        start = checkpoints.load(resume, student, optimizer, settings, losses, corrected)

    def save(folder: Path) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins with the machine's first
        if rank == 0 or shards:
            checkpoints.save(folder, student, optimizer, settings, step, losses, corrected, depot)

    def reach() -> bool:
        """Call back at the milestone of this step; whether to stop there."""
        one = parallel.whole_student(student) if shards else student
        reached = Milestone(milestones[step], step * batch * length, step, one, save)
        eager = torch.compiler.set_stance("force_eager") if settings.compile else nullcontext()
        with eager:  # it is scored in shapes of its own
            ends = on_milestone(reached) is False
        student.train()
        losses.restart_clock()
        return ends and step < steps

    share = batch // world_size
    micro = max(1, min(share, settings.micro_batch_tokens // length))

    def parts(step: int) -> list[np.ndarray]:
        """Windows of each forward pass of this process in the step after `step` steps."""
        indices = stream(settings.seed, len(windows), step * batch + rank * share, share)
        return [indices[at : at + micro] for at in range(0, share, micro)]

    asked = teacher if settings.asks_teacher else None
    coming = feed((part for step in range(start, steps) for part in parts(step)), windows, asked, device)
    step, stopped = start, False
    student.train()
    if step in milestones:  # 0, or that of the checkpoint: whoever was cut off there hears of it again
        stopped = reach()
    while step < steps and not stopped:
        torch.manual_seed(_step_seed(settings.seed, step, rank))  # dropout, where a model has it
        total = torch.zeros(4, device=device)
        left = share
        while left:
            part = next(coming)
            left -= len(part.indices)
            said = part.said
            if asked and said is None:
                said = asked.ask(part.indices, part.tokens)
            with parallel.gradients_kept(objective) if left else nullcontext():
                with _no_packing():
                    loss, means = objective(part.ids, said)
                (loss * (len(part.indices) / share)).backward()
            total += means * (len(part.indices) / share)
        learning_rate = learning_rate_of(settings, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        norm = parallel.whole(nn.utils.clip_grad_norm_(student.parameters(), settings.gradient_clip))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.add(step, total, norm, learning_rate)
        at_milestone = step in milestones
        at_checkpoint = checkpoint_steps > 0 and step % checkpoint_steps == 0
        if at_milestone or at_checkpoint or step == steps or step % settings.log_steps == 0:
            losses.flush()  # before anything of this step is kept: a diverged student is not
        if at_checkpoint and checkpoint_folder is not None:
            save(checkpoint_folder / f"step-{step:08d}")
            if rank == 0 or (depot is not None and parallel.leads_node()):
                checkpoints.keep_newest(checkpoint_folder, depot if rank == 0 else None)
        if at_milestone:
            stopped = reach()
    teacher_tokens = (teacher.forward_tokens() if teacher else 0) - teacher_tokens_before
    seconds = time.monotonic() - began
    return TrainResult(student, step, step * batch * length, losses.last, teacher_tokens, seconds, stopped)


def stream(seed: int, windows: int, start: int, count: int) -> np.ndarray:
    """Indices (count,) of places start..start+count-1 of the endless stream over `windows` windows."""
    places = np.arange(start, start + count)
    epochs = places // windows
    return np.array(
        [_epoch(seed, windows, epoch)[place % windows] for epoch, place in zip(epochs, places, strict=True)]
    )


@lru_cache(maxsize=2)
def _epoch(seed: int, windows: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def _no_packing() -> AbstractContextManager:
    """Every forward pass of transformers asks whether position ids begin anew inside a window, and waits for the
    device to say no: ours never do."""
    return patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def make_optimizer(student: PreTrainedModel, settings: LoopSettings) -> torch.optim.AdamW:
    """Norms and biases do not decay."""
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate_of(settings: LoopSettings, step: int, steps: int) -> float:
    """Of the step after `step` steps: linear warm-up, then constant or a cosine down to the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step + 1 - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    low = settings.min_learning_rate
    return low + (settings.learning_rate - low) * (1 + math.cos(math.pi * progress)) / 2


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed per step, so that no generator's state need be kept to continue a run exactly."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
