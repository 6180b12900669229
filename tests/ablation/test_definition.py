"""What a YAML of arms means, what of it is refused before anything is written, and what is made of the rows."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import CONFIG_MAPPING

from minitron_search.ablation.definition import Ablation, checked, load
from minitron_search.ablation.differences import differences, read_arms, shown, write_differences
from minitron_search.ablation.runner import prepare_ablation, run_ablation
from minitron_search.ablation.shapes import shaped
from minitron_search.architecture_search.default_space import two_digits
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.cli import main
from minitron_search.cluster.session import UnfitError
from minitron_search.config.loading import is_ablation, parse_config
from minitron_search.config.loading import load_config as load_config
from minitron_search.evaluation.statistics import holm
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, sizes_of, weights, whole
from minitron_search.planning.prepare import Prepared, check
from minitron_search.records.directory import RunDirectory
from minitron_search.teachers.sources import teacher_config
from tests import tiny
from tests.evaluation.test_evidence import WINDOWS, log

SHIPPED = sorted((Path(__file__).parents[2] / "search_spaces" / "ablations").glob("*.yaml"))
STATED = ["--resources.mfu", "0.5", "--resources.flops_per_second", "1T"]  # else a dry run measures this machine


# Those that come with it


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_ablation_that_comes_with_it_is_in_order(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    output = ["--output", str(tmp_path / "run")]
    assert main(["--config", str(path), *output, "--dry-run", *STATED]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    if not is_ablation(str(path)):
        return
    found = load(str(path), output)
    assert found.question.endswith("?") and found.figure and len(found.changes) >= 2
    about = found.about()
    assert about["tokens"] == 16_384 and about["seeds"] == [0, 1, 2]
    assert all(arm in said for arm in about["arms"])
    runs = checked(found, resume=False)
    for arm, (config, space) in runs.items():
        if arm in about["arms"]:
            assert config.search.rungs == (0, 4096, 16_384) and config.search.trials == 1
            params = [space.measures(architecture).params for architecture in space.architectures()]
            assert max(params) <= 1.01 * min(params)
    waiting = [arm for arm in about["arms"] if arm not in runs]
    assert all(found.waits(arm, found.changes[arm]) for arm in waiting) and (not waiting or found.before)


def test_what_is_compared_at_equal_parameters_has_equal_parameters(tmp_path: Path) -> None:
    for name in ("figure-7", "other-methods"):
        (path,) = (path for path in SHIPPED if path.stem == name)
        spaces = [space for _, space in checked(load(str(path), ["--output", str(tmp_path / name)]), False).values()]
        params = [space.measures(architecture).params for space in spaces for architecture in space.architectures()]
        assert max(params) < 1.005 * min(params)


def test_the_base_is_a_configuration_by_itself(tmp_path: Path) -> None:
    (base,) = (path for path in SHIPPED if path.stem == "smollm2")
    check(load_config(str(base), ["--output", str(tmp_path / "run")]), resume=False)


# What a YAML means


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.input_files(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def values(inputs: Path) -> dict[str, Any]:
    """An ablation that would start."""
    text = str(inputs / "text.txt")
    return {
        "question": "Is it?",
        "architecture": {"hidden_size": 20},
        "teacher": {"model": str(inputs / "teacher")},
        "corpus": {"train": text, "validation": text, "sequence_length": 32, "calibration_samples": 4,
                   "validation_samples": 4},
        "winogrande": {"source": str(inputs / "questions.jsonl")},
        "space": {"budget": {"params": {"target": "15K", "tolerance": 0.5}}},
        "search": {"rungs": [0, 64, 128], "seeds": 2},
        "distillation": {"batch_tokens": 64},
        "arms": {"plain": {}, "other": {"distillation": {"loss": "ce"}}},
    }  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("minitron_search.cluster.session.joined", lambda: pytest.fail("nothing here needs Ray"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


Loaded = Callable[..., Ablation]


@pytest.fixture
def loaded(values: dict[str, Any], here: Path) -> Loaded:
    def made(*flags: str, **over: Any) -> Ablation:
        Path("a.yaml").write_text(yaml.safe_dump({**values, **over}, sort_keys=False))
        return load("a.yaml", list(flags))

    return made


def test_arms_are_runs_that_differ_in_what_they_say(loaded: Loaded) -> None:
    found = loaded()
    plain, other = (found.config(arm).dump() for arm in ("plain", "other"))
    assert plain["distillation"]["loss"] == "kld" and other["distillation"]["loss"] == "ce"
    for config, arm in ((plain, "plain"), (other, "other")):
        assert config.pop("output") == f"runs/a/{arm}" and config.pop("name") == f"a-{arm}"
        config["distillation"].pop("loss")
    assert plain == other
    assert plain["stages"] == ["importance", "search"] and plain["retraining"]["tokens"] == 128
    assert plain["search"]["trials"] == 1 and plain["search"]["seeds"] == 2 and not plain["search"]["controls"]
    about = found.about()
    assert about["seeds"] == [0, 1] and about["tokens"] == 128 and about["baseline"] == "plain"
    assert about["arms"] == ["plain", "other"], "in the order of the file"


def test_flags_are_for_all_arms_or_for_one(loaded: Loaded) -> None:
    found = loaded("--distillation.learning_rate", "1e-4", "--arms.other.distillation.loss", "js", "--output", "there",
                   "--seed", "3", "--baseline", "other")  # fmt: skip
    plain, other = (found.config(arm) for arm in ("plain", "other"))
    assert plain.distillation.learning_rate == other.distillation.learning_rate == 1e-4
    assert (plain.distillation.loss, other.distillation.loss) == ("kld", "js")
    assert other.output == "there/other" and found.about()["seeds"] == [3, 4] and found.baseline == "other"


def test_three_seeds_unless_given(loaded: Loaded) -> None:
    found = loaded(search={"rungs": [64]})
    assert found.about()["seeds"] == [0, 1, 2] and found.config("plain").search.seeds == 3


def test_a_base_lies_under_and_its_search_is_not_read(loaded: Loaded, values: dict[str, Any]) -> None:
    base = {"name": "base", "output": "elsewhere", "stages": ["depth"], "seed": 5,
            "search": {"trials": 96, "rungs": [0, 64], "promote": 3}, "distillation": {"temperature": 2.0}}  # fmt: skip
    Path("base.yaml").write_text(yaml.safe_dump(base))
    config = loaded(base="base.yaml").config("plain")
    assert config.seed == 5 and config.distillation.temperature == 2 and config.search.trials == 1
    assert config.search.rungs == (0, 64, 128), "what the ablation says is over it"
    assert config.output == "runs/a/plain" and "search" in config.stages


def test_an_arm_s_architecture_is_in_the_place_of_the_others(loaded: Loaded) -> None:
    swept = {"intermediate_size": 16, "drop_block": {"lengths": [1], "seeds": "sweep"}}
    arms = {"narrow": {}, "flat": {"architecture": {"drop_block": [1, 2]}}, "rule": {"architecture": "depth_bi"},
            "swept": {"architecture": swept}}  # fmt: skip
    found = loaded(arms=arms)
    runs = checked(found, resume=False)
    narrow, flat, rule, swept_run = (runs[arm] for arm in arms)
    assert [architecture.hidden_size for architecture in narrow[1].architectures()] == [20]
    assert flat[1].anchors[0].layers == (0, 3) and flat[1].anchors[0].hidden_size == 24
    block = rule[0].space.axes.drop_block
    assert block and block.seeds == "bi" and len(block.lengths) == 1
    assert swept_run[0].stages == ("importance", "depth", "search") and swept_run[0].depth.lengths == (1,)
    assert next(swept_run[1].architectures()).intermediate_size == 16


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "phi", "qwen3"])
@pytest.mark.parametrize("share", [0.6, 0.8])
def test_the_width_rule_shrinks_both_widths_alike_to_the_budget(
    model_type: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the sizes that a family's configuration has by itself: those of its first model."""
    teacher = CONFIG_MAPPING[model_type]()
    monkeypatch.setattr("minitron_search.ablation.shapes.teacher_config", lambda name: teacher)
    target, full = share * parameter_count(weights(teacher), sizes(teacher)), whole(teacher)
    config = parse_config({"space": {"budget": {"params": {"target": target, "tolerance": 0.05}}, "axes": {}}})
    (shape,) = SearchSpace(parse_config({"space": {**config.dump()["space"], **shaped("width", config)}}).space,
                           teacher).architectures()  # fmt: skip
    assert shape.layers == full.layers
    assert parameter_count(weights(teacher), sizes_of(teacher, shape)) == pytest.approx(target, rel=0.01)
    assert shape.num_attention_heads == full.num_attention_heads or model_type == "gpt2"
    kept = shape.hidden_size / full.hidden_size, shape.intermediate_size / full.intermediate_size
    assert max(kept) < 1 and kept[0] == pytest.approx(kept[1], rel=0.2)


