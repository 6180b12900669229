"""An ablation end to end on a tiny teacher, on a real Ray."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.runs import Command, events, rows, tiny_inputs

pytestmark = pytest.mark.slow  # which has one process make what all of them read

ARMS: dict[str, Any] = {
    "a_merged": {"architecture": "depth_laco", "distillation": {"initialization": "merged"}},
    "b_pruned": {},
    "c_lm_loss": {"distillation": {"loss": "ce"}},
}  # in the order that YAML is written in here


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, shared_ray: Path) -> Command:
    """Three arms, two seeds, one trial at a time inside the Tune trials."""
    folder = tmp_path_factory.mktemp("ablations")
    values = {key: value for key, value in tiny_inputs(folder).items() if key not in ("name", "retraining")}
    (folder / "text.txt").write_text(tiny.prose(20_000, seed=1))  # no other test's: nothing of it is in the cache yet
    return Command(folder, {
        **values,
        "question": "Is it?",
        "space": {"budget": {"params": {"target": 110_000, "tolerance": 0.25}}},
        "architecture": {"hidden_size": 42, "intermediate_size": 112},
        "search": {"rungs": [0, 128], "seeds": 2, "concurrency": 1},
        "resources": {"launcher": "inline"},
        "arms": ARMS,
    })  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(command: Command) -> Path:
    output = command.folder / "unbroken"
    output.with_suffix(".log").write_text(command.main(output))
    return output


def test_every_arm_is_a_run_of_one_architecture_and_all_its_seeds(unbroken: Path) -> None:
    about = json.loads((unbroken / "ablation.json").read_text())
    assert about["arms"] == list(ARMS) and about["seeds"] == [0, 1] and about["tokens"] == 128
    for arm in about["arms"]:
        found = [row for row in rows(unbroken / arm) if row["arm"] == "search"]
        assert {(row["seed"], row["tokens"]) for row in found} == {(s, t) for s in (0, 1) for t in (0, 128)}
        assert {row["status"] for row in found} == {"promoted"} and len({row["architecture"] for row in found}) == 1
        assert not events(unbroken / arm, "trial_continued"), "nobody waits at a rung to be compared"
        assert not list((unbroken / arm).glob("trials/*/checkpoint")), "nothing goes on from them"
    merged = json.loads((unbroken / "a_merged" / "layer_merge.json").read_text())
    kept = {row["num_hidden_layers"] for row in rows(unbroken / "a_merged") if row["arm"] == "search"}
    assert kept == {len(merged[0])} and kept <= {3, 4, 5}


def test_what_an_arm_finds_made_is_not_made_again(unbroken: Path) -> None:
    said = unbroken.with_suffix(".log").read_text()
    assert said.count("one teacher pass") == 1 and said.count("measured before on the same teacher") == 2
    pruned, lm_loss = (events(unbroken / arm, "teacher_asked")[0] for arm in ("b_pruned", "c_lm_loss"))
    assert pruned["tokens"] > 0 == lm_loss["tokens"], "the same teacher, for the same windows"
    of_arms = [next(row for row in rows(unbroken / arm) if row["arm"] == "teacher") for arm in ARMS]
    assert of_arms[1] == of_arms[2], "it was scored once"


def test_arms_are_compared_and_shown(unbroken: Path) -> None:
    found = pq.read_table(unbroken / "ablation.parquet").to_pylist()
    assert {(of["arm"], of["baseline"], of["tokens"], of["seeds"]) for of in found if of["metric"] == "lm_loss"} == {
        (arm, "a_merged", tokens, 2) for arm in ("b_pruned", "c_lm_loss") for tokens in (0, 128)
    }
    assert "95% intervals of arm - a_merged" in unbroken.with_suffix(".log").read_text()
    assert (unbroken / "report.html").exists()


def test_resume_makes_the_arm_that_was_cut_off_and_leaves_the_other(command: Command, unbroken: Path) -> None:
    """Killed in the last arm, of whose two seeds one had ended."""
    output = command.folder / "cut-off"
    shutil.copytree(unbroken, output)
    (output / "ablation.parquet").unlink()
    cut, ended = output / "c_lm_loss", [path for path in (output / "b_pruned").rglob("*") if path.is_file()]
    log = cut / "events.jsonl"
    log.write_text("".join(line for line in log.open() if "run_finished" not in line and "promoted" not in line))
    last = max(row["seed"] for row in rows(cut))
    for trial in {row["trial"] for row in rows(cut) if row["seed"] == last and row["arm"] == "search"}:
        shutil.rmtree(cut / "trials" / trial)
    (cut / "trials.parquet").unlink()
    for config in output.glob("*/config.yaml"):
        config.write_text(config.read_text().replace(unbroken.name, output.name))
    before = {path: path.stat().st_mtime_ns for path in ended}
    command.main(output, "--resume")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the arm that had ended was touched"
    for arm in ARMS:
        assert rows(output / arm) == rows(unbroken / arm)
    assert pq.read_table(output / "ablation.parquet") == pq.read_table(unbroken / "ablation.parquet")
