"""The embedded text: which documents are kept, and that everyone gets the same."""

import pytest

from minitron_search.data import docstrings

SOURCE = b'''
"""Module."""
import nowhere_to_be_found
class A:
    """Class.

        indented
    """
    if True:
        def method(self):
            """Method."""
    else:
        def other(self):
            """Other."""
async def f():
    "Function."
    x = "not a docstring"
'''


def test_docstrings_of_modules_classes_functions_and_methods_are_read_without_importing():
    found = ["Module.", "Class.\n\nindented", "Method.", "Other.", "Function."]
    assert list(docstrings.docstrings(SOURCE)) == found


def test_prose_is_kept_and_tables_and_code_are_not():
    assert docstrings.is_prose("Return the sum of all elements, or zero.\n\n>>> total([1])\n1")
    assert not docstrings.is_prose("A table of the units\n==== ====\n  1    2\n  3    4\n==== ====\nx=1; y=2; z=3")
    assert not docstrings.is_prose(">>> print('this line has many plain words in it')")


def test_copies_that_differ_in_white_space_and_case_count_once():
    assert docstrings.distinct(iter(["One text.", "other", "one\n   TEXT."])) == ["One text.", "other"]


def test_the_order_does_not_depend_on_the_order_of_reading():
    texts = [f"text {number}" for number in range(50)]
    assert docstrings._mixed(texts) == docstrings._mixed(texts[::-1]) != texts


def test_documents_are_the_same_from_the_packages_and_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(docstrings, "DISTRIBUTIONS", ("numpy", "not-installed-anywhere"))
    first = docstrings.documents()
    assert len(first) > 500 and min(map(len, first)) >= docstrings.SHORTEST
    assert not any("<|" in text for text in first)
    monkeypatch.setattr(docstrings, "_collected", None)
    assert docstrings.documents() == first


def test_packages_without_lists_of_files_are_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(docstrings, "DISTRIBUTIONS", ("not-installed-anywhere",))
    with pytest.raises(RuntimeError, match="corpus.train: 'docstrings'"):
        docstrings.documents()
