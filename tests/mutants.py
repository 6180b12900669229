"""Does the suite bite? Mutants of the science modules, drawn by a fixed seed, each run against its package's tests.

    python -m tests.mutants [--draw 60] [--seed 0] [--only NUMBER ...] [--list]

A mutant is one expression changed by an operator of `OPERATORS`. It is killed by a failing test, or by a test run
that lasts ten times as long as it may. A mutant that survives is printed with its place; what cannot be told from the
original by any test is in `EQUIVALENT`, with the reason. The exit status is 1 if another one survived.

Each mutant is imported in the place of its module by a process that has been forked once torch, transformers and
pytest are there: the tree is not touched.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600
# The science, and the tests that hold it: those of its own package first.
SCIENCE = {
    "models": (("families", "architecture", "layerwise", "output_head"), ("models", "pruning", "planning")),
    "data": (("winogrande_packing",), ("data", "evaluation")),
    "losses": (("output_loss", "divergences", "intermediate"), ("losses", "distillation")),
    "evaluation": (
        ("scoring", "statistics", "winogrande", "paired_scores", "chance", "evidence"),
        ("evaluation", "data", "ablation"),
    ),
    "pruning": (("rankings", "trimming", "laco"), ("pruning", "importance", "depth")),
    "importance": (("importance", "activations", "weights", "taylor", "pca", "iterative"), ("importance",)),
    "depth": (("sweep", "recommendation", "layer_choice"), ("depth",)),
    "distillation": (("loop", "objective", "correction", "teacher_cache"), ("distillation", "losses")),
    "architecture_search": (("space", "schedule", "samplers", "state", "latency"), ("architecture_search", "planning")),
}
OVER_AXES = {"sum", "mean", "norm", "cumsum", "argsort", "sort", "softmax", "log_softmax", "cat", "stack", "max", "min",
             "amax", "amin", "logsumexp", "flatten", "unsqueeze", "split", "std", "var", "take"}  # fmt: skip
# Mutants that no test can tell from the original, by `Mutant.name`, and why.
EQUIVALENT: dict[str, str] = {
    "importance.pca [swapped argument] tensor.movedim(axis, -1) -> tensor.movedim(-1, axis)": "a weight has "
    "two axes at most, and both transpose a matrix whose first axis is meant",
    "architecture_search.samplers [dropped term] count - 1 -> count": "one bit more, where count is a power of 2: the "
    "numbers below count come in the same order",
}


class Mutant(NamedTuple):
    """One changed expression: where it is, what changes, and the whole mutated source."""

    module: str
    line: int
    operator: str
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        """What identifies it while the lines around it move."""
        return f"{self.module} [{self.operator}] {self.before} -> {self.after}"


def sign(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        yield ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield node.operand


def off_by_one(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 1000:
        yield ast.Constant(node.value + 1)


def dropped_term(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        yield node.left


def wrong_axis(node: ast.AST) -> Iterator[ast.expr]:
    if not isinstance(node, ast.Call):
        return
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name not in OVER_AXES or isinstance(node.func, ast.Name):  # the built-in max(1, x) has no axis
        return
    for place, argument in enumerate(node.args):
        if isinstance(argument, ast.Constant) and argument.value in (0, 1, -1) and type(argument.value) is int:
            moved = [*node.args[:place], ast.Constant(1 if argument.value == 0 else 0), *node.args[place + 1 :]]
            yield ast.Call(node.func, moved, node.keywords)
    for place, keyword in enumerate(node.keywords):
        if keyword.arg in ("dim", "axis") and isinstance(keyword.value, ast.Constant | ast.UnaryOp):
            axis = ast.literal_eval(keyword.value)
            if type(axis) is int:
                other = ast.keyword(keyword.arg, ast.Constant(1 if axis == 0 else 0))
                yield ast.Call(node.func, node.args, [*node.keywords[:place], other, *node.keywords[place + 1 :]])


def swapped_argument(node: ast.AST) -> Iterator[ast.expr]:
    plain = isinstance(node, ast.Call) and len(node.args) >= 2 and not any(
        isinstance(argument, ast.Starred) for argument in node.args[:2]
    )  # fmt: skip
    if plain and ast.dump(node.args[0]) != ast.dump(node.args[1]):  # type: ignore[attr-defined]
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)  # type: ignore[attr-defined]


COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def comparison(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)


OPERATORS: dict[str, Callable[[ast.AST], Iterator[ast.expr]]] = {
    "sign": sign,
    "off by one": off_by_one,
    "dropped term": dropped_term,
    "wrong axis": wrong_axis,
    "swapped argument": swapped_argument,
    "comparison": comparison,
}


def expressions(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield every expression inside functions that decides a number; not annotations, decorators, messages or checks
    that only refuse."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                yield from _inside(statement)


def _inside(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.FunctionDef | ast.ClassDef):
        return
    if isinstance(node, ast.AnnAssign):
        if node.value:
            yield from _inside(node.value)
        return
    if isinstance(node, ast.expr):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _inside(child)


def mutants_of(module: str, path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a module, in the order of its source."""
    text = path.read_text()
    raw, starts = text.encode(), [0]
    for row in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(row.encode()))
    for node in dict.fromkeys(expressions(ast.parse(text))):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        before = ast.unparse(node)
        for operator, change in OPERATORS.items():
            for changed in change(node):
                after = ast.unparse(ast.fix_missing_locations(changed))
                source = (raw[:begin] + b"(" + after.encode() + b")" + raw[end:]).decode()
                try:
                    compile(source, str(path), "exec")
                except SyntaxError:
                    continue
                yield Mutant(module, node.lineno, operator, before, after, source)


