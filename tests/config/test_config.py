"""What people write is understood; what is wrong is named, with its value and what would have been right."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from minitron_search.config.keys import keys
from minitron_search.config.loading import differences, load_config, parse_config
from minitron_search.config.schema import Config
from minitron_search.config.space import Axis
from minitron_search.records.paths import cache_folder

# The interface: these keys are what users have written down. Values may differ from today's defaults.
INTERFACE = """
name: smollm2-135m
output: runs/smollm2-135m              # a folder or a pyarrow filesystem URI (s3://, gs://, file://)
seed: 0
precision: auto                        # float32, bfloat16, or auto: bfloat16 where the hardware is faster at it
stages: [importance, depth, search, retrain, report]
teacher: {model: smollm2-135m}         # the embedded default's name, a folder, or a Hub name
corpus:
  train: docstrings                    # the embedded text, a .txt/.jsonl/.parquet file or glob, or a Hub data set
  validation: docstrings               # disjoint from train even when the source is the same
  sequence_length: 256
  calibration_samples: 64
  validation_samples: 32
winogrande: {source: embedded, limit: null, shots: 0}   # embedded, a .jsonl file, or allenai/winogrande
importance: {batch: l2, sequence: mean}
depth: {lengths: [1, 2, 8, 15], metrics: [lm_loss, winogrande, bi], workers: auto}
space:
  budget: {params: {target: 90M, tolerance: 0.05}}       # also non_embedding_params, memory_bytes; several are ANDed
  axes:
    hidden_size: {low: 384, high: 576, step: 64}
    intermediate_size: {low: 768, high: 1536, step: 128}
    num_attention_heads: {choices: [6, 9]}
    drop_block: {lengths: [0, 2, 4, 8]}                  # a contiguous block: length, and where it starts
  anchors: []                          # always evaluated
search: {trials: 12, sampler: tpe, objective: lm_loss, rungs: [8K, 32K], reduction_factor: 3, concurrency: auto,
  promote: 1, seeds: 1}
distillation: {loss: kld, temperature: 1.0, intermediate: 0.0, learning_rate: 3e-4, batch_tokens: 2K,
  teacher_cache: auto}
retraining: {tokens: 256K, learning_rate: 1e-4, min_learning_rate: 1e-5, warmup_steps: 40, schedule: cosine}
evaluation: {tasks: []}                # lm-eval task names, run on the teacher and on every promoted student
resources: {launcher: train, workers_per_trial: 1, cpus_per_worker: 1, gpus_per_worker: 0, strategy: ddp}
"""


def nested(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a plain configuration."""
    found = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def message(values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(values)
    return str(caught.value)


def flag_message(*flags: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(None, list(flags))
    return str(caught.value)


def test_every_key_of_the_interface_is_known_and_kept() -> None:
    written = yaml.safe_load(INTERFACE)
    read = leaves(parse_config(written).dump())
    assert set(leaves(written)) <= set(read)
    assert read["space.budget.params.target"] == 90e6 and read["distillation.learning_rate"] == 3e-4


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("8K", 8_000), ("8k", 8_000), ("2K", 2_000), ("90M", 90_000_000), ("4.5B", 4_500_000_000), ("1.1M", 1_100_000),
        ("4.0e9", 4_000_000_000), ("1e6", 1_000_000), ("1T", 10**12), ("1_000_000", 1_000_000), (" 12 ", 12),
        (12, 12), (12.0, 12), ("0.5K", 500), (".5M", 500_000), ("2e3K", 2_000_000),
    ],
)  # fmt: skip
def test_counts_as_people_write_them(written: Any, number: int) -> None:
    tokens = parse_config({"retraining": {"tokens": written}}).retraining.tokens
    assert tokens == number and isinstance(tokens, int)
    if isinstance(written, str):
        assert load_config(None, ["--retraining.tokens", written]).retraining.tokens == number


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-4", 1e-4), ("3E-4", 3e-4), ("0.0003", 3e-4), (3e-4, 3e-4), (1, 1.0), (".5", 0.5), ("2", 2.0)],
)
def test_reals_as_people_write_them(written: Any, number: float) -> None:
    assert parse_config({"distillation": {"learning_rate": written}}).distillation.learning_rate == number
    loaded = load_config(None, [f"--distillation.learning_rate={written}"])
    assert loaded.distillation.learning_rate == number


