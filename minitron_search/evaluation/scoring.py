"""Score a model: LM loss, KL to the teacher, Winogrande; each with its standard error and n."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from minitron_search.data.winogrande_packing import PackedOptions
from minitron_search.evaluation import winogrande as evaluation_winogrande
from minitron_search.evaluation.statistics import standard_error
from minitron_search.losses.output_loss import next_tokens, token_losses
from minitron_search.models.device import autocast
from minitron_search.models.families import final_hidden
from minitron_search.models.output_head import OutputHead, output_head

ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Score:
    """One model's scores; its fields are the columns `records.metrics.score_columns()` of `trials.parquet`.

    Losses are in nats per token, with standard errors over windows (the tokens of one window are not independent);
    Winogrande's errors are over examples.
    """

    lm_loss: float
    lm_loss_stderr: float
    lm_loss_n: int
    kl: float
    kl_stderr: float
    winogrande_acc: float
    winogrande_acc_stderr: float
    winogrande_margin: float
    winogrande_margin_stderr: float
    winogrande_n: int


class Scored(NamedTuple):
    """A score with its single values, by which two models are compared pair by pair: `by_window` and `kl_by_window`
    (n,), LM loss and KL of every validation window; `correct` (m,), 0 or 1, and `margin` (m,), nats, of every
    Winogrande example."""

    score: Score
    by_window: np.ndarray
    kl_by_window: np.ndarray
    correct: np.ndarray
    margin: np.ndarray


def score(
    model: PreTrainedModel,
    windows: np.ndarray,
    teacher_hidden: torch.Tensor,
    teacher_head: OutputHead,
    packed: PackedOptions,
    precision: str,
) -> Scored:
    """Score `model` on validation `windows` (n, length) and on the packed Winogrande options.

    `teacher_hidden` (n, length, teacher's hidden_size): the teacher's final hidden states of the same windows.
    LM loss is over the length - 1 next tokens of every window, KL over all positions.
    """
    ce, kl = window_losses(model, windows, teacher_hidden, teacher_head, precision)
    choices = evaluation_winogrande.evaluate(model, packed, precision)
    scores = Score(
        lm_loss=float(ce.mean()),
        lm_loss_stderr=standard_error(ce),
        lm_loss_n=len(windows),
        kl=float(kl.mean()),
        kl_stderr=standard_error(kl),
        winogrande_acc=choices.accuracy,
        winogrande_acc_stderr=choices.accuracy_stderr,
        winogrande_margin=choices.margin,
        winogrande_margin_stderr=choices.margin_stderr,
        winogrande_n=choices.n,
    )
    return Scored(scores, ce, kl, *evaluation_winogrande.by_example(choices.log_likelihoods, packed.answers))


def window_losses(
    model: PreTrainedModel,
    windows: np.ndarray,
    teacher_hidden: torch.Tensor,
    teacher_head: OutputHead,
    precision: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean LM loss and the mean KL of every window, (n,) float64 each; arguments as in `score`."""
    losses: list[np.ndarray] = []
    divergences: list[np.ndarray] = []
    head = output_head(model)
    with torch.inference_mode(), autocast(precision, model.device):
        for first in range(0, len(windows), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            ids = torch.from_numpy(windows[rows].astype(np.int64)).to(model.device)
            student = final_hidden(model, ids).flatten(0, 1)
            teacher = teacher_hidden[rows].to(model.device, student.dtype).flatten(0, 1)
            per_token = token_losses(student, head, next_tokens(ids).flatten(), teacher, teacher_head)
            assert per_token.kl is not None
            losses.append(per_token.ce.view_as(ids)[:, :-1].double().mean(1).cpu().numpy())
            divergences.append(per_token.kl.view_as(ids).double().mean(1).cpu().numpy())
    return np.concatenate(losses), np.concatenate(divergences)


def lm_losses(model: PreTrainedModel, windows: np.ndarray, precision: str) -> np.ndarray:
    """Return the mean LM loss of every window, (n,) float64, nats per token, of `windows` (n, length)."""
    losses, head = [], output_head(model)
    with torch.inference_mode(), autocast(precision, model.device):
        for first in range(0, len(windows), ROWS_AT_ONCE):
            ids = torch.from_numpy(windows[first : first + ROWS_AT_ONCE].astype(np.int64)).to(model.device)
            hidden = final_hidden(model, ids).flatten(0, 1)
            ce = token_losses(hidden, head, next_tokens(ids).flatten()).ce
            losses.append(ce.view_as(ids)[:, :-1].double().mean(1).cpu().numpy())
    return np.concatenate(losses)


def throughput(model: PreTrainedModel, windows: np.ndarray, precision: str, repeats: int) -> tuple[float, float]:
    """Return the tokens per second of a forward pass over a window, all logits of every position, and its standard
    error over `repeats` windows; one more, the first, warms up."""
    ids = torch.from_numpy(windows.astype(np.int64)).to(model.device)
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    seconds = []
    with torch.inference_mode(), autocast(precision, model.device):
        for repeat in range(-1, repeats):
            wait()
            began = time.perf_counter()
            model(ids[repeat % len(ids)][None], use_cache=False)
            wait()
            seconds.append(time.perf_counter() - began)
    timed = np.array(seconds[1:])
    speed = ids.shape[1] / timed.mean()
    return float(speed), float(speed * standard_error(timed) / timed.mean())
