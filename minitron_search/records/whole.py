"""Tell a whole file from a torn one, by what its own format says of it; no file is read to its end but short ones."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

LONGEST_HEADER = 100_000_000  # bytes: what the safetensors library itself reads


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name: dtype, shape and place. Nothing else of the file is read.

    Raises ValueError with what is wrong, for a file that is not whole.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        beginning = file.read(8)
        if beginning == b"version ":  # of https://git-lfs.github.com/spec/v1
            raise ValueError("is a git-lfs pointer, three lines of text instead of the weights (`git lfs pull` fetches "
                             "them)")  # fmt: skip
        length = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"is cut short or no safetensors file: {size:,} bytes do not hold its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError("is no safetensors file: its header cannot be read") from error
    if size != end:
        raise ValueError(f"has {size:,} bytes, and its header describes {end:,}")
    return header


def why_torn(path: Path) -> str | None:
    """Return why a file is not whole, by the format that its name says it has; None where nothing shows that."""
    try:
        if path.suffix == ".safetensors":
            safetensors_header(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".npy":
            np.load(path, mmap_mode="r")
        elif path.suffix == ".npz":
            zipfile.ZipFile(path).close()
    except Exception as error:  # of a damaged file: every reader has types of its own
        return f"{path.name} {error}"
    return None
