"""`ray job submit --working-dir .` sends what a run reads and little else: Ray's own client packs it here."""

import io
import shutil
import zipfile
from types import SimpleNamespace

import pytest
from ray.dashboard.modules.dashboard_sdk import SubmissionClient

from tests.cluster_files.files import ROOT

LIMIT = 2e6


class Client(SubmissionClient):
    """Keeps what it would send."""

    def __init__(self):
        self.sent = b""

    def _do_request(self, method, endpoint, data=None, **_):
        self.sent = data or self.sent
        return SimpleNamespace(status_code=200 if method == "PUT" else 404)


def uploaded(folder):
    """(bytes sent, names in the package)"""
    client = Client()
    client._upload_working_dir_if_needed({"working_dir": str(folder)})
    names = zipfile.ZipFile(io.BytesIO(client.sent)).namelist()
    return len(client.sent), {name for name in names if not name.endswith("/")}


def test_this_tree_is_small_and_holds_what_a_run_reads():
    size, names = uploaded(ROOT)
    assert size < LIMIT
    needed = [path for pattern in ("minitron_search/**/*.py", "minitron_search/**/*.json*", "analysis/*.py",
              "analysis/*.html", "search_spaces/*.yaml", "pyproject.toml", "constraints.txt")
              for path in ROOT.glob(pattern)]  # fmt: skip
    assert len(needed) > 90
    assert {str(path.relative_to(ROOT)) for path in needed} <= names
    folders = {name.split("/")[0] for name in names}
    assert not folders & {"tests", "docs", "benchmarks", "clusters", "runs", ".git", ".venv", ".ci"}


@pytest.mark.parametrize("gitignored", [True, False])
def test_what_a_working_tree_gathers_stays_behind(tmp_path, monkeypatch, gitignored):
    """Of a tree with an environment, runs, caches and models in it, and where .gitignore is not asked."""
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0" if gitignored else "1")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path)
    wanted = {"minitron_search/run.py", "search_spaces/mine.yaml", "corpus.jsonl"}
    gathered = {".git/objects/pack/a.pack", ".venv/lib/torch/a.so", "runs/one/best/config.json", "tests/data/a.parquet",
                "docs/report.png", "minitron_search/__pycache__/run.cpython-311.pyc", "model/model.safetensors",
                "model/model.gguf", ".mypy_cache/a.json", "minitron_search.egg-info/PKG-INFO", "benchmarks/a.py",
                "clusters/gcp.yaml", "cluster.yaml", ".hypothesis/a", "build/lib/a.py"}  # fmt: skip
    for name in wanted | gathered:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    _, names = uploaded(tmp_path)
    assert names - {".gitignore", ".rayignore"} == wanted
