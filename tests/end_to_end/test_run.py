"""The command on a tiny teacher: what it leaves, that it repeats itself, and that nothing kills it for good."""

import html
import json
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from minitron_search.cli import main
from minitron_search.records.directory import RunDirectory
from tests.project.test_docs import fenced
from tests.runs import Command, events, in_background, kill_child, rows
from tests.tracking.test_tracking import shown

ONE = ("--search.concurrency", "1")
INLINE = ("--resources.launcher", "inline")


@pytest.fixture
def command(tiny_command: Command, shared_ray: Path) -> Command:
    return tiny_command


@pytest.fixture
def unbroken(finished_run: Path) -> Path:
    """A whole run at concurrency 1, inside the Tune trials."""
    return finished_run


def test_a_run_leaves_every_artifact(unbroken: Path) -> None:
    for name in ("config.yaml", "environment.json", "importance.safetensors", "trials.parquet", "events.jsonl",
                 "study.db", "report.html", "best/config.json", "best/README.md", "best/tokenizer.json"):  # fmt: skip
        assert (unbroken / name).exists(), name
    arms = {row["arm"] for row in rows(unbroken)}
    assert arms == {"teacher", "search", "random_pruned", "random_init", "untrained", "retrained"}
    evidence = json.loads((unbroken / "evidence.json").read_text())
    finalists = {row["architecture"] for row in rows(unbroken) if row["arm"] == "search" and row["rung"] == 2}
    assert {about["architecture"] for about in evidence["finalists"]} == finalists
    assert evidence["words"][-1] in html.unescape((unbroken / "report.html").read_text())


