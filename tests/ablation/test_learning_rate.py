"""The arms of an ablation train at one learning rate: what a probe chose for one of them is every other's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minitron_search.ablation.runner import _take_learning_rate
from minitron_search.config.loading import parse_config
from minitron_search.records.directory import RunDirectory, chosen_rate


def begun(folder: Path, teacher: str, rate: float | None = None) -> RunDirectory:
    run = RunDirectory(folder)
    run.write_config(parse_config({"teacher": {"model": teacher}}).dump())
    if rate is not None:
        run.event("learning_rate", rate=rate, how="best of a probe")
    return run


def taken(run: RunDirectory, others: list[RunDirectory], **distillation: Any) -> dict[str, Any] | None:
    rates = {"distillation": distillation, "retraining": distillation}
    config = parse_config({"teacher": {"model": "gemma"}, **rates, "name": "new"})
    prepared: Any = SimpleNamespace(run_dir=run, config=config)
    _take_learning_rate(prepared, others)
    return chosen_rate(run)


def test_an_arm_takes_the_rate_of_another_arm_with_the_same_teacher(tmp_path: Path) -> None:
    others = [RunDirectory(tmp_path / "not begun"), begun(tmp_path / "other", "qwen", 7e-5),
              begun(tmp_path / "no rate", "gemma"), begun(tmp_path / "first", "gemma", 5e-5)]  # fmt: skip
    run = RunDirectory(tmp_path / "new")
    found = taken(run, others)
    assert found is not None and (found["rate"], found["how"]) == (5e-5, "as in arm first: best of a probe")
    assert run.read_config()["name"] == "new", "a run that has an event has a configuration"
    again = taken(run, [begun(tmp_path / "second", "gemma", 1e-3)])
    assert again is not None and again["rate"] == 5e-5, "it has one"


def test_an_arm_of_another_teacher_or_of_given_rates_takes_none(tmp_path: Path) -> None:
    assert taken(RunDirectory(tmp_path / "a"), [begun(tmp_path / "other", "qwen", 7e-5)]) is None
    same = begun(tmp_path / "same", "gemma", 5e-5)
    assert taken(RunDirectory(tmp_path / "b"), [same], learning_rate=1e-4) is None


def test_a_damaged_event_leaves_the_file(tmp_path: Path) -> None:
    run = begun(tmp_path, "gemma")
    assert chosen_rate(run) is None
    run.write_learning_rate({"rate": 5e-5, "how": "best of a probe"})
    assert chosen_rate(run) == {"rate": 5e-5, "how": "best of a probe"}
