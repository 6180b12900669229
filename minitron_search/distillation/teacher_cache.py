"""A cache of teacher outputs, computed once and read by every trial.

At every position of the train windows it holds either of

    hidden   its final normed hidden state, from which the loss computes the full distribution in chunks: exact
    topk     the k largest log-probabilities of the next token and the log of the other tokens' total: an
             approximation, smaller wherever 4 k + 4 bytes are less than a hidden state

A cache is a folder `<cache folder>/teacher_cache/<key>`, the key made from the content of all that goes into it:

    hidden.bin                                     (windows, length, hidden_size), float32 or bfloat16
    indices.bin, log_probabilities.bin, rest.bin   (windows, length, k) uint16 (int32 where the vocabulary needs it),
                                                   (windows, length, k) float16 and (windows, length) float32
    token_hashes.npy                               (windows,) uint64, of each window's token ids
    cache.json                                     what the key was made from and, of topk, what it loses
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minitron_search.config.types import Precision
from minitron_search.losses.output_loss import TopK
from minitron_search.models.device import autocast
from minitron_search.models.families import final_hidden
from minitron_search.models.output_head import output_head
from minitron_search.records import cache
from minitron_search.records.cache import content_id

Mode = Literal["auto", "hidden", "topk", "off"]
MAX_BYTES = 16 * 2**30
FORWARD_TOKENS = 2048  # teacher tokens per forward pass
LOGIT_TOKENS = 64  # rows of float32 logits at once
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Request(NamedTuple):
    """The content of a cache. `k` is None for hidden states, else the number of log-probabilities kept of a token."""

    teacher: str  # content hash of its weights and configuration
    data: str
    windows: np.ndarray  # (n, length) int32
    precision: Precision
    hidden_size: int  # the teacher's
    vocab_size: int
    k: int | None = None


class Column(NamedTuple):
    """One file of a cache; `shape` is that of one token's entry."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def token_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Lost(NamedTuple):
    """What `topk` leaves out of the teacher; means over tokens.

    `kl`, in nats, is KL(teacher || the k probabilities, and the rest spread evenly over all other tokens). The chain
    rule of KL gives what the loss leaves out: the rest's mass times the KL between teacher and student among the other
    tokens; `kl` is that of a student that gives all of them the same probability.
    """

    rest_mass: float
    kl: float


class Built(NamedTuple):
    """A cache that is there.

    `teacher_tokens` went through the teacher to make it, 0 where it existed; `lost` is None for hidden states.
    """

    path: Path
    teacher_tokens: int
    lost: Lost | None


def cache_path(request: Request) -> Path:
    """Return the folder of the cache, named by the content of everything that goes into it."""
    return cache.entry("teacher_cache", content_id(_key_content(request), digits=32))


def cache_bytes(request: Request) -> int:
    """Return the size on disk of the cache's columns."""
    return request.windows.size * sum(column.token_bytes for column in columns(request).values())


def columns(request: Request) -> dict[str, Column]:
    """Return the files of a cache, by name.

    Log-probabilities are float16: read back, they move the KL of a token by 1e-4 nats (bfloat16: 7e-4), where leaving
    out all but 64 tokens takes 0.07 from it (SmolLM2 and its trim by four layers).
    """
    if request.k is None:
        return {"hidden": Column(DTYPES[request.precision], (request.hidden_size,))}
    return {
        "indices": Column(torch.uint16 if request.vocab_size <= 2**16 else torch.int32, (request.k,)),
        "log_probabilities": Column(torch.float16, (request.k,)),
        "rest": Column(torch.float32, ()),
    }


