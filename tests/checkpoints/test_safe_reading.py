"""A checkpoint that is damaged or hostile is refused as such, before anything in it has run."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from minitron_search.checkpoints.safe_reading import DamagedError, read_metadata, read_tensors
from tests.tiny import over

OLD = Path(__file__).parents[1] / "fixtures" / "old_run" / "interrupted"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"student.a": torch.full((64, 3), value), "exp_avg.a": torch.full((64, 3), -value), "step.a": torch.ones(())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(tensors(), checkpoint_id=tmp_path / "step", no_dist=True)
    return tmp_path / "step"


def read(folder: Path) -> dict[str, torch.Tensor]:
    into = {name: torch.zeros_like(value) for name, value in tensors().items()}
    read_tensors(folder, read_metadata(folder), into, alone=True)
    return into


def only(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def rewritten(folder: Path, change: Callable[[Any], None]) -> None:
    described = pickle.loads((folder / ".metadata").read_bytes())
    change(described)
    (folder / ".metadata").write_bytes(pickle.dumps(described))


def test_what_was_saved_is_read(folder: Path) -> None:
    assert all(torch.equal(value, tensors()[name]) for name, value in read(folder).items())


def test_what_an_earlier_version_saved_is_described() -> None:
    found = list(OLD.glob("trials/*/checkpoint/step-*"))
    assert found and all(read_metadata(each).state_dict_metadata for each in found)


@over([2, 4, 5])
def test_a_pickle_in_the_place_of_the_description_does_not_run(protocol: int, tmp_path: Path) -> None:
    dcp.save(tensors(), checkpoint_id=tmp_path / "step", no_dist=True)
    path = tmp_path / "step" / ".metadata"
    path.write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol=protocol))
    with pytest.raises(DamagedError, match="names posix.mkdir, which no checkpoint does"):
        read(tmp_path / "step")
    described = {"a": Touch(tmp_path / "ran")}
    path.write_bytes(pickle.dumps(described, protocol=protocol))
    with pytest.raises(DamagedError):
        read(tmp_path / "step")
    assert not (tmp_path / "ran").exists()


def test_a_name_with_dots_reaches_nothing_behind_what_is_allowed(folder: Path) -> None:
    # protocol 4: STACK_GLOBAL of "torch", "Size.__base__"
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x0dSize.__base__\x93.")
    with pytest.raises(DamagedError, match="names torch.Size.__base__"):
        read(folder)


def test_an_entry_that_is_a_pickle_is_not_read(folder: Path, tmp_path: Path) -> None:
    """As torch reads one: `torch.load(..., weights_only=False)`."""
    data = pickle.dumps(Touch(tmp_path / "ran"))
    only(folder).write_bytes(data.ljust(only(folder).stat().st_size, b"."))

    def as_bytes(described: Any) -> None:
        described.state_dict_metadata["student.a"] = BytesStorageMetadata()

    rewritten(folder, as_bytes)
    with pytest.raises(DamagedError):
        read(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_the_place_of_a_tensor_does_not_run(folder: Path, tmp_path: Path) -> None:
    torch.save(Touch(tmp_path / "ran"), tmp_path / "hostile")
    hostile = (tmp_path / "hostile").read_bytes()
    path = only(folder)
    path.write_bytes(hostile.ljust(path.stat().st_size, b"\0"))

    def whole(described: Any) -> None:
        for place in described.storage_data.values():
            place.offset, place.length = 0, len(hostile)

    rewritten(folder, whole)
    with pytest.raises(DamagedError):
        read(folder)
    assert not (tmp_path / "ran").exists()


def test_a_file_elsewhere_is_not_read(folder: Path, tmp_path: Path) -> None:
    only(folder).rename(tmp_path / "elsewhere.distcp")

    def upwards(described: Any) -> None:
        for place in described.storage_data.values():
            place.relative_path = "../elsewhere.distcp"

    rewritten(folder, upwards)
    with pytest.raises(DamagedError, match="no file of this checkpoint"):
        read(folder)


def damages() -> dict[str, Callable[[Path], Any]]:
    def cut(name: str, keep: float) -> Callable[[Path], Any]:
        def shorten(folder: Path) -> None:
            path = only(folder) if name == "tensors" else folder / name
            os.truncate(path, int(path.stat().st_size * keep))

        return shorten

    def flip(folder: Path) -> None:
        data = bytearray(only(folder).read_bytes())
        place = data.index(torch.ones(8).numpy().tobytes())
        data[place + 2] ^= 0xFF
        only(folder).write_bytes(bytes(data))

    def in_place_of(name: str) -> Callable[[Path], Any]:
        def replace(folder: Path) -> None:
            path = only(folder) if name == "tensors" else folder / name
            path.unlink()
            path.mkdir()

        return replace

    def part(folder: Path) -> None:
        rewritten(folder, lambda described: described.state_dict_metadata["student.a"].chunks.clear())

    def no_entry(folder: Path) -> None:
        rewritten(folder, lambda described: described.state_dict_metadata.pop("exp_avg.a"))

    return {
        **{
            f"{name} cut at {keep}": cut(name, keep) for name in ("tensors", ".metadata") for keep in (0, 0.1, 0.5, 0.9)
        },
        "tensors missing": lambda folder: only(folder).unlink(),
        "description missing": lambda folder: (folder / ".metadata").unlink(),
        "description is text": lambda folder: (folder / ".metadata").write_text("{}"),
        "description is a list": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])),
        "tensors are a folder": in_place_of("tensors"),
        "description is a folder": in_place_of(".metadata"),
        "a bit of a tensor": flip,
        "a tensor without its parts": part,
        "a tensor that is not described": no_entry,
    }


@over(list(damages()))
def test_damage_is_called_damage(kind: str, tmp_path: Path) -> None:
    dcp.save(tensors(), checkpoint_id=tmp_path / "step", no_dist=True)
    damages()[kind](tmp_path / "step")
    with pytest.raises(DamagedError) as raised:
        read(tmp_path / "step")
    assert "\n" not in str(raised.value) and len(json.dumps(str(raised.value))) < 400