def told(output: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What TensorBoard shows of every trial, but for times."""
    run = RunDirectory(output)
    found = {folder.name: shown(run, folder.name) for folder in sorted((output / "trials").iterdir())}
    return {trial: {tag: of for tag, of in tags.items() if "per_second" not in tag} for trial, tags in found.items()}


def test_tensorboard_has_every_step_and_rung_of_every_trial(unbroken: Path) -> None:
    run, found = RunDirectory(unbroken), told(unbroken)
    assert set(found) == {row["trial"] for row in rows(unbroken)}
    for trial, tags in found.items():
        lines = run.metrics(trial)
        for kind, tag in (("step", "train/loss"), ("rung", "validation/lm_loss")):
            assert [tokens for tokens, _ in tags.get(tag, [])] == [x["tokens"] for x in lines if x["kind"] == kind]


def test_the_best_student_reloads_inside_the_budget(unbroken: Path) -> None:
    student, info = AutoModelForCausalLM.from_pretrained(unbroken / "best", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    row = next(row for row in rows(unbroken) if row["arm"] == "retrained")
    assert student.num_parameters() == row["params"]
    assert abs(row["params"] - 105_000) <= 0.1 * 105_000


def test_the_code_of_the_card_runs(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = fenced(unbroken / "best" / "README.md", "python")
    exec(code.replace("path/to/this/folder", str(unbroken / "best")), {})
    assert capsys.readouterr().out.strip()


def test_ranks_compare_within_a_rung_and_stopped_trials_stay_stopped(unbroken: Path) -> None:
    found = [row for row in rows(unbroken) if row["arm"] == "search"]
    last = max(row["rung"] for row in found)
    for trial in {row["trial"] for row in found}:
        mine = [row for row in found if row["trial"] == trial]
        assert [row["rung"] for row in mine] == list(range(len(mine)))
        assert len({row["status"] for row in mine}) == 1
        assert (mine[0]["status"] in ("complete", "promoted")) == (mine[-1]["rung"] == last)
    best = min((row for row in found if row["rung"] == last), key=lambda row: row["lm_loss"])
    assert best["status"] == "promoted"


def test_the_teacher_is_asked_once_for_all_trials(command: Command, unbroken: Path) -> None:
    (asked,) = events(unbroken, "teacher_asked")
    assert asked["tokens"] == 512 + 4 * 32  # what the longest trial trains on, and validation
    assert asked["teacher_cache"] == "hidden"
    assert len({row["trial"] for row in rows(unbroken) if row["arm"] in ("search", "retrained")}) > 2
    output = command.folder / "topk"
    command.main(output, *ONE, *INLINE, "--stages", "importance,search", "--search.trials", "2",
                 "--distillation.teacher_cache", "topk", "--distillation.topk", "100")  # fmt: skip
    (sparse,) = events(output, "teacher_asked")
    assert sparse["tokens"] == 512, "validation is exact, and was there"
    assert (sparse["teacher_cache"], sparse["topk"]) == ("topk", 100)
    assert 0 < sparse["rest_mass"] < 1 and sparse["kl_lost"] > 0
    exact = {(row["trial"], row["rung"]): row["lm_loss"] for row in rows(unbroken)}
    both = [row for row in rows(output) if row["arm"] == "search" and (row["trial"], row["rung"]) in exact]
    ours = [(row["lm_loss"], exact[row["trial"], row["rung"]]) for row in both]
    assert all(a == pytest.approx(b, rel=1e-2) for a, b in ours) and any(a != b for a, b in ours)


def test_a_run_killed_at_every_stage_and_interrupted_gives_the_unbroken_table(
    command: Command, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the driver, also when TPE proposes: what it proposes on resuming is in the table. Ctrl-C and SIGTERM
    stop cleanly and keep finished rows. In the end the directory is all that continuing takes."""
    output, finished = command.folder / "killed", set[str]()
    moments = [("importance:", signal.SIGKILL), ("rung 0", signal.SIGINT), ("[4/5", signal.SIGTERM),
               ("retrain:", signal.SIGKILL)]  # fmt: skip
    for at, how in moments:
        resume = ["--resume"] if output.exists() else []
        status = command.interrupt(output, at, how, *ONE, *INLINE, *resume)
        expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
        assert status == expected[how], at
        before = rows(output) if (output / "trials.parquet").exists() else []
        assert before or at == "importance:", at
        finished |= {row["trial"] for row in before if row["arm"] == "search" and row["status"] != "running"}
    monkeypatch.chdir(command.folder)
    assert main(["--output", "killed", "--resume"]) == 0
    assert rows(output) == rows(unbroken)
    assert told(output) == told(unbroken)
    started = [event["trial"] for event in events(output, "trial_started")]
    continued = [event["trial"] for event in events(output, "trial_continued")]
    assert len(finished) == 5
    for trial in finished:
        assert started.count(trial) == 1 + continued.count(trial), "a finished trial was repeated"


@pytest.mark.slow
def test_two_at_once_through_ray_train_give_the_same_numbers(command: Command, unbroken: Path) -> None:
    """Both launchers, any concurrency: what both runs reached is equal, and trials really overlap.

    The retraining through Ray Train is on two workers, whose sums are rounded otherwise: equal to 1e-5.
    """
    output = command.folder / "parallel"
    command.main(output, "--search.concurrency", "2", "--search.controls", "false")
    alone = {(row["trial"], row["rung"]): row for row in rows(unbroken)}
    both = [row for row in rows(output) if (row["trial"], row["rung"]) in alone]
    assert len(both) >= 4
    for row in both:
        other = alone[row["trial"], row["rung"]]
        if row["arm"] == "retrained":
            assert row["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
            continue
        assert {**row, "status": "", "proposal": 0} == {**other, "status": "", "proposal": 0}
    spans = []
    for event in events(output, "trial_started"):
        if event["trial"].startswith("search-"):
            ends = [e["time"] for e in events(output, "trial_finished") if e["trial"] == event["trial"]]
            spans.append((event["time"], ends[0]))
    assert any(a[0] < b[0] < a[1] for a in spans for b in spans), "no two trials ran at once"


@pytest.mark.slow
def test_a_killed_train_process_is_replaced_and_changes_no_number(command: Command, unbroken: Path) -> None:
    """A worker as its trial goes on towards the next rung, then the controller of another trial that does."""
    output, killed = command.folder / "killed-train", list[str]()

    def kill() -> None:
        went_on = set[str]()
        for kind in ("TrainWorker", "TrainController"):
            while not (new := set(going_on(output)) - went_on):
                time.sleep(0.01)
            went_on |= new
            if kill_child(kind):
                killed.append(kind)

    in_background(kill)
    command.main(output, *ONE, "--stages", "importance,search")
    assert killed == ["TrainWorker", "TrainController"]
    ours = [row for row in rows(output) if row["arm"] == "search"]
    expected = [row for row in rows(unbroken) if row["arm"] == "search"]
    assert ours == expected


def going_on(output: Path) -> list[str]:
    """The trials that were started again after a rung."""
    if not (output / "events.jsonl").exists():
        return []
    started = [event["trial"] for event in RunDirectory(output).events() if event["event"] == "trial_started"]
    return [trial for trial in started if started.count(trial) > 1]


def test_a_diverging_trial_fails_with_its_reason_and_is_not_repeated(command: Command) -> None:
    output = command.folder / "diverging"
    printed = command.main(output, *ONE, *INLINE, "--stages", "importance,search", "--search.trials", "2",
                           "--distillation.learning_rate", "1e30", status=1)  # fmt: skip
    assert "nothing to promote" in printed
    failed = [row for row in rows(output) if row["arm"] == "search"]
    assert len(failed) == 2
    assert all(row["status"] == "failed" and "diverged at step" in row["message"] for row in failed)


@pytest.mark.slow
def test_two_workers_train_like_one(command: Command, unbroken: Path) -> None:
    """Data-parallel at the same global batch: losses agree to 1e-4 relative (sums are split differently)."""
    output = command.folder / "two-workers"
    command.main(output, *ONE, "--resources.workers_per_trial", "2", "--stages", "importance,search",
                 "--search.trials", "2", "--search.controls", "false")  # fmt: skip
    compared = 0
    for log in output.glob("trials/search-*/metrics.jsonl"):
        two, one = ([json.loads(line)["loss"] for line in (root / "trials" / log.parent.name / "metrics.jsonl").open()
                     if '"step"' in line] for root in (output, unbroken))  # fmt: skip
        for left, right in zip(two, one, strict=False):
            assert left == pytest.approx(right, rel=1e-4)
            compared += 1
    assert compared >= 4