@given(st.integers(1, 10**12))
def test_every_whole_number_is_read_as_itself(number: int) -> None:
    assert parse_config({"retraining": {"tokens": number}}).retraining.tokens == number
    assert parse_config({"retraining": {"tokens": f"{number}"}}).retraining.tokens == number
    assert parse_config({"retraining": {"tokens": f"{number // 10}.{number % 10}K"}}).retraining.tokens == number * 100


@pytest.mark.parametrize("wrong", ["many", "8Q", "8KK", "1e400", "", "-3", "1.5", 2.5, True, None, [8], {"a": 1},
                                   float("nan"), float("inf")])  # fmt: skip
def test_what_is_no_count_is_refused_with_its_key_and_value(wrong: Any) -> None:
    shown = wrong if wrong == "1.5" else repr(wrong)  # a number, if no count
    assert message({"retraining": {"tokens": wrong}}).startswith(f"retraining.tokens: {shown}")


def test_off_is_a_value_though_yaml_reads_it_as_false(tmp_path: Path) -> None:
    (tmp_path / "off.yaml").write_text("distillation: {teacher_cache: off}")
    written = load_config(str(tmp_path / "off.yaml"), [])
    assert written == load_config(None, ["--distillation.teacher_cache", "off"])
    assert written.distillation.teacher_cache == "off"
    assert parse_config(yaml.safe_load(yaml.safe_dump(written.dump()))) == written


LEAVES = [
    name
    for name, default in keys()
    if not isinstance(default, BaseModel)
    and not name.startswith(("space.anchors.", "space.axes.", "space.budget."))
    and name != "space.anchors"
]


@pytest.mark.parametrize("key", LEAVES)
@settings(max_examples=15, deadline=None)
@given(wrong=st.sampled_from([{"oops": 1}, [{"oops": 1}], [[]], object()]))
def test_a_value_of_the_wrong_type_is_named_everywhere(key: str, wrong: Any) -> None:
    assert key in message(nested(key, wrong))


