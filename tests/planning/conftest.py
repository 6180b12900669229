"""Inputs of a run that would start, and a place of the test's own where it would: nothing here needs Ray."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.input_files(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr("minitron_search.cluster.session.joined", lambda: pytest.fail("nothing here needs Ray"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
