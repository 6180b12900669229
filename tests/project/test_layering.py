"""The house: imports go down only, every module has a room, Ray is where work is placed, analysis reads records."""

import ast
import graphlib
import re
from collections import Counter
from functools import cache
from pathlib import Path

from tests.runs import ROOT

# Lowest first: a package imports from those before it and from itself.
ORDER = (
    "version", "messages", "records", "ownership", "config", "tracking", "models", "teachers", "data", "losses",
    "evaluation", "pruning", "importance", "depth", "checkpoints", "distillation", "trials", "architecture_search",
    "export", "planning", "progress", "cluster", "pipeline", "ablation", "commands", "api",
    "options", "completion", "usage", "cli", "run", "subcommands",
)  # fmt: skip
PLACES_WORK = {"cluster", "pipeline", "commands"}  # the only ones that import Ray
# imported before the command says its first word
LIGHT = {
    "messages", "records", "ownership", "config", "options", "completion", "usage", "cli", "run", "subcommands",
}  # fmt: skip
LARGE = {"torch", "transformers", "ray"}
MOST = 12  # modules in a folder
WRITTEN = ("tests", "benchmarks", "examples", "docs")  # where imports stand in strings and documents too
PRIVATE_WORDS = {"workshop", "depot", "mirror", "ruling", "rounds", "walk", "feed", "materials", "pairing"}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


PACKAGE, ANALYSIS = modules("minitron_search"), modules("analysis")


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, wherever in it; `from a import b` gives a.b as well as a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def room(name: str) -> str:
    """The package of a module, or its own name where it lies beside the packages."""
    return name.split(".")[1]


def imported(path: Path, among: dict[str, Path]) -> set[str]:
    return {name for name in imports(path) if name in among}


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def test_every_module_is_in_a_room_that_is_named() -> None:
    """A new file cannot be outside the rule."""
    assert len(PACKAGE) > 90 and len(ANALYSIS) > 20
    assert {room(name) for name in PACKAGE if name != "minitron_search"} == set(ORDER)


def test_packages_import_downwards() -> None:
    upwards = [
        f"{name} imports {other}"
        for name, path in PACKAGE.items()
        for other in imported(path, PACKAGE)
        if "." in name and "." in other and ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    assert upwards == []


def test_no_files_import_each_other_in_a_circle() -> None:
    for package in (PACKAGE, ANALYSIS):
        graph = {name: imported(path, package) - {name} for name, path in package.items()}
        tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_folder_is_more_than_a_screen() -> None:
    folders = Counter(path.parent for path in (*PACKAGE.values(), *ANALYSIS.values()))
    assert {str(folder): count for folder, count in folders.items() if count > MOST} == {}


def test_no_module_is_named_in_a_private_word() -> None:
    assert not {path.stem for path in (*PACKAGE.values(), *ANALYSIS.values())} & PRIVATE_WORDS


def test_ray_is_imported_only_where_work_is_placed() -> None:
    users = {name for name, path in PACKAGE.items() if "ray" in top_level(path)}
    assert users and {room(name) for name in users} <= PLACES_WORK


def test_what_is_imported_before_the_first_word_is_light() -> None:
    for name, path in PACKAGE.items():
        if "." not in name or room(name) in LIGHT:
            assert not top_level(path) & LARGE, name


def test_analysis_reads_records_with_neither_torch_nor_ray() -> None:
    for name, path in ANALYSIS.items():
        assert not top_level(path) & LARGE, name
        rooms = {room(other) for other in imported(path, PACKAGE) if "." in other}
        assert rooms <= {"messages", "records"}, name


def test_the_package_imports_analysis_only_to_report() -> None:
    users = {room(name) for name, path in PACKAGE.items() if "analysis" in top_level(path)}
    assert users <= {"pipeline", "commands", "subcommands"}


IN_TEXT = re.compile(r"^ *(?:from|import) ((?:minitron_search|analysis)[.\w]*)(?: import ([\w, ]+))?", re.MULTILINE)


def test_what_scripts_in_strings_and_documents_import_is_there() -> None:
    """Nothing else reads them before they run: in slow tests, by hand, or by a user."""
    everything, missing = {**PACKAGE, **ANALYSIS}, []
    for path in [path for folder in WRITTEN for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".md")]:
        for module, listed in IN_TEXT.findall(path.read_text()):
            names = [name.split(" as ")[0].strip() for name in listed.split(",") if name.strip()]
            text = everything[module].read_text() if module in everything else ""
            missing += [
                f"{path.name}: {module} {name}" for name in names
                if f"{module}.{name}" not in everything and not re.search(rf"\b{name}\b", text)
            ]  # fmt: skip
            missing += [] if module in everything else [f"{path.name}: {module}"]
    assert not missing, missing