@pytest.mark.parametrize(
    "key", [name for name, default in keys() if isinstance(default, BaseModel) and name.count(".") == 0]
)
def test_a_section_that_is_none_is_named(key: str) -> None:
    for wrong in (5, "text", [1], None):
        assert message({key: wrong}).startswith(f"{key}: {wrong!r}")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"stages": ["importance", "depht"]}, ["stages.1: 'depht'", "'depth'"]),
        ({"precision": "float16"}, ["precision: 'float16'", "'float32'", "'bfloat16'"]),
        ({"search": {"concurrency": 0}}, ["search.concurrency: 0", "1"]),
        ({"search": {"rungs": ["32K", "8K"]}}, ["search.rungs: [32000, 8000]", "[8K, 32K]"]),
        ({"search": {"rungs": ["8K", "8K"]}}, ["search.rungs"]),
        ({"search": {"trials": 2, "promote": 3}}, ["search.promote: 3 of 2", "at most 2"]),
        ({"search": {"reduction_factor": 1}}, ["search.reduction_factor: 1", "2"]),
        ({"corpus": {"sequence_length": 4}}, ["corpus.sequence_length: 4", "8"]),
        ({"depth": {"lengths": [1, 2.5]}}, ["depth.lengths: 2.5", "2 or 0.5"]),
        ({"depth": {"lengths": [0]}}, ["depth.lengths", "greater than 0"]),
        ({"distillation": {"temperature": 0}}, ["distillation.temperature: 0", "greater than 0"]),
        ({"distillation": {"topk": 0}}, ["distillation.topk: 0", "greater than or equal to 1"]),
        ({"distillation": {"teacher_cache": "logits"}}, ["distillation.teacher_cache: 'logits'", "'topk'"]),
        ({"distillation": {"teacher_cache_bytes": "half"}}, ["distillation.teacher_cache_bytes: 'half'"]),
        ({"distillation": {"teacher_cache": "topk", "temperature": 2}},
         ["distillation.teacher_cache: topk", "temperature 2", "valid: teacher_cache hidden"]),
        ({"distillation": {"teacher_cache": "topk", "loss": "ce"}}, ["distillation.teacher_cache: topk", "loss ce"]),
        ({"space": {"budget": {}}}, ["space.budget", "{target: 90M"]),
        ({"space": {"budget": {"params": {"target": "90X"}}}}, ["space.budget.params.target: '90X'"]),
        ({"space": {"budget": {"params": {"target": 1, "tolerance": 1}}}}, ["space.budget.params.tolerance: 1"]),
        ({"space": {"axes": {"hidden_size": {"low": 8}}}}, ["space.axes.hidden_size", "low, high and one of"]),
        ({"space": {"axes": {"hidden_size": {"low": 8, "high": 4, "step": 2}}}}, ["low 8 is above high 4"]),
        ({"space": {"axes": {"hidden_size": {"low": 8, "high": 9, "step": 1, "choices": [8]}}}}, ["either choices"]),
        ({"space": {"axes": {"hidden_size": {"choices": []}}}}, ["space.axes.hidden_size"]),
        ({"space": {"axes": {"hidden_size": {"low": 8, "high": 9, "step": 1, "divisor": 1}}}},
         ["space.axes.hidden_size", "one of step and divisor"]),
        ({"space": {"axes": {"hidden_size": {"low": 8, "high": 9}}}}, ["space.axes.hidden_size", "divisor: 64"]),
        ({"space": {"axes": {"hidden_size": {"low": 65, "high": 127, "divisor": 64}}}},
         ["low 65 to high 127 holds no multiple of divisor 64", "valid: high at least 128"]),
        ({"space": {"budget": {"latency_ms": {"target": 0}}}}, ["space.budget.latency_ms.target: 0"]),
        ({"space": {"budget": {"latency": {"target": 5}}}}, ["did you mean space.budget.latency_ms"]),
        ({"space": {"axes": {"intermediate_size": {"choices": [[8, 9], [8, 8]]}}}},
         ["space.axes.intermediate_size", "a size for every layer", "valid: choices"]),
        ({"space": {"axes": {"hidden_size": {"choices": ["x"]}}}}, ["space.axes.hidden_size.choices.0: 'x'"]),
        ({"space": {"axes": {"drop_block": {"lengths": []}}}}, ["space.axes.drop_block.lengths: []"]),
        ({"space": {"anchors": [{"hidden_size": "x"}]}}, ["space.anchors.0.hidden_size: 'x'"]),
        ({"space": {"anchors": [{"drop_block": [1]}]}}, ["space.anchors.0.drop_block"]),
        ({"resources": {"launcher": "inline", "workers_per_trial": 2}}, ["resources.launcher", "valid"]),
        ({"resources": {"launcher": "inline", "strategy": "fsdp2"}}, ["resources.strategy: fsdp2", "valid", "ddp"]),
        ({"resources": {"strategy": "fsdp"}}, ["resources.strategy: 'fsdp'", "'ddp' or 'fsdp2'"]),
        ({"resources": {"workers_per_trial": 3}}, ["distillation.batch_tokens: 1000 is 4 windows", "valid: 1536"]),
        ({"winogrande": {"limit": 1}}, ["winogrande.limit: 1", "2"]),
    ],
)  # fmt: skip
def test_a_value_outside_its_field_says_what_is_inside(values: Any, parts: list[str]) -> None:
    said = message(values)
    assert all(part in said for part in parts), said


def test_every_wrong_key_is_told_at_once() -> None:
    said = message({"seed": "x", "search": {"trials": "y", "rungz": 1}, "corpus": {"train": 5}})
    assert len(said.splitlines()) == 4
    assert all(part in said for part in ("seed: 'x'", "search.trials: 'y'", "search.rungz", "corpus.train: 5"))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("search.trails", "search.trials"),
        ("serch.trials", "search"),
        ("trials", "search.trials"),
        ("serch", "search"),
        ("space.axes.hiden_size", "space.axes.hidden_size"),
        ("space.budget.param.target", "space.budget.param"),
        ("distillation.temprature", "distillation.temperature"),
        ("teacher.modle", "teacher.model"),
    ],
)
def test_an_unknown_key_is_told_what_it_resembles(key: str, meant: str) -> None:
    for said in (message(nested(key, 5)), flag_message(f"--{key}", "5")):
        assert "unknown key" in said and meant in said, said


