"""A shell completes commands, flags and the words that they take; where none is known, files."""

import os
import subprocess
import sys

import pytest

from minitron_search import subcommands
from minitron_search.completion import SHELLS, completed
from tests.runs import ROOT

COMMANDS = {name: subcommands.arguments_of(name) for name in subcommands.COMMANDS}


@pytest.mark.parametrize(("line", "words"), [
    ("minitron-search ", list(subcommands.COMMANDS)),
    ("minitron-search pr", ["prune"]),
    ("minitron-search run mn", ["mn-minitron-8b"]),
    ("minitron-search ablate figure-6", ["figure-6"]),
    ("minitron-search run smollm2 --search.sch", ["--search.scheduler"]),
    ("minitron-search evaluate runs/a --dry", ["--dry-run", "--dry_run"]),
    ("minitron-search run --search.scheduler h", ["halving", "hyperband"]),
    ("minitron-search run --search.controls ", ["true", "false"]),
    ("minitron-search run --stages importance,re", ["importance,retrain", "importance,report"]),
    ("minitron-search run --help search.s", ["search.sampler", "search.scheduler", "search.seeds"]),
    ("minitron-search report --f", ["--figures"]),
    ("minitron-search prune --te", ["--text"]),
    ("minitron-search completion z", ["zsh"]),
    # files are the shell's to complete
    ("minitron-search report runs/", []), ("minitron-search run --corpus.train ", []), ("minitron-search serach ", []),
    ("minitron-search prune --search", []),
])  # fmt: skip
def test_what_a_line_may_become(line: str, words: list[str]) -> None:
    assert completed(line, COMMANDS) == words


@pytest.mark.parametrize("shell", SHELLS)
def test_the_line_that_is_installed_asks_this_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert subcommands.main(["completion", shell]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.endswith(
        "complete -o default -C 'minitron-search completion' minitron-search\n"
    )
    assert subprocess.run(["bash", "-n"], input=line, text=True).returncode == 0
    line = "minitron-search run --search.sam and what is right of the cursor"
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(line.index(" and"))}
    done = subprocess.run(
        [sys.executable, "-m", "minitron_search.subcommands", "completion", "minitron-search", "--search.sam", "run"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "--search.sampler\n"
