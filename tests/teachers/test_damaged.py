"""Damaged teachers: refused in one line before anything is spent, or the run is that of the undamaged one."""

import io
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from minitron_search.cli import main
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, weights
from minitron_search.planning.prepare import Prepared
from tests import tiny
from tests.runs import Command, rows
from tests.teachers import damage

OF_EACH = 50
SECONDS = 3.0  # that a refusal may take


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text(tiny.prose(3_000))
    tiny.winogrande_file(folder / "questions.jsonl")
    for family in damage.FAMILIES:
        damage.whole(folder / family, family)
    return folder


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Prepared]]:
    """What runs that began would read: they end before their first stage."""
    prepared: list[Prepared] = []
    monkeypatch.setattr("minitron_search.commands.run_pipeline", lambda run, since: prepared.append(run))
    monkeypatch.setattr("minitron_search.cluster.session.joined", lambda: pytest.fail("nothing here needs Ray"))
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield prepared


def flags(inputs: Path, teacher: Path, output: str = "run") -> list[str]:
    config = AutoConfig.from_pretrained(inputs / teacher.name)
    params = parameter_count(weights(config), sizes(config))
    return [
        "--output", output, "--teacher.model", str(teacher), "--corpus.train", str(inputs / "text.txt"),
        "--corpus.validation", str(inputs / "text.txt"), "--corpus.sequence_length", "32",
        "--corpus.calibration_samples", "4", "--corpus.validation_samples", "4",
        "--winogrande.source", str(inputs / "questions.jsonl"), "--precision", "float32",
        "--space.budget", json.dumps({"params": {"target": int(params * 0.9), "tolerance": 0.2}}),
        "--space.axes", json.dumps({"intermediate_size": {"low": 10, "high": 20, "step": 5}}),
        "--search.rungs", "64", "--distillation.batch_tokens", "64", "--retraining.tokens", "128",
        "--search.trials", "1", "--search.controls", "false", "--retraining.warmup_steps", "1",
        "--resources.launcher", "inline",
    ]  # fmt: skip


def ended(arguments: list[str]) -> tuple[int, str, float]:
    """Exit status, what was said on stderr, and the seconds that a command took."""
    said, began = io.StringIO(), time.monotonic()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = main(arguments)
    return status, said.getvalue(), time.monotonic() - began


def content(prepared: Prepared) -> list[Any]:
    """All that a run reads, as ids."""
    return [prepared.pruned.fingerprint, prepared.corpus.id, prepared.packed.input_ids.tolist(), len(prepared.space)]


@pytest.mark.parametrize("family", damage.FAMILIES)
def test_a_damaged_teacher_is_refused_at_once_or_does_no_harm(
    family: str, inputs: Path, begun: list[Prepared], tmp_path: Path
) -> None:
    assert ended(flags(inputs, inputs / family))[0] == 0  # imports what a first run does, too
    undamaged, counted = content(begun.pop()), Counter[str]()
    for number, (what, how) in enumerate(damage.drawn(family, OF_EACH)):
        teacher = tmp_path / str(number) / family
        shutil.copytree(inputs / family, teacher)
        damaged = damage.apply(teacher, what, how, np.random.default_rng(number))
        case = f"{number}: {what} {damaged} {how}"
        status, said, seconds = ended(flags(inputs, teacher, output=f"run-{number}"))
        counted[what if status else f"{what} let in"] += 1
        if status == 0:
            assert what == "harmless" or how == "bfloat16", case
            # a weight rounded to bfloat16 is another teacher, under another id
            assert (content(begun.pop()) == undamaged) == (how != "bfloat16"), case
            continue
        assert status == 2 and what != "harmless", f"{case}: {said}"
        assert said.startswith("minitron_search: teacher.model: ") and said.count("\n") == 1, f"{case}: {said}"
        assert damaged in said and "; valid: " in said, f"{case}: {said}"
        assert seconds < SECONDS, f"{case}: {seconds}"
        assert not (tmp_path / f"run-{number}").exists(), case
    assert counted["tensor"] > 15 and counted["file"] > 10 and counted["harmless let in"] == len(damage.HARMLESS)


@pytest.mark.slow
def test_runs_of_harmlessly_damaged_teachers_are_those_of_the_undamaged(
    inputs: Path, tmp_path: Path, shared_ray: Path
) -> None:
    """Ten damaged teachers of two families drawn, each run compared with its family's undamaged one."""
    draw = np.random.default_rng(1)
    for family in draw.permutation(damage.FAMILIES)[:2].tolist():
        command = Command(tmp_path, {})
        command.main(tmp_path / f"{family}-whole", *flags(inputs, inputs / family)[2:])
        for how in draw.permutation(damage.HARMLESS)[:5].tolist():
            teacher = tmp_path / how.replace("/", "-") / family
            shutil.copytree(inputs / family, teacher)
            damage.apply(teacher, "harmless", how, draw)
            output = tmp_path / f"{family}-{how.replace('/', '-')}"
            command.main(output, *flags(inputs, teacher)[2:])
            assert rows(output) == rows(tmp_path / f"{family}-whole"), (family, how)