def test_an_unknown_key_that_resembles_nothing_is_told_what_there_is() -> None:
    assert "valid: name, output, seed" in message({"zzzzz": 1})


# Files and flags


def test_flags_merge_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("search: {trials: 5, rungs: [1K, 2K]}\nseed: 3\nspace: {axes: {hidden_size: {choices: [8]}}}\n")
    loaded = load_config(str(file), ["--search.trials", "16", "--space.axes.hidden_size.choices=8,16", "--seed=4"])
    assert loaded.search.trials == 16 and loaded.seed == 4
    assert loaded.search.rungs == (1000, 2000)
    assert loaded.search.seeds == Config().search.seeds
    assert loaded.space.axes.hidden_size is not None and loaded.space.axes.hidden_size.values() == (8, 16)
    # a section that the file names keeps the defaults of what it leaves out, and only those
    assert loaded.space.axes.intermediate_size is None
    assert loaded.space.budget == Config().space.budget


@given(st.integers(1, 200), st.integers(0, 200), st.integers(1, 50))
def test_an_axis_by_divisor_holds_every_multiple_in_its_range(low: int, more: int, divisor: int) -> None:
    expected = tuple(value for value in range(low, low + more + 1) if value % divisor == 0)
    axis = {"low": low, "high": low + more, "divisor": divisor}
    if expected:
        assert Axis(**axis).values() == expected
    else:
        assert "no multiple" in message({"space": {"axes": {"hidden_size": axis}}})


def test_an_optional_section_is_opened_by_a_flag() -> None:
    budget = load_config(None, ["--space.budget.non_embedding_params.target", "50M"]).space.budget
    assert budget.non_embedding_params is not None and budget.non_embedding_params.target == 50e6
    assert budget.params == Config().space.budget.params  # several are ANDed
    closed = load_config(None, ["--space.budget", "{memory_bytes: {target: 1B}}"]).space.budget
    assert closed.params is None and closed.memory_bytes is not None


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--stages", "depth,report"], "stages", ["depth", "report"]),
        (["--stages", "report"], "stages", ["report"]),
        (["--search.rungs", "1K,2K"], "search.rungs", [1000, 2000]),
        (["--search.rungs=[1K, 2K]"], "search.rungs", [1000, 2000]),
        (["--search.rungs", "4K"], "search.rungs", [4000]),
        (["--depth.lengths", "1,0.25,8"], "depth.lengths", [1, 0.25, 8]),
        (["--winogrande.limit", "null"], "winogrande.limit", None),
        (["--winogrande.limit", "40"], "winogrande.limit", 40),
        (["--search.concurrency", "4"], "search.concurrency", 4),
        (["--search.concurrency", "auto"], "search.concurrency", "auto"),
        (["--corpus.train", "*.txt"], "corpus.train", "*.txt"),
        (["--corpus.train", "data/[ab].txt"], "corpus.train", "data/[ab].txt"),
        (["--corpus.sequence-length", "64"], "corpus.sequence_length", 64),
        (["--evaluation.tasks", "winogrande,arc_easy"], "evaluation.tasks", ["winogrande", "arc_easy"]),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--distillation.learning_rate", "1e-4"], "distillation.learning_rate", 1e-4),
    ],
)
def test_flags_are_read_as_people_write_them(flags: list[str], key: str, value: Any) -> None:
    assert leaves(load_config(None, flags).dump())[key] == value


def test_flags_without_sense_are_refused() -> None:
    assert flag_message("--search.trials") == "--search.trials: no value given; valid: --search.trials INT"
    assert flag_message("--search.trails") == "--search.trails: no value given; did you mean search.trials?"
    assert "--search.trials: no value given" in flag_message("--search.trials", "--seed", "1")
    assert "'search.trials' is not an option" in flag_message("search.trials", "5")
    assert "trials is 12, not a section; did you mean search.trials?" in flag_message("--search.trials.x", "5")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("seed: 1")
    for name, content, part in [
        ("missing.yaml", None, "other.yaml"),
        ("broken.yaml", "a: [1", "is not valid YAML"),
        ("list.yaml", "[1, 2]", "holds a list"),
    ]:
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"(?s)--config: .*{name}.*{part}"):
            load_config(str(tmp_path / name), [])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(str(tmp_path / "empty.yaml"), []) == Config()