def test_arms_of_other_calibration_or_another_teacher_distil_on_the_same_text(loaded: Loaded) -> None:
    found = loaded(
        importance={"samples": 2},
        arms={"two": {}, "four": {"importance": {"samples": 4}}, "drawn": {"importance": {"seed": 9}},
              "random": {"corpus": {"calibration": "random"}},
              "corrected": {"teacher": {"correction": {"method": "full"}}},
              "ranked": {"importance": {"method": "taylor"}}, "narrow": {"architecture": "depth_one_by_one"}},
    )  # fmt: skip
    made = prepare_ablation(found, resume=False)
    assert list(made) == list(found.changes) and not Path("runs").exists()
    first = made["two"].corpus
    for prepared in made.values():
        assert (prepared.corpus.train == first.train).all() and (prepared.corpus.validation == first.validation).all()
    assert (made["random"].corpus.calibration != first.calibration).any()


@pytest.mark.parametrize("budget", [{}, {"budget": {"params": {"target": "80%"}}}])
def test_a_share_of_the_teachers_is_of_the_one_that_arms_have_in_common(
    loaded: Loaded, budget: dict[str, Any], tmp_path: Path
) -> None:
    """Another teacher of an arm's has another count, and arms are compared at one budget."""
    tiny.teacher_folder(tmp_path / "wider", intermediate_size=200)
    found = loaded(space=budget, arms={"one": {}, "two": {"teacher": {"model": str(tmp_path / "wider")}}})
    one, two = (found.config(arm).space.budget for arm in found.changes)
    teacher = teacher_config(found.values["teacher"]["model"])
    params = parameter_count(weights(teacher), sizes(teacher))
    assert one == two and one.params
    assert one.params.number == (round(0.8 * params) if budget else two_digits(round(2 * params / 3)))


