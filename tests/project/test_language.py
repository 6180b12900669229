"""A docstring says what the caller gets in a sentence that begins with a verb."""

import ast

from tests.project.test_layering import ANALYSIS, PACKAGE

# Words that begin a fragment, not a sentence that says what a function does.
FRAGMENTS = {
    "all", "and", "as", "because", "every", "how", "if", "in", "it", "its", "no", "of", "or", "so", "the", "their",
    "these", "this", "those", "unless", "what", "when", "where", "whether", "which", "with", "without",
}  # fmt: skip


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    fragments = []
    for name, path in {**PACKAGE, **ANALYSIS}.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not _is_property(node) and (text := ast.get_docstring(node)):
                word = text.split()[0].strip("`").lower()
                if word in FRAGMENTS or not text[0].isalpha():
                    fragments.append(f"{name}.{node.name}: {text.splitlines()[0]}")
    assert fragments == []


def _is_property(node: ast.FunctionDef) -> bool:
    """Tell whether a function is read as an attribute, whose docstring may name the thing."""
    names = {getattr(decorator, "id", getattr(decorator, "attr", "")) for decorator in node.decorator_list}
    return bool(names & {"property", "cached_property"})
