"""Read a folder of torch.distributed.checkpoint without running anything that is in it.

Its `.metadata` is a pickle, and an entry that is no tensor is another one. torch unpickles both as they come, and a
run directory may come from a bucket or a colleague. Here the first may name only what a description of tensors is made
of, and the second is refused; tensors themselves torch reads with an allow-list of its own.
"""

import math
import pickle
from io import BytesIO
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem, load, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from minitron_search.messages import failures

METADATA = ".metadata"
ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                     "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
    },
    **{("torch", str(kind).removeprefix("torch.")): kind for kind in vars(torch).values() if type(kind) is torch.dtype},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # where it was saved; a plain path touches no disk
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # as Python 3.13 calls it
}  # fmt: skip


class DamagedError(ValueError):
    """A checkpoint that is not as it was written: cut short, incomplete, or not written by a training."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise DamagedError(f"{METADATA} names {module}.{name}, which no checkpoint does; it was not run") from None


def read_metadata(folder: Path, checksums: bool = True) -> Metadata:
    """Return what a checkpoint says of its tensors, each of which is there in full.

    `checksums`: read all of the files, and compare them with the checksums in them. Raises DamagedError where it names
    anything but tensors, and where a file or a part of one is missing, or is not as it was written.
    """
    try:
        with open(folder / METADATA, "rb") as file:
            described = _Unpickler(file).load()
        _check(folder, described)
        if checksums:
            _check_checksums(folder, described)
    except (DamagedError, PermissionError):
        raise
    except Exception as error:  # a pickle that is cut short raises almost anything
        raise DamagedError(f"{METADATA} cannot be read ({type(error).__name__}: {error})") from error
    return described


def read_tensors(folder: Path, described: Metadata, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Read `tensors` from a checkpoint that `described` describes, into themselves.

    Called by every process of a group unless `alone`. Raises DamagedError where one of them is not there as it was
    written.
    """
    try:
        load(tensors, storage_reader=_Reader(folder, described), planner=_TensorsOnly(), no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, PermissionError | torch.OutOfMemoryError):
            raise cause from None
        raise DamagedError(
            f"its tensors cannot be read ({type(cause).__name__}: {failures.described(cause)})"
        ) from error


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, described: Metadata):
        super().__init__(folder)
        self.described = described

    def read_metadata(self, *_given: Any, **_named: Any) -> Metadata:
        self.described.storage_meta = StorageMeta(load_id=self.load_id)
        return self.described


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        raise DamagedError(f"{read_item.dest_index.fqn} is no tensor; it was not read")


def _check(folder: Path, described: Any) -> None:
    """Raise DamagedError unless the files hold all of every tensor that is described."""
    if not isinstance(described, Metadata) or not isinstance(described.storage_data, dict):
        raise DamagedError(f"{METADATA} does not describe a checkpoint")
    for name, tensor in described.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise DamagedError(f"{name} is no tensor; it was not read")
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise DamagedError(f"{name} is not there in full")
    sizes: dict[str, int] = {}
    for place in described.storage_data.values():
        name = str(place.relative_path)
        if name != PurePath(name).name or place.transform_descriptors:
            raise DamagedError(f"{METADATA} names {name!r}, which is no file of this checkpoint")
        if name not in sizes:
            if not (folder / name).is_file():
                raise DamagedError(f"{name} is missing")
            sizes[name] = (folder / name).stat().st_size
        if place.offset + place.length > sizes[name]:
            raise DamagedError(f"{name} has {sizes[name]:,} bytes of {place.offset + place.length:,} or more")


def _check_checksums(folder: Path, described: Metadata) -> None:
    """Raise DamagedError where a byte has changed: torch writes each tensor as a zip, and reads no checksum of it."""
    for index, place in described.storage_data.items():
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            with ZipFile(BytesIO(file.read(place.length))) as stored:
                if (entry := stored.testzip()) is not None:
                    raise DamagedError(f"{index.fqn} is not as it was written ({entry})")
