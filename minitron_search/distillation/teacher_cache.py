"""Teacher outputs computed once, read by every trial.

What every candidate would ask of the teacher, at every position of the train windows, is either of

    hidden   its final normed hidden state, from which the loss computes the full distribution in chunks: exact
    topk     the k largest log-probabilities of the next token and the log of what the others have together: an
             approximation, smaller wherever 4 k + 4 bytes are less than a hidden state

A cache is a folder `<cache folder>/teacher_cache/<key>`, the key made from the content of all that makes it:

    hidden.bin                                     (windows, length, hidden_size), float32 or bfloat16
    indices.bin, log_probabilities.bin, rest.bin   (windows, length, k) uint16 (int32 where the vocabulary needs it),
                                                   (windows, length, k) float16 and (windows, length) float32
    token_hashes.npy                               (windows,) uint64, of each window's token ids
    cache.json                                     what the key was made from and, of topk, what it loses

Folders are made beside their place under a lock and renamed into it, which NFS does as a local disk does (its locks,
`flock`, hold between machines since Linux 2.6.12).
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
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from minitron_search.config.types import Precision
from minitron_search.losses.output_loss import TopK
from minitron_search.models.device import autocast
from minitron_search.models.families import final_hidden
from minitron_search.models.output_head import head_logits
from minitron_search.records.paths import cache_folder

Mode = Literal["auto", "hidden", "topk", "off"]
FORMULA = 2  # part of the key: raise it when what is stored for the same inputs changes
MAX_BYTES = 16 * 2**30
FORWARD_TOKENS = 2048  # teacher tokens per forward pass
LOGIT_TOKENS = 64  # rows of float32 logits at once
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Request(NamedTuple):
    """What a cache is to hold. `k` None asks for hidden states, else for the k largest log-probabilities."""

    teacher: str  # content hash of its weights and configuration
    data: str
    windows: np.ndarray  # (n, length) int32
    precision: Precision
    hidden_size: int  # the teacher's
    vocab_size: int
    k: int | None = None


class Column(NamedTuple):
    """One file of a cache: `shape` of what it holds of a token."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def token_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Lost(NamedTuple):
    """What `topk` does not know of the teacher; means over tokens.

    `kl`, in nats, is KL(teacher || the k probabilities, and the rest spread evenly over all other tokens). The chain
    rule of KL gives what the loss leaves out: the rest's mass times the KL between teacher and student among the other
    tokens; `kl` is that of a student to whom all of them are alike.
    """

    rest_mass: float
    kl: float


class Built(NamedTuple):
    """`teacher_tokens` went through the teacher to make the cache; 0 when it was already there. `lost` is None where
    hidden states are stored."""

    path: Path
    teacher_tokens: int
    lost: Lost | None


