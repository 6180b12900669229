"""Pack text into token windows: disjoint calibration, train and validation.

Documents (`text_sources.py`) are joined by the end-of-text token and cut into windows that do not overlap; the last,
incomplete one is dropped. What a tokenizer puts before a text by itself (Gemma's BOS, without which those models
collapse; a language tag) begins every window, which is then that and the rest of its L tokens of text; no other special
token is inserted, and no EOS at the end.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from minitron_search.data.coverage import check_expressible
from minitron_search.data.text_sources import TextSource, text_source
from minitron_search.data.tokens import Tokens, read_tokens
from minitron_search.records.cache import content_id

Windows = np.ndarray  # int32 (count, sequence_length)
RANDOM = "random"  # a source of calibration windows: uniform random tokens


@dataclass(frozen=True)
class Corpus:
    calibration: Windows  # (calibration_samples, sequence_length)
    train: Windows  # (train_tokens / sequence_length, rounded up, sequence_length)
    validation: Windows  # (validation_samples, sequence_length)
    id: str  # content id of the three arrays

    def __repr__(self) -> str:
        parts = (f"{name} {len(getattr(self, name)):,}" for name in ("calibration", "train", "validation"))
        return f"windows of {self.train.shape[1]} tokens: {', '.join(parts)}"


def load_corpus(
    train: str,
    validation: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    calibration_samples: int,
    validation_samples: int,
    train_tokens: int,
    seed: int,
    calibration: str | None = None,
    vocab_size: int | None = None,
) -> Corpus:
    """Return the windows that a run reads; the three parts share none.

    Validation is the first `validation_samples` windows of its source in order. From the train source,
    without the validation windows when it is the same text and without every document that validation holds
    when it is another, come the windows of calibration (drawn at random by `seed`) and of training (the
    others, in order).

    `calibration`: another source for the calibration windows, the first that it has outside validation, or `random`
    for uniform random tokens by `seed`, of those below `vocab_size` (the rows of the embedding; None: all of the
    tokenizer's); the train windows stay the same.

    `train_tokens`: tokens training reads at the most, rounded up to whole windows. Token ids are cached by
    content. Raises ValueError, naming `corpus.train`, `corpus.validation` or `corpus.calibration`, for a source that
    is missing, unreadable or too short.
    """
    cutter = _Cutter(tokenizer, sequence_length)
    train_windows = math.ceil(train_tokens / sequence_length)
    needed = calibration_samples + train_windows
    validation_source, train_source = text_source("corpus.validation", validation), text_source("corpus.train", train)
    same = validation_source.id == train_source.id

    tokens = cutter.tokens("corpus.validation", validation_source, validation_samples + (needed if same else 0))
    windows = cutter.windows(tokens)
    if len(windows) < validation_samples:
        raise ValueError(
            f"corpus.validation: {validation!r} has {len(windows)} windows of {sequence_length} tokens and "
            f"{validation_samples} were asked for; valid: a longer text, or a smaller corpus.validation_samples"
        )
    held_out = tokens.hashes[tokens.starts < cutter.step * validation_samples]
    if same:
        pool = windows[validation_samples : validation_samples + needed]
    else:
        pool = cutter.windows(cutter.tokens("corpus.train", train_source, needed, held_out))[:needed]
    if len(pool) < needed:
        raise ValueError(
            f"corpus.train: {train!r} has, outside validation, {len(pool)} windows of {sequence_length} "
            f"tokens and {needed} were asked for ({calibration_samples} calibration, {train_windows} train); "
            "valid: a longer text, fewer tokens to train on, or a smaller corpus.calibration_samples"
        )
    drawn = np.zeros(needed, bool)
    drawn[np.random.default_rng(seed).choice(needed, calibration_samples, replace=False)] = True
    calibrated = pool[drawn]
    if calibration == RANDOM:
        random = np.random.default_rng(seed)
        tokens_drawn = min(len(tokenizer), vocab_size or len(tokenizer))
        calibrated = random.integers(tokens_drawn, size=calibrated.shape, dtype=calibrated.dtype)
    elif calibration is not None:
        calibrated = _other_calibration(cutter, calibration, calibration_samples, held_out)
    parts = calibrated, pool[~drawn], windows[:validation_samples]
    return Corpus(*parts, id=_corpus_id(parts))


def _other_calibration(cutter: "_Cutter", name: str, samples: int, held_out: np.ndarray) -> Windows:
    """Return the first `samples` windows of a source of their own, without the documents in `held_out`."""
    field = "corpus.calibration"
    windows = cutter.windows(cutter.tokens(field, text_source(field, name), samples, held_out))[:samples]
    if len(windows) < samples:
        raise ValueError(
            f"corpus.calibration: {name!r} has, outside validation, {len(windows)} windows of {cutter.length} tokens "
            f"and {samples} were asked for; valid: a longer text, or a smaller corpus.calibration_samples"
        )
    return windows


class _Cutter:
    """Cuts tokens into windows of `length`, of which the last `step` are text and the first what a text begins with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        self.tokenizer, self.length, self.prefix = tokenizer, length, prefix(tokenizer)
        self.step = length - len(self.prefix)
        if self.step < 2:
            raise ValueError(
                f"corpus.sequence_length: {length} leaves no text after the {len(self.prefix)} tokens that this "
                f"tokenizer puts before any; valid: at least {len(self.prefix) + 2}"
            )

    def tokens(self, field: str, source: TextSource, windows: int, without: np.ndarray | None = None) -> Tokens:
        tokens = read_tokens(source, self.tokenizer, self.step * windows, without)
        check_expressible(field, tokens.coverage, self.tokenizer)
        return tokens

    def windows(self, tokens: Tokens) -> Windows:
        count = len(tokens.ids) // self.step
        windows = tokens.ids[: count * self.step].reshape(count, self.step)
        return (
            np.hstack([np.tile(np.array(self.prefix, windows.dtype), (count, 1)), windows]) if self.prefix else windows
        )


def _corpus_id(parts: Iterable[np.ndarray]) -> str:
    """Return the content id of the windows: the same as ever, since environment.json and teacher caches hold it."""
    hashes = (hashlib.sha256(f"{part.shape}".encode() + part.tobytes()).digest() for part in parts)
    return content_id(b"".join(hashes), digits=16)


def prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that this tokenizer puts before a text by itself: what comes before those of the text alone."""
    for text in ("a", "1", ".", "the"):  # one that it has tokens for
        alone, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        if alone:
            begins = range(len(whole) - len(alone) + 1)
            return next((whole[:start] for start in begins if whole[start : start + len(alone)] == alone), [])
    return []
