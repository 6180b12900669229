"""The content-addressed cache: ids that never change, entries that are whole or absent, made by one process."""

import json
import multiprocessing
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