def cache_path(request: Request) -> Path:
    """The folder of the cache, named by the content of all that makes it."""
    key = hashlib.sha256(json.dumps(_made_from(request), sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "teacher_cache" / key


def cache_bytes(request: Request) -> int:
    return request.windows.size * sum(column.token_bytes for column in columns(request).values())


def columns(request: Request) -> dict[str, Column]:
    """The files of a cache. Log-probabilities are float16: read back, they move the KL of a token by 1e-4 nats
    (bfloat16: 7e-4), where leaving out all but 64 tokens takes 0.07 from it (SmolLM2 and its trim by four layers)."""
    if request.k is None:
        return {"hidden": Column(DTYPES[request.precision], (request.hidden_size,))}
    return {
        "indices": Column(torch.uint16 if request.vocab_size <= 2**16 else torch.int32, (request.k,)),
        "log_probabilities": Column(torch.float16, (request.k,)),
        "rest": Column(torch.float32, ()),
    }


def budget_bytes(asked: int | Literal["auto"], folder: Path) -> int:
    """`auto`: a quarter of the free disk where `folder` is or will be, and never more than 16 GiB."""
    return min(free_bytes(folder) // 4, MAX_BYTES) if asked == "auto" else asked


def free_bytes(folder: Path) -> int:
    """Of the disk where `folder` is or will be."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def resolve_mode(mode: Mode, hidden: Request, budget: int) -> Literal["hidden", "topk", "off"]:
    """`auto` is `hidden` where that cache exists or fits the budget in bytes, else `off`: both are the exact loss, and
    `topk`, another one, is for the user to ask for."""
    if mode != "auto":
        return mode
    return "hidden" if cache_path(hidden).exists() or cache_bytes(hidden) <= budget else "off"


def ensure(request: Request, write: Callable[[Path], list[Lost]]) -> Built:
    """Makes the cache unless it is there; of many processes that ask, one computes it.

    `write(folder)` fills the files of every row, in other processes say, and returns what `write_part` does of each
    part (`in_this_process`). The cache appears whole or not at all.
    """
    path = cache_path(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _make(request, write, path)
                return Built(path, int(request.windows.size), CacheReader(path).lost)
    return Built(path, 0, CacheReader(path).lost)


def in_this_process(request: Request, load_teacher: Callable[[], PreTrainedModel]) -> Callable[[Path], list[Lost]]:
    """A `write` for `ensure` that needs no other process; the teacher is loaded only if there is something to ask."""

    def write(folder: Path) -> list[Lost]:
        teacher = load_teacher()
        return [write_part(folder, teacher, request, part) for part in parts(request.windows)]

    return write


def parts(windows: np.ndarray) -> list[slice]:
    """Rows of `windows` (n, length) that go through the teacher together."""
    rows = max(1, FORWARD_TOKENS // windows.shape[1])
    return [slice(start, min(start + rows, len(windows))) for start in range(0, len(windows), rows)]


def write_part(folder: Path, teacher: PreTrainedModel, request: Request, part: slice) -> Lost:
    """Writes the rows of `part` in their places, beside other processes that write theirs; returns the sums over its
    tokens of what is lost. The teacher's device is where it computes."""
    ids = torch.from_numpy(request.windows[part].astype(np.int64)).to(teacher.device)
    hidden = teacher_hidden(teacher, ids, request.precision)
    lost, said = Lost(0.0, 0.0), {"hidden": hidden}
    if request.k is not None:
        said, lost = _topk(teacher, hidden, request.k, request.precision)
    for name, column in columns(request).items():
        data = said[name].to(column.dtype).cpu().contiguous().view(torch.uint8).numpy().tobytes()
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
    """What `hidden` stores, computed now: (n, length, hidden_size) of `ids` (n, length), in its dtype."""
    teacher.eval()
    with autocast(precision, ids.device):
        return final_hidden(teacher, ids).to(DTYPES[precision])


class CacheReader:
    """Rows of a cache, memory-mapped: processes of one machine share its pages."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError where no cache is."""
        about = json.loads((path / "cache.json").read_text())
        self.path, self.k = path, about["k"]
        self.lost = None if self.k is None else Lost(**about["lost"])
        self._columns = {
            name: Column(getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in about["columns"].items()
        }
        shape = (about["windows"], about["length"])
        self._rows = {
            name: np.memmap(path / f"{name}.bin", np.uint8, "r", shape=(shape[0], shape[1] * column.token_bytes))
            for name, column in self._columns.items()
        }
        self._hashes = np.load(path / "token_hashes.npy")

    def hidden(self, indices: np.ndarray, tokens: np.ndarray) -> Tensor:
        """The teacher's final normed hidden states (n, length, hidden_size) of the windows at `indices` (n,).

        Raises ValueError when a window's `tokens` (n, length) are not those its row was computed from.
        """
        return self._read(indices, tokens)["hidden"]

    def topk(self, indices: np.ndarray, tokens: np.ndarray) -> TopK:
        """What is kept of the teacher's next-token distributions: indices and log-probabilities (n, length, k), rest
        (n, length). Raises ValueError as `hidden` does."""
        read = self._read(indices, tokens)
        log_probabilities, rest = read["log_probabilities"].float(), read["rest"]
        # rounding each left a sum beside 1, which the KL would count in full
        total = torch.cat([log_probabilities, rest[..., None]], -1).logsumexp(-1)
        return TopK(read["indices"].to(torch.int64), log_probabilities - total[..., None], rest - total)

    def _read(self, indices: np.ndarray, tokens: np.ndarray) -> dict[str, Tensor]:
        for index, found in zip(indices, token_hashes(tokens), strict=True):
            if index >= len(self._hashes) or self._hashes[index] != found:
                raise ValueError(
                    f"teacher cache {self.path}: its row {index} was computed from other tokens than those "
                    "asked for; valid: the windows it was made from"
                )
        return {
            name: torch.from_numpy(self._rows[name][indices]).view(column.dtype).view(*tokens.shape, *column.shape)
            for name, column in self._columns.items()
        }


def token_hashes(windows: np.ndarray) -> np.ndarray:
    """(n,) uint64: a hash of the token ids of each window, whatever integer type holds them."""
    rows = np.ascontiguousarray(windows, dtype="<i4")
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8")


def _make(request: Request, write: Callable[[Path], list[Lost]], path: Path) -> None:
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    lost = Lost(*(sum(part) / request.windows.size for part in zip(*write(partial), strict=True)))
    np.save(partial / "token_hashes.npy", token_hashes(request.windows))
    about = _made_from(request)
    about["columns"] = {name: (str(dtype).removeprefix("torch."), shape) for name, (dtype, shape) in
                        columns(request).items()}  # fmt: skip
    if request.k is not None:
        about["lost"] = lost._asdict()
    (partial / "cache.json").write_text(json.dumps(about, indent=1))
    os.rename(partial, path)


def _made_from(request: Request) -> dict[str, Any]:
    windows = np.ascontiguousarray(request.windows, dtype="<i4")
    return {
        "formula": FORMULA,
        "teacher": request.teacher,
        "data": request.data,
        "tokens": hashlib.sha256(windows.tobytes()).hexdigest(),
        "windows": windows.shape[0],
        "length": windows.shape[1],
        "precision": request.precision,
        "k": request.k,
    }


@torch.no_grad()
def _topk(teacher: PreTrainedModel, hidden: Tensor, k: int, precision: Precision) -> tuple[dict[str, Tensor], Lost]:
    """The columns of `hidden` (n, length, hidden_size), and the sums over its tokens of what they lose."""
    chunks, lost = [], torch.zeros(2, dtype=torch.float64)
    for rows in hidden.flatten(0, 1).split(LOGIT_TOKENS):
        with autocast(precision, hidden.device):
            logits = head_logits(teacher, rows)
        others = logits.float().log_softmax(-1)
        kept, indices = others.topk(k)
        others.scatter_(1, indices, -torch.inf)
        rest = others.logsumexp(1)
        mass = rest.exp()
        evenly = rest - math.log(others.shape[1] - k)  # each of the others' share
        kl = -torch.special.entr(others.exp_()).sum(1) - mass * evenly
        lost += torch.stack([mass.double().sum(), kl.double().sum()]).cpu()
        chunks.append((indices, kept, rest))
    shape = hidden.shape[:2]
    said = [torch.cat(parts).unflatten(0, shape) for parts in zip(*chunks, strict=True)]
    return dict(zip(("indices", "log_probabilities", "rest"), said, strict=True)), Lost(*lost.tolist())
