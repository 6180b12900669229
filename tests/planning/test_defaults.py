"""What a configuration leaves to its teacher is derived, printed and kept in numbers; what it says is left alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_search.cli import main
from minitron_search.config.loading import load_config
from minitron_search.config.schema import Config
from minitron_search.planning.defaults import completed
from minitron_search.planning.prepare import complete, prepare
from minitron_search.records.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def teacher(inputs: Path) -> list[str]:
    """The flags of a user who gives a teacher, and a text short enough for a test; nothing of the space."""
    return [
        "--teacher.model", str(inputs / "teacher"), "--corpus.train", str(inputs / "text.txt"),
        "--corpus.validation", str(inputs / "text.txt"), "--corpus.sequence_length", "32",
        "--corpus.calibration_samples", "4", "--corpus.validation_samples", "4",
        "--winogrande.source", str(inputs / "questions.jsonl"), "--search.rungs", "64,128",
        "--distillation.batch_tokens", "64", "--retraining.tokens", "256",
    ]  # fmt: skip


def test_a_dry_run_of_another_teacher_prints_what_is_derived(
    teacher: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*teacher, "--dry-run"]) == 0
    said = capsys.readouterr().out
    shown = yaml.safe_load(said[: said.index("\nspace: ")])
    assert shown["name"] == "teacher" and shown["output"] == "runs/teacher"
    assert isinstance(shown["space"]["budget"]["params"]["target"], float)
    assert "auto" not in yaml.safe_dump(shown["space"]) and "90000000" not in said
    for line in ("name: teacher, after teacher.model", "two thirds of the teacher's", "space.axes.hidden_size: ",
                 "space.axes.num_attention_heads: the teacher's 4 in every candidate",
                 "space.axes.drop_block.lengths: "):  # fmt: skip
        assert line in said, line
    assert "legal and in budget" in said and "depth.lengths" not in said  # a stage that does not run


def test_a_run_keeps_numbers_and_goes_on_with_them(
    teacher: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same flags, from the file of the run alone, and when the rules are others by then."""
    prepared = prepare(load_config(None, teacher), resume=False)
    assert not prepared.config.is_open and "derived: space.axes.hidden_size: " in capsys.readouterr().out
    run = RunDirectory("runs/teacher")
    run.write_config(prepared.config.dump())
    assert "auto" not in yaml.safe_dump(run.read_config()["space"])
    monkeypatch.setattr("minitron_search.architecture_search.default_space.SHARE", 0.5)
    monkeypatch.setattr("minitron_search.architecture_search.default_space.MLP_STEPS", 3)
    capsys.readouterr()
    assert complete(load_config(None, teacher), resume=False)[0].space != prepared.config.space
    again, lines = complete(load_config(None, teacher), resume=True)
    assert again.dump() == prepared.config.dump() and lines == []
    assert prepare(load_config(None, teacher), resume=True).config.dump() == prepared.config.dump()
    for found in (["--output", "runs/teacher"], teacher[:2]):  # by the place that follows the teacher, too
        assert main([*found, "--resume", "--dry-run"]) == 0
        assert "derived" not in capsys.readouterr().out


def test_a_run_that_began_under_another_default_name_goes_on(teacher: list[str]) -> None:
    """As before names followed teachers."""
    begun = complete(load_config(None, [*teacher, "--name", "smollm2-135m", "--output", "old"]), resume=False)[0]
    RunDirectory("old").write_config(begun.dump())
    again, _ = complete(load_config(None, [*teacher, "--output", "old"]), resume=True)
    assert again.dump() == begun.dump()
    other, _ = complete(load_config(None, [*teacher, "--output", "old", "--name", "mine"]), resume=True)
    assert other.name == "mine"


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        (["--space.budget.params.target", "80%"], ["anchors"]),
        (["--space.budget.params.tolerance", "0.2"], ["anchors"]),
        (["--space.axes.num_attention_heads.choices", "2,4"], ["budget"]),
        (["--space.axes.drop_block.seeds", "bi"], ["budget"]),
    ],
)
def test_a_flag_changes_what_it_says_and_the_rest_stays_derived(
    teacher: list[str], flags: list[str], same: list[str]
) -> None:
    plain = complete(load_config(None, teacher), resume=False)[0].dump()["space"]
    changed = complete(load_config(None, [*teacher, *flags]), resume=False)[0].dump()["space"]
    key = flags[0].removeprefix("--space.").split(".")
    assert changed != plain and all(changed[name] == plain[name] for name in same)
    given: Any = changed
    for part in key:
        given = given[part]
    assert given not in (None, "auto")
    assert changed["axes"]["hidden_size"] and changed["axes"]["intermediate_size"] and changed["budget"]["params"]


def test_the_embedded_default_is_what_it_was() -> None:
    """Not by the rules: a change of them must not change it."""
    config, lines = completed(Config(), None)
    assert config.name == "smollm2-135m" and config.output == "runs/smollm2-135m"
    assert config.depth.lengths == (1, 2, 8, 15)
    none = {"low": None, "high": None, "step": None, "divisor": None, "choices": None}
    assert config.dump()["space"] == {
        "budget": {"params": {"target": 90e6, "tolerance": 0.05}, "non_embedding_params": None, "memory_bytes": None,
                   "latency_ms": None, "tokens_per_second": None},
        "axes": {
            "hidden_size": {**none, "low": 384, "high": 576, "step": 64},
            "intermediate_size": {**none, "low": 768, "high": 1536, "step": 128},
            "num_attention_heads": {**none, "choices": [6, 9]},
            "num_key_value_heads": None,
            "drop_block": {"lengths": [0, 2, 4, 8], "seeds": "none"},
        },
        "anchors": [], "deployable": [],
    }  # fmt: skip
    assert len(lines) == 6 and any("90,000,000, two thirds of the teacher's 134,515,008" in line for line in lines)


def test_flags_over_the_embedded_default_leave_the_rest_of_it() -> None:
    config, _ = completed(load_config(None, ["--space.axes.hidden_size.low", "448"]), None)
    assert config.space.axes.hidden_size and config.space.axes.hidden_size.values() == (448, 512, 576)
    assert config.space.axes.num_attention_heads and config.space.axes.num_attention_heads.values() == (6, 9)


def test_depth_lengths_of_a_shallow_teacher_leave_it_layers(teacher: list[str]) -> None:
    config, lines = complete(load_config(None, [*teacher, "--stages", "importance,depth,search"]), resume=False)
    assert config.depth.lengths == (1, 2) and "depth.lengths: 1, 2" in lines
