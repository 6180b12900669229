"""Score a model on Winogrande: log-likelihoods of options to accuracy and margin with standard errors."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from minitron_search.data.winogrande_packing import PackedOptions
from minitron_search.models.families import final_hidden
from minitron_search.models.output_head import output_head

HEAD_CHUNK = 512  # positions whose full-vocabulary logits exist at once


def model_inputs(
    packed: PackedOptions, rows: slice, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (input_ids, position_ids, mask) of `rows`.

    Shapes (batch, length), (batch, length) and (batch, 1, length, length); the mask is additive, of `dtype`.
    """
    length = int(packed.row_lengths[rows.start])  # rows are sorted: the first is the longest
    input_ids, position_ids, subtree_end = (
        torch.from_numpy(array[rows, :length]).to(device)
        for array in (packed.input_ids, packed.position_ids, packed.subtree_end)
    )
    columns = torch.arange(length, device=device)
    # Query q sees key k when k comes no later and q is still inside k's subtree: k is q or an ancestor of it.
    sees = (columns[None, :] <= columns[:, None]) & (columns[:, None] < subtree_end[:, None, :])
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
    return input_ids, position_ids, mask[:, None]


def option_log_likelihoods(
    packed: PackedOptions, rows: slice, hidden: Tensor, head: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """Return the log-likelihood (nats) of every option scored in `rows`; 0 for options in other rows, so batches add
    up.

    hidden: (batch, length, hidden_size), the final hidden states of these rows (after the final norm); head:
    (positions, hidden_size) -> logits (positions, vocab). Only positions that predict a scored token go through it. The
    log-softmax is in float32, sums in float64. Returns (2 * n,) float64, options 2i and 2i + 1 being example i's.
    """
    here = (packed.row >= rows.start) & (packed.row < rows.stop)
    length = hidden.shape[1]
    flat = (packed.row[here] - rows.start) * length + packed.column[here]
    # Twins' continuations share positions: each goes through the head once.
    positions, scored = np.unique(flat, return_inverse=True)
    order = np.argsort(scored, kind="stable")
    scored, targets, options = scored[order], packed.target[here][order], packed.option[here][order]
    states = hidden.reshape(-1, hidden.shape[-1])
    values = []
    for start in range(0, len(positions), HEAD_CHUNK):
        chunk = torch.from_numpy(positions[start : start + HEAD_CHUNK]).to(hidden.device)
        logits = head(states[chunk]).float()
        low, high = np.searchsorted(scored, (start, start + HEAD_CHUNK))
        which = torch.from_numpy(scored[low:high] - start).to(hidden.device)
        target = torch.from_numpy(targets[low:high]).to(hidden.device)
        values.append((logits[which, target] - logits.logsumexp(-1)[which]).cpu())
    sums = np.zeros(2 * len(packed.answers))
    np.add.at(sums, options, torch.cat(values).double().numpy())
    return sums


@dataclass(frozen=True)
class WinograndeScore:
    """`accuracy` in 0..1; `margin` in nats: the mean of the right option's log-likelihood minus the wrong one's.

    Standard errors are over the n examples as lm-eval gives them (sample standard deviation / sqrt(n)); the two
    sentences of a twin pair are counted as independent, which they are not. They are nan for n = 1.
    """

    accuracy: float
    accuracy_stderr: float
    margin: float
    margin_stderr: float
    n: int
    log_likelihoods: np.ndarray  # (n, 2) float64


def by_example(log_likelihoods: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (correct, margin) of every example, (n,) each, from log-likelihoods (n, 2) and answers (n,) in {1, 2}.

    correct is 1 or 0; margin, nats, is the right option's log-likelihood minus the wrong one's.
    """
    examples, right = np.arange(len(answers)), answers.astype(np.int64) - 1
    correct = (log_likelihoods.argmax(1) == right).astype(np.float64)  # a tie chooses option 1, as in lm-eval
    return correct, log_likelihoods[examples, right] - log_likelihoods[examples, 1 - right]


def score_from_log_likelihoods(log_likelihoods: np.ndarray, answers: np.ndarray) -> WinograndeScore:
    """Return the score of log-likelihoods (n, 2) against answers (n,) in {1, 2}."""
    n = len(answers)
    correct, margins = by_example(log_likelihoods, answers)

    def stderr(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")

    return WinograndeScore(
        accuracy=float(correct.mean()),
        accuracy_stderr=stderr(correct),
        margin=float(margins.mean()),
        margin_stderr=stderr(margins),
        n=n,
        log_likelihoods=log_likelihoods,
    )


def check_window(config: PretrainedConfig, packed: PackedOptions) -> None:
    """Raise ValueError when the sequences do not fit in the model's sliding window, which the tree mask would
    ignore."""
    window = getattr(config, "sliding_window", None)
    longest = int(packed.position_ids.max()) + 1
    if window is not None and longest > window:
        raise ValueError(
            f"winogrande.shots: an example with its shots is {longest} tokens, beyond the model's sliding "
            f"window of {window}; use fewer shots"
        )


def evaluate(
    model: PreTrainedModel, packed: PackedOptions, precision: str = "float32", batch_tokens: int = 4096
) -> WinograndeScore:
    """Score `model` (float32 weights) on `packed`; `precision` is float32 or bfloat16 (autocast).

    Raises ValueError as `check_window` does.
    """
    check_window(model.config, packed)
    device, was_training = model.device, model.training
    model.eval()
    sums = np.zeros(2 * len(packed.answers))
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for rows in packed.batches(batch_tokens):
            hidden = final_hidden(model, *model_inputs(packed, rows, device, model.dtype))
            sums += option_log_likelihoods(packed, rows, hidden, output_head(model).logits)
    model.train(was_training)
    return score_from_log_likelihoods(sums.reshape(-1, 2), packed.answers)
