"""What a run takes of disk: counted by what it is, and held against what is free before anything is written."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_search.planning import disk, memory
from minitron_search.planning.checks import check_disk
from minitron_search.planning.forecast import in_words, resources, resources_comparison
from minitron_search.records.directory import RunDirectory
from tests.planning.test_forecast import BODY, CPUS, HEAD, config_of, costs_of


def parameters() -> int:
    costs = costs_of(config_of())
    return costs.space.measures(costs.space.typical()).params


@pytest.mark.parametrize(("search", "at_once", "expected"), [
    ({"trials": 1, "rungs": [128]}, 1, 1),
    ({"trials": 6, "rungs": [128, 256]}, 2, 6 + 2),  # two of three that go on write their second beside the first
    ({"trials": 6, "rungs": [0, 128, 256]}, 8, 3 + 1),  # untrained trims have none
    ({"trials": 1, "rungs": [128], "controls": True}, 2, 4),
])  # fmt: skip
def test_checkpoints_of_a_search_at_its_peak(search: dict[str, Any], at_once: int, expected: int) -> None:
    assert disk.searched_checkpoints(config_of(search=search), at_once) == expected


def test_a_run_is_its_checkpoints_and_its_students_and_the_cache_its_copies() -> None:
    costs, one = costs_of(config_of()), 12 * parameters()
    assert parameters() > BODY + HEAD, "with its norms"
    assert disk.run_bytes(costs, 1)["checkpoints"] == 2 * one
    assert disk.kept(costs)["best/"] == 4 * parameters()
    cached = disk.cached(costs)
    assert cached["permuted teacher"] == 4 * parameters(), "the teacher is the only student"
    assert cached["teacher's outputs"] == (1008 + 5 * 16) * 24 * 4
    assert disk.cached(costs_of(config_of(distillation={"teacher_cache": "off"})))["teacher's outputs"] == 80 * 24 * 4
    only = costs_of(config_of(stages=["search"]))
    assert disk.kept(only)["best/"] == 0 and disk.run_bytes(only, 1)["checkpoints"] == 2 * one


def test_a_disk_that_is_too_small_is_refused_and_what_is_there_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = costs_of(config_of(output=str(tmp_path / "run")))
    needed = sum(disk.run_bytes(costs, 1).values()) + sum(disk.cached(costs).values())
    for free, refused in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if refused:
            with pytest.raises(ValueError, match=r"output: .* GB free and the run needs about .* valid: a folder on a"):
                check_disk(costs, 1)
        else:
            check_disk(costs, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").write_bytes(b"0" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1000))
    check_disk(costs, 1)


def test_the_forecast_is_compared_with_the_peak_of_all_sessions(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.event("resources_taken", disk=1, driver=1, memory=1)
    assert resources_comparison(run) is None, "an old run, which was not forecast"
    run.event("resources_forecast", disk=4_100_000_000, memory=2_000_000_000, by={})
    run.event("resources_taken", disk=3_900_000_000, driver=1)  # on a cluster
    assert resources_comparison(run) == (
        "forecast 4.10 GB of disk, taken 3.90 GB; forecast 2.00 GB of memory, taken 0.00 GB"
    )


def test_a_whole_run_says_what_it_took(finished_run: Path) -> None:
    events = RunDirectory(finished_run).events()
    (forecast,), (taken,) = (
        [event for event in events if event["event"] == f"resources_{kind}"] for kind in ("forecast", "taken")
    )
    assert taken["memory"] > taken["driver"] > 1e8 and taken["disk"] > 1e6
    assert set(forecast["by"]) == {"memory", "worker", "disk", "kept"} and forecast["memory"] > 1e9


def test_a_run_is_told_in_lines_before_it_starts_and_what_does_not_fit_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = resources(costs_of(config_of()), CPUS)
    needed = sum(taken.memory.values())
    for free, lines in ((needed, 2), (needed - 1, 3)):
        monkeypatch.setattr(memory, "free_for_run", lambda free=free: free)
        said = in_words(taken)
        assert len(said) == lines and said[0].startswith("memory: 2.") and "driver 0.6" in said[0], said
        assert said[-1].startswith("disk: ") and said[-1].endswith("stay")
    assert "warning: that is more than is free" in said[1]
