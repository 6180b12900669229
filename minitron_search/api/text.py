"""Text to token windows, with the tokenizer of a model."""

import math
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from minitron_search.api.model import Model
from minitron_search.config.types import as_number
from minitron_search.data.corpus import Corpus, load_corpus
from minitron_search.teachers.sources import load_tokenizer

EMBEDDED = "docstrings"


def corpus(
    text: str | Path = EMBEDDED,
    model: "Model | PreTrainedTokenizerBase | str | Path" = "smollm2-135m",
    *,
    length: int = 256,
    calibration: int = 64,
    validation: int = 32,
    tokens: int | str = "64K",
    validation_text: str | Path | None = None,
    seed: int = 0,
) -> Corpus:
    """Return windows of `length` tokens in three parts that share none: `.calibration`, `.train` and `.validation`.

    `text`: a .txt, .jsonl or .parquet file, a glob, a Hub data set, or the embedded text (docstrings). `model`: whose
    tokenizer reads it. `calibration`, `validation`: windows. `tokens`: of the train part, as 64K or 1M, rounded up to
    whole windows. `validation_text`: another text for validation; by default the first windows of `text`.

    Raises ValueError for a text that is missing, unreadable or too short.
    """
    tokenizer = _tokenizer(model)
    train = token_count("tokens", tokens)
    source = str(text)
    return load_corpus(
        source, str(validation_text or source), tokenizer, sequence_length=length, calibration_samples=calibration,
        validation_samples=validation, train_tokens=math.ceil(train / length) * length, seed=seed,
    )  # fmt: skip


def _tokenizer(model: "Model | PreTrainedTokenizerBase | str | Path") -> PreTrainedTokenizerBase:
    if isinstance(model, PreTrainedTokenizerBase):
        return model
    if isinstance(model, Model):
        if model.tokenizer is None:
            raise ValueError(f"model: {model.name} has no tokenizer; valid: load(model, tokenizer=...)")
        return model.tokenizer
    return load_tokenizer(str(model))


def token_count(name: str, value: int | str) -> int:
    """Return a number of tokens, as 64K or 1M. Raises ValueError for what is none."""
    number = as_number(value)
    if not isinstance(number, int | float) or number < 0 or number != int(number):
        raise ValueError(f"{name}: {value!r} is no number of tokens; valid: as in 64K, 1M or 500000")
    return int(number)
