"""`evaluation.tasks` through lm-eval itself, on tiny models and questions in local files."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import tables
from minitron_search.data import winogrande, winogrande_packing
from minitron_search.evaluation import benchmarks, lm_eval_run, lm_eval_tasks
from minitron_search.evaluation import benchmarks as evaluation_benchmarks
from minitron_search.evaluation import winogrande as evaluation_winogrande
from minitron_search.evaluation.lm_eval_tasks import TABLES, Task, check_data, parse_tasks
from minitron_search.evaluation.statistics import chance_bar, clustered, compared, mcnemar
from minitron_search.pipeline import stages as run_command
from minitron_search.records.directory import RunDirectory
from tests import tiny

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "winogrande_validation.jsonl"
DOCUMENTED = next(
    text for text in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)
    if text.startswith("task: winogrande")
)  # fmt: skip
NAMES = ("Ann", "Bea", "Cid", "Dan", "Eve", "Fay")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.teacher_folder(folder / name, seed, max_position_embeddings=1024)
            for seed, name in enumerate(("teacher", "student", "reference"))}  # fmt: skip


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """The documented YAML over eleven questions, of which some are twins."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = []
    for n in range(11):
        one, other = NAMES[n // 2], NAMES[(n // 2 + 1) % 6]
        sentence = f"{one} met {other} {'before' if n % 2 else 'after'} noon, so _ waved first."
        lines.append({"sentence": sentence, "option1": one, "option2": other, "answer": f"{1 + n % 2}"})
    (folder / "winogrande_validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "my_winogrande.yaml").write_text(DOCUMENTED)
    return folder / "my_winogrande.yaml"


def scores(folder: Path, examples: Path, shots: int) -> evaluation_winogrande.WinograndeScore:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    packed = winogrande_packing.pack(winogrande.load_examples(str(examples)), tokenizer, shots, 512, 1024)
    return evaluation_winogrande.evaluate(model, packed)


# One task on one model


@pytest.mark.parametrize("shots", [0, 3])
def test_a_local_task_scores_as_this_projects_own_winogrande(
    models: dict[str, Path], questions: Path, shots: int
) -> None:
    (task,) = parse_tasks([f"{questions}:{shots}"])
    found = lm_eval_run.evaluate(models["teacher"], task, "float32")
    ours = scores(models["teacher"], questions.with_name("winogrande_validation.jsonl"), shots)
    assert (found["value"], found["n"], found["shots"]) == (pytest.approx(ours.accuracy), 11, shots)
    assert found["stderr"] == pytest.approx(ours.accuracy_stderr)
    assert np.mean(found["samples"]) == pytest.approx(found["value"])
    assert found["twins"] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert (found["metric"], found["chance"], found["task_version"]) == ("acc,none", 0.5, 1.0)
    assert found["at_chance"] == (found["value"] <= chance_bar(11, 0.5))
    assert found["versions"].keys() == {"lm_eval", "transformers", "torch", "datasets"}


def test_shots_asked_for_are_given_where_a_task_fixes_none(models: dict[str, Path], questions: Path) -> None:
    questions.write_text(DOCUMENTED + "num_fewshot: 0\n")  # which lm-eval's own option would not change
    (task,) = parse_tasks([f"{questions}:2"])
    assert lm_eval_run.evaluate(models["teacher"], task, "float32", limit=2)["shots"] == 2
    (task,) = lm_eval_tasks.load(task)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=1)
    assert task.instances[0].args[0].count("\n\n") == 2


def test_no_weight_of_a_model_is_left_to_chance(models: dict[str, Path], questions: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["student"], tmp_path / "student"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="student lacks model.norm.weight"):
        lm_eval_run.evaluate(folder, parse_tasks([f"{questions}:0"])[0], "float32", limit=2)


@pytest.mark.skipif(not SHARED.exists(), reason="Winogrande itself is not beside the project")
def test_shots_reach_the_prompts_of_real_winogrande(models: dict[str, Path], questions: Path) -> None:
    shutil.copy(SHARED, questions.with_name("winogrande_validation.jsonl"))
    seen = {}
    for task in parse_tasks([f"{questions}:0", f"{questions}:2"]):
        (loaded,) = lm_eval_tasks.load(task)
        loaded.set_fewshot_seed(1234)
        loaded.build_all_requests(limit=3)
        seen[task.shots] = [instance.args[0] for instance in loaded.instances]
    assert len(seen[0]) == len(seen[2]) == 6
    assert all(two.endswith(none) and two.count("\n\n") == 2 for none, two in zip(seen[0], seen[2], strict=True))
    found = lm_eval_run.evaluate(models["teacher"], parse_tasks([f"{questions}:0"])[0], "float32", limit=5)
    assert found["n"] == 5 and found["limit"] == 5 and len(found["samples"]) == 5


def test_bfloat16_is_of_the_products(models: dict[str, Path], questions: Path) -> None:
    (task,) = parse_tasks([f"{questions}:0"])
    found = lm_eval_run.evaluate(models["teacher"], task, "bfloat16")
    assert found["precision"] == "bfloat16" and found["n"] == 11


def test_a_guesser_passes_the_bar_one_time_in_twenty() -> None:
    draw = np.random.default_rng(0)
    for n, guess in ((100, 0.25), (1267, 0.5), (40, 0.5)):
        right = draw.binomial(n, guess, 40_000) / n
        assert 0.02 < (right > chance_bar(n, guess)).mean() < 0.06


def reported(samples: dict[str, list[dict[str, Any]]], results: dict[str, dict[str, Any]], **config: Any) -> dict:
    """What lm-eval returns, as far as it is read."""
    return {
        "results": results, "samples": samples, "n-shot": dict.fromkeys(results, 0), "versions": {},
        "higher_is_better": {}, "group_subtasks": {}, "configs": {leaf: config for leaf in samples},
    }  # fmt: skip


def sample(number: int, options: int = 4, **metrics: Any) -> dict[str, Any]:
    return {"doc_id": number, "doc": {}, "doc_hash": str(number), "filter": "none", "resps": [None] * options,
            "metrics": list(metrics), **metrics}  # fmt: skip


def test_ifevals_value_is_the_papers_mean_of_four_and_its_error_is_over_prompts() -> None:
    """Instructions are of prompts: a prompt with three weighs three times one with one."""
    strict, loose = [[True, False, True], [False], [True, True]], [[True, True, True], [False], [True, True]]
    asked = [
        sample(n, prompt_level_strict_acc=all(strict[n]), inst_level_strict_acc=strict[n],
               prompt_level_loose_acc=all(loose[n]), inst_level_loose_acc=loose[n])
        for n in range(3)
    ]  # fmt: skip
    four = {"prompt_level_strict_acc,none": 1 / 3, "inst_level_strict_acc,none": 4 / 6,
            "prompt_level_loose_acc,none": 2 / 3, "inst_level_loose_acc,none": 5 / 6}  # fmt: skip
    found = lm_eval_run.measured(
        next(task for task in TABLES["table_2"] if task.name == "ifeval"),
        reported({"ifeval": asked}, {"ifeval": {"name": "ifeval", **four}}, output_type="generate_until"),
    )
    assert found["value"] == pytest.approx(np.mean(list(four.values()))) and found["n"] == 3
    assert np.mean(found["samples"]) == pytest.approx(found["value"], abs=1e-5)
    assert found["stderr"] == pytest.approx(np.std(found["samples"], ddof=1) / 3**0.5, abs=1e-5)
    assert found["chance"] is None and found["at_chance"] is None


def test_a_group_is_all_questions_of_its_tasks_in_one_order() -> None:
    leaves = {"b": [sample(1, acc=1.0), sample(0, acc=0.0)], "a": [sample(0, acc=1.0)]}
    results = {"g": {"acc,none": 2 / 3, "acc_stderr,none": 0.3, "name": "g"}, "a": {}, "b": {}}
    found = lm_eval_run.measured(Task("g", 5, None), reported(leaves, results, output_type="multiple_choice"))
    assert found["samples"] == [1.0, 0.0, 1.0] and (found["n"], found["stderr"], found["chance"]) == (3, 0.3, 0.25)


def test_a_metric_that_is_no_mean_has_no_samples_and_no_chance() -> None:
    leaves = {"t": [sample(n, word_perplexity=(-3.0, 2)) for n in range(2)]}
    results = {"t": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"}}
    found = lm_eval_run.measured(Task("t", 0, None), reported(leaves, results, output_type="loglikelihood_rolling"))
    assert (found["value"], found["stderr"], found["samples"], found["chance"]) == (12.5, None, None, None)
    leaves = {"t": [sample(n, acc=float(n)) for n in range(2)]}  # mass on several right options
    scored = reported(leaves, {"t": {"acc,none": 0.5}}, output_type="multiple_choice", process_results="its own")
    assert lm_eval_run.measured(Task("t", 0, None), scored)["chance"] is None


# What is asked


def test_a_task_has_the_papers_shots_where_the_paper_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda: pytest.fail("the index takes seconds"))
    asked = ["winogrande", "arc_challenge", "mmlu", "hellaswag", "gsm8k", "truthfulqa_mc2", "winogrande:0", "mmlu:5"]
    labels = [task.label for task in parse_tasks(asked)]
    assert labels == ["winogrande:5", "arc_challenge:25", "mmlu:5", "hellaswag:10", "gsm8k:5", "truthfulqa_mc2:0",
                      "winogrande:0"]  # fmt: skip


def test_the_tables_are_lm_evals_own_tasks() -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    for task in (task for table in TABLES.values() for task in table):
        assert task.yaml is not None
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / task.yaml, resolve_func=False)
        assert task.name == (config.get("group") or config["task"])
        assert task.unsafe == bool(config.get("unsafe_code"))
        metrics = config.get("aggregate_metric_list") or config["metric_list"]
        names = {metric["metric"].rpartition(".")[2] for metric in metrics}
        filters = {each["name"] for each in config.get("filter_list", [{"name": "none"}])}
        for metric in task.metrics:
            name, _, kept = metric.rpartition(",")
            assert kept in filters and (name in names or (name, names) == ("pass@1", {"pass_at_k"}))
        assert task.changes.keys() <= {"generation_kwargs", "repeats"}


