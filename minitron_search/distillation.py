"""The training loop of distillation, written once; it is placed elsewhere, and knows nothing of placement.

`L = L_CLM + L_logits`, each switchable (2408.11796, section 2.3). The teacher is a source of final hidden
states, live or cached, and an output head. Same inputs and same thread count give the same numbers, bit for
bit, on a CPU; so does a run continued from a checkpoint.

Order of data: an endless stream of windows, epoch after epoch, each a permutation made from (seed, epoch).
Batch k is the same windows whatever the number of processes, and every run with the same seed reads the same
stream.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from minitron_search.distillation_loss import OutputHead, next_tokens, output_loss
from minitron_search.families import final_hidden, head_scale, head_softcap
from minitron_search.loop_settings import LoopSettings, Precision
from minitron_search.precision import autocast
from minitron_search.teacher_cache import CacheReader, teacher_hidden

DIVERGED = 3.0  # times the mean loss of the first BASELINE_STEPS steps
BASELINE_STEPS = 10
LEAST_BASELINE = 1.0  # nats: a student that begins near its teacher may triple a loss of almost nothing


# What a continued run may change without changing the steps already taken.
FREE_ON_RESUME = {"total_tokens", "milestones", "checkpoint_tokens", "log_steps", "threads"}


class Teacher(NamedTuple):
    """`hidden(indices, tokens)`: windows (n,), their ids (n, length) -> final normed (n, length, hidden).

    `forward_tokens()`: how many tokens it has put through the teacher itself.
    """

    hidden: Callable[[np.ndarray, np.ndarray], Tensor]
    head: OutputHead
    forward_tokens: Callable[[], int]


class Milestone(NamedTuple):
    """Handed to `on_milestone` in every process. `save(folder)` writes a checkpoint, in one process, and may run
    in a thread of its own as long as it ends before `on_milestone` does."""

    tokens: int  # as asked for in LoopSettings.milestones
    tokens_seen: int  # whole batches
    step: int
    student: PreTrainedModel
    save: Callable[[Path], None]


class TrainResult(NamedTuple):
    student: PreTrainedModel
    step: int
    tokens: int
    last_loss: float
    teacher_tokens: int  # put through the teacher by this process in this call
    seconds: float
    stopped: bool  # by on_milestone, before total_tokens


class DivergedError(RuntimeError):
    """The loss is not finite, or too far above where it began."""

    def __init__(self, step: int, value: float, limit: float) -> None:
        super().__init__(f"diverged at step {step}: loss {value:.4g}, limit {limit:.4g}")
        self.step, self.value, self.limit = step, value, limit

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process borders
        return type(self), (self.step, self.value, self.limit)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's head with its family's scale (Granite) and soft-cap (Gemma)."""
    head = model.get_output_embeddings()
    return OutputHead(head.weight, head.bias, head_scale(model.config), head_softcap(model.config))


def live_teacher(model: PreTrainedModel, precision: Precision) -> Teacher:
    """Runs `model` for every batch."""
    counted = [0]

    def hidden(indices: np.ndarray, tokens: np.ndarray) -> Tensor:
        counted[0] += tokens.size
        return teacher_hidden(model, torch.from_numpy(tokens.astype(np.int64)).to(model.device), precision)

    return Teacher(hidden, frozen_head(output_head(model), precision), lambda: counted[0])


def cached_teacher(path: Path, head: OutputHead, precision: Precision) -> Teacher:
    """Reads the cache at `path`; `head` is the teacher's `output_head`."""
    return Teacher(CacheReader(path).hidden, frozen_head(head, precision), lambda: 0)


