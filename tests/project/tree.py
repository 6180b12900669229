"""The tree in docs/architecture.md, made from the first line of every module's docstring.

python -m tests.project.tree        # write it into the document
"""

import ast
import re
from pathlib import Path

from tests.project.test_layering import ORDER
from tests.runs import ROOT

DOCUMENT = ROOT / "docs" / "architecture.md"
MARKED = re.compile(r"(<!-- tree: begin -->\n).*?(<!-- tree: end -->)", re.DOTALL)


def first_sentence(path: Path) -> str:
    """Return the first paragraph of a module's docstring, on one line, up to the end of its first sentence."""
    paragraph = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.:]) (?=[A-Z])", paragraph)[0].removesuffix(":")


def tree() -> str:
    """Return the whole tree as a Markdown list: packages in the order of imports, lowest first."""
    lines = []
    for name in ORDER:
        folder = ROOT / "minitron_search" / name
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        lines.append(f"- **`{name}{'/' if folder.is_dir() else '.py'}`** {first_sentence(path)}")
        lines += _files(folder)
    for name in ("analysis", "analysis/cards", "analysis/outcome", "analysis/page"):
        lines.append(f"- **`{name}/`** {first_sentence(ROOT / name / '__init__.py')}")
        lines += _files(ROOT / name)
    return "\n".join(lines) + "\n"


def _files(folder: Path) -> list[str]:
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    return [f"  - `{path.name}` {first_sentence(path)}" for path in files]


def with_tree(document: str) -> str:
    """Return the document with today's tree between its marks."""
    return MARKED.sub(lambda marks: marks[1] + "\n" + tree() + "\n" + marks[2], document)


if __name__ == "__main__":
    DOCUMENT.write_text(with_tree(DOCUMENT.read_text()))
