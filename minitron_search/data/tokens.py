"""Turn documents into token ids, joined by the end-of-text token, kept in the cache by content."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from minitron_search.data.coverage import Coverage, coverage, sampled
from minitron_search.data.text_sources import TextSource
from minitron_search.records import cache
from minitron_search.records.cache import content_id

BATCH = 4_000_000  # characters tokenised at once
CUT = 1024  # tokens before a cut in a text that are not trusted to be those of the whole text


@dataclass(frozen=True)
class Tokens:
    """The beginning of a source, or all of it: documents joined by the end-of-text token."""

    ids: np.ndarray  # int32 (tokens,)
    starts: np.ndarray  # int64 (documents,): index in ids of each document's first token
    hashes: np.ndarray  # uint64 (documents,): `_text_hash`
    complete: bool  # the source has no more
    coverage: Coverage | None = None  # None: no text, or in a cache of a version that did not look


def read_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, need: int, without: np.ndarray | None = None
) -> Tokens:
    """Return at least `need` tokens of the source, or all it has, without documents whose hash is in `without`.

    What comes back may be longer: how much of it is used must not depend on what the cache holds.
    """
    end, skip = _end_of_text(tokenizer), set() if without is None else set(without.tolist())
    key = content_id([cache.FORMULA["tokens"], source.id, _tokenizer_id(tokenizer), end, sorted(skip)], digits=16)
    kept = cache.entry("tokens", key, ".npz")
    if (tokens := _kept_tokens(kept, need)) is not None:
        return tokens
    with cache.lock(kept):
        if (tokens := _kept_tokens(kept, need)) is not None:  # made by another process meanwhile
            return tokens
        texts = (text for text in source.documents() if text.strip() and _text_hash(text) not in skip)
        sample: list[str] = []
        tokens = _tokenised(sampled(texts, sample), tokenizer, end, need)
        tokens = replace(tokens, coverage=coverage(sample, tokenizer))
        cache.replace(kept, lambda into: _write_tokens(into, tokens))
    return tokens


def _kept_tokens(path: Path, need: int) -> Tokens | None:
    """Return what the cache holds where that is `need` tokens, or all that the source has."""
    tokens = cache.read_kept(path, _read_tokens)
    return tokens if tokens is not None and (tokens.complete or len(tokens.ids) >= need) else None


def _read_tokens(path: Path) -> Tokens:
    with np.load(path) as arrays:
        coverage = Coverage(*arrays["coverage"].tolist()) if "coverage" in arrays else None
        return Tokens(arrays["ids"], arrays["starts"], arrays["hashes"], bool(arrays["complete"]), coverage)


def _write_tokens(path: Path, tokens: Tokens) -> None:
    with open(path, "wb") as file:  # np.savez gives a path of another suffix its own
        arrays: dict[str, Any] = {name: getattr(tokens, name) for name in ("ids", "starts", "hashes", "complete")}
        if tokens.coverage is not None:
            arrays["coverage"] = np.array(tokens.coverage)
        np.savez(file, **arrays)


def _tokenised(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, end: int, need: int) -> Tokens:
    pieces: list[np.ndarray] = []  # int32 (tokens,)
    starts: list[int] = []
    hashes: list[int] = []
    count, complete = 0, True
    remaining = iter(texts)
    while count < need and (batch := _batch(remaining, need - count)):
        for text, ids in zip(batch, _encoded(batch, tokenizer, need - count), strict=True):
            piece = [end, *ids] if pieces else ids
            starts.append(count + bool(pieces))
            hashes.append(_text_hash(text))
            pieces.append(np.array(piece, np.int32))
            count += len(piece)
    if count >= need:  # enough: whether there is more was not looked at
        complete = False
    stream = np.concatenate([np.empty(0, np.int32), *pieces])
    return Tokens(stream, np.array(starts, np.int64), np.array(hashes, np.uint64), complete)


def _batch(texts: Iterator[str], need: int) -> list[str]:
    """Take the next documents: enough for `need` tokens at 8 characters each, or `BATCH` characters."""
    batch: list[str] = []
    characters = 0
    while characters < min(BATCH, 8 * need) and (text := next(texts, None)) is not None:
        batch.append(text)
        characters += len(text)
    return batch


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase, need: int) -> list[list[int]]:
    if len(texts) > 1:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # One long text: what comes after a cut changes only the tokens just before it, so a beginning is enough.
    # The tokens are those of the text tokenised whole.
    (text,) = texts
    length = 8 * (need + CUT)
    while length < len(text):
        ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"][:-CUT]
        if len(ids) >= need:
            return [ids]
        length *= 2
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _tokenizer_id(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return content_id([type(tokenizer).__name__, content], digits=16)


def _text_hash(text: str) -> int:
    """Return a hash, 64 bits, of the text but for its white space."""
    return int.from_bytes(hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).digest()[:8], "little")


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return `<|endoftext|>` where the tokenizer has it: an instruct model's eos ends a turn, not a text."""
    end = tokenizer.get_added_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if end is None:
        raise ValueError("teacher.model: its tokenizer has neither <|endoftext|> nor eos_token; valid: one that has")
    return end
