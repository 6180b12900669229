"""Imports go one way; Ray is where work is placed; analysis reads run directories and nothing else."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "minitron_search").rglob("*.py"))
}
ANALYSIS = sorted((ROOT / "analysis").rglob("*.py"))

# where work is placed
RAY = {
    "cluster", "correction_stage", "depth_stage", "forecast_stage", "launchers", "retraining", "ruling", "run",
    "kept_actors", "node_disks", "node_files", "search", "worker_group", "workshop",
}  # fmt: skip
# Each layer imports from those before it, and from itself where that makes no cycle.
LAYERS = (
    {"config", "architecture", "run_directory", "console", "precision"},
    {"families", "search_space", "corpus", "winogrande", "rankings", "teacher", "latency"},
    {"importance", "depth", "trimming", "distillation", "teacher_cache", "scoring"},
    {"search", "ruling", "search_state", "retraining", "depth_stage", "correction_stage", "latency_stage"},
    {"run"},
)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; `from a import b` gives a.b as well as a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of_package(path: Path) -> set[str]:
    return {name for name in imports(path) if name in PACKAGE and name != "minitron_search"}


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def test_there_is_something_to_look_at() -> None:
    assert len(PACKAGE) > 15 and len(ANALYSIS) > 5
    assert "minitron_search.config.schema" in of_package(PACKAGE["minitron_search.run"])


def test_imports_go_one_way() -> None:
    graph = {name: of_package(path) - {name} for name, path in PACKAGE.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_no_module_imports_from_a_layer_above_its_own_even_through_others() -> None:
    graph = {name: of_package(path) - {name} for name, path in PACKAGE.items()}
    reached: dict[str, set[str]] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        reached[name] = graph[name].union(*(reached[other] for other in graph[name]))
    for height, layer in enumerate(LAYERS):
        above = {f"minitron_search.{name}" for upper in LAYERS[height + 1 :] for name in upper}
        for name in layer & {name.removeprefix("minitron_search.") for name in PACKAGE}:
            assert not reached[f"minitron_search.{name}"] & above, name


@pytest.mark.parametrize("name", PACKAGE)
def test_ray_is_imported_only_where_work_is_placed(name: str) -> None:
    if name.removeprefix("minitron_search.") not in RAY:
        assert "ray" not in top_level(PACKAGE[name])


@pytest.mark.parametrize("path", ANALYSIS, ids=lambda path: path.stem)
def test_analysis_reads_run_directories_with_neither_torch_nor_ray(path: Path) -> None:
    assert not top_level(path) & {"torch", "ray", "transformers"}
    assert of_package(path) <= {"minitron_search.records.directory", "minitron_search.records.bucket"}
    for name in ("run_directory", "mirror", "logs", "depot"):
        read = of_package(PACKAGE[f"minitron_search.{name}"])
        assert read <= {
            "minitron_search.records.paths",
            "minitron_search.records.logs",
            "minitron_search.records.transfer",
            "minitron_search.records.directory",
        }


def test_the_run_directory_needs_neither_torch_nor_ray() -> None:
    assert not top_level(PACKAGE["minitron_search.records.directory"]) & {"torch", "ray", "transformers"}
    assert not top_level(PACKAGE["minitron_search"]) & {"torch", "ray", "transformers"}


@pytest.mark.parametrize("name", PACKAGE)
def test_the_package_imports_analysis_only_to_report(name: str) -> None:
    assert "analysis" not in top_level(PACKAGE[name]) or name == "minitron_search.run"
