"""docs/architecture.md shows the house as it is: its tree, the files and the names it speaks of."""

import re

from tests.project.test_layering import ANALYSIS, ORDER, PACKAGE
from tests.project.tree import DOCUMENT, first_sentence, with_tree
from tests.runs import ROOT


def test_the_tree_is_todays() -> None:
    text = DOCUMENT.read_text()
    assert with_tree(text) == text, "python -m tests.project.tree writes it"


def test_every_module_says_in_a_sentence_what_it_is_for() -> None:
    for name, path in {**PACKAGE, **ANALYSIS}.items():
        sentence = first_sentence(path)
        assert 10 < len(sentence) < 220 and sentence[0].isupper() or sentence.startswith("`"), f"{name}: {sentence!r}"


def test_the_packages_are_named_in_the_order_of_imports() -> None:
    """The table of packages is read as the rule: each imports only from those above it."""
    rows = re.findall(r"^\| `([a-z_]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [name for name in ORDER if (ROOT / "minitron_search" / name).is_dir()]


def test_the_walks_name_lines_that_are_there() -> None:
    """`file.py`: `text` in a walk is a line of that file, in order, in at most five files."""
    for walk in re.findall(r"<!-- walk -->\n(.*?)<!-- end -->", DOCUMENT.read_text(), re.DOTALL):
        steps = re.findall(r"`(minitron_search/[\w/]+\.py)`: `(.+?)`", walk)
        assert steps and len({file for file, _ in steps}) <= 5
        for file, text in steps:
            assert text in (ROOT / file).read_text(), f"{file} has no {text!r}"