def test_the_output_follows_the_name_unless_it_is_given(tmp_path: Path) -> None:
    assert Config().output == "runs/smollm2-135m"
    assert parse_config({"name": "a"}).output == "runs/a"
    assert load_config(None, ["--name", "b"]).output == "runs/b"
    assert load_config(None, ["--name", "b", "--output", "elsewhere"]).output == "elsewhere"
    file = tmp_path / "run.yaml"
    file.write_text("name: a\n")
    assert load_config(str(file), []).output == "runs/a"
    assert load_config(str(file), ["--name", "b"]).output == "runs/b"
    file.write_text("name: a\noutput: there\n")
    assert load_config(str(file), ["--name", "b"]).output == "there"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "smollm2-135m"), ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("./folder/", "folder"),
        ("/a/my models/one (2)", "one-2"), ("runs/tiny/best", "tiny-best"), ("runs/tiny/best-2", "tiny-best-2"),
        ("s3://bucket/run/best?region=eu", "run-best"), ("..", "teacher"), ("/models/日本", "teacher"),
        ("/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b", "Qwen2.5-0.5B"), ("/m/" + "x" * 200, "x" * 80),
    ],
)  # fmt: skip
def test_the_name_follows_the_teacher_as_a_file_may_be_called(model: str, name: str, tmp_path: Path) -> None:
    loaded = load_config(None, ["--teacher.model", model])
    assert loaded.name == name and loaded.output == f"runs/{name}"
    assert load_config(None, ["--teacher.model", model, "--name", "b"]).output == "runs/b"
    (tmp_path / "run.yaml").write_text("name: a\n")
    assert load_config(str(tmp_path / "run.yaml"), ["--teacher.model", model]).output == "runs/a"


# Budgets of the teacher's, and what is left to it


@pytest.mark.parametrize(
    ("written", "read"),
    [("67%", "67%"), ("66.60 %", "66.6%"), (".5%", "0.5%"), ("auto", "auto"), ("90M", 90e6), (1, 1.0), ("1e6", 1e6)],
)
def test_a_budget_is_a_number_a_share_of_the_teachers_or_auto(written: Any, read: Any) -> None:
    for name in ("params", "non_embedding_params", "memory_bytes"):
        budget = load_config(None, [f"--space.budget.{name}.target", str(written)]).space.budget
        assert getattr(budget, name).target == read == getattr(parse_config(
            {"space": {"budget": {name: {"target": written}}}}).space.budget, name).target  # fmt: skip


@pytest.mark.parametrize(
    "wrong", ["0%", "100%", "250%", "-5%", "%", "x%", "50%%", "1e1000", "nan", "0", "-1", "2e18", ""]
)
def test_a_budget_that_makes_no_sense_is_refused(wrong: str) -> None:
    said = flag_message("--space.budget.params.target", wrong)
    assert said.startswith("space.budget.params.target: ") and "valid: " in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["latency_ms", "tokens_per_second"])
@pytest.mark.parametrize("target", ["67%", "auto", None])
def test_a_budget_on_speed_is_a_number(name: str, target: str | None) -> None:
    bound = {"tolerance": 0.1} if target is None else {"target": target}
    assert message({"space": {"budget": {name: bound}}}).startswith(f"space.budget.{name}.target: ")