def test_code_that_a_model_writes_runs_only_where_the_environment_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mbpp, humaneval runs code.*valid: winogrande:5,arc_.*HF_ALLOW_CODE_EVAL=1"):
        parse_tasks(["table_1"])
    with pytest.raises(ValueError, match="humaneval runs code.*valid: winogrande,"):
        parse_tasks(["humaneval"])
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    sampled = {task.name: task for task in parse_tasks(["table_1", "table_2"])}
    assert sampled["humaneval"].changes["repeats"] == 20 and len(sampled) == 13
    assert len(parse_tasks(["table_1", "table_2"])) == 14  # mmlu with and without a chat template


def test_what_lm_eval_cannot_do_is_refused_with_the_reason(questions: Path) -> None:
    for asked, why in (
        ("mt_bench", "judge"), ("bfcl", "BFCL"), ("xlsum:3", "XL-Sum"), ("winogrande:five", "'five' is not a number"),
        ("arc_easy:1000000", "at most 1,000"), ("arc_easy:" + "9" * 5000, "at most 1,000"),
        (str(questions.with_name("my_winogrand.yaml")), "no file .*near it: .*my_winogrande.yaml"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"evaluation.tasks: .*{why}.*"):
            parse_tasks([asked])


def test_two_files_of_one_tasks_name_are_refused(questions: Path) -> None:
    other = questions.with_name("other.yaml")
    other.write_text(questions.read_text() + "num_fewshot: 3\n")
    with pytest.raises(ValueError, match="evaluation.tasks: .* is of two different files; valid: another name"):
        parse_tasks([f"{questions}:0", f"{other}:0"])
    assert len(parse_tasks([f"{questions}:0", f"{questions}:0"])) == 1


@pytest.mark.parametrize("named", ["data_files: {validation: 'asked/*.jsonl'}", "data_dir: asked"])
def test_a_task_is_another_when_a_file_of_its_questions_is(questions: Path, named: str) -> None:
    folder = questions.with_name("asked")
    folder.mkdir()
    (folder / "one.jsonl").write_text('{"a": 1}\n')
    questions.write_text(f"task: mine\ndataset_path: json\ndataset_kwargs: {{{named}}}\n")
    (before,) = parse_tasks([f"{questions}:0"])
    (folder / "one.jsonl").write_text('{"a": 2}\n')
    (after,) = parse_tasks([f"{questions}:0"])
    assert before.content != after.content and [after] == parse_tasks([f"{questions}:0"])
    if "files" in named:
        assert after.changes["dataset_kwargs"]["data_files"] == {"validation": [str(folder / "one.jsonl")]}


def test_a_file_that_is_no_task_is_refused(questions: Path) -> None:
    for text, why in (
        ("task: [unclosed", "not a task"), ("dataset_path: json\n", "names no task"), ("- 1\n", "not a task"),
        (DOCUMENTED.replace("winogrande_validation.jsonl", "elsewhere.jsonl"), "no file 'elsewhere.jsonl'"),
    ):  # fmt: skip
        questions.write_text(text)
        with pytest.raises(ValueError, match=f"evaluation.tasks: .*{why}"):
            parse_tasks([str(questions)])
    questions.write_text(DOCUMENTED + "unsafe_code: true\n")
    with pytest.raises(ValueError, match="HF_ALLOW_CODE_EVAL"):
        parse_tasks([str(questions)])


class Index:
    """Of lm-eval, made up: it takes seconds to make."""

    def __init__(self) -> None:
        import lm_eval.tasks
        from lm_eval.tasks._index import Entry, Kind

        folder = Path(lm_eval.tasks.__file__).parent
        self.task_index = {
            "piqa": Entry("piqa", Kind.TASK, folder / "piqa" / "piqa.yaml", {"task": "piqa"}),
            "fixed": Entry("fixed", Kind.TASK, folder / "fixed.yaml", {"task": "fixed", "num_fewshot": 0}),
            "writes": Entry("writes", Kind.TASK, folder / "w.yaml", {"task": "writes", "unsafe_code": True}),
            "tag": Entry("tag", Kind.TAG, None, None, {"piqa", "fixed", "arc_challenge"}),
            "mean": Entry("mean", Kind.GROUP, folder / "m.yaml", {"task": ["piqa"], "aggregate_metric_list": [1]}),
            "loose": Entry("loose", Kind.GROUP, folder / "l.yaml", {"task": ["piqa", {"task": "fixed"}]}),
        }
        self.all_tasks, self.all_tags, self.all_groups = sorted(self.task_index), ["tag"], ["mean", "loose"]


def test_other_names_are_those_of_lm_evals_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "_manager", Index)
    names = frozenset({*Index().all_tasks, *Index().all_tags, *Index().all_groups})
    monkeypatch.setattr(lm_eval_tasks, "_written_names", lambda: names)
    labels = [task.label for task in parse_tasks(["piqa:3", "tag", "mean"])]
    assert labels == ["piqa:3", "arc_challenge:25", "fixed:0", "piqa:0", "mean"]
    assert [task.shots for task in parse_tasks(["tag:2"])] == [2, 2, 2]
    for asked, why in (("piq", "valid: piqa"), ("writes", "HF_ALLOW_CODE_EVAL"),
                       ("loose", "no metric of its own; valid: piqa,fixed")):  # fmt: skip
        with pytest.raises(ValueError, match=f"evaluation.tasks: .*{why}"):
            parse_tasks([asked])