def frozen_head(head: OutputHead, precision: Precision) -> OutputHead:
    """Without gradients, its weight once and for all in the dtype of the products."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    bias = None if head.bias is None else head.bias.detach().float()
    return head._replace(weight=head.weight.detach().to(dtype), bias=bias)


def train(
    student: PreTrainedModel,
    windows: np.ndarray,
    settings: LoopSettings,
    teacher: Teacher | None,
    *,
    on_milestone: Callable[[Milestone], bool | None] = lambda milestone: None,
    log: Callable[[dict[str, float]], None] = lambda record: None,
    checkpoint_folder: Path | None = None,
    resume: Path | None = None,
    world_size: int = 1,
    rank: int = 0,
) -> TrainResult:
    """Trains `student`, where it is (its device, in place), on `windows` (n, length) int32.

    `teacher` may be None for the loss `ce`. `on_milestone` is called at every milestone and returns False to
    stop there. `log` gets a record per step, several steps at a time: step, tokens, loss, lm_loss, kl (nats
    per token; kl only with a teacher), learning_rate, gradient_norm, tokens_per_second. `resume` is a
    checkpoint.

    With `world_size` > 1, called by every process of an initialised torch.distributed group, each of which
    trains on its share of every batch (DistributedDataParallel); the loss and its gradient are the mean over
    the batch. `log` is called on rank 0.

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
    assert teacher is not None or settings.loss == "ce"
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    began, device = time.monotonic(), student.device
    teacher_tokens_before = teacher.forward_tokens() if teacher else 0
    steps = math.ceil(settings.total_tokens / (batch * length))
    milestones = {math.ceil(tokens / (batch * length)): tokens for tokens in sorted(settings.milestones)}
    checkpoint_steps = math.ceil((settings.checkpoint_tokens or 0) / (batch * length))  # 0: none

    optimizer = _optimizer(student, settings)
    start, losses = 0, _Losses(settings, batch * length, world_size, rank, log)
    if resume is not None:
        start = _load(resume, student, optimizer, settings, losses)
    objective: nn.Module = _Objective(student, settings, teacher and teacher.head)
    if world_size > 1:
        objective = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)

    def save(folder: Path) -> None:
        _save(folder, student, optimizer, settings, step, losses)

    def reach() -> bool:
        """Call back at the milestone of this step; whether to stop there."""
        reached = Milestone(milestones[step], step * batch * length, step, student, save)
        ends = on_milestone(reached) is False
        student.train()
        losses.restart_clock()
        return ends and step < steps

    share = batch // world_size
    micro = max(1, min(share, settings.micro_batch_tokens // length))
    step, stopped = start, False
    student.train()
    if step in milestones:  # 0, or that of the checkpoint: whoever was cut off there hears of it again
        stopped = reach()
    while step < steps and not stopped:
        torch.manual_seed(_step_seed(settings.seed, step, rank))  # dropout, where a model has it
        indices = stream(settings.seed, len(windows), step * batch + rank * share, share)
        parts = [indices[at : at + micro] for at in range(0, share, micro)]
        total = torch.zeros(3, device=device)
        for number, part in enumerate(parts):
            tokens = windows[part]
            hidden = teacher.hidden(part, tokens).to(device) if teacher and settings.loss != "ce" else None
            ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
            last = number == len(parts) - 1
            with nullcontext() if last or world_size == 1 else objective.no_sync():  # type: ignore[operator]
                loss, means = objective(ids, hidden)
                (loss * (len(part) / share)).backward()
            total += means * (len(part) / share)
        learning_rate = _learning_rate(settings, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(student.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.add(step, total, norm, learning_rate)
        at_milestone = step in milestones
        at_checkpoint = checkpoint_steps > 0 and step % checkpoint_steps == 0
        if at_milestone or at_checkpoint or step == steps or step % settings.log_steps == 0:
            losses.flush()  # before anything of this step is kept: a diverged student is not
        if at_checkpoint and checkpoint_folder is not None and rank == 0:
            save(checkpoint_folder / f"step-{step:08d}")
            keep_newest(checkpoint_folder)
        if at_milestone:
            stopped = reach()
    teacher_tokens = (teacher.forward_tokens() if teacher else 0) - teacher_tokens_before
    seconds = time.monotonic() - began
    return TrainResult(student, step, step * batch * length, losses.last, teacher_tokens, seconds, stopped)


def stream(seed: int, windows: int, start: int, count: int) -> np.ndarray:
    """Indices (count,) of places start..start+count-1 of the endless stream over `windows` windows."""
    places = np.arange(start, start + count)
    epochs = places // windows
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(windows) for epoch in np.unique(epochs)}
    return np.array([order[epoch][place % windows] for epoch, place in zip(epochs, places, strict=True)])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint that `train` wrote to `folder`."""
    return max(folder.glob("step-????????"), default=None)


class _Objective(nn.Module):
    """The student's body, head and loss in one forward: DistributedDataParallel then sees every gradient."""

    def __init__(self, student: PreTrainedModel, settings: LoopSettings, teacher_head: OutputHead | None) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        self.teacher_head = teacher_head

    def forward(self, ids: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """(loss, [loss, ce, kl]) of `ids` (n, length), given the teacher's `hidden` (n, length, hidden)."""
        with autocast(self.settings.precision, ids.device):
            states = final_hidden(self.student, ids)
            loss = output_loss(
                self.settings.loss, states.flatten(0, 1), output_head(self.student), next_tokens(ids).flatten(),
                None if hidden is None else hidden.flatten(0, 1), self.teacher_head,
                temperature=self.settings.temperature,
            )  # fmt: skip
        kl = torch.zeros_like(loss.ce) if loss.kl is None else loss.kl
        return loss.loss, torch.stack([loss.loss.detach(), loss.ce, kl])


class _Losses:
    """Losses of the steps since the last flush, kept on the device: reading one would wait for it."""

    def __init__(
        self, settings: LoopSettings, batch_tokens: int, world_size: int, rank: int, log: Callable[..., None]
    ) -> None:
        self.settings, self.batch_tokens, self.world_size, self.rank = (
            settings,
            batch_tokens,
            world_size,
            rank,
        )
        self.log = log
        self.first: list[float] = []  # of the first BASELINE_STEPS steps
        self.last = math.nan
        self.pending: list[tuple[int, Tensor, float]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.monotonic()

    def add(self, step: int, means: Tensor, norm: Tensor, learning_rate: float) -> None:
        self.pending.append((step, torch.cat([means, norm.reshape(1)]), learning_rate))

    def flush(self) -> None:
        """Logs what is pending; raises DivergedError, on every process alike."""
        if not self.pending:
            return
        values = torch.stack([row for _, row, _ in self.pending])
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        rows = values.tolist()  # waits for the device
        speed = len(rows) * self.batch_tokens / max(time.monotonic() - self.clock, 1e-9)
        for (step, _, learning_rate), (loss, ce, kl, norm) in zip(self.pending, rows, strict=True):
            if self.rank == 0:
                record = {
                    "step": step, "tokens": step * self.batch_tokens, "loss": loss, "lm_loss": ce, "kl": kl,
                    "learning_rate": learning_rate, "gradient_norm": norm, "tokens_per_second": speed,
                }  # fmt: skip
                if self.settings.loss == "ce":
                    del record["kl"]
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


def _optimizer(student: PreTrainedModel, settings: LoopSettings) -> torch.optim.AdamW:
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


def _learning_rate(settings: LoopSettings, step: int, steps: int) -> float:
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


def _fixed(settings: LoopSettings) -> dict[str, Any]:
    """The settings that a continued run must share; cosine depends on where it ends."""
    free = FREE_ON_RESUME - ({"total_tokens"} if settings.schedule == "cosine" else set())
    return {key: value for key, value in json.loads(json.dumps(asdict(settings))).items() if key not in free}


def _save(
    folder: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer, settings: LoopSettings,
    step: int, losses: _Losses,
) -> None:  # fmt: skip
    """Appears whole or not at all; one that is there is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # named_parameters lists tied weights once
    weights = {name: p.detach().contiguous() for name, p in student.named_parameters()}
    save_file(weights, partial / "model.safetensors")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    state = {
        "step": step,
        "first_losses": losses.first,
        "last_loss": losses.last,
        "settings": _fixed(settings),
    }
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def _load(
    folder: Path,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    losses: _Losses,
) -> int:
    """Steps already taken. Raises ValueError where `settings` are not those of the checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    for key, value in _fixed(settings).items():
        if state["settings"].get(key) != value:
            raise ValueError(
                f"{key}: {value!r}, but the checkpoint {folder} was trained with "
                f"{state['settings'].get(key)!r}; valid: the same, or a run that begins anew"
            )
    load_weights(folder, student)
    kept = torch.load(folder / "optimizer.pt", map_location=student.device, weights_only=True)
    optimizer.load_state_dict(kept)
    losses.first, losses.last = state["first_losses"], state["last_loss"]
    return int(state["step"])


def load_weights(folder: Path, student: PreTrainedModel) -> None:
    """Put the weights of checkpoint `folder` into `student`."""
    weights = load_file(folder / "model.safetensors", device=str(student.device))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(weights[name])


def keep_newest(folder: Path) -> None:
    for old in sorted(folder.glob("step-????????"))[:-1]:
        shutil.rmtree(old)
