"""Text is what was written, numbers are decimal, a key is there once, and no file is read for ever."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from minitron_search.config.loading import load_config
from minitron_search.config.plain_yaml import Kind, parse
from minitron_search.config.schema import Config

TYPED = ("1.10", "010", "12:30", "1_0", "try #2", "2026-11-28", "no", "a: b", "null", "[a]", "0x10", "{a: 1}", " x ")


def value(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("key", ["name", "output", "teacher.model", "corpus.train", "winogrande.source"])
def test_text_is_taken_as_it_is_typed(key: str) -> None:
    for typed in TYPED:
        assert value(load_config(None, [f"--{key}", typed]), key) == typed
        assert value(load_config(None, [f"--{key}={typed}"]), key) == typed


def test_text_in_a_file_is_what_is_written(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for written in ("1.10", "010", "12:30", "1_0", "2026-11-28", "no", "0x10", "on"):
        file.write_text(f"name: {written}\ncorpus: {{train: {written}}}\nevaluation: {{tasks: [{written}, a]}}\n")
        config = load_config(str(file), [])
        assert (config.name, config.corpus.train, config.evaluation.tasks) == (written, written, (written, "a"))


@pytest.mark.parametrize(
    ("key", "typed", "expected"),
    [
        ("seed", "010", 10), ("seed", "9007199254740993", 9007199254740993), ("search.controls", "no", False),
        ("search.controls", "on", True), ("corpus.calibration", "null", None), ("winogrande.limit", "null", None),
        ("evaluation.tasks", "[a, 010]", ("a", "010")), ("distillation.intermediate", "0.5", 0.5),
    ],
)  # fmt: skip
def test_other_keys_are_read_by_their_own_type(key: str, typed: str, expected: Any) -> None:
    assert value(load_config(None, [f"--{key}", typed]), key) == expected


@pytest.mark.parametrize(
    ("key", "typed"),
    [
        ("seed", "12:30"), ("seed", "0x10"), ("seed", "0o10"), ("seed", "2026-11-28"), ("seed", "5 # five"),
        ("seed", "9223372036854775808"), ("seed", ".inf"), ("seed", "9" * 5000), ("search.controls", "perhaps"),
        ("output", ""), ("name", ""), ("name", "  "), ("name", "a\nb"), ("output", "s3:/bucket/x"), ("output", "s3://"),
        ("output", "~no-such-user-here/x"), ("teacher.model", "S3:bucket"), ("output", "ftp://host/x"),
        ("retraining.min_learning_rate", "1e-2"), ("retraining.warmup_steps", "33"), ("depth.lengths", "[.inf]"),
        ("distillation.temperature", "1e300"), ("distillation.temperature", ".nan"), ("importance.rounds", "1e12"),
        ("search.trials", "1e12"), ("search.tokens", "1e300"), ("distillation.batch_tokens", "1e300"),
        ("space.budget", "{memory_bytes: {target: 1B, batch_size: 1e300}}"), ("resources.gpus_per_worker", "1.5"),
        ("space.axes.hidden_size", "{low: 1, high: 4B, step: 1}"), ("retraining.learning_rate", "1e31"),
        ("space.axes.hidden_size", "{low: 1, high: 9M, step: 1}"), ("space.budget.params.target", "1e300"),
        ("space.axes.hidden_size", "{low: 1, low: 2, high: 3, step: 1}"), ("resources.price_per_hour", ".inf"),
        ("teacher.correction", "{method: full, tokens: 1K, warmup_steps: 100}"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(key: str, typed: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_config(None, [f"--{key}={typed}"])
    said = str(refused.value)
    assert key in said and "valid: " in said and "\n" not in said and len(said) < 1000


def test_home_and_addresses_mean_what_they_say(tmp_path: Path) -> None:
    for key in ("output", "teacher.model", "corpus.train", "winogrande.source", "distillation.teacher"):
        assert value(load_config(None, [f"--{key}", "~/x"]), key) == str(Path.home() / "x")
    assert load_config(None, ["--output", "S3://Bucket/X"]).output == "s3://Bucket/X"
    (tmp_path / "home.yaml").write_text("output: ~/there\nteacher: {model: ~/m}\nname: ~/n")
    config = load_config(str(tmp_path / "home.yaml"), [])
    assert (config.output, config.name) == (str(Path.home() / "there"), "~/n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nname: a\nseed: 2\n", "line 3: seed is given twice, first in line 1"),
        ("search: {trials: 2,\n  trials: 3}\n", "line 2: search.trials is given twice"),
        ("arms: {a: {}, a: {}}\n", "arms.a is given twice"),
        ("a: &a [*a]\n", "an alias holds itself"),
        ("[" * 50_000, "nested too deeply"),
        ("a: 1\n---\nb: 2\n", "not valid YAML: line 2: but found another document"),
        ("? [a]\n: 1\n", "a key is a list"),
        ("seed: !!python/object:os.getcwd x\n", "not valid YAML: line 1"),
        ("a: &a [" + "1," * 99 + "1]\nb: &b [" + "*a," * 99 + "*a]\nc: [" + "*b," * 99 + "*b]\n", "more than 20,000"),
        ("# " + "x" * 2**21, "valid: a YAML file of at most"),
    ],
)
def test_files_that_are_read_one_way_by_people_and_another_by_yaml(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    began = time.monotonic()
    with pytest.raises(ValueError, match=said) as refused:
        load_config(str(file), [])
    assert "\n" not in str(refused.value) and "valid: " in str(refused.value)
    assert time.monotonic() - began < 5


def test_anchors_and_merge_keys_are_yaml_still(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("search: &s {trials: 5, seeds: 2}\ndistillation: {batch_tokens: 2K}\nspace: {axes: {}}\n")
    assert load_config(str(file), []).search.trials == 5
    file.write_text("corpus: {train: &t 010, validation: *t}\nspace:\n  axes:\n    hidden_size: &h {low: 8, high: 16, "
                    "step: 8}\n    intermediate_size: {<<: *h, high: 24}\n")  # fmt: skip
    config = load_config(str(file), [])
    assert config.corpus.validation == "010"
    assert config.space.axes.intermediate_size is not None
    assert config.space.axes.intermediate_size.values() == (8, 16, 24)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for file in (str(tmp_path / "pipe.yaml"), "/dev/zero", str(tmp_path)):
        with pytest.raises(ValueError, match=r"--config: .* is (a folder|not a regular file); valid: "):
            load_config(file, [])


def test_a_tag_that_its_value_contradicts_is_named_with_its_line() -> None:
    with pytest.raises(ValueError, match="here, line 2: .*'x'; valid: the value without a tag"):
        parse("a: 1\nseed: !!int x\n", "here", lambda key: Kind.OTHER)