def test_an_arm_may_wait_for_a_run_that_is_made_first(loaded: Loaded, inputs: Path) -> None:
    middle = "{output}/before/middle/best"
    found = loaded(
        before={"middle": {"search": {"seeds": 1, "rungs": [64]}, "space": {"budget": {"params": {"target": "16K"}}}}},
        arms={"one": {}, "two": {"teacher": {"model": middle}}, "three": {"distillation": {"teacher": middle}}},
    )
    runs = checked(found, resume=False)
    assert list(runs) == ["before/middle", "one"], "what can be looked at before it is made"
    first = runs["before/middle"][0]
    assert first.stages == ("importance", "search", "retrain") and first.output == "runs/a/before/middle"
    assert first.search.rungs == (64,) and first.search.seeds == 1 and first.space.budget.params
    assert first.space.budget.params.target == 16_000 and found.config("one").search.seeds == 2
    made = Path("runs/a/before/middle/best")
    shutil.copytree(inputs / "teacher", made)
    assert found.config("two").teacher.model == str(made) and found.config("three").distillation.teacher == str(made)
    with pytest.raises(ValueError, match="arms.two: distillation.lss: unknown key"):
        wrong = {"teacher": {"model": "{output}/before/x"}, "distillation": {"lss": 1}}
        checked(loaded(arms={"one": {}, "two": wrong}), resume=False)
    for section, key in (("distillation", "loss"), ("importance", "method")):
        with pytest.raises(ValueError, match=f"arms.two: {section}.{key}: 'none' is no"):
            wrong = {"teacher": {"model": "{output}/before/x"}, section: {key: "none"}}
            checked(loaded(arms={"one": {}, "two": wrong}), resume=False)


