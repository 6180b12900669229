"""Damaged teachers: what happens to a model's folder, drawn by a seed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests import tiny

SHARDED = ("qwen3", "gpt_neox")
FAMILIES = ("llama", "gpt2", *SHARDED)  # one that ties, one whose files hold other names, two in shards
TENSORS = ("dropped", "renamed", "transposed", "truncated", "int8", "float8_e4m3fn", "bfloat16", "nan", "inf")
FILES = ("truncated", "emptied", "folder", "loop")
HARMLESS = (
    "README.md", "README.md folder", "notes.txt", "pytorch_model.bin", "more.safetensors", "a/model.safetensors",
    "index beside one file",
)  # fmt: skip


def whole(folder: Path, family: str) -> Path:
    """A teacher of a family, with a README."""
    config = tiny.config(family, vocab_size=258, num_hidden_layers=2, max_position_embeddings=128,
                         tie_word_embeddings=family in ("llama", "gpt2"))  # fmt: skip
    tiny.model(config).save_pretrained(folder, max_shard_size="20KB" if family in SHARDED else "1GB")
    tiny.tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


def drawn(family: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` damages of a family's teacher, (what, how): every way to damage a tensor and a file, of drawn ones."""
    draw = np.random.default_rng([seed, FAMILIES.index(family)])
    ways = [("tensor", how) for how in TENSORS] * 3 + [("file", how) for how in FILES] * 5
    ways += [("harmless", how) for how in HARMLESS]
    return [ways[place % len(ways)] for place in draw.permutation(max(count, len(ways)))[:count]]


def apply(folder: Path, what: str, how: str, draw: np.random.Generator) -> str:
    """Damage a teacher; what was damaged."""
    if what == "tensor":
        return _tensor(folder, how, draw)
    if what == "file":
        path = sorted(path for path in folder.iterdir() if path.name != "README.md")[draw.integers(_count(folder))]
        _file(path, how, draw)
        return path.name
    return _harmless(folder, how)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _count(folder: Path) -> int:
    return sum(path.name != "README.md" for path in folder.iterdir())


def _tensor(folder: Path, how: str, draw: np.random.Generator) -> str:
    path = shards(folder)[draw.integers(len(shards(folder)))]
    tensors = load_file(path)
    names = [name for name, tensor in tensors.items() if how != "transposed" or _differs_transposed(tensor)]
    if not names:  # a shard of square ones
        return _tensor(folder, how, draw)
    name = sorted(names)[draw.integers(len(names))]
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed": lambda tensor: tensor.T.contiguous(),
        "truncated": lambda tensor: tensor[:-1].contiguous(),
        "nan": lambda tensor: _with_one(tensor, float("nan"), draw),
        "inf": lambda tensor: _with_one(tensor, -float("inf"), draw),
    }
    tensor = tensors.pop(name)
    if how == "renamed":
        tensors[name.replace("weight", "wieght").replace("bias", "bais")] = tensor
    elif how != "dropped":
        tensors[name] = changes[how](tensor) if how in changes else tensor.to(getattr(torch, how))
    save_file(tensors, path, {"format": "pt"})
    return name


def _differs_transposed(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]  # of a square one no header tells


def _with_one(tensor: torch.Tensor, value: float, draw: np.random.Generator) -> torch.Tensor:
    tensor.view(-1)[int(draw.integers(tensor.numel()))] = value
    return tensor


def _file(path: Path, how: str, draw: np.random.Generator) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: int(draw.integers(len(data) - 2))])  # JSON without its last line break is whole
        return
    path.unlink()
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)


def _harmless(folder: Path, how: str) -> str:
    first = load_file(shards(folder)[0])
    if how == "README.md":
        (folder / how).write_text("---\nlicen")
    elif how == "README.md folder":
        (folder / "README.md").unlink()
        (folder / "README.md").mkdir()
    elif how == "notes.txt" or how == "pytorch_model.bin":
        (folder / how).write_bytes(b"\0\1\2")
    elif how == "more.safetensors":  # another number under a name of the model's own
        save_file({name: tensor + 1 for name, tensor in first.items()}, folder / how, {"format": "pt"})
    elif how == "a/model.safetensors":
        (folder / "a").mkdir()
        (folder / how).write_bytes(b"torn")
    elif how == "index beside one file" and len(shards(folder)) == 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "none.safetensors"}}))
    return how
