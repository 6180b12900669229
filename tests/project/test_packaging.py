"""A fresh clone, the wheel and a job's upload each hold every module and every file that a module reads."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cluster_files.test_upload import uploaded
from tests.runs import ROOT

PACKAGES = ("minitron_search", "analysis")
GIT = shutil.which("git")


def shipped() -> set[str]:
    """Every file of the packages in this tree, by its path from the root."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert len(folders) > 15
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.skipif(GIT is None or not (ROOT / ".git").exists(), reason="this tree is no clone")
def test_git_ignores_no_module() -> None:
    """A package that .gitignore names would neither be committed nor uploaded by `ray job submit`."""
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"], input="\n".join(sorted(shipped())), cwd=ROOT, text=True,
        capture_output=True,
    )  # fmt: skip
    assert ignored.returncode == 1 and not ignored.stdout, ignored.stdout + ignored.stderr


def test_a_job_is_sent_every_module() -> None:
    _, names = uploaded(ROOT)
    assert shipped() <= names


def test_the_wheel_holds_every_module_and_the_files_beside_them(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('wheels'))"
    (tree / "wheels").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "wheels").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert shipped() <= names
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == set(PACKAGES)