def test_an_arm_that_fails_is_said_to_and_the_others_go_on(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minitron_search.cluster.session.joined", nullcontext)
    found = loaded(arms={"one": {}, "two": {}, "three": {}})
    text, ran = np.arange(WINDOWS) / 10, []

    def run(prepared: Prepared) -> None:
        ran.append(prepared.run_dir.root.name)
        if ran[-1] == "two":
            raise ValueError("it diverged")
        log(prepared.run_dir, "search", "x", [text], params=1)
        prepared.run_dir.write_trials({})
        (prepared.run_dir.trial("search-x-0") / "checkpoint").mkdir()
        prepared.run_dir.write_config(prepared.config.dump())
        prepared.run_dir.event("run_finished")

    assert run_ablation(found, prepare_ablation(found, resume=False), run) == ["two"] and ran == ["one", "two", "three"]
    said = capsys.readouterr().out
    assert "arm two failed: it diverged" in said and json.loads(Path("runs/a/ablation.json").read_text())
    assert {row["arm"] for row in pq.read_table("runs/a/ablation.parquet").to_pylist()} == {"three"}
    assert not list(Path("runs/a").glob("*/trials/*/checkpoint"))
    ran.clear()
    assert run_ablation(found, prepare_ablation(found, resume=True), run) == ["two"] and ran == ["two"]

    def unfit(prepared: Prepared) -> None:
        raise UnfitError("no place")

    with pytest.raises(UnfitError):
        run_ablation(found, prepare_ablation(found, resume=True), unfit)


# What is refused


@pytest.fixture
def refused(values: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refusal(*flags: str, **over: Any) -> str:
        given = {key: value for key, value in {**values, **over}.items() if value is not None}
        Path("a.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
        assert main(["--config", "a.yaml", "--output", "run", *flags]) == 2
        assert not Path("run").exists()
        said = capsys.readouterr().err
        assert said.startswith("minitron_search: ") and "Traceback" not in said
        return said

    return refusal


def test_the_good_one_is_good(values: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert main(["--config", "a.yaml", "--output", "run", "--dry-run", *STATED]) == 0
    assert "0.00" in capsys.readouterr().out and not Path("run").exists()


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"distillation": {"lss": "ce"}}, "distillation.lss: unknown key"),
        (3, "3; valid: keys of the configuration"),
        ({"distillation": {"batch_tokens": 96}}, "trains on 192 tokens, in whole batches, and the others on 128"),
        ({"architecture": {}}, "no architecture on the axes' grid meets the budget; space.budget.params: 15,000 +- 10"),
        ({"architecture": "widths"}, "architecture: 'widths' is not a rule; valid: width, depth_sweep"),
        ({"architecture": {"hidden": 20}}, "architecture.hidden: unknown key (value 20); valid: hidden_size"),
        ({"architecture": {"drop_block": 2}}, "architecture.drop_block: 2; valid: [start, length]"),
        ({"architecture": {"hidden_size": 99}}, "space.axes.hidden_size: 99 is above the teacher's 24"),
        ({"importance": {"seed": 4}}, "distils on other windows than the baseline"),
        ({"teacher": {"correction": {"method": "full", "tokens": 512}}}, "distils on other windows than the baseline"),
        ({"search": {"rungs": [64]}}, "search.rungs: arms are compared at equal tokens and seeds"),
        ({"search": {"seeds": 9}}, "search.seeds: arms are compared at equal tokens and seeds"),
        ({"corpus": {"validation_samples": 8}}, "corpus.validation_samples: arms are compared at the same"),
        ({"space": {"budget": {"params": None}}}, "space.budget.params: arms are compared at the same space.budget"),
        ({"teacher": None}, "teacher: None is not valid"),
        ({"space": 3}, "space: 3 is not valid"),
        ({"seed": 4}, "seed: arms are compared at the same seed"),
    ],
)
def test_an_arm_that_does_not_fit_is_refused_and_named(refused: Callable[..., str], arm: Any, said: str) -> None:
    budget = {"budget": {"params": {"target": 15_000, "tolerance": 0.1}}}
    message = refused(arms={"plain": {}, "b": arm}, space=budget)
    assert re.search(r"arms\.b[:.] ?" + re.escape(said), message), message


