"""A hundred configurations, each with a fault that is drawn from the schema itself, end in a message each."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from minitron_search.config.keys import fields as all_fields
from minitron_search.config.keys import keys
from minitron_search.config.space import Anchor, Axis, DropBlock, MemoryTarget, SpeedTarget, Target
from tests.runs import ROOT

SECTIONS = {name: default for name, default in keys() if isinstance(default, BaseModel)}
OPTIONAL = {"target": Target, "axis": Axis, "drop": DropBlock, "anchor": Anchor, "memory": MemoryTarget,
            "speed": SpeedTarget}  # fmt: skip
CONTRADICTIONS: list[dict[str, Any]] = [
    {"search": {"trials": 2, "promote": 3}}, {"search": {"rungs": [9000, 5000]}},
    {"resources": {"launcher": "inline", "workers_per_trial": 4}}, {"importance": {"samples": 65}},
    {"retraining": {"learning_rate": 1e-6}}, {"retraining": {"warmup_steps": 77}},
    {"distillation": {"teacher_cache": "topk", "loss": "js"}}, {"distillation": {"embedding": True}},
    {"teacher": {"prune": "corrected"}}, {"resources": {"mfu": 0.5}}, {"evaluation": {"references": ["./x"]}},
    {"depth": {"metrics": ["taylor"], "weights": "streamed"}}, {"search": {"tokens": 100}},
]  # fmt: skip


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def bounds(metadata: list[Any]) -> Iterator[float]:
    """Yield numbers just outside what a field allows."""
    for part in metadata:
        for name, step in (("ge", -1), ("gt", -1), ("le", 1), ("lt", 1)):
            bound = getattr(part, name, None)
            if bound is not None:
                yield bound + step * max(1, abs(bound))


def mutations(draw: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (the key at fault, a configuration that has the fault), one after another for ever."""
    fields = [(name, field) for name, field in all_fields() if name.count(".") < 2 or "correction" in name]
    leaves = [(name, field) for name, field in fields if name not in SECTIONS and not name.startswith("space.")]
    numbers = [(name, value) for name, field in leaves for value in bounds(field.metadata)]
    while True:
        name, _ = draw.choice(leaves)
        yield name, nested(name, draw.choice([{"oops": 1}, [[]], [{"a": [1]}]]))
        name, value = draw.choice(numbers)
        yield name, nested(name, value)
        section = draw.choice([*SECTIONS, ""])
        unknown = "".join(draw.choice("abcdefgh_") for _ in range(draw.randint(4, 12)))
        yield unknown, nested(f"{section}.{unknown}".lstrip("."), draw.choice([1, "x", None, {"a": 1}]))
        section = draw.choice(list(SECTIONS))
        yield section, nested(section, draw.choice([5, "text", [1], None]))
        fault = draw.choice(CONTRADICTIONS)
        (key, inner), *_ = fault.items()
        yield key, fault


def test_a_hundred_faults_are_a_hundred_messages(tmp_path: Path) -> None:
    """All in one process, in which nothing large is imported."""
    faults, source = [], mutations(random.Random(17))
    for number in range(100):
        key, values = next(source)
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(values))
        faults.append((str(file), key))
    code = (
        "import io, sys\nfrom contextlib import redirect_stderr\nfrom minitron_search.cli import main\n"
        "for file in sys.argv[1:]:\n"
        "    said = io.StringIO()\n"
        "    with redirect_stderr(said):\n"
        "        status = main(['--config', file, '--output', 'nowhere'])\n"
        "    print(repr((status, said.getvalue())))\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *(file for file, _ in faults)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [eval(line) for line in done.stdout.splitlines()]  # noqa: S307 - of our own making
    assert len(answers) == 100
    for (file, key), (status, said) in zip(faults, answers, strict=True):
        about = f"{Path(file).read_text()}\n{said}"
        assert status == 2, about
        first = said.removeprefix("minitron_search: ")
        assert said.startswith("minitron_search: ") and said.count("\n") == 1, about
        assert key.rpartition(".")[2] in first and ("valid: " in first or "did you mean" in first), about
        assert "Traceback" not in said and "nowhere" not in said, about
