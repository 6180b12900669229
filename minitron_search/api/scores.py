"""Scores of a model, each with its standard error and n."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from minitron_search.api.html import table
from minitron_search.api.model import Model, load
from minitron_search.data.winogrande import load_examples
from minitron_search.data.winogrande_packing import pack
from minitron_search.distillation.teacher_cache import teacher_hidden
from minitron_search.evaluation import winogrande as choices
from minitron_search.evaluation.scoring import lm_losses, window_losses
from minitron_search.evaluation.statistics import interval, mean_and_error
from minitron_search.models.device import resolve
from minitron_search.models.output_head import output_head


@dataclass(frozen=True, repr=False)
class Scores:
    """Scores by name, (mean, standard error, n), and the values that they are means of.

    values: lm_loss and kl, nats per token, by window (n,); winogrande_acc, 0 or 1, by question (m,). Errors are over
    windows and questions: the tokens of one window are not independent.
    """

    values: dict[str, np.ndarray]
    means: dict[str, tuple[float, float, int]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "means", {name: mean_and_error(of) for name, of in self.values.items()})

    def __getitem__(self, name: str) -> float:
        """Return the mean of a score. Raises KeyError, with those there are, for one that was not taken."""
        if name not in self.means:
            raise KeyError(f"{name}: not scored; scored: {', '.join(self.means)}")
        return self.means[name][0]

    def against(self, other: "Scores") -> str:
        """Say how much lower or higher the LM loss is than another model's on the same windows, paired, with its 95%
        interval. Raises ValueError for scores of other windows."""
        mine, theirs = self.values["lm_loss"], other.values["lm_loss"]
        if len(mine) != len(theirs) or len(mine) < 2:
            raise ValueError(f"other: {len(theirs)} windows against {len(mine)}; valid: scores of the same windows, of "
                             "which there are two or more")  # fmt: skip
        difference = mine - theirs
        low, high = interval(difference)
        return f"LM loss {difference.mean():+.4f} nats per token (95% {low:+.4f} to {high:+.4f}, n = {len(mine)})"

    def __repr__(self) -> str:
        told = [f"{name} {mean:.4f} +- {error:.4f} (n = {n})" for name, (mean, error, n) in self.means.items()]
        return ", ".join(told)

    def _repr_html_(self) -> str:
        rows = [(name, f"{mean:.4f}", f"{error:.4f}", n) for name, (mean, error, n) in self.means.items()]
        return table(("score", "mean", "standard error", "n"), rows)


def score(
    model: "Model | PreTrainedModel | str | Path",
    windows: np.ndarray,
    teacher: "Model | PreTrainedModel | str | Path | None" = None,
    *,
    winogrande: str | Path | None = None,
    limit: int | None = None,
    precision: str = "auto",
) -> Scores:
    """Return the LM loss of `windows` (n, length), the KL to a teacher where one is given, and Winogrande's accuracy.

    `winogrande`: embedded, or a .jsonl file of questions; `limit`: how many of them. Log-likelihoods are as lm-eval
    computes them.

    Raises ValueError for questions that cannot be read, and for a model without the tokenizer that they need.
    """
    scored, resolved = load(model), resolve(precision)
    if teacher is None:
        values = {"lm_loss": lm_losses(scored.model, windows, resolved)}
    else:
        taught = load(teacher).model
        hidden = torch.cat([
            teacher_hidden(taught, torch.from_numpy(window[None].astype(np.int64)).to(taught.device), resolved).cpu()
            for window in windows
        ])  # fmt: skip
        head = output_head(taught).frozen(resolved)
        ce, kl = window_losses(scored.model, windows, hidden, head, resolved)
        values = {"lm_loss": ce, "kl": kl}
    if winogrande is not None:
        values["winogrande_acc"] = _winogrande(scored, str(winogrande), limit, resolved)
    return Scores(values)


def _winogrande(scored: Model, source: str, limit: int | None, precision: str) -> np.ndarray:
    if scored.tokenizer is None:
        raise ValueError(f"winogrande: {scored.name} has no tokenizer; valid: load(model, tokenizer=...)")
    examples = load_examples(source, limit)
    longest = getattr(scored.config, "max_position_embeddings", 2048)
    packed = pack(examples, scored.tokenizer, 0, max_length=longest, vocab_size=scored.config.vocab_size)
    choices.check_window(scored.config, packed)
    found = choices.evaluate(scored.model, packed, precision)
    correct, _ = choices.by_example(found.log_likelihoods, packed.answers)
    return np.asarray(correct, float)