def test_a_flag_for_a_part_leaves_the_other_parts_to_be_derived() -> None:
    axes = load_config(None, ["--space.axes.hidden_size.low", "448", "--space.axes.drop_block.seeds", "bi"]).space.axes
    assert axes.hidden_size == Axis(low=448, high="auto", step="auto") and axes.hidden_size.open
    assert axes.drop_block and axes.drop_block.seeds == "bi" and axes.drop_block.lengths == "auto"
    over = load_config(None, ["--space.axes.hidden_size.choices", "448,512"]).space.axes.hidden_size
    assert over == Axis(choices=(448, 512)) and not over.open
    divided = load_config(None, ["--space.axes.hidden_size.divisor", "32"]).space.axes.hidden_size
    assert divided == Axis(low="auto", high="auto", divisor=32)
    tolerance = load_config(None, ["--space.budget.params.tolerance", "0.02"]).space.budget.params
    assert tolerance and (tolerance.target, tolerance.tolerance) == ("auto", 0.02)


def test_auto_in_the_place_of_a_mapping_is_all_of_it() -> None:
    assert load_config(None, ["--space.axes", "auto", "--space.budget", "auto"]) == Config()
    one = parse_config({"space": {"axes": {"hidden_size": "auto", "drop_block": "auto"}}}).space.axes
    assert one.hidden_size == Config().space.axes.hidden_size and one.drop_block == Config().space.axes.drop_block
    assert one.intermediate_size is None and Config().space.open and Config().is_open


# What is written and read again


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--name", "a", "--winogrande.limit", "7", "--depth.lengths", "1,0.5"],
        ["--space.anchors", "[{hidden_size: 8, drop_block: [1, 2]}]", "--search.concurrency", "3"],
        ["--space.budget", "{memory_bytes: {target: 1B, batch_size: 4}, params: {target: 2M}}"],
        ["--space.axes", "{}", "--distillation.loss", "clm+kld", "--resources.gpus_per_worker", "0.5"],
    ],
)
def test_a_dumped_configuration_parses_to_itself(flags: list[str]) -> None:
    config = load_config(None, flags)
    written = yaml.safe_dump(config.dump(), sort_keys=False)
    assert parse_config(yaml.safe_load(written)) == config
    assert parse_config(yaml.safe_load(written)).dump() == config.dump()
    assert not list(differences(yaml.safe_load(written), config.dump()))


def test_differences_name_every_key_that_differs_and_no_other() -> None:
    there = load_config(None, ["--search.trials", "3", "--space.budget.memory_bytes.target", "1M"]).dump()
    asked = load_config(None, ["--search.rungs", "1K"]).dump()
    found = sorted(line.partition(": ")[0] for line in differences(there, asked))
    assert found == ["search.rungs", "search.trials", "space.budget.memory_bytes"]
    assert "search.trials: 3 there, 12 asked now" in list(differences(there, asked))
    assert list(differences({"a": 1}, {"b": 2})) == ["a: 1 there, None asked now", "b: None there, 2 asked now"]


def test_keys_name_every_leaf_of_the_configuration_once() -> None:
    names = [name for name, _ in keys()]
    assert len(names) == len(set(names))
    assert {name for name in leaves(Config().dump()) if not name.startswith("space.")} <= set(names)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError):
        Config().seed = 1


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", "~/here")
    assert cache_folder() == Path.home() / "here"
    monkeypatch.delenv("MINITRON_SEARCH_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "minitron_search"


@pytest.mark.parametrize("name", ["teacher", "best", "best-2"])
def test_a_reference_does_not_take_the_place_of_the_runs_own_models(name: str) -> None:
    with pytest.raises(ValueError, match=rf"evaluation.references: {name} .*valid: \./{name}"):
        parse_config({"evaluation": {"tasks": ["winogrande"], "references": [name]}})
    parse_config({"evaluation": {"tasks": ["winogrande"], "references": [f"./{name}"]}})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--search.objective="], "search.objective: "),
        (["--space.axes.hidden_size", "{choices: []}"], "valid: choices: [6, 9], or low, high and step"),
        (["--space.axes.hidden_size", "{low: 16}"], "valid: {low: 384, high: 576, step: 64}"),
        (["--output", "file:/x/y"], "valid: file:///x/y"),
        (["--output", "file://localhost/x"], "valid: file:///localhost/x"),
        (["--output", "file:"], "valid: file:///runs/first"),
    ],
)
def test_a_fault_is_one_line_with_what_would_be_valid(flags: list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, flags)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 and "valid: " in lines[0] and said in lines[0]
