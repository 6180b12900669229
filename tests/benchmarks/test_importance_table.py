"""The table of criteria: shapes at one budget, one command into a document, run again without a trace."""

from pathlib import Path

import pytest

from benchmarks.document import replaced
from benchmarks.importance_table import TOLERANCE, main, shape_within
from minitron_search.importance.pca import rotated_config
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, sizes_of, weights, whole
from tests import tiny

BEGIN, END = "<!-- importance_table: begin -->", "<!-- importance_table: end -->"


@pytest.mark.parametrize("kept", [0.5, 0.67, 0.8])
def test_a_shape_meets_the_budget_and_keeps_heads_depth_and_proportion(kept: float) -> None:
    config = tiny.config(hidden_size=48, intermediate_size=128, vocab_size=258)
    budget = kept * parameter_count(weights(config), sizes(config))
    shape = shape_within(config, budget)
    assert abs(parameter_count(weights(config), sizes_of(config, shape)) / budget - 1) <= TOLERANCE
    assert (shape.num_attention_heads, shape.layers) == (4, whole(config).layers)
    assert shape.intermediate_size / shape.hidden_size == pytest.approx(128 / 48, rel=0.15)
    untied = rotated_config(config)
    smaller = shape_within(untied, budget)
    assert abs(parameter_count(weights(untied), sizes_of(untied, smaller)) / budget - 1) <= TOLERANCE
    assert smaller.hidden_size < shape.hidden_size


def test_a_budget_that_no_shape_meets_names_the_flag() -> None:
    config = tiny.config()
    with pytest.raises(ValueError, match="--kept: no shape has 100 parameters"):
        shape_within(config, 100)


def test_the_command_writes_one_table_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    teacher = tiny.teacher_folder(tmp_path / "teacher", hidden_size=48, intermediate_size=96)
    (tmp_path / "text.txt").write_text(tiny.prose(3_000))
    document = tmp_path / "results.md"
    document.write_text(f"# Results\n\nbefore\n\n{BEGIN}\nan older table\n{END}\n\nafter\n")
    command = [
        "--model", str(teacher), "--text", str(tmp_path / "text.txt"), "--length", "32", "--samples", "4",
        "--windows", "3", "--pool", "16", "--seeds", "0", "1", "--precision", "float32", "--output", str(document),
        "--methods", "magnitude", "pca",
    ]  # fmt: skip
    main(command)
    first = document.read_text()
    assert first.startswith("# Results\n\nbefore\n\n") and first.endswith("\n\nafter\n") and "older" not in first
    rows = [line for line in first.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 1 + 2 + 2  # heading, teacher, default and magnitude, pca at the budget and at the shape
    assert "| 0.000 |" in next(row for row in rows if "magnitude" in row)  # no calibration data, no spread
    main(command)
    assert document.read_text() == first


def test_a_document_without_markers_gets_them_at_its_end() -> None:
    named = "importance_table", "Importance criteria"
    once = replaced("# Results\n\ntext\n", "table 1", *named)
    assert (
        once.startswith("# Results\n\ntext\n\n## Importance criteria\n") and once.count(BEGIN) == once.count(END) == 1
    )
    assert replaced(once, "table 2", *named) == once.replace("table 1", "table 2")
