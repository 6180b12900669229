"""Teacher outputs computed once, read by every trial.

What every candidate would ask of the teacher is its final normed hidden state at every position of the train
windows: `hidden_size` numbers a token, from which the loss computes the teacher's full distribution in
chunks. A cache is a folder `<cache folder>/teacher_cache/<key>`:

    hidden.bin         (windows, length, hidden_size), bfloat16 or float32
    token_hashes.npy   (windows,) uint64, of each window's token ids
    cache.json         shape, dtype and what the key was made from
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from minitron_search import config
from minitron_search.families import final_hidden
from minitron_search.loop_settings import Precision
from minitron_search.precision import autocast

Mode = Literal["auto", "hidden", "off"]
FORMULA = 1  # part of the key: raise it when what is stored for the same inputs changes
MAX_BYTES = 16 * 2**30
FORWARD_TOKENS = 2048  # teacher tokens per forward pass
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORED_AS = {torch.float32: np.float32, torch.bfloat16: np.int16}  # numpy has no bfloat16


class Built(NamedTuple):
    """`teacher_tokens` went through the teacher to make the cache; 0 when it was already there."""

    path: Path
    teacher_tokens: int


def cache_path(teacher_fingerprint: str, data_id: str, windows: np.ndarray, precision: Precision) -> Path:
    """The folder of the cache of `windows` (n, length), named by the content of all that makes it."""
    made_from = _made_from(teacher_fingerprint, data_id, windows, precision)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    return config.cache_folder() / "teacher_cache" / key


def cache_bytes(windows: np.ndarray, hidden_size: int, precision: Precision) -> int:
    return windows.size * hidden_size * DTYPES[precision].itemsize


def default_budget_bytes(folder: Path) -> int:
    """A quarter of the free disk where `folder` is or will be, and never more than 16 GiB."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return min(shutil.disk_usage(existing).free // 4, MAX_BYTES)


def resolve_mode(
    mode: Mode, path: Path, bytes_needed: int, budget_bytes: int | None = None
) -> Literal["hidden", "off"]:
    """`auto` is `hidden` where the cache at `path` exists or fits the budget (`default_budget_bytes`)."""
    if mode != "auto":
        return mode
    budget = default_budget_bytes(path) if budget_bytes is None else budget_bytes
    return "hidden" if path.exists() or bytes_needed <= budget else "off"


def ensure(
    load_teacher: Callable[[], PreTrainedModel],
    teacher_fingerprint: str,
    data_id: str,
    windows: np.ndarray,
    precision: Precision,
    write: Callable[[Path], int] | None = None,
) -> Built:
    """Makes the cache of `windows` (n, length) unless it is there; of many that ask, one process computes it.

    `teacher_fingerprint` is a content hash of the teacher's weights and configuration. `load_teacher` is
    called only when there is something to compute, and its device is where that happens. `write` fills the
    file it is given with every row, in other processes say, and returns the hidden size (`write_hidden`). The
    cache appears whole or not at all (it is renamed into place).
    """
    path = cache_path(teacher_fingerprint, data_id, windows, precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return Built(path, 0)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return Built(path, 0)
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir()
        file = partial / "hidden.bin"
        if write is None:
            hidden_size = write_hidden(file, load_teacher(), windows, chunks(windows), precision)
        else:
            hidden_size = write(file)
        np.save(partial / "token_hashes.npy", token_hashes(windows))
        made_from = _made_from(teacher_fingerprint, data_id, windows, precision)
        (partial / "cache.json").write_text(json.dumps({"hidden_size": hidden_size, **made_from}, indent=1))
        os.rename(partial, path)
    return Built(path, int(windows.size))


class CacheReader:
    """Rows of a cache, memory-mapped: processes of one machine share its pages."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError where no cache is."""
        about = json.loads((path / "cache.json").read_text())
        self.path = path
        self.dtype = DTYPES[about["precision"]]
        shape = (about["windows"], about["length"], about["hidden_size"])
        self._rows = np.memmap(path / "hidden.bin", dtype=STORED_AS[self.dtype], mode="r", shape=shape)
        self._hashes = np.load(path / "token_hashes.npy")

    def hidden(self, indices: np.ndarray, tokens: np.ndarray) -> Tensor:
        """The teacher's final normed hidden states (n, length, hidden_size) of the windows at `indices` (n,).

        Raises ValueError when a window's `tokens` (n, length) are not those its row was computed from.
        """
        for index, found in zip(indices, token_hashes(tokens), strict=True):
            if index >= len(self._hashes) or self._hashes[index] != found:
                raise ValueError(
                    f"teacher cache {self.path}: its row {index} was computed from other tokens than those "
                    "asked for; valid: the windows it was made from"
                )
        return torch.from_numpy(self._rows[indices]).view(self.dtype)


def token_hashes(windows: np.ndarray) -> np.ndarray:
    """(n,) uint64: a hash of the token ids of each window, whatever integer type holds them."""
    rows = np.ascontiguousarray(windows, dtype="<i4")
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8")


def _made_from(fingerprint: str, data_id: str, windows: np.ndarray, precision: Precision) -> dict[str, Any]:
    return {
        "formula": FORMULA,
        "teacher": fingerprint,
        "data": data_id,
        "tokens": hashlib.sha256(np.ascontiguousarray(windows, dtype="<i4").tobytes()).hexdigest(),
        "windows": windows.shape[0],
        "length": windows.shape[1],
        "precision": precision,
    }


def chunks(windows: np.ndarray) -> list[slice]:
    """Rows of `windows` (n, length) that go through the teacher together."""
    rows = max(1, FORWARD_TOKENS // windows.shape[1])
    return [slice(start, min(start + rows, len(windows))) for start in range(0, len(windows), rows)]


def write_hidden(
    file: Path, teacher: PreTrainedModel, windows: np.ndarray, parts: list[slice], precision: Precision
) -> int:
    """Writes `parts` of the rows of `file` in their places, beside other processes that write theirs; returns the
    hidden size."""
    out = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        for part in parts:
            ids = torch.from_numpy(windows[part].astype(np.int64)).to(teacher.device)
            hidden = teacher_hidden(teacher, ids, precision).cpu()
            data = hidden.view(torch.int16 if precision == "bfloat16" else torch.float32).numpy().tobytes()
            os.pwrite(out, data, part.start * (len(data) // len(ids)))
        os.fsync(out)
    finally:
        os.close(out)
    return int(teacher.config.hidden_size)


@torch.no_grad()
def teacher_hidden(teacher: PreTrainedModel, ids: Tensor, precision: Precision) -> Tensor:
    """What the cache stores, computed now: (n, length, hidden_size) of `ids` (n, length), in its dtype."""
    teacher.eval()
    with autocast(precision, ids.device):
        return final_hidden(teacher, ids).to(DTYPES[precision])
