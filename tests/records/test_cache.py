"""The content-addressed cache: ids that never change, entries that are whole or absent, made by one process."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from minitron_search.records import cache
from minitron_search.records.cache import content_id


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_ids_are_those_that_run_directories_hold() -> None:
    """They name users' trials and architectures: another string here orphans every run made before."""
    assert content_id({"b": [1, None], "a": 0.5}) == content_id({"a": 0.5, "b": [1, None]}) == "b9ed643694"
    assert content_id(b"", digits=64) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_arrays_and_files_are_their_content(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int32)
    arrays = (array, array.astype(np.int64), array.reshape(2, 3), array[::-1])
    assert len({content_id(["a", value]) for value in arrays}) == 4
    assert content_id([array]) == content_id([array.copy()])
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).write_text(text)
    a, b, c = (content_id({"file": tmp_path / name}) for name in "abc")
    assert a == b != c
    with pytest.raises(TypeError, match="object has no content id"):
        content_id([object()])


@pytest.mark.parametrize("durable", [False, True])
def test_an_entry_is_a_file_or_a_folder_and_is_made_once(durable: bool) -> None:
    def folder_of_two(into: Path) -> None:
        (into / "inner").mkdir(parents=True)
        (into / "inner" / "a").write_text("a")

    file, made = cache.entry("text", "key", ".txt"), cache.entry("model", "key")
    assert cache.make_once(file, lambda into: into.write_text("x"), durable=durable)
    assert cache.make_once(made, folder_of_two, durable=durable)
    assert not cache.make_once(file, lambda into: pytest.fail("made again"))
    assert file.read_text() == "x" and (made / "inner" / "a").read_text() == "a"
    assert list(file.parent.iterdir()) == [file] and list(made.parent.iterdir()) == [made]


def test_what_fails_half_way_leaves_nothing(folder: Path) -> None:
    place = cache.entry("model", "key")

    def half(into: Path) -> None:
        into.mkdir()
        (into / "a").write_text("a")
        raise OSError("no space left on device")

    for make in (cache.make_once, cache.replace):
        with pytest.raises(OSError, match="no space"):
            make(place, half)
        assert not list(place.parent.iterdir())


def test_what_a_killed_process_left_is_cleared_by_the_next() -> None:
    place = cache.entry("model", "key")
    leftover = place.with_name(".key.partial")
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("")
    cache.make_once(place, lambda into: into.mkdir())
    assert not list(place.iterdir()) and not leftover.exists()


def _make(place: str, log: str) -> None:
    def write(into: Path) -> None:
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        into.write_text("value")

    cache.make_once(Path(place), write)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    place, log = cache.entry("text", "key"), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_make, args=(str(place), str(log))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert log.read_text() == "made\n" and place.read_text() == "value"


def test_every_formula_is_a_whole_number() -> None:
    assert json.loads(json.dumps(cache.FORMULA)) == cache.FORMULA
    assert all(isinstance(number, int) and number >= 1 for number in cache.FORMULA.values())


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it is a minute later, so that files were not written in this very moment."""
    now = time.time()
    monkeypatch.setattr(cache.time, "time", lambda: now + 60)


def test_a_hash_is_remembered_for_old_files_and_never_for_ones_just_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    now = cache.file_hash(path)
    assert not folder.exists()
    later(monkeypatch)
    assert cache.file_hash(path) == now
    (remembered,) = (folder / "hashes").iterdir()
    monkeypatch.setattr(cache, "_sha256", lambda path, size: pytest.fail("read again"))
    assert cache.file_hash(path) == now
    monkeypatch.undo()
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(folder))
    remembered.write_text(now[:30])  # torn
    assert cache.file_hash(path) == now


def test_a_file_of_the_same_size_and_time_has_a_hash_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Archives that are unpacked with their times, and images that are built with fixed ones."""
    later(monkeypatch)
    path, hashes = tmp_path / "file", []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        os.utime(path, (10**9, 10**9))
        hashes.append(cache.file_hash(path))
        time.sleep(0.01)  # the clock of a file system ticks less often than ours
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, (10**9, 10**9))
    os.replace(other, path)
    assert len({*hashes, cache.file_hash(path)}) == 3


def test_a_long_first_hash_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "TOLD_EVERY_S", -1.0)
    (tmp_path / "file").write_bytes(b"x")
    cache.file_hash(tmp_path / "file")
    assert "hashing file, once: 0 of 0 GB" in capsys.readouterr().out


def made_of_three(into: Path) -> None:
    into.mkdir()
    np.save(into / "a.npy", np.arange(100))
    (into / "b.json").write_text('{"one": [1, 2, 3]}')
    (into / "c.bin").write_bytes(b"c" * 1000)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "changed":
        path.write_bytes(data[:-1] + b"\xff")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "emptied", "changed", "removed"])
@pytest.mark.parametrize("name", ["a.npy", "b.json", "c.bin"])
def test_a_torn_entry_is_made_again_and_a_line_says_so(name: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = cache.entry("model", "key")
    assert cache.make_once(place, made_of_three) and not cache.make_once(place, made_of_three)
    whole = (place / name).read_bytes()
    damage(place / name, how)
    assert cache.make_once(place, made_of_three)
    assert (place / name).read_bytes() == whole
    said = capsys.readouterr().out
    assert "cache: model/key is made again" in said and name in said
    assert not cache.make_once(place, made_of_three)


def test_of_a_long_file_both_ends_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "HASHED_WHOLE", 100)
    monkeypatch.setattr(cache, "END", 10)
    place = cache.entry("text", "key", ".txt")

    def write(into: Path) -> None:
        into.write_bytes(b"a" * 1000)

    cache.make_once(place, write)
    for at in (3, 995):
        place.write_bytes(b"a" * at + b"b" + b"a" * (999 - at))
        assert cache.make_once(place, write)


def test_an_entry_of_an_earlier_version_is_held_against_its_own_format(capsys: pytest.CaptureFixture[str]) -> None:
    place = cache.entry("model", "key")
    place.parent.mkdir(parents=True)
    made_of_three(place)
    assert not cache.make_once(place, made_of_three)
    damage(place / "a.npy", "cut")
    assert cache.make_once(place, made_of_three)
    assert "a.npy" in capsys.readouterr().out


def test_an_entry_of_another_formula_is_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = cache.entry("permuted", "key")
    cache.make_once(place, made_of_three)
    monkeypatch.setitem(cache.FORMULA, "permuted", 99)
    assert cache.make_once(place, made_of_three) and not cache.make_once(place, made_of_three)
    assert "permuted/key is made again: was made by formula 1, and this version has 99" in capsys.readouterr().out


def test_what_lies_outside_the_cache_is_left_alone(tmp_path: Path) -> None:
    made_of_three(tmp_path / "mine")
    damage(tmp_path / "mine" / "a.npy", "cut")
    assert not cache.make_once(tmp_path / "mine", made_of_three)


def test_what_cannot_be_read_is_gone_and_a_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    place = cache.entry("evaluation", "key", ".json")
    read = lambda path: json.loads(path.read_text())  # noqa: E731
    assert cache.read_kept(place, read) is None
    cache.replace(place, lambda into: into.write_text("[1]"))
    assert cache.read_kept(place, read) == [1]
    place.write_text("[1")
    assert cache.read_kept(place, read) is None and not place.exists()
    assert "cache: evaluation/key.json is made again: cannot be read" in capsys.readouterr().out
