"""The training loop of distillation, written once; it is placed elsewhere, and knows nothing of placement.

`L = L_CLM + L_logits + alpha * L_is`, each switchable (2408.11796, section 2.3). The teacher is a source of hidden
states, live or cached, and an output head. The same inputs and thread count give the same numbers, bit for bit, on a
CPU; so does a run continued from a checkpoint.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minitron_search.distillation import parallel
from minitron_search.distillation.batches import BatchPlan, batch_plan
from minitron_search.distillation.checkpoints import CheckpointFolder, TrainingState, load_checkpoint, save_checkpoint
from minitron_search.distillation.objective import Objective
from minitron_search.distillation.parallel import Processes
from minitron_search.distillation.prefetch import MicroBatch, prefetch
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher import TeacherSource
from minitron_search.distillation.training_log import TrainingLog
from minitron_search.models.families import decoder_layers
from minitron_search.models.patches import recompute_activations, windows_are_not_packed


class Milestone(NamedTuple):
    """The argument of `on_milestone`, in every process.

    Every process calls `save(folder)`, which writes a checkpoint, or none does; it may run in a thread of its own as
    long as it ends before `on_milestone` does.
    """

    tokens: int  # as asked for in LoopSettings.milestones
    tokens_seen: int  # whole batches
    step: int
    student: PreTrainedModel | None  # gathered; of a sharded one a copy in the first process, None in the others
    save: Callable[[Path], None]


class TrainResult(NamedTuple):
    """What `train` returns; `student` is the one that it was given."""

    student: PreTrainedModel
    step: int
    tokens: int
    last_loss: float
    teacher_tokens: int  # put through the teacher by this process in this call
    seconds: float
    stopped: bool  # by on_milestone, before total_tokens


@windows_are_not_packed()
def train(
    student: PreTrainedModel,
    windows: np.ndarray,
    settings: LoopSettings,
    teacher: TeacherSource | None,
    *,
    on_milestone: Callable[[Milestone], bool | None] = lambda milestone: None,
    log: Callable[[dict[str, float]], None] = lambda record: None,
    checkpoints: CheckpointFolder | None = None,
    resume: Path | None = None,
    processes: Processes = parallel.ALONE,
) -> TrainResult:
    """Train `student`, where it is (its device, in place), on `windows` (n, length) int32.

    `teacher` may be None for the loss `ce`. `on_milestone` is called at every milestone and returns False to
    stop there. `log` gets a record per step, several steps at a time: step, tokens, loss, lm_loss, kl (nats
    per token; kl only with a teacher), learning_rate, gradient_norm, tokens_per_second and intermediate (L_is before
    alpha; only where asked for). `checkpoints` takes one every `checkpoint_tokens`; `resume` is one to go on from.

    With several `processes`, called by every one of an initialised torch.distributed group, each of which
    trains on its share of every batch; the loss and its gradient are the mean over the batch. `log` is called on
    rank 0. Under `ddp` rank 0's weights are everyone's; under `fsdp2` all have to bring the same, and `student`
    is left sharded, on the device of the run.

    Raises ValueError where the settings do not fit the windows, the number of processes or the checkpoint;
    DamagedError, before a step is taken, where the checkpoint cannot be read; and DivergedError when a loss is not
    finite, or, after the warm-up and 10 steps, is above 3 times the mean of the first 10 steps (taken as at least 1
    nat).
    """
    plan = batch_plan(settings, windows.shape[1], processes.world_size)
    assert teacher is not None or not settings.asks_teacher
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    began, asked_before = time.monotonic(), teacher.forward_tokens() if teacher else 0

    objective = _objective(student, settings, teacher, processes.world_size)
    losses = TrainingLog(settings, plan.batch_tokens, processes, log)
    state = TrainingState(student, make_optimizer(student, settings), settings, losses, teacher and teacher.correction)
    start = 0 if resume is None else load_checkpoint(resume, state)
    training = _Training(objective, state, plan, processes, checkpoints, on_milestone, start)
    stopped = training.run(windows, teacher if settings.asks_teacher else None)

    asked = teacher.forward_tokens() - asked_before if teacher else 0
    seconds = time.monotonic() - began
    return TrainResult(student, training.step, training.step * plan.batch_tokens, losses.last, asked, seconds, stopped)


@dataclass
class _Training:
    """The steps of a training in one process. `step` counts those taken."""

    objective: nn.Module
    state: TrainingState
    plan: BatchPlan
    processes: Processes
    checkpoints: CheckpointFolder | None
    on_milestone: Callable[[Milestone], bool | None]
    step: int

    def __post_init__(self) -> None:
        self.student, self.settings = self.state.student, self.state.settings
        self.device = self.student.device
        self.shards = self.settings.shards(self.processes.world_size)

    def run(self, windows: np.ndarray, teacher: TeacherSource | None) -> bool:
        """Take every step that is left; return whether `on_milestone` stopped the training before the last."""
        micro_batches = prefetch(self._indices(len(windows)), windows, teacher, self.device)
        self.student.train()
        # at the start this is 0 or the checkpoint's step: a training that was killed there calls back again
        if self._at_milestone and self._reach_milestone():
            return True
        while self.step < self.plan.steps:
            means = self._accumulate_gradients(micro_batches, teacher)
            self._update_weights(means)
            self._flush_log()
            self._write_checkpoint()
            if self._at_milestone and self._reach_milestone():
                return True
        return False

    def _indices(self, windows: int) -> Iterator[np.ndarray]:
        """Yield the window indices (n,) of every forward pass to come, in order."""
        for step in range(self.step, self.plan.steps):
            yield from self.plan.micro_batches(self.settings.seed, windows, step, self.processes.rank)

    def _accumulate_gradients(self, micro_batches: Iterator[MicroBatch], teacher: TeacherSource | None) -> Tensor:
        """Run this process's share of a batch forward and backward; return its mean [loss, ce, kl, intermediate]."""
        torch.manual_seed(_step_seed(self.settings.seed, self.step, self.processes.rank))  # of dropout, if any
        total = torch.zeros(4, device=self.device)
        left = self.plan.share
        while left:
            batch = next(micro_batches)
            left -= len(batch.indices)
            weight = len(batch.indices) / self.plan.share
            teacher_batch = batch.teacher
            if teacher is not None and teacher_batch is None:
                teacher_batch = teacher.ask(batch.indices, batch.tokens)
            with parallel.gradients_kept(self.objective) if left else nullcontext():
                loss, means = self.objective(batch.ids, teacher_batch)
                (loss * weight).backward()
            total += means * weight
        return total

    def _update_weights(self, means: Tensor) -> None:
        learning_rate, optimizer = learning_rate_of(self.settings, self.step, self.plan.steps), self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.gradient_clip)
        norm = parallel.gathered(norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.state.losses.add(self.step, means, norm, learning_rate)

    @property
    def _at_milestone(self) -> bool:
        return self.step in self.plan.milestones

    @property
    def _at_checkpoint(self) -> bool:
        return self.plan.checkpoint_steps > 0 and self.step % self.plan.checkpoint_steps == 0

    def _flush_log(self) -> None:
        """Log before anything of this step is kept: a diverged student is not."""
        regular = self.step == self.plan.steps or self.step % self.settings.log_steps == 0
        if self._at_milestone or self._at_checkpoint or regular:
            self.state.losses.flush()

    def _write_checkpoint(self) -> None:
        if self._at_checkpoint and self.checkpoints is not None:
            self._save(self.checkpoints.at(self.step))
            self.checkpoints.keep_newest(self.processes.rank)

    def _save(self, folder: Path) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread begins with the machine's first
        if self.processes.rank == 0 or self.shards:
            kept = self.checkpoints or CheckpointFolder(folder.parent)
            save_checkpoint(folder, self.state, self.step, kept.transfer, kept.files)

    def _reach_milestone(self) -> bool:
        """Call back at the milestone of this step; return whether to stop before the last step."""
        milestone = Milestone(
            tokens=self.plan.milestones[self.step],
            tokens_seen=self.step * self.plan.batch_tokens,
            step=self.step,
            student=parallel.gathered_student(self.student) if self.shards else self.student,
            save=self._save,
        )
        # a compiled student is scored eagerly: scoring has shapes of its own
        with torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext():
            stops = self.on_milestone(milestone) is False
        self.student.train()
        self.state.losses.restart_clock()
        return stops and self.step < self.plan.steps


def _objective(
    student: PreTrainedModel, settings: LoopSettings, teacher: TeacherSource | None, world_size: int
) -> nn.Module:
    """Return the objective, its student checkpointed, compiled and spread over processes as the settings say."""
    if settings.gradient_checkpointing:
        recompute_activations(student)
    if settings.compile:
        for layer in decoder_layers(student):
            layer.compile(dynamic=False)  # a graph a shape: which one runs does not depend on what ran before
    objective: nn.Module = Objective(student, settings, teacher and teacher.head)
    if world_size == 1:
        return objective
    if settings.shards(world_size):
        return parallel.sharded(objective, student)
    return parallel.replicated(objective)


def make_optimizer(student: PreTrainedModel, settings: LoopSettings) -> torch.optim.AdamW:
    """Return AdamW over all parameters; norms and biases do not decay."""
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
    """Return the rate of the step after `step` steps: linear warm-up, then constant or a cosine to the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step + 1 - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    low = settings.min_learning_rate
    return low + (settings.learning_rate - low) * (1 + math.cos(math.pi * progress)) / 2


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed for one step: no generator's state need be kept to continue a run exactly."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
