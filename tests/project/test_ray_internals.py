"""Private names of Ray are used in one module, which says why: an upgrade of Ray breaks no other."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTERNALS = ROOT / "minitron_search" / "cluster" / "ray_internals.py"
MODULES = sorted((ROOT / "minitron_search").rglob("*.py"))
# Modules without an underscore that Ray's documentation does not list, and a constant of its worker.
PRIVATE_MODULES = ("ray.core", "ray.train.v2", "ray.tune.execution", "ray.tune.utils.object_cache")
PRIVATE_NAMES = {"WORKER_MODE", "DRIVER_MODE"}


def is_private(name: str) -> bool:
    """Whether a dotted name is of Ray and private."""
    inside = any(name == module or name.startswith(f"{module}.") for module in PRIVATE_MODULES)
    parts = name.split(".")
    private = any(hidden(part) or part in PRIVATE_NAMES for part in parts[1:])
    return parts[0] == "ray" and (inside or private)


def hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):  # of what a call of Ray returns: ray.get_runtime_context().worker
        return dotted(node.func)
    return node.id if isinstance(node, ast.Name) else ""


def private_names(tree: ast.Module) -> Iterator[str]:
    """The private names of Ray that a module imports, reaches by attributes, passes, overrides, or names in a text."""
    imported: dict[str, str] = {}  # local name -> where it comes from
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            yield from (f"{node.module}.{a.name}" for a in node.names if is_private(f"{node.module}.{a.name}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            name = f"{imported.get(first, first)}.{rest}"
            if is_private(name) or name.startswith("ray.get_runtime_context.worker"):
                yield name
        elif isinstance(node, ast.Call) and dotted(node).startswith("ray."):
            yield from (f"{dotted(node)}({word.arg}=)" for word in node.keywords if word.arg and hidden(word.arg))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if " " not in node.value and is_private(node.value):
                yield node.value
        elif isinstance(node, ast.ClassDef):
            yield from inherited(node, imported)


def inherited(node: ast.ClassDef, imported: dict[str, str]) -> Iterator[str]:
    """The private names that a subclass of Ray's takes from its base: those it uses and does not make itself."""
    bases = [imported.get(dotted(base), dotted(base)) for base in node.bases]
    for base in (name for name in bases if name.startswith("ray.")):
        module, _, name = base.rpartition(".")
        theirs = {name for name in dir(getattr(import_module(module), name)) if hidden(name)}
        methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        own = set(methods)
        used = set()
        for each in ast.walk(node):
            if isinstance(each, ast.Attribute) and dotted(each.value) in ("self", "super"):
                (own if isinstance(each.ctx, ast.Store) else used).add(each.attr)
        yield from (f"{base}.{name}" for name in sorted({n for n in used if hidden(n)} - own | methods & theirs))


@pytest.mark.parametrize(
    "source",
    [
        "from ray._private.state import state",
        "from ray.train.v2.api.config import FailureConfig",
        "import ray.tune.execution.tune_controller",
        "import ray\nray.init(_node_ip_address='127.0.0.1')",
        "import ray\nray.get_runtime_context().worker.mode",
        "import ray\nprint(ray.WORKER_MODE)",
        "import logging\nlogging.getLogger('ray._private.authentication')",
        "from ray.tune.schedulers import ASHAScheduler\nclass A(ASHAScheduler):\n def x(self): return self._trial_info",
        "from ray.tune.schedulers import ASHAScheduler\nclass A(ASHAScheduler):\n def x(self): super()._anything()",
    ],
)
def test_the_search_for_private_names_finds_them(source: str) -> None:
    assert list(private_names(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import ray\nray.get_runtime_context().get_node_id()",
        "from ray.tune.schedulers import ASHAScheduler\nclass A(ASHAScheduler):\n def _mine(self): return self._mine()",
        "state._connect()",
    ],
)
def test_public_names_and_our_own_are_none(source: str) -> None:
    assert not list(private_names(ast.parse(source)))


def test_private_names_of_ray_are_in_one_module() -> None:
    assert list(private_names(ast.parse(INTERNALS.read_text())))
    used = {path.relative_to(ROOT): sorted(set(private_names(ast.parse(path.read_text()))))
            for path in MODULES if path != INTERNALS}  # fmt: skip
    assert {path: names for path, names in used.items() if names} == {}


def test_the_version_they_were_checked_with_is_the_pinned_one() -> None:
    """Whoever upgrades Ray reads that module again, and writes the version down there."""
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert f"Ray {pinned.removeprefix('ray==')}." in ast.get_docstring(ast.parse(INTERNALS.read_text()))
