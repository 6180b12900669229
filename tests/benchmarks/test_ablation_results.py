"""The ablations' section of a document: tables of those that are given are written anew, all others stay."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import ablation_results
from benchmarks.document import between
from tests.analysis.conftest import ARMS, write_ablation


def test_an_ablation_that_is_not_given_keeps_its_table_and_its_place_in_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[pd.DataFrame] = []
    monkeypatch.setattr(ablation_results, "write_figures", lambda cards, folder: (
        drawn.append(cards[0].panels[0].data), ([], "no browser here"))[1])  # fmt: skip
    document, folder = tmp_path / "results.md", tmp_path / "kept"
    document.write_text("# Results\n\nbefore\n")
    for name, seeds in (("one", (0, 1, 2)), ("two", (0, 1)), ("one", (0, 1))):
        runs = write_ablation(tmp_path / f"{len(seeds)}" / name, seeds=seeds)
        monkeypatch.setattr("sys.argv", ["", str(runs), "--output", str(document), "--folder", str(folder)])
        ablation_results.main()
    text = document.read_text()
    assert text.startswith("# Results\n\nbefore\n") and text.count("ablations: begin") == 1
    tables = ablation_results.blocks(between(text, "ablations"))
    assert list(tables) == ["one", "two"]
    assert all("2 seeds" in of and all(f"| {arm} |" in of for arm in ARMS) for of in tables.values())
    assert set(drawn[-1]["ablation"]) == {"one", "two"} and set(drawn[0]["ablation"]) == {"one"}
