"""What a person waits for before the first word: a misspelt key is told before anything large is imported."""

import subprocess
import sys

import pytest

from tests.runs import ROOT

LARGE = {"torch", "transformers", "ray", "optuna", "pandas", "pyarrow", "scipy", "plotly"}


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), (["--serch.trials", "3"], 2), (["--config", "no"], 2)])
def test_help_and_a_misspelt_key_import_nothing_large(arguments: list[str], status: int) -> None:
    code = (
        "import sys\nfrom minitron_search.cli import main\n"
        f"try:\n    status = main({arguments!r})\nexcept SystemExit as end:\n    status = end.code or 0\n"
        "print(status, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found, *modules = done.stdout.splitlines()[-1].split()
    assert int(found) == status, done.stderr
    assert not LARGE & set(modules)
