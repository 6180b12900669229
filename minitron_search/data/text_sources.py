"""Where text comes from, as documents: the embedded text, files, or a Hub data set.

A source is one of
    docstrings                      the embedded text
    a.txt, b.jsonl, c.parquet, d/*  a file or a glob: a .txt is one document, tokenised whole; a .jsonl has
                                    one per line (field `text`), a .parquet one per row (column `text`)
    owner/name[/config][:split]     a Hub data set, column `text`, split `train` unless named; streamed
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from minitron_search.data.docstrings import documents as docstring_documents
from minitron_search.messages.failures import first_line
from minitron_search.records.cache import content_id
from minitron_search.teachers.sources import near_names

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes of this machine
MOST_LINE = 2**28  # bytes of a .jsonl's line
LARGE = 2**30  # bytes of a file whose beginning is read before all of it is hashed
HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class TextSource:
    id: str  # of the content: two names of the same text have one id
    documents: Callable[[], Iterable[str]]


def text_source(field: str, name: str) -> TextSource:
    """Return the source that configuration key `field` names. Raises ValueError, with the key, for one that is missing
    or has no reader; reading its documents raises ValueError for one that is damaged."""
    if name == "docstrings":
        texts = docstring_documents()
        return TextSource(content_id(texts, digits=16), lambda: texts)
    if _is_local(name):
        paths = _files(field, name)
        return TextSource(
            content_id([(path.suffix, path) for path in paths], digits=16),
            lambda: (text for path in paths for text in READERS[path.suffix](field, path)),
        )
    match = _hub_name(field, name)
    return _hub(field, name, match["path"], match["config"], match["split"] or "train")


def check_source(field: str, name: str) -> None:
    """Raise ValueError, as `text_source` does, for files that are not there; nothing is read of any."""
    if name == "docstrings":
        return
    if _is_local(name):
        _files(field, name)
    else:
        _hub_name(field, name)


def _is_local(name: str) -> bool:
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or path.suffix in READERS or path.exists()
    return local or glob.has_magic(name)


def _hub_name(field: str, name: str) -> re.Match[str]:
    if match := HUB_NAME.fullmatch(name):
        return match
    raise ValueError(f"{field}: {name!r} is not a file here{near_names(Path(name))}; valid: {_valid()}")


def _files(field: str, name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"{field}: {name!r} is a folder; valid: a glob of its files, as in {name.rstrip('/')}/*.txt")
    paths = [path]
    if not path.exists():
        if not glob.has_magic(name):
            raise ValueError(f"{field}: {name!r} does not exist{near_names(path)}; valid: {_valid()}")
        paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not paths:
            raise ValueError(f"{field}: {name!r} matches no file; valid: {_valid()}")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{field}: {str(path)!r} is not a regular file; valid: {_valid()}")
        if path.suffix == ".txt" and path.stat().st_size > MEMORY:
            raise ValueError(f"{field}: {str(path)!r} is one document, larger than this machine's memory of {MEMORY:,} "
                             "bytes; valid: a .jsonl with a document a line")  # fmt: skip
        if path.suffix not in READERS:
            raise ValueError(f"{field}: {str(path)!r} is none of {', '.join(READERS)}; valid: {_valid()}")
        if path.suffix != ".txt" and path.stat().st_size > LARGE:
            next(READERS[path.suffix](field, path), None)
    return paths


def _txt(field: str, path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise ValueError(
            f"{field}: {str(path)!r}, line {line}, is not UTF-8 at byte {error.start} of the file; valid: UTF-8 text"
        ) from error


def _jsonl(field: str, path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), start=1):
            if not line.strip():
                continue
            if len(line) > MOST_LINE:
                raise ValueError(f"{field}: {str(path)!r}, line {number} is longer than {MOST_LINE:,} bytes; valid: a "
                                 'document a line, {"text": "..."}')  # fmt: skip
            try:
                text = _text(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{field}: {str(path)!r}, line {number}: {line[:60]!r} is not an object with a text "
                    f"({_why(error)}); "
                    'valid: {"text": "..."}'
                ) from error
            yield text


def _parquet(field: str, path: Path) -> Iterator[str]:
    try:
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise ValueError(f"it has the columns {', '.join(columns)}")
        number = 0
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column(0):
                number += 1
                try:
                    row = {"text": text.as_py()}
                    if row["text"] is not None:
                        yield _text(row)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"row {number}: {_why(error)}") from error
    except (ValueError, TypeError, OSError) as error:  # pyarrow's own errors are ValueError or OSError
        raise ValueError(
            f"{field}: {str(path)!r} is not a parquet file with a string column `text` ({_why(error)})"
        ) from error


# By suffix: (configuration key, file) -> its documents; raises ValueError, with the key, for a file that is damaged.
READERS: dict[str, Callable[[str, Path], Iterator[str]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def _valid() -> str:
    *suffixes, last = READERS
    return (f"'docstrings', a {', '.join(suffixes)} or {last} file or glob, or a Hub data set as "
            "owner/name[/config][:split]")  # fmt: skip


def _text(row: Any) -> str:
    """Return the text of a record. Raises KeyError or TypeError where there is none, ValueError for half of a
    character, which no tokenizer takes."""
    text = row["text"]
    if not isinstance(text, str):
        raise TypeError(f"`text` is {type(text).__name__}")
    if half := half_character(text):
        raise ValueError(half)
    return text


def half_character(text: str) -> str | None:
    """Return where a text has half of a surrogate pair, as JSON can spell and UTF-8 cannot; None where it has none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} of its text is {text[error.start]!r}, half of a surrogate pair"
    return None


def _why(error: Exception) -> str:
    """Return what is wrong in a line: pyarrow and json say it in several, or leave it to the type."""
    said = str(error).strip().splitlines()
    return said[0] if said and not isinstance(error, KeyError) else f"{type(error).__name__} {error}".strip()


def _hub(field: str, name: str, path: str, config: str | None, split: str) -> TextSource:
    import datasets  # takes a second: only for who uses the Hub
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    try:
        builder = datasets.load_dataset_builder(path, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        raise ValueError(
            f"{field}: {name!r} is not a file here, and the Hub did not give it ({first_line(error)}); "
            f"valid: {_valid()}"
        ) from error

    def rows() -> Iterator[str]:
        try:
            # Streaming reads the Hub: without it, what is in the datasets cache has to do.
            stream = datasets.load_dataset(path, config, split=split, streaming=not is_offline_mode())
            for number, row in enumerate(stream, start=1):
                try:
                    text = _text(row)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"row {number}: {_why(error)}") from error
                yield text
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{field}: {name!r} has no split {split!r} with strings in a column `text` ({_why(error)})"
            ) from error

    # The builder's hash is that of the data set's commit.
    return TextSource(content_id([path, config, split, builder.hash], digits=16), rows)
