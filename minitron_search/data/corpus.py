"""Text -> packed token windows; disjoint calibration, train and validation.

A source is one of
    docstrings                      the embedded text
    a.txt, b.jsonl, c.parquet, d/*  a file or a glob: a .txt is one document, tokenised whole; a .jsonl has
                                    one per line (field `text`), a .parquet one per row (column `text`)
    owner/name[/config][:split]     a Hub data set, column `text`, split `train` unless named; streamed
Documents are joined by the end-of-text token and cut into windows that do not overlap; the last, incomplete
one is dropped. A tokenizer that puts BOS before a text by itself (Gemma's does; without it those models
collapse) gets windows of BOS and L-1 tokens; otherwise no special token is inserted.
"""

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from minitron_search.data.docstrings import documents as docstring_documents
from minitron_search.models.sources import file_hash, near_names
from minitron_search.records.paths import cache_folder

Windows = np.ndarray  # int32 (count, sequence_length)
HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
VALID = "'docstrings', a .txt, .jsonl or .parquet file or glob, or a Hub data set as owner/name[/config][:split]"
RANDOM = "random"  # a source of calibration windows: uniform random tokens
BATCH = 4_000_000  # characters tokenised at once
CUT = 1024  # tokens before a cut in a text that are not trusted to be those of the whole text


@dataclass(frozen=True)
class Corpus:
    calibration: Windows  # (calibration_samples, sequence_length)
    train: Windows  # (train windows asked, sequence_length)
    validation: Windows  # (validation_samples, sequence_length)
    id: str  # content id of the three arrays


@dataclass(frozen=True)
class _Source:
    id: str  # of the content: two names of the same text have one id
    documents: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class _Tokens:
    """The beginning of a source, or all of it: documents joined by the end-of-text token."""

    ids: np.ndarray  # int32 (tokens,)
    starts: np.ndarray  # int64 (documents,): index in ids of each document's first token
    hashes: np.ndarray  # uint64 (documents,): `_text_hash`
    complete: bool  # the source has no more


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
) -> Corpus:
    """Validation is the first `validation_samples` windows of its source in order. From the train source,
    without the validation windows when it is the same text and without every document that validation holds
    when it is another, come the windows of calibration (drawn at random by `seed`) and of training (the
    others, in order).

    `calibration`: another source for the calibration windows, the first that it has outside validation, or `random`
    for uniform random tokens by `seed`; the train windows stay the same.

    `train_tokens`: tokens training reads at the most, rounded up to whole windows. Token ids are cached by
    content. Raises ValueError, naming `corpus.train`, `corpus.validation` or `corpus.calibration`, for a source that
    is missing, unreadable or too short.
    """
    bos = _bos(tokenizer)
    step = sequence_length - (bos is not None)
    train_windows = math.ceil(train_tokens / sequence_length)
    asked = calibration_samples + train_windows
    held_source, train_source = _source("corpus.validation", validation), _source("corpus.train", train)
    same = held_source.id == train_source.id

    held_tokens = _tokens(held_source, tokenizer, step * (validation_samples + (asked if same else 0)))
    held = _windows(held_tokens, sequence_length, bos)
    if len(held) < validation_samples:
        raise ValueError(
            f"corpus.validation: {validation!r} has {len(held)} windows of {sequence_length} tokens and "
            f"{validation_samples} were asked; valid: a longer text, or a smaller corpus.validation_samples"
        )
    seen = held_tokens.hashes[held_tokens.starts < step * validation_samples]
    if same:
        pool = held[validation_samples : validation_samples + asked]
    else:
        pool = _windows(_tokens(train_source, tokenizer, step * asked, seen), sequence_length, bos)[:asked]
    if len(pool) < asked:
        raise ValueError(
            f"corpus.train: {train!r} has, outside validation, {len(pool)} windows of {sequence_length} "
            f"tokens and {asked} were asked ({calibration_samples} calibration, {train_windows} train); "
            "valid: a longer text, fewer tokens to train on, or a smaller corpus.calibration_samples"
        )
    drawn = np.zeros(asked, bool)
    drawn[np.random.default_rng(seed).choice(asked, calibration_samples, replace=False)] = True
    parts = pool[drawn], pool[~drawn], held[:validation_samples]
    if calibration == RANDOM:
        tokens = np.random.default_rng(seed).integers(len(tokenizer), size=parts[0].shape, dtype=parts[0].dtype)
        parts = tokens, *parts[1:]
    elif calibration is not None:
        found = _tokens(_source("corpus.calibration", calibration), tokenizer, step * calibration_samples, seen)
        windows = _windows(found, sequence_length, bos)[:calibration_samples]
        if len(windows) < calibration_samples:
            raise ValueError(
                f"corpus.calibration: {calibration!r} has, outside validation, {len(windows)} windows of "
                f"{sequence_length} tokens and {calibration_samples} were asked; valid: a longer text, or a smaller "
                "corpus.calibration_samples"
            )
        parts = windows, *parts[1:]
    return Corpus(*parts, id=_digest(*(f"{part.shape}".encode() + part.tobytes() for part in parts)))


def _windows(tokens: _Tokens, sequence_length: int, bos: int | None) -> Windows:
    step = sequence_length - (bos is not None)
    count = len(tokens.ids) // step
    windows = tokens.ids[: count * step].reshape(count, step)
    return windows if bos is None else np.insert(windows, 0, bos, axis=1)


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token this tokenizer puts before a text by itself, if it does."""
    first = tokenizer("a")["input_ids"][0]
    return first if first == tokenizer.bos_token_id else None


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """`<|endoftext|>` where the tokenizer has it: an instruct model's eos ends a turn, not a text."""
    end = tokenizer.get_added_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if end is None:
        raise ValueError("teacher.model: its tokenizer has neither <|endoftext|> nor eos_token; valid: one that has")
    return end