def budget_bytes(setting: int | Literal["auto"], folder: Path) -> int:
    """Return how many bytes a cache may take; `auto` is a quarter of the disk that is free, at most 16 GiB."""
    return min(free_bytes(folder) // 4, MAX_BYTES) if setting == "auto" else setting


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free on the disk where `folder` is or will be."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def resolve_mode(mode: Mode, hidden: Request, budget: int) -> Literal["hidden", "topk", "off"]:
    """Return `mode`, resolved: `auto` is `hidden` where that cache exists or fits the budget in bytes, else `off`.

    Both give the exact loss; `topk` approximates it, so only the user chooses it.
    """
    if mode != "auto":
        return mode
    return "hidden" if cache_path(hidden).exists() or cache_bytes(hidden) <= budget else "off"


def ensure(request: Request, write: Callable[[Path], list[Lost]]) -> Built:
    """Return the cache, made unless it exists; of many processes that call this, one computes it.

    `write(folder)` writes all rows, perhaps in other processes, and returns what `write_part` returns for each part
    (`in_this_process`). The cache appears whole or not at all.
    """
    path, make = cache_path(request), lambda into: _make(request, write, into)
    made = cache.make_once(path, make)
    if cache.read_kept(path, CacheReader) is None:  # of an earlier version, and shorter than it says itself
        made = cache.make_once(path, make)
    return Built(path, int(request.windows.size) if made else 0, CacheReader(path).lost)


def in_this_process(request: Request, load_teacher: Callable[[], PreTrainedModel]) -> Callable[[Path], list[Lost]]:
    """Return a `write` for `ensure` that needs no other process; the teacher is loaded only if it is needed."""

    def write(folder: Path) -> list[Lost]:
        teacher = load_teacher()
        return [write_part(folder, teacher, request, part) for part in parts(request.windows)]

    return write


def parts(windows: np.ndarray) -> list[slice]:
    """Return the slices of `windows` (n, length) that go through the teacher together."""
    rows = max(1, FORWARD_TOKENS // windows.shape[1])
    return [slice(start, min(start + rows, len(windows))) for start in range(0, len(windows), rows)]


def write_part(folder: Path, teacher: PreTrainedModel, request: Request, part: slice) -> Lost:
    """Write the rows of `part` in their places and return the sums over its tokens of what is lost.

    Other processes may write other parts meanwhile. Computes on the teacher's device.
    """
    ids = torch.from_numpy(request.windows[part].astype(np.int64)).to(teacher.device)
    hidden = teacher_hidden(teacher, ids, request.precision)
    lost, outputs = Lost(0.0, 0.0), {"hidden": hidden}
    if request.k is not None:
        outputs, lost = _topk(teacher, hidden, request.k, request.precision)
    for name, column in columns(request).items():
        data = outputs[name].to(column.dtype).cpu().contiguous().view(torch.uint8).numpy().tobytes()
        assert len(data) == ids.numel() * column.token_bytes
        out = os.open(folder / f"{name}.bin", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(out, data, part.start * ids.shape[1] * column.token_bytes)
            os.fsync(out)
        finally:
            os.close(out)
    return lost


@torch.no_grad()
def teacher_hidden(teacher: PreTrainedModel, ids: Tensor, precision: Precision) -> Tensor:
    """Return the teacher's final hidden states (n, length, hidden_size) of `ids` (n, length), in the cache's dtype."""
    teacher.eval()
    with autocast(precision, ids.device):
        return final_hidden(teacher, ids).to(DTYPES[precision])


class CacheReader:
    """Rows of a cache, memory-mapped: processes of one machine share its pages."""

    def __init__(self, path: Path) -> None:
        """Open the cache at `path`. Raises FileNotFoundError where there is none."""
        content = json.loads((path / "cache.json").read_text())
        self.path, self.k = path, content["k"]
        self.lost = None if self.k is None else Lost(**content["lost"])
        self._columns = {
            name: Column(getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in content["columns"].items()
        }
        shape = (content["windows"], content["length"])
        self._rows = {
            name: np.memmap(path / f"{name}.bin", np.uint8, "r", shape=(shape[0], shape[1] * column.token_bytes))
            for name, column in self._columns.items()
        }
        self._hashes = np.load(path / "token_hashes.npy")

    def hidden(self, indices: np.ndarray, tokens: np.ndarray) -> Tensor:
        """Return the teacher's final normed hidden states (n, length, hidden_size) of the windows at `indices` (n,).

        Raises ValueError when a window's `tokens` (n, length) are not those its row was computed from.
        """
        return self._read(indices, tokens)["hidden"]

    def topk(self, indices: np.ndarray, tokens: np.ndarray) -> TopK:
        """Return the teacher's most probable tokens: indices and log-probabilities (n, length, k), rest (n, length).

        Raises ValueError as `hidden` does.
        """
        columns = self._read(indices, tokens)
        log_probabilities, rest = columns["log_probabilities"].float(), columns["rest"]
        # rounding each left a sum that is not quite 1, which the KL would count in full
        total = torch.cat([log_probabilities, rest[..., None]], -1).logsumexp(-1)
        return TopK(columns["indices"].to(torch.int64), log_probabilities - total[..., None], rest - total)

    def _read(self, indices: np.ndarray, tokens: np.ndarray) -> dict[str, Tensor]:
        for index, token_hash in zip(indices, token_hashes(tokens), strict=True):
            if index >= len(self._hashes) or self._hashes[index] != token_hash:
                raise ValueError(
                    f"teacher cache {self.path}: row {index} was computed from other tokens than these; "
                    "valid: the windows that it was made from"
                )
        return {
            name: torch.from_numpy(self._rows[name][indices]).view(column.dtype).view(*tokens.shape, *column.shape)
            for name, column in self._columns.items()
        }


def token_hashes(windows: np.ndarray) -> np.ndarray:
    """Return a hash (n,) uint64 of the token ids of each window, whatever integer type holds them."""
    rows = np.ascontiguousarray(windows, dtype="<i4")
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8")


def _make(request: Request, write: Callable[[Path], list[Lost]], into: Path) -> None:
    into.mkdir()
    lost = Lost(*(sum(part) / request.windows.size for part in zip(*write(into), strict=True)))
    np.save(into / "token_hashes.npy", token_hashes(request.windows))
    content = _key_content(request)
    content["columns"] = {name: (str(dtype).removeprefix("torch."), shape) for name, (dtype, shape) in
                        columns(request).items()}  # fmt: skip
    if request.k is not None:
        content["lost"] = lost._asdict()
    (into / "cache.json").write_text(json.dumps(content, indent=1))


def _key_content(request: Request) -> dict[str, Any]:
    windows = np.ascontiguousarray(request.windows, dtype="<i4")
    return {
        "formula": cache.FORMULA["teacher_cache"],
        "teacher": request.teacher,
        "data": request.data,
        "tokens": content_id(windows.tobytes(), digits=64),
        "windows": windows.shape[0],
        "length": windows.shape[1],
        "precision": request.precision,
        "k": request.k,
    }


@torch.no_grad()
def _topk(teacher: PreTrainedModel, hidden: Tensor, k: int, precision: Precision) -> tuple[dict[str, Tensor], Lost]:
    """Return the columns for `hidden` (n, length, hidden_size), and the sums over its tokens of what they lose."""
    chunks, lost = [], torch.zeros(2, dtype=torch.float64)
    head = output_head(teacher)
    for rows in hidden.flatten(0, 1).split(LOGIT_TOKENS):
        with autocast(precision, hidden.device):
            logits = head.logits(rows)
        others = logits.float().log_softmax(-1)
        kept, indices = others.topk(k)
        others.scatter_(1, indices, -torch.inf)
        rest = others.logsumexp(1)
        mass = rest.exp()
        even = rest - math.log(others.shape[1] - k)  # log-probability of each other token, were they alike
        kl = -torch.special.entr(others.exp_()).sum(1) - mass * even
        lost += torch.stack([mass.double().sum(), kl.double().sum()]).cpu()
        chunks.append((indices, kept, rest))
    shape = hidden.shape[:2]
    columns = [torch.cat(parts).unflatten(0, shape) for parts in zip(*chunks, strict=True)]
    return dict(zip(("indices", "log_probabilities", "rest"), columns, strict=True)), Lost(*lost.tolist())