def test_questions_that_cannot_be_had_are_one_message(questions: Path) -> None:
    check_data(parse_tasks([str(questions)]))
    questions.write_text(DOCUMENTED.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(ValueError, match=r"evaluation.tasks: winogrande:0: its questions cannot be had \(.*valid: "):
        check_data(parse_tasks([str(questions)]))


# All tasks on all models


class Counting:
    """`evaluation.evaluate` without a model; tasks called `broken` fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.broken = True

    def __call__(self, folder: Path, task: Task, precision: str, limit: int | None) -> dict[str, Any]:
        self.asked.append((folder.name, task.label))
        if task.name == "broken" and self.broken:
            raise ConnectionError("no route\nto the Hub")
        right = np.random.default_rng(len(folder.name)).integers(0, 2, 12).astype(float).tolist()
        return {
            "metric": "acc,none", "value": float(np.mean(right)), "stderr": 0.1, "n": 12, "shots": task.shots,
            "samples": right, "twins": None, "questions": "q", "limit": limit, "precision": precision,
        }  # fmt: skip


WINOGRANDE, BROKEN, PIQA = (Task(name, 0, f"{name}.yaml") for name in ("winogrande", "broken", "piqa"))
Evaluate = Callable[..., bool]


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def evaluate_in(models: dict[str, Path], counting: Counting) -> Evaluate:
    def evaluate_in(run: RunDirectory, *tasks: Task, references: tuple[str, ...] = (), limit: int | None = None,
                    precision: Any = "float32", **changed: Path) -> bool:  # fmt: skip
        ours = {"teacher": ("tiny", models["teacher"]), "best": ("best", models["student"])}
        ours |= {name: (name, folder) for name, folder in changed.items()}
        return benchmarks.evaluate_all(run, ours, references, tasks, precision, limit, counting)

    return evaluate_in


def test_what_was_evaluated_is_not_evaluated_again(
    tmp_path: Path, models: dict[str, Path], counting: Counting, evaluate_in: Evaluate
) -> None:
    one, other = RunDirectory(tmp_path / "one"), RunDirectory(tmp_path / "other")
    assert evaluate_in(one, WINOGRANDE, references=(str(models["reference"]),))
    assert counting.asked == [(name, "winogrande:0") for name in ("teacher", "student", "reference")]
    first = one.read_evaluation()
    assert evaluate_in(one, WINOGRANDE, references=(str(models["reference"]),)) and one.read_evaluation() == first
    assert evaluate_in(other, WINOGRANDE)  # another run with the same models
    assert len(counting.asked) == 3
    assert other.read_evaluation()["results"] == first["results"][:2]
    shutil.rmtree(tmp_path / "cache" / "evaluation")  # a run's own results need no cache
    assert evaluate_in(one, WINOGRANDE) and len(counting.asked) == 3
    evaluate_in(one, WINOGRANDE._replace(shots=5))
    evaluate_in(one, WINOGRANDE, limit=4)
    assert len(counting.asked) == 7
    kept = {(row["model"], row["label"], row["limit"]) for row in one.read_evaluation()["results"]}
    assert len(kept) == len(one.read_evaluation()["results"]) == 7  # what was there stays
    evaluate_in(one, WINOGRANDE, precision="bfloat16")  # in the place of float32
    assert len(counting.asked) == 9 and len(one.read_evaluation()["results"]) == 7


def test_an_id_is_of_all_that_answers(tmp_path: Path, models: dict[str, Path]) -> None:
    copy = Path(shutil.copytree(models["teacher"], tmp_path / "copy"))
    before = evaluation_benchmarks.model_content(copy)
    assert (
        before
        == evaluation_benchmarks.model_content(models["teacher"])
        != evaluation_benchmarks.model_content(models["student"])
    )
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert evaluation_benchmarks.model_content(copy) != before
    (copy / "README.md").write_text("said of it")
    (copy / "chat_template.jinja").unlink()
    assert evaluation_benchmarks.model_content(copy) == before


def test_a_key_is_of_a_local_tasks_content_wherever_it_lies(tmp_path: Path, questions: Path) -> None:
    def keyed(path: Path) -> str:
        (task,) = parse_tasks([str(path)])
        return evaluation_benchmarks.cache_key("model", task, "float32", None)

    before = keyed(questions)
    moved = Path(shutil.copytree(questions.parent, tmp_path / "elsewhere")) / questions.name
    assert keyed(moved) == before
    data = moved.with_name("winogrande_validation.jsonl")
    data.write_text(data.read_text().replace("waved", "nodded"))
    assert keyed(moved) != before
    questions.write_text(DOCUMENTED + "description: 'Answer.'\n")
    assert keyed(questions) != before


def test_data_files_may_lie_where_the_command_is_started(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = questions.with_name("winogrande_validation.jsonl")
    here = questions.parent.parent
    shutil.move(data, here / data.name)
    monkeypatch.chdir(here)
    (task,) = parse_tasks(["tasks/my_winogrande.yaml:0"])
    monkeypatch.chdir("/")  # where a worker is
    assert len(lm_eval_tasks.load(task)[0].eval_docs) == 11


def test_a_task_that_fails_loses_nothing_and_is_tried_again(
    tmp_path: Path, counting: Counting, evaluate_in: Evaluate
) -> None:
    run = RunDirectory(tmp_path / "run")
    assert not evaluate_in(run, WINOGRANDE, BROKEN, PIQA)
    found = run.read_evaluation()
    assert [(row["model"], row["task"]) for row in found["results"]] == [
        ("teacher", "winogrande"), ("teacher", "piqa"), ("best", "winogrande"), ("best", "piqa")]  # fmt: skip
    assert found["failures"] == [{"model": name, "task": "broken:0", "message": "ConnectionError: to the Hub"}
                                 for name in ("teacher", "best")]  # fmt: skip
    assert [event["event"] for event in run.events()] == ["evaluation_failed"] * 2
    counting.broken = False
    counting.asked.clear()
    assert evaluate_in(run, WINOGRANDE, BROKEN, PIQA)
    assert counting.asked == [("teacher", "broken:0"), ("student", "broken:0")]
    assert run.read_evaluation()["failures"] == [] and len(run.read_evaluation()["results"]) == 6


def test_a_model_that_is_not_there_loses_nothing(tmp_path: Path, counting: Counting, evaluate_in: Evaluate) -> None:
    run = RunDirectory(tmp_path / "run")
    assert not evaluate_in(run, WINOGRANDE, references=("./nowhere",))
    assert len(run.read_evaluation()["results"]) == 2
    assert "is not a folder" in run.read_evaluation()["failures"][0]["message"]
    (tmp_path / "best").mkdir()  # a student cut short
    assert not evaluate_in(run, WINOGRANDE, best=tmp_path / "best")


def test_another_model_by_the_same_name_replaces_the_first(
    tmp_path: Path, models: dict[str, Path], counting: Counting, evaluate_in: Evaluate
) -> None:
    run = RunDirectory(tmp_path / "run")
    evaluate_in(run, WINOGRANDE, PIQA)
    evaluate_in(run, WINOGRANDE, best=models["reference"])
    rows = [(row["model"], row["task"]) for row in run.read_evaluation()["results"]]
    assert sorted(rows) == [("best", "winogrande"), ("teacher", "piqa"), ("teacher", "winogrande")]


def answered(model: str, samples: list[float] | None, **given: Any) -> dict[str, Any]:
    return {"model": model, "task": "t", "label": "t:0", "questions": "q", "metric": "acc,none", "shots": 0,
            "limit": None, "precision": "float32", "samples": samples, "twins": None, **given}  # fmt: skip


def test_differences_are_paired_by_question() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, (2, 40)).astype(float)
    twins = (np.arange(40) // 2).tolist()
    results = [answered("teacher", a.tolist()), answered("best", b.tolist())]
    (found,) = benchmarks.differences(results, ["best"])
    expected = compared(a, b) | {"p": mcnemar(a, b)["p"]}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert (found["test"], found["n"], found["units"]) == ("McNemar", 40, 40)
    assert found["only_teacher"] == int((a > b).sum()) and found["only_model"] == int((b > a).sum())
    (over,) = benchmarks.differences([{**each, "twins": twins} for each in results], ["best"])
    whole = compared(clustered(a, np.array(twins)), clustered(b, np.array(twins)))
    assert over["stderr"] == pytest.approx(whole["stderr"]) and over["units"] == 20 and over["p"] == found["p"]
    (alike,) = benchmarks.differences([{**each, "samples": a.tolist()[:5] + [0.0], "twins": [0, 0, 1, 1, 2, 3]}
                                             for each in results], ["best"])  # fmt: skip
    assert str(alike["difference"]) == "0.0" and alike["p"] == 1.0
    (shares,) = benchmarks.differences([results[0], answered("best", (b / 2).tolist())], ["best"])
    assert shares["test"] == "signs"


@pytest.mark.parametrize("other", [{"questions": "r"}, {"limit": 3}, {"precision": "bfloat16"}, {"samples": None},
                                   {"metric": "acc_norm,none"}, {"label": "t:5", "shots": 5}])  # fmt: skip
def test_what_was_not_asked_alike_is_not_paired(other: dict[str, Any]) -> None:
    results = [answered("teacher", [1.0, 0.0]), answered("best", [1.0, 1.0]) | other]
    assert benchmarks.differences(results, ["best"]) == []
    assert benchmarks.differences(results[1:], ["best"]) == []


def test_parameters_are_counted_from_the_file(models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["teacher"])
    assert benchmarks.parameters(models["teacher"]) == sum(each.numel() for each in model.parameters())


# The commands


@pytest.fixture
def finished(tmp_path: Path, models: dict[str, Path]) -> RunDirectory:
    """What `benchmarks.tables` reads of a run."""
    run = RunDirectory(tmp_path / "run")
    run.write_config({"name": "tiny", "teacher": {"model": str(models["teacher"])}})
    shutil.copytree(models["student"], run.best())
    return run


def test_a_finished_run_is_evaluated_by_one_command_once(
    finished: RunDirectory, models: dict[str, Path], questions: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    finished.write_environment({"precision": "float32", "teacher": {"folder": str(models["teacher"])}})
    asked = [str(finished.root), "--tasks", f"{questions}:0,{questions}:2", "--references", str(models["reference"])]
    assert tables.main(asked) == 0
    found = finished.read_evaluation()
    names = [(row["model"], row["shots"]) for row in found["results"]]
    assert names == [(model, shots) for model in ("teacher", "best", str(models["reference"])) for shots in (0, 2)]
    assert len(found["differences"]) == 4 and all(row["test"] == "McNemar" for row in found["differences"])
    assert [row["precision"] for row in found["results"]] == ["float32"] * 6  # the run's own
    assert found["models"]["best"]["content"] == evaluation_benchmarks.model_content(models["student"])
    assert "Tables 1 and 2" in finished.report.read_text()
    printed = capsys.readouterr().out
    assert "winogrande" in printed and "±" in printed
    monkeypatch.setattr(tables, "evaluate", lambda *_: pytest.fail("evaluated again"))
    before = finished.evaluation.read_bytes()
    assert tables.main(asked) == 0 and finished.evaluation.read_bytes() == before


def test_a_wrong_command_is_status_2_and_writes_nothing(
    tmp_path: Path, questions: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    reference = ["--references", str(models["reference"])]
    for flags, why in (
        (["--tasks", str(questions)], "no run is there"), (["--tasks", "mt_bench", *reference], "judge"),
        (["--tasks", str(questions), "--references", "./nowhere"], "--references: './nowhere' is not a folder"),
    ):  # fmt: skip
        assert tables.main([str(folder), *flags]) == 2
        assert why in capsys.readouterr().err and not folder.exists()


def test_the_stage_of_a_run_evaluates_the_corrected_teacher_under_a_name_of_its_own(
    tmp_path: Path, models: dict[str, Path], questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray places runs here."""
    from types import SimpleNamespace

    monkeypatch.setattr(run_command, "on_all_cpus", lambda depot, function, *arguments: function(*arguments))
    asked = SimpleNamespace(tasks=(f"{questions}:0",), references=(), limit=4)
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(models["student"], run.best())
    shutil.copytree(models["reference"], run.best(2))
    for corrected, name in ((None, "tiny"), (models["teacher"], "tiny, corrected")):
        config = SimpleNamespace(evaluation=asked, teacher=SimpleNamespace(model="tiny"))
        pruned = SimpleNamespace(folder=models["teacher"])
        prepared = SimpleNamespace(run_dir=run, config=config, precision="float32", pruned=pruned, corrected=corrected)
        run_command.evaluate_models(prepared, 2)  # type: ignore[arg-type]
        found = run.read_evaluation()
        assert found["models"]["teacher"]["name"] == name
        assert [(row["model"], row["n"]) for row in found["results"]] == [("teacher", 4), ("best", 4), ("best-2", 4)]