# Tokens


def _tokens(
    source: _Source, tokenizer: PreTrainedTokenizerBase, need: int, without: np.ndarray | None = None
) -> _Tokens:
    """At least `need` tokens of the source, or all it has, leaving out documents whose hash is in `without`.

    What comes back may be longer: how much of it is used must not depend on what the cache holds.
    """
    end, skip = _end_of_text(tokenizer), set() if without is None else set(without.tolist())
    # This file's own source is part of the key: tokens made by other rules are other tokens.
    key = _digest(source.id, _tokenizer_id(tokenizer), end, sorted(skip), Path(__file__).read_bytes())
    cached = cache_folder() / "tokens" / f"{key}.npz"
    if cached.exists():
        with np.load(cached) as arrays:
            tokens = _Tokens(arrays["ids"], arrays["starts"], arrays["hashes"], bool(arrays["complete"]))
        if tokens.complete or len(tokens.ids) >= need:
            return tokens
    texts = (text for text in source.documents() if text.strip() and _text_hash(text) not in skip)
    tokens = _tokenised(texts, tokenizer, end, need)
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_name(f".{key}.{os.getpid()}.npz")
    np.savez(temporary, ids=tokens.ids, starts=tokens.starts, hashes=tokens.hashes, complete=tokens.complete)
    os.replace(temporary, cached)
    return tokens


def _tokenised(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, end: int, need: int) -> _Tokens:
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
    return _Tokens(stream, np.array(starts, np.int64), np.array(hashes, np.uint64), complete)


def _batch(texts: Iterator[str], need: int) -> list[str]:
    """The next documents: enough for `need` tokens at 8 characters each, or `BATCH` characters."""
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
    return _digest(type(tokenizer).__name__, content)


def _text_hash(text: str) -> int:
    """Of the text but for its white space; 64 bits."""
    return int.from_bytes(hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).digest()[:8], "little")


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part if isinstance(part, bytes) else repr(part).encode()).digest())
    return digest.hexdigest()[:16]


# Sources


def _source(field: str, name: str) -> _Source:
    if name == "docstrings":
        texts = docstring_documents()
        return _Source(_digest(texts), lambda: texts)
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or path.suffix in READERS or path.exists()
    if local or glob.has_magic(name):
        return _files(field, name)
    if match := HUB_NAME.fullmatch(name):
        return _hub(field, name, match["path"], match["config"], match["split"] or "train")
    raise ValueError(f"{field}: {name!r} is no file here{near_names(path)}; valid: {VALID}")


def _files(field: str, name: str) -> _Source:
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"{field}: {name!r} is a folder; valid: a glob of its files, as in {name.rstrip('/')}/*.txt")
    paths = [path]
    if not path.exists():
        if not glob.has_magic(name):
            raise ValueError(f"{field}: {name!r} does not exist{near_names(path)}; valid: {VALID}")
        paths = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
        if not paths:
            raise ValueError(f"{field}: {name!r} matches no file; valid: {VALID}")
    for path in paths:
        if path.suffix not in READERS:
            raise ValueError(f"{field}: {str(path)!r} is none of {', '.join(READERS)}; valid: {VALID}")
    return _Source(
        _digest(*((path.suffix, file_hash(path)) for path in paths)),
        lambda: (text for path in paths for text in READERS[path.suffix](field, path)),
    )


def _txt(field: str, path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: {str(path)!r} is not UTF-8 at byte {error.start}; valid: UTF-8 text") from error


def _jsonl(field: str, path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _text(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{field}: {str(path)!r}, line {number}: {line[:60]!r} is no object with a text; "
                    'valid: {"text": "..."}'
                ) from error


def _parquet(field: str, path: Path) -> Iterator[str]:
    try:
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise ValueError(f"it has the columns {', '.join(columns)}")
        for batch in file.iter_batches(columns=["text"]):
            for row in batch.to_pylist():
                if row["text"] is not None:
                    yield _text(row)
    except (ValueError, TypeError, OSError) as error:  # pyarrow's own errors are ValueError or OSError
        raise ValueError(f"{field}: {str(path)!r} is no parquet file with a string column `text` ({error})") from error


READERS: dict[str, Callable[[str, Path], Iterator[str]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def _text(row: Any) -> str:
    """Raises KeyError or TypeError where there is no text."""
    if not isinstance(row["text"], str):
        raise TypeError(f"`text` is {type(row['text']).__name__}")
    return row["text"]


def _hub(field: str, name: str, path: str, config: str | None, split: str) -> _Source:
    import datasets  # takes a second: only for who uses the Hub
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    try:
        builder = datasets.load_dataset_builder(path, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        raise ValueError(
            f"{field}: {name!r} is no file here, and the Hub did not give it ({str(error).splitlines()[0]}); "
            f"valid: {VALID}"
        ) from error

    def rows() -> Iterator[str]:
        try:
            # Streaming reads the Hub: without it, what is in the datasets cache has to do.
            stream = datasets.load_dataset(path, config, split=split, streaming=not is_offline_mode())
            for row in stream:
                yield _text(row)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{field}: {name!r} has no split {split!r} with strings in a column `text` ({error})"
            ) from error

    # The builder's hash is that of the data set's commit.
    return _Source(_digest(path, config, split, builder.hash), rows)