def drawn(count: int, seed: int) -> list[Mutant]:
    """Draw mutants without replacement: operators in turn, and for each a module, then one of its mutants."""
    pool: dict[str, dict[str, list[Mutant]]] = {operator: {} for operator in OPERATORS}
    for package, (names, _) in SCIENCE.items():
        for name in names:
            path = ROOT / "minitron_search" / package / f"{name}.py"
            for mutant in mutants_of(f"minitron_search.{package}.{name}", path):
                pool[mutant.operator].setdefault(mutant.module, []).append(mutant)
    draw, found = random.Random(seed), list[Mutant]()
    while len(found) < count:
        of_operator = pool[list(OPERATORS)[len(found) % len(OPERATORS)]]
        of_module = of_operator[draw.choice(sorted(of_operator))]
        found.append(of_module.pop(draw.randrange(len(of_module))))
        if not of_module:
            del of_operator[found[-1].module]
    return found


class Imported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a mutant's source."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.mutant.module:
            return None
        return importlib.util.spec_from_file_location(name, _file(name), loader=self)  # type: ignore[arg-type]

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, _file(self.mutant.module), "exec"), module.__dict__)


def _file(module: str) -> str:
    return str(ROOT / (module.replace(".", "/") + ".py"))


def tests_of(mutant: Mutant) -> list[str]:
    """Return the test files that are to kill it: those that name its module first, then the others of its packages."""
    package = mutant.module.split(".")[1]
    files = [path for folder in SCIENCE[package][1] for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))]
    files.sort(key=lambda path: mutant.module not in path.read_text())
    return [str(path) for path in files]


def killed(mutant: Mutant, tests: list[str]) -> tuple[bool, float, str]:
    """Run `tests` on the mutant in a forked process: whether one failed, after how many seconds, and its name."""
    began = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(mutant, tests, writer)
    os.close(writer)
    os.set_blocking(reader, False)
    said, status = b"", None
    while status is None:
        pid, ended = os.waitpid(child, os.WNOHANG)
        status = ended if pid else None
        if status is None and time.monotonic() - began > TIMEOUT_S:
            os.killpg(child, signal.SIGKILL)
            return True, time.monotonic() - began, "it does not end"
        time.sleep(0.05)
        try:
            said += os.read(reader, 1 << 16)
        except BlockingIOError:
            pass
    os.close(reader)
    return os.waitstatus_to_exitcode(status) != 0, time.monotonic() - began, said.decode(errors="replace")


def _run(mutant: Mutant, tests: list[str], writer: int) -> None:
    """Never returns: the process ends with pytest's exit status."""
    os.setpgid(0, 0)
    sys.meta_path.insert(0, Imported(mutant))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)

    class First:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                os.write(writer, report.nodeid.encode())

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                os.write(writer, f"{report.nodeid} cannot be imported".encode())

    status = 1
    try:
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-summary"]
        status = int(pytest.main([*options, *tests], plugins=[First()]))
    finally:
        os._exit(status)


def main() -> int:
    """Draw, run and print; return 1 if a mutant survived that is not known to be equivalent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draw", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the draw; all without it")
    parser.add_argument("--list", action="store_true", help="print the draw and run nothing")
    options = parser.parse_args()
    survivors, counts = 0, {"killed": 0, "equivalent": 0, "survived": 0}
    for number, mutant in enumerate(drawn(options.draw, options.seed), 1):
        if options.only and number not in options.only:
            continue
        place = f"{number:3d} {mutant.module.removeprefix('minitron_search.')}:{mutant.line} {mutant.operator}: "
        place += re.sub(r"\s+", " ", f"{mutant.before}  ->  {mutant.after}")
        if options.list:
            print(place, flush=True)
            continue
        if mutant.name in EQUIVALENT:
            counts["equivalent"] += 1
            print(f"{place}\n      equivalent: {EQUIVALENT[mutant.name]}", flush=True)
            continue
        dead, seconds, by = killed(mutant, tests_of(mutant))
        counts["killed" if dead else "survived"] += 1
        survivors += not dead
        print(f"{place}\n      {'killed by ' + by if dead else 'SURVIVED'} after {seconds:.0f} s", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 1 if survivors else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    # before any fork: what takes seconds to import and holds nothing of this project
    import numpy  # noqa: F401
    import pytest
    import ray  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    torch.set_num_threads(1)
    sys.exit(main())