AXES = {"hidden_size": {"choices": [16, 20]}}
WIDE = {"params": {"target": 15_000, "tolerance": 0.9}}


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"space": 3}, "space: 3 is not valid"),
        ({"serch": {"seeds": 3}}, "serch: unknown key"),
        ({"distillation": {"batch": 3}}, "distillation.batch: unknown key"),
        ({"arms": {"a": {}}}, "arms: {'a': {}}; valid: two or more"),
        ({"arms": {"a": {}, "B c": {}}}, "arms: 'B c' names a folder; valid: lower-case letters, digits, _ and -, as"),
        ({"arms": {"a": {}, "../x": {}}}, "arms: '../x' names a folder"),
        ({"arms": {"a": {}, "before": {}}}, "arms: 'before' names a folder"),
        ({"before": {"b/c": {}}}, "before: 'b/c' names a folder"),
        ({"baseline": "plane"}, "baseline: 'plane' is not an arm; valid: plain, other"),
        ({"question": None}, "question: none; valid: what the arms are to answer"),
        ({"question": ["q"]}, "question: ['q'] is no text; valid: a line of text"),
        ({"baseline": ["plain"]}, "baseline: ['plain'] is no text; valid: a line of text"),
        ({"search": {"rungs": [0, 64, 128], "trials": 4}}, "search.trials: an ablation sets it"),
        ({"stages": ["report"]}, "stages: an ablation sets it"),
        ({"base": "nowhere.yaml"}, "--config: no file 'nowhere.yaml'"),
        (
            {"architecture": None, "space": {"budget": WIDE, "axes": AXES}},
            "arms.plain: 2 architectures are in its space",
        ),
    ],
)
def test_what_does_not_fit_is_refused(refused: Callable[..., str], over: dict[str, Any], said: str) -> None:
    assert said in refused(**over)


