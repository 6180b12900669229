"""The card of Tables 1 and 2: ours, the paper's beside it where the model is the same, and nothing that could run."""

import base64
import io
from pathlib import Path

import pandas as pd
import pytest

from analysis.outcome import benchmark_tables
from analysis.run_cards import tables_card
from analysis.run_data import load_run
from minitron_search.evaluation.lm_eval_tasks import TABLES
from minitron_search.records.directory import RunDirectory
from tests.analysis.conftest import HOSTILE, WIDTH, evaluated, evaluation
from tests.analysis.test_report import Page, read

PAPER = Path(__file__).parents[2].parent / "shared" / "papers" / "minitron_in_practice_2408.11796.txt"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A folder that holds an evaluation and nothing else, as `benchmarks.tables` makes one of references."""
    run = RunDirectory(tmp_path / "run")
    run.write_evaluation(evaluation())
    return run


def test_what_is_written_is_what_is_read(run: RunDirectory) -> None:
    assert run.read_evaluation() == evaluation()
    assert len(run.evaluation.read_text().splitlines()) > 6  # an entry is a line


def test_the_papers_number_is_beside_ours_where_model_task_and_shots_are_the_papers(run: RunDirectory) -> None:
    rows = benchmark_tables.tables_info([load_run(run)]).results.set_index("model")
    assert rows.loc[WIDTH, "published"] == 73.5
    assert rows.loc[WIDTH, "minus_published"] == pytest.approx(74.0 - 73.5)
    assert rows.loc["teacher", "published"] is None or pd.isna(rows.loc["teacher", "published"])
    card = tables_card(load_run(run))
    assert "paper 73.5, ours +0.5" in card.body and "51.0 ± 1.4<small>not above chance, 50</small>" in card.body
    assert "−4.0 ± 1.5" in card.body and "−7.0 to −1.0" in card.body and "McNemar" in card.body


@pytest.mark.parametrize(("model", "task", "shots", "score"), [
    ("meta-llama/Llama-3.1-8B", "mmlu", 5, 65.3), ("meta-llama/Meta-Llama-3.1-8B", "arc_challenge", 25, 57.9),
    ("nvidia/Mistral-NeMo-Minitron-8B-Base", "humaneval", 0, 36.2),
    ("mistralai/Mistral-Nemo-Base-2407", "gsm8k", 5, 56.4),
    ("nvidia/Llama-3.1-Minitron-4B-Depth-Base", "humaneval", 0, None),  # a dash there
    ("meta-llama/Llama-3.1-8B", "winogrande", 0, None), ("meta-llama/Llama-3.1-8B", "piqa", 0, None),
    ("meta-llama/Llama-3.1-8B, corrected", "winogrande", 5, None), ("./Llama-3.1-8B", "winogrande", 5, None),
    ("meta-llama/Llama-3.1-8B-Instruct", "ifeval", 0, 80.4), ("meta-llama/Llama-3.1-8B", "ifeval", 0, None),
])  # fmt: skip
def test_a_row_of_the_paper_is_found_by_hub_name_task_and_shots(
    model: str, task: str, shots: int, score: float | None
) -> None:
    assert benchmark_tables.published(model, {"task": task, "shots": shots, "value": 0.5})["published"] == score


def test_every_benchmark_has_a_task_of_its_table_or_says_why_not() -> None:
    for table in benchmark_tables.PUBLISHED["tables"]:
        asked = [(task.name, task.shots) for task in TABLES[table["table"]]]
        listed = [(row["task"], row["shots"]) for row in table["benchmarks"] if row["task"]]
        assert sorted(asked) == sorted(listed)
        assert all(bool(row["task"]) != bool(row["cannot"]) for row in table["benchmarks"])
        for model in table["models"]:
            assert model["scores"].keys() == {row["name"] for row in table["benchmarks"]}


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not beside the project")
def test_the_published_numbers_are_those_of_the_text() -> None:
    lines = {line.split("\t")[0]: line.split("\t")[1:] for line in PAPER.read_text().splitlines() if "\t" in line}
    for table in benchmark_tables.PUBLISHED["tables"]:
        for row in table["benchmarks"]:
            cells = [model["scores"][row["name"]] for model in table["models"]]
            printed = [None if cell == "-" else float(cell.rstrip("*")) for cell in lines[row["name"]]]
            assert cells == printed, row["name"]
            for model, cell in zip(table["models"], lines[row["name"]], strict=True):
                assert not cell.endswith("*") or row["name"] in model["elsewhere"]


def test_failures_are_told_and_the_csv_is_all_of_it(run: RunDirectory) -> None:
    page = read(run)
    assert "ConnectionError: no route" in run.report.read_text()
    links = {a["download"]: a["href"] or "" for _, a in page.tags if "download" in a}
    table = pd.read_csv(io.BytesIO(base64.b64decode(links["evaluation.csv"].split(",", 1)[1])))
    assert table["n"].tolist() == [1267] * 4 and {"stderr", "shots", "lm_eval", "task_version"} <= set(table.columns)


def test_no_word_of_an_evaluation_becomes_a_tag(tmp_path: Path) -> None:
    tags = []
    for hostile in ("", HOSTILE):
        run = RunDirectory(tmp_path / f"run{len(hostile)}")
        run.write_evaluation(evaluation(hostile))
        tags.append([tag for tag, _ in read(run).tags])
    assert tags[0] == tags[1]
    assert "alert(1)" in run.report.read_text()


def test_only_failures_one_without_results_and_an_older_file_render(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "failed")
    run.write_evaluation({**evaluation(), "results": [], "differences": []})
    assert "no route" in tables_card(load_run(run)).body
    old = RunDirectory(tmp_path / "old")
    old.write_evaluation({"teacher": {"winogrande": {"acc,none": 0.5}}})
    assert "version" in tables_card(load_run(old)).reason
    none = RunDirectory(tmp_path / "none")
    none.write_config({"name": "none"})
    assert "evaluation.tasks" in tables_card(load_run(none)).reason


def test_limits_are_columns_of_their_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    found = evaluation()
    found["results"] += [evaluated("best", "winogrande", 5, 0.6, limit=100, n=100)]
    run.write_evaluation(found)
    page = Page(tables_card(load_run(run)).body)
    assert page.tags and "first 100 questions" in tables_card(load_run(run)).body
    heads = [attributes for tag, attributes in page.tags if tag == "th" and attributes.get("class") == "number"]
    assert len(heads) >= 3  # winogrande of all questions, of the first 100, and the other task
