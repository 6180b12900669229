"""What is wrong is found before anything is spent: status 2, one message, nothing written, Ray not started."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

from minitron_search.cli import main
from minitron_search.config import loading
from minitron_search.models.engines import ENGINES, Engine, Rule
from minitron_search.planning import checks
from minitron_search.planning.prepare import prepare
from minitron_search.records.directory import RunDirectory
from tests import tiny

pytestmark = pytest.mark.usefixtures("here")
BUDGET = "{params: {target: 12K, tolerance: 0.5}}"
AXES = "{hidden_size: {low: 16, high: 24, step: 4}, num_attention_heads: {choices: [2, 4]}}"


@pytest.fixture
def good(inputs: Path) -> list[str]:
    """Flags of a run that would start."""
    return [
        "--output", "run", "--teacher.model", str(inputs / "teacher"), "--corpus.train", str(inputs / "text.txt"),
        "--corpus.validation", str(inputs / "text.txt"), "--corpus.sequence_length", "32",
        "--corpus.calibration_samples", "4", "--corpus.validation_samples", "4",
        "--winogrande.source", str(inputs / "questions.jsonl"), "--space.budget", BUDGET, "--space.axes", AXES,
        "--search.rungs", "64,128", "--distillation.batch_tokens", "64", "--retraining.tokens", "256",
        "--stages", "importance,search,retrain,report",
    ]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path under `folder` and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


Refused = Callable[..., str]


@pytest.fixture
def refused(good: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    def refusal(*flags: str) -> str:
        """The message of a run of the good flags with these over them."""
        before = {path: content for path, content in tree(here).items() if not path.startswith("cache")}
        capsys.readouterr()
        assert main([*good, *flags]) == 2
        after = {path: content for path, content in tree(here).items() if not path.startswith("cache")}
        assert after == before, "something was written"
        said = capsys.readouterr().err
        assert said.startswith("minitron_search: ") and "Traceback" not in said
        return said

    return refusal


def existing_run(good: list[str]) -> None:
    """A run directory of the good flags in the folder `run`, with an importance file and a row."""
    resolved = loading.load_config(None, good).dump()
    run = RunDirectory("run")
    run.write_config(resolved)
    run.importance.write_bytes(b"importance")
    run.event("run_started")
    run.log_rung("a", {"trial": "a", "rung": 0})


def test_the_good_flags_are_good(good: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or every refusal below would show nothing. A dry run checks the same, and writes nothing."""
    assert main([*good, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "legal and in budget" in said and "FLOPs" in said and "teacher: hidden 24" in said
    assert "deployable by vLLM: " in said and "deployable by llama.cpp: " in said
    assert not (here / "run").exists()
    shown = said[: said.index("\nspace: ")]
    assert yaml.safe_load(shown)["search"]["rungs"] == [64, 128]


def test_an_unknown_key(refused: Refused) -> None:
    assert "search.trails: unknown key (value 3); did you mean search.trials?" in refused("--search.trails", "3")


def test_several_wrong_keys_are_told_at_once(refused: Refused) -> None:
    said = refused("--search.trails", "3", "--precision", "float64", "--seed", "x")
    assert all(key in said for key in ("search.trails", "precision", "seed"))


def test_a_missing_configuration_file(refused: Refused) -> None:
    assert "--config: no file 'nowhere.yaml'" in refused("--config", "nowhere.yaml")


def test_an_unknown_engine(refused: Refused) -> None:
    assert "space.deployable: 'vlm' is not an engine; valid: vllm, llama.cpp" in refused("--space.deployable", "vlm")


def test_a_run_that_an_engine_would_not_take_all_of_says_so(
    good: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared(*flags: str) -> str:
        prepare(loading.load_config(None, [*good, *flags]), False)
        return capsys.readouterr().out

    assert "deployable" not in prepared()
    rule = Rule(("llama", "mistral"), lambda students: students.hidden == 20, "it has no tiles of 20")
    monkeypatch.setitem(ENGINES, "tiles", Engine("Tiles", (rule,)))
    assert "deployable by Tiles: 3 of 5; most often it has no tiles of 20" in prepared()
    assert "deployable" not in prepared("--space.deployable", "tiles")
    assert "deployable" not in prepared("--stages", "importance")


def test_a_budget_that_no_architecture_meets(refused: Refused) -> None:
    said = refused("--space.budget", "{params: {target: 90M}}")
    assert "space.budget.params: 90,000,000 +- 5.0% asked" in said and "reachable" in said


def test_a_step_that_leaves_no_legal_head_count(refused: Refused) -> None:
    said = refused("--space.axes.num_attention_heads", "{low: 1, high: 4, step: 2}")
    assert "none of [1, 3]" in said and "valid: [2, 4]" in said


def test_an_axis_above_the_teacher(refused: Refused) -> None:
    assert "space.axes.hidden_size: 32 is above the teacher's 24" in refused("--space.axes.hidden_size.high", "32")


def test_a_window_longer_than_the_teachers_positions(refused: Refused) -> None:
    said = refused("--corpus.sequence_length", "512", "--search.rungs", "512,1024")
    assert "corpus.sequence_length: 512" in said and "256" in said


@pytest.mark.parametrize("field", ["train", "validation"])
def test_a_missing_text(field: str, refused: Refused, here: Path) -> None:
    (here / "texts.txt").write_text("near it")
    said = refused(f"--corpus.{field}", "./text.txt")
    assert f"corpus.{field}: './text.txt' does not exist" in said and "texts.txt" in said


def test_a_glob_that_matches_nothing(refused: Refused) -> None:
    assert "corpus.train: '*.txt' matches no file" in refused("--corpus.train", "*.txt")


def test_a_text_too_short_to_train_on_says_how_many_windows_it_has(refused: Refused, here: Path) -> None:
    (here / "short.txt").write_text("a" * (32 * 9 + 5))
    said = refused("--corpus.train", "short.txt")
    # 4 calibration windows and 256 tokens of training are 12 windows of 32
    assert "corpus.train: 'short.txt' has, outside validation, 9 windows of 32 tokens and 12 were asked" in said


def test_a_text_too_short_to_validate_on_says_how_many_windows_it_has(refused: Refused, here: Path) -> None:
    (here / "short.txt").write_text("a" * (32 * 3 + 5))
    said = refused("--corpus.validation", "short.txt")
    assert "corpus.validation: 'short.txt' has 3 windows of 32 tokens and 4 were asked" in said


def test_winogrande_records_with_a_missing_field_or_another_answer_are_named_by_line(
    refused: Refused, here: Path
) -> None:
    file = tiny.winogrande_file(here / "questions.jsonl", 4)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for field in ("sentence", "option1", "option2", "answer"):
        broken = [dict(record) for record in records]
        del broken[2][field]
        file.write_text("".join(json.dumps(record) + "\n" for record in broken))
        said = refused("--winogrande.source", "questions.jsonl")
        assert f"questions.jsonl, line 3: field '{field}' is missing" in said
    for answer in ("3", "", "A"):
        broken = [dict(record) for record in records]
        broken[1]["answer"] = answer
        file.write_text("".join(json.dumps(record) + "\n" for record in broken))
        said = refused("--winogrande.source", "questions.jsonl")
        assert f"questions.jsonl, line 2: answer is {answer!r}" in said


def test_a_plan_needs_no_text_and_says_that_a_run_would(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*good, "--dry-run", "--corpus.train", "nowhere.txt"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a run would be refused: corpus.train: 'nowhere.txt' does not exist" in printed


def test_a_missing_winogrande_file_and_too_many_questions(refused: Refused, inputs: Path) -> None:
    said = refused("--winogrande.source", "nowhere.jsonl")
    assert "winogrande.source: no file nowhere.jsonl" in said and "; valid: embedded" in said
    assert "winogrande.limit: 5 is outside 1..4" in refused("--winogrande.limit", "5")
    assert "winogrande.shots: 4 is outside 0..3" in refused("--winogrande.shots", "4")


# The teacher


def test_a_family_that_is_not_supported(refused: Refused, here: Path) -> None:
    gptj = GPTJConfig(vocab_size=64, n_positions=32, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)
    GPTJForCausalLM(gptj).save_pretrained(here / "gptj")
    tiny.tokenizer().save_pretrained(here / "gptj")
    said = refused("--teacher.model", str(here / "gptj"))
    assert "teacher.model: family 'gptj' is not supported; supported: cohere" in said


def test_a_teacher_that_is_not_there(refused: Refused, inputs: Path) -> None:
    said = refused("--teacher.model", str(inputs / "teachr"))
    assert "teacher.model" in said and "is not a folder, near it: " in said and str(inputs / "teacher") in said


def test_a_teacher_without_weights_or_tokenizer(refused: Refused, here: Path) -> None:
    tiny.config(vocab_size=258).save_pretrained(here / "empty")
    assert "has no weights in safetensors files" in refused("--teacher.model", str(here / "empty"))
    tiny.model(tiny.config(vocab_size=258)).save_pretrained(here / "mute")
    assert "has no tokenizer that can be loaded" in refused("--teacher.model", str(here / "mute"))


# The teacher's cache


def test_more_tokens_than_the_vocabulary_has(refused: Refused) -> None:
    said = refused("--distillation.teacher_cache", "topk", "--distillation.topk", "258")
    assert "distillation.topk: 258 leaves nothing of the teacher's vocabulary of 258 tokens; valid: at most 257" in said


# 8 windows of 32 tokens: 24 float32 hidden channels each, or 10 indices and log-probabilities of 2 bytes and the rest
@pytest.mark.parametrize(("mode", "needed"), [("hidden", 24_576), ("topk", 11_264)])
def test_a_cache_that_does_not_fit(
    mode: str, needed: int, refused: Refused, good: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good += ["--precision", "float32", "--distillation.topk", "10"]
    flags = ["--distillation.teacher_cache", mode]
    said = refused(*flags, "--distillation.teacher_cache_bytes", str(needed - 1))
    assert f"distillation.teacher_cache: {mode} needs {needed:,} bytes, and distillation.teacher_cache_bytes" in said
    prepare(loading.load_config(None, [*good, *flags, "--distillation.teacher_cache_bytes", str(needed)]), False)
    monkeypatch.setattr(checks, "free_bytes", lambda folder: needed - 1)
    assert f"{mode} needs {needed:,} bytes, and MINITRON_SEARCH_CACHE" in refused(*flags)
    for other in ("auto", "off"):
        prepare(loading.load_config(None, [*good, "--distillation.teacher_cache", other]), False)


def test_a_run_that_goes_on_has_its_cache_already(good: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good += ["--distillation.teacher_cache", "hidden"]
    existing_run(good)
    monkeypatch.setattr(checks, "free_bytes", lambda folder: 0)
    with pytest.raises(ValueError, match="needs .* bytes, and MINITRON_SEARCH_CACHE"):
        prepare(loading.load_config(None, good), True)
    RunDirectory("run").event("teacher_asked", tokens=256)
    prepare(loading.load_config(None, good), True)


# Stages


def test_stages_that_need_what_no_stage_made(refused: Refused) -> None:
    assert "search needs importance" in refused("--stages", "search")
    assert "retrain needs a search" in refused("--stages", "importance,retrain")
    assert "stages.0: 'serch' is not valid" in refused("--stages", "serch")


# The output folder


def test_a_folder_that_holds_another_run(refused: Refused, good: list[str]) -> None:
    existing_run(good)
    said = refused()
    assert "output: run holds a run" in said and "--resume" in said


def test_a_folder_that_holds_something_else(refused: Refused, here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("years of work")
    for flags in ([], ["--resume"]):
        assert "output: run is not empty and holds no run; valid: a new folder" in refused(*flags)


def test_a_folder_inside_another_run(refused: Refused, good: list[str], here: Path) -> None:
    existing_run(good)
    RunDirectory(here / "run").event("run_started")
    said = refused("--output", "run/best/mine")
    assert f"output: run/best/mine is inside the run {here / 'run'}; valid: a folder outside it" in said


def test_continuing_a_run_whose_configuration_is_no_more(refused: Refused, good: list[str], here: Path) -> None:
    existing_run(good)
    (here / "run" / "config.yaml").write_text("a: [1")
    said = refused("--resume")
    assert "run/config.yaml is damaged" in said and "valid: the file as it was" in said and said.count("\n") == 1


def test_continuing_with_another_configuration_says_what_differs(refused: Refused, good: list[str]) -> None:
    existing_run(good)
    said = refused("--resume", "--search.trials", "99", "--distillation.temperature", "2")
    assert "search.trials: 12 there, 99 asked now" in said
    assert "distillation.temperature: 1.0 there, 2.0 asked now" in said
    assert "search.seeds" not in said


def test_continuing_nothing(refused: Refused, here: Path) -> None:
    assert "output: run holds no run to continue" in refused("--resume")
    (here / "run").mkdir()
    assert "output: run holds no run to continue" in refused("--resume")


def test_continuing_may_change_where_the_work_is_placed(good: list[str], here: Path) -> None:
    existing_run(good)
    before = tree(here / "run")
    speed = ("--resources.mfu", "0.4", "--resources.flops_per_second", "989T", "--resources.price_per_hour", "2")
    placed = ("--search.concurrency", "7", "--stages", "importance,search")
    assert main([*good, "--resume", "--dry-run", *placed, *speed]) == 0
    assert tree(here / "run") == before


def test_a_path_through_a_file(refused: Refused, here: Path) -> None:
    (here / "file").write_text("in the way")
    for output in ("file", "file/run"):
        assert "file is not a folder that can be written to" in refused("--output", output)


def test_a_dry_run_of_something_wrong_is_refused_too(refused: Refused) -> None:
    assert "space.budget.params" in refused("--dry-run", "--space.budget", "{params: {target: 90M}}")


def test_compiling_without_a_compiler_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = refused("--distillation.compile", "true")
    assert "distillation.compile: true needs a C++ compiler, and there is no no-such-compiler" in said
    assert "valid: false" in said


def test_where_a_run_is_placed_may_change_on_resume_and_what_it_computes_may_not(
    good: list[str], here: Path, refused: Refused
) -> None:
    begun = RunDirectory("run")
    begun.write_config(loading.load_config(None, good[: good.index("--stages")]).dump())
    flags = ("--resume", "--resources.strategy", "fsdp2", "--resources.workers_per_trial", "2",
             "--distillation.gradient_checkpointing", "true", "--distillation.temperature", "2.0")  # fmt: skip
    said = refused(*flags)
    assert "distillation.temperature: 1.0 there, 2.0 asked now" in said
    assert "resources" not in said and "gradient_checkpointing" not in said


def test_continuing_with_another_model_of_the_same_name(refused: Refused, good: list[str], here: Path) -> None:
    existing_run(good)
    run = RunDirectory("run")
    other = {"folder": "teacher", "fingerprint": "0123456789abcdef"}
    run.write_environment({"teacher": other, "distillation_teacher": other, "corrected_teacher": None})
    said = refused("--resume")
    assert "teacher.model: " in said and "is not the model that run began with: its fingerprint is " in said
    assert "was 0123456789abcdef; valid: that model, or another output" in said


def test_every_model_that_is_named_has_to_be_whole(refused: Refused, inputs: Path, here: Path) -> None:
    """With the key that names it; also in a dry run, which reads no values."""
    for name, change in (("cut", lambda tensor: tensor[:-1].clone()), ("nan", lambda tensor: tensor * float("nan"))):
        folder = Path(shutil.copytree(inputs / "teacher", here / "cache" / name))
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = change(weights["model.norm.weight"])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        for flags in (
            ["--teacher.model", str(folder)],
            ["--distillation.teacher", str(folder)],
            ["--evaluation.tasks", "winogrande", "--evaluation.references", str(folder)],
        ):
            said = refused(*flags, *(["--dry-run"] if name == "cut" else []))
            assert f"{flags[-2].removeprefix('--')}: '{folder}' has " in said and "model.norm.weight" in said
            assert said.count("\n") == 1


# What is to be evaluated


@pytest.fixture
def task(here: Path) -> Path:
    """lm-eval's Winogrande over a data set that no machine has."""
    path = here / "task.yaml"
    about = "output_type: multiple_choice\nvalidation_split: test\nmetric_list: [{metric: acc}]\n"
    path.write_text(f"task: mine\ndataset_path: nobody/nothing\n{about}doc_to_text: a\ndoc_to_target: b\n")
    return path


def test_an_evaluation_that_cannot_be_is_refused(refused: Refused, task: Path, inputs: Path) -> None:
    for asked, why in (
        ("mt_bench", "evaluation.tasks: 'mt_bench': MT-Bench needs a judge"),
        ("humaneval", "evaluation.tasks: humaneval runs code that the model writes"),
        ("nothere.yaml", "evaluation.tasks: no file 'nothere.yaml'"),
        (str(task), "evaluation.tasks: mine:0: its questions cannot be had ("),
    ):
        assert why in refused("--evaluation.tasks", asked)
    for reference, why in (
        ("./nowhere", "is not a folder"),
        ("nobody/nothing", "has no configuration that can be loaded"),
    ):
        said = refused("--evaluation.tasks", "winogrande", "--evaluation.references", reference)
        assert f"evaluation.references: '{reference}' {why}" in said and "teacher.model" not in said
    assert "with no evaluation.tasks" in refused("--evaluation.references", str(inputs / "teacher"))


def test_continuing_may_change_what_is_evaluated(good: list[str], here: Path) -> None:
    existing_run(good)
    assert main([*good, "--resume", "--dry-run", "--evaluation.tasks", "winogrande:0", "--evaluation.limit", "9"]) == 0


def test_a_run_that_was_begun_without_a_dtype_goes_on_in_float32(good: list[str], refused: Refused) -> None:
    existing_run(good)
    run = RunDirectory("run")
    begun = run.read_config()
    config = loading.load_config(None, good)
    assert prepare(config, resume=True).config.retraining.dtype == "auto"
    del begun["retraining"]["dtype"]
    run.write_config(begun)
    for flags in ((), ("--retraining.dtype", "float32")):
        prepared = prepare(loading.load_config(None, [*good, *flags]), resume=True)
        assert prepared.config.retraining.dtype == prepared.stored == "float32"
    assert "retraining.dtype" not in refused("--resume", "--seed", "1")
    said = refused("--resume", "--retraining.dtype", "bfloat16")
    assert "retraining.dtype: 'float32' there, 'bfloat16' asked now" in said


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_students_are_written_in_the_dtype_asked_for(asked: str, good: list[str], here: Path) -> None:
    folder = tiny.teacher_folder(here / "half")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    flags = [*good, "--teacher.model", str(folder), "--retraining.dtype", asked]
    assert prepare(loading.load_config(None, flags), resume=False).stored == {"auto": "bfloat16"}.get(asked, asked)


def test_a_token_beyond_the_embedding_that_only_the_configuration_names_is_said(
    good: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.teacher_folder(here / "named")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 258, "eos_token_id": [257, 999]}))
    prepare(loading.load_config(None, [*good, "--teacher.model", str(folder)]), resume=False)
    said = capsys.readouterr().out
    assert "names bos_token_id 258, and the embedding has 258 rows" in said and "names eos_token_id 999" in said
    assert "257" not in said


@pytest.mark.parametrize("special", ["eos_token", "bos_token", "unk_token", "pad_token", "extra"])
def test_a_token_beyond_the_embedding_is_refused_if_it_can_be_read(
    special: str, good: list[str], refused: Refused, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.teacher_folder(here / "beyond")
    tokenizer = tiny.tokenizer()
    key, value = ("extra_special_tokens", ["<|more|>"]) if special == "extra" else (special, "<|more|>")
    tokenizer.add_special_tokens({key: value})
    tokenizer.save_pretrained(folder)
    flags = ["--teacher.model", str(folder)]
    if special in ("pad_token", "extra"):
        prepare(loading.load_config(None, [*good, *flags]), resume=False)
        said = capsys.readouterr().out
        assert "tokens beyond the 258 rows of the embedding, '<|more|>' (258); this run reads none of them" in said
        for part in ("train", "validation"):
            text = "<|more|> " * 200 + tiny.prose(4000)
            (here / f"{part}.txt").write_text(text)
            said = refused(*flags, f"--corpus.{part}", str(here / f"{part}.txt"))
            assert f"corpus.{part}: " in said and "'<|more|>' is token 258" in said and "has 258 rows; valid:" in said
    else:
        said = refused(*flags)
        assert f"its {special} '<|more|>' is token 258 of the tokenizer, and the embedding has 258 rows" in said
