"""The embedded text: documentation strings of packages this project depends on anyway.

Documents are the docstrings of modules, classes and functions. One is kept when it has at least 200
characters, when at least half of its characters stand on lines of prose (four words or more; 85% letters,
spaces, commas, full stops and apostrophes; no `>>>`), when it holds no `<|`, which a tokenizer could read as
a special token, and when no other kept one has the same text but for white space and case. Near copies (a
method documented on two classes) do stay.
"""

import ast
import hashlib
import importlib.metadata
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from minitron_search.records import cache

# Required dependencies, direct or through one of ours, so that every installation has the same text. Not
# torch, transformers, ray, plotly or sympy: parsing those takes 2 to 11 s each, all of these together 6.
DISTRIBUTIONS = (
    "accelerate", "alembic", "datasets", "fsspec", "huggingface_hub", "jinja2", "networkx", "numpy", "optuna",
    "pandas", "pyarrow", "pydantic", "sqlalchemy",
)  # fmt: skip
SHORTEST = 200  # characters
TESTS = {"test", "tests", "testing"}


def documents() -> list[str]:
    """Return the documents in an order that mixes the libraries; the same for the same versions of the packages.

    Read from the cache when these versions were read before. Raises RuntimeError when no
    distribution has a list of files (packages installed without metadata).
    """
    versions = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS if _python_files(name)}
    if not versions:
        raise RuntimeError(
            "corpus.train: 'docstrings' finds no package whose metadata lists its files; valid: packages "
            "installed by pip or uv, or a file of your own"
        )
    kept = cache.entry("docstrings", cache.content_id([cache.FORMULA["docstrings"], versions]), ".json")
    cache.make_once(kept, lambda into: into.write_text(json.dumps(_mixed(_collected(versions)))), durable=True)
    return json.loads(kept.read_text())


def is_prose(text: str) -> bool:
    """Return True where at least half of the characters stand on lines of prose."""
    lines = [line for line in text.splitlines() if line.strip()]
    return 2 * sum(len(line) for line in lines if _is_prose_line(line)) >= sum(len(line) for line in lines)


def docstrings(source: bytes) -> Iterator[str]:
    """Yield the dedented docstrings of a file's module, classes, functions and methods; nothing is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
        # Only statements that hold definitions: `ast.walk` through every expression takes four times as long.
        if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
            waiting.extend(reversed([*node.body, *getattr(node, "orelse", ())]))


def distinct(texts: Iterator[str]) -> list[str]:
    """Keep the first of each group of texts that differ in white space and case only."""
    kept: dict[str, str] = {}
    for text in texts:
        kept.setdefault(" ".join(text.lower().split()), text)
    return list(kept.values())


def _collected(distributions: dict[str, str]) -> list[str]:
    return distinct(
        text
        for name in sorted(distributions)
        for path in _python_files(name)
        for text in _parsed(path)
        if len(text) >= SHORTEST and "<|" not in text and is_prose(text)
    )


def _mixed(texts: list[str]) -> list[str]:
    """Order texts by their hashes: a shuffle that no other document's coming or going changes."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())


def _python_files(distribution: str) -> list[Path]:
    """List a distribution's files, sorted; none when it is not installed or has no list of files."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    kept = sorted(file for file in files if file.suffix == ".py" and not TESTS.intersection(file.parts))
    return [Path(str(file.locate())) for file in kept]


def _parsed(path: Path) -> list[str]:
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:  # a third of the files: not worth a parse
        return []
    try:
        return list(docstrings(source))
    except SyntaxError:  # a file for another Python version
        return []


def _is_prose_line(line: str) -> bool:
    plain = len(line) - len(re.findall(r"[^A-Za-z ,.']", line))
    return plain >= 0.85 * len(line) and len(re.findall(r"\b[A-Za-z]{2,}\b", line)) >= 4 and ">>>" not in line