def test_an_output_that_holds_something_is_refused(values: dict[str, Any], here: Path, capsys: Any) -> None:
    Path("a.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    asked = ["--config", "a.yaml", "--output", "run"]
    assert main([*asked, "--resume"]) == 2 and "holds no ablation to continue" in capsys.readouterr().err
    Path("run").mkdir()
    Path("run/ablation.json").write_text(json.dumps(load("a.yaml", ["--output", "run"]).about()))
    assert main(asked) == 2 and "is not empty; valid: another folder, or --resume" in capsys.readouterr().err
    assert main([*asked, "--resume", "--search.rungs", "0,64"]) == 2
    assert "run holds an ablation of another tokens; valid: the same values" in capsys.readouterr().err


# What is made of the rows


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Two seeds of three arms, whose trials have the same ids; `same` differs by noise, `worse` by a nat; at rung 0
    nobody differs."""
    draw, root = np.random.default_rng(0), tmp_path / "run"
    text = draw.normal(4, 1, WINDOWS)
    for arm, more in (("base", 0.0), ("same", 0.0), ("worse", 1.0)):
        run = RunDirectory(root / arm)
        for seed in (0, 1):
            noise = draw.normal(0, 0.01, WINDOWS)
            log(run, "search", "x", [text, text + more + noise], seed=seed, params=90_000_000)
        log(run, "teacher", "t", [text - 1])
        run.write_trials({})
    return root, {
        "question": "Is it?",
        "arms": ["base", "same", "worse"],
        "baseline": "base",
        "seeds": [0, 1],
        "tokens": 200,
    }


def test_arms_are_paired_window_by_window_and_seed_by_seed(runs: tuple[Path, dict[str, Any]]) -> None:
    root, about = runs
    rows, scores = read_arms(root, about["arms"])
    assert {arm: len(of) for arm, of in rows.items()} == dict.fromkeys(about["arms"], 4), "not the teacher's"
    found = differences(rows, scores, "base")
    losses = {(of["arm"], of["rung"]): of for of in found if of["metric"] == "lm_loss"}
    assert set(losses) == {(arm, rung) for arm in ("same", "worse") for rung in (0, 1)}
    assert losses["worse", 0]["difference"] == 0 and losses["worse", 0]["p"] == 1
    worse, same = losses["worse", 1], losses["same", 1]
    assert worse["difference"] == pytest.approx(1, abs=0.02) and worse["n"] == WINDOWS and worse["seeds"] == 2
    assert worse["stderr"] < 0.01 < 1 and worse["low"] < worse["difference"] < worse["high"]
    assert worse["seeds_low"] < worse["difference"] < worse["seeds_high"]
    assert worse["value"] - worse["baseline_value"] == pytest.approx(worse["difference"])
    assert [same["p_holm"], worse["p_holm"]] == holm([same["p"], worse["p"]])
    assert [same["seeds_p_holm"], worse["seeds_p_holm"]] == holm([same["seeds_p"], worse["seeds_p"]])
    assert worse["p_holm"] < 0.01 < same["p_holm"] and worse["seeds_p_holm"] < 0.05
    write_differences(root, found)
    assert pq.read_table(root / "ablation.parquet").to_pylist() == found


def test_the_table_says_who_differs_and_who_failed(runs: tuple[Path, dict[str, Any]]) -> None:
    from rich.console import Console

    root, about = runs
    about["arms"].append("gone")
    rows, scores = read_arms(root, about["arms"])
    out = Console(width=200, record=True, file=open("/dev/null", "w"))
    out.print(shown(about, rows, differences(rows, scores, "base")))
    narrow = Console(width=120, record=True, file=open("/dev/null", "w"))
    long = {"a_name_of_twenty_three_l": rows["worse"], **rows}
    narrow.print(shown({**about, "arms": list(long)}, long, differences(long, scores, "base")))
    assert "\u2026" not in narrow.export_text(), "a job's log has 120 columns"
    lines = {line.split()[0]: line for line in out.export_text().splitlines() if line.split()}
    assert "failed" in lines["gone"] and "90.0M" in lines["base"] and "[" not in lines["base"]
    assert "*" in lines["worse"] and "*" not in lines["same"]


def test_of_one_seed_nothing_is_said_over_seeds(tmp_path: Path) -> None:
    text = np.random.default_rng(0).normal(4, 1, WINDOWS)
    for arm in ("a", "b"):
        run = RunDirectory(tmp_path / arm)
        log(run, "search", "x", [text + (arm == "b")])
        run.write_trials({})
    rows, scores = read_arms(tmp_path, ["a", "b"])
    found = differences(rows, scores, "a")
    assert all(of["seeds"] == 1 and of["seeds_p"] is None and of["seeds_p_holm"] is None for of in found)
    write_differences(tmp_path, found)
