"""What TensorBoard, W&B and MLflow are told: every point of every trial once, whatever was killed."""

import json
import math
import struct
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from minitron_search.records.bucket import BucketCopy
from minitron_search.records.directory import RunDirectory
from minitron_search.tracking import curves
from minitron_search.tracking.curves import Tracking, tracked
from minitron_search.tracking.tensorboard import EventFile, Point
from minitron_search.tracking.trackers import check_installed, log_in, tracker_of

ABOUT = {"trial": "a", "arm": "search", "seed": 0, "hidden_size": 48, "layers": [0, 2], "drop_block_start": None}
SCORES = ("lm_loss", "kl", "winogrande_acc", "winogrande_margin")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.event("run_started")
    begin(run, "a")
    return run


def begin(run: RunDirectory, trial: str) -> None:
    run.start_trial(trial, {**ABOUT, "trial": trial})


def steps(run: RunDirectory, trial: str, *numbers: int) -> None:
    for step in numbers:
        run.log_step(trial, step=step, tokens=64 * step, loss=10.0 / step, lm_loss=3.0, learning_rate=1e-3)


def rung(run: RunDirectory, trial: str, rung: int, tokens: int) -> None:
    run.log_scores(trial, rung, lm_loss=[1.0, 2.0])
    scores = {name: rung + number for number, name in enumerate(SCORES)} | {f"{name}_stderr": 0.5 for name in SCORES}
    run.log_rung(trial, {"trial": trial, "rung": rung, "tokens": tokens, "architecture": "x", **scores})


def records(path: Path) -> Iterator[Event]:
    """Of TensorBoard's format (TFRecord), with both of a record's checksums; nothing may be left over."""
    content = path.read_bytes()
    while content:
        (length,), header, data = struct.unpack("<Q", content[:8]), content[:8], content[12:]
        assert content[8:12] == struct.pack("<I", masked_crc32c(header))
        data, check, content = data[:length], data[length : length + 4], data[length + 4 :]
        assert len(data) == length and check == struct.pack("<I", masked_crc32c(data))
        yield Event.FromString(data)


def shown(run: RunDirectory, trial: str = "a") -> dict[str, list[tuple[int, float]]]:
    """(tokens, value) by tag, in the order of the file."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in records(run.tensorboard(trial)):
        for value in event.summary.value:
            if not value.tag.startswith("_hparams_"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


class Told:
    """A tracker that keeps what it is told."""

    name = "told"

    def __init__(self) -> None:
        self.points: list[tuple[str, Point]] = []
        self.ends: list[tuple[str, str]] = []

    def tell(self, trial: str, about: Any, points: list[Point]) -> None:
        assert about["trial"] == trial
        self.points += [(trial, point) for point in points]

    def end(self, trial: str, status: str) -> None:
        self.ends.append((trial, status))


def test_losses_and_scores_are_told_at_their_tokens(run: RunDirectory) -> None:
    rung(run, "a", 0, 0)
    steps(run, "a", 1, 2)
    rung(run, "a", 1, 128)
    Tracking(run, []).look()
    found = shown(run)
    assert found["train/loss"] == [(64, 10.0), (128, 5.0)]
    assert found["validation/kl"] == [(0, 1.0), (128, 2.0)]
    assert [tokens for tokens, _ in found["validation/lm_loss_stderr"]] == [0, 128]
    assert "train/kl" not in found, "a loss that asks no teacher has none"
    assert found["train/learning_rate"][0][1] == pytest.approx(1e-3)


def test_the_file_begins_with_its_version_and_says_what_the_trial_is(run: RunDirectory) -> None:
    steps(run, "a", 1)
    Tracking(run, []).look()
    version, experiment, begun, *_ = records(run.tensorboard("a"))
    assert version.file_version == "brain.Event:2"
    plugin = [HParamsPluginData.FromString(event.summary.value[0].metadata.plugin_data.content)
              for event in (experiment, begun)]  # fmt: skip
    assert {metric.name.tag for metric in plugin[0].experiment.metric_infos} == {f"validation/{n}" for n in SCORES}
    about = plugin[1].session_start_info.hparams
    assert about["hidden_size"].number_value == 48 and about["arm"].string_value == "search"
    assert set(about) == {"trial", "arm", "seed", "hidden_size"}


def test_steps_that_a_restarted_trial_repeats_are_told_once(run: RunDirectory) -> None:
    steps(run, "a", 1, 2, 3, 4)
    curves = Tracking(run, [])
    curves.look()
    steps(run, "a", 3, 4, 5)  # from the checkpoint of step 2
    rung(run, "a", 0, 320)
    rung(run, "a", 0, 320)
    curves.look()
    assert [tokens for tokens, _ in shown(run)["train/loss"]] == [64, 128, 192, 256, 320]
    assert len(shown(run)["validation/lm_loss"]) == 1


@pytest.mark.parametrize("cut", range(0, 700, 23))
def test_a_run_that_goes_on_tells_what_is_left_wherever_it_was_cut_off(run: RunDirectory, cut: int) -> None:
    """Killed after any byte of the file, and with lines logged twice before and after."""
    steps(run, "a", 1, 2, 3, 2, 3, 4)
    Tracking(run, []).look()
    file = run.tensorboard("a")
    whole = file.read_bytes()
    assert len(whole) > cut
    file.write_bytes(whole[: len(whole) - cut])
    steps(run, "a", 4, 5)
    rung(run, "a", 0, 320)
    Tracking(run, []).look()
    assert [tokens for tokens, _ in shown(run)["train/loss"]] == [64, 128, 192, 256, 320]
    assert [tokens for tokens, _ in shown(run)["validation/lm_loss"]] == [320]
    before = file.read_bytes()
    Tracking(run, []).look()
    assert file.read_bytes() == before, "nothing new is nothing told"


def test_a_log_that_lost_its_end_with_the_machine_is_told_once_when_it_is_written_again(run: RunDirectory) -> None:
    steps(run, "a", 1, 2, 3)
    Tracking(run, []).look()
    log = run.trial("a") / "metrics.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")  # steps are not fsynced
    curves = Tracking(run, [])
    curves.look()
    steps(run, "a", 2, 3, 4)
    curves.look()
    assert [tokens for tokens, _ in shown(run)["train/loss"]] == [64, 128, 192, 256]


def test_every_trial_has_its_file_and_those_of_another_session_are_not_begun_again(run: RunDirectory) -> None:
    begin(run, "b")
    steps(run, "a", 1)
    steps(run, "b", 1)
    first = Told()
    Tracking(run, [first]).end("KILLED")
    assert {trial for trial, _ in first.points} == {"a", "b"} == {trial for trial, _ in first.ends}
    steps(run, "b", 2)
    second = Told()
    Tracking(run, [second]).end("FINISHED")
    assert second.points == [("b", Point(128, {"train/loss": 5.0, "train/lm_loss": 3.0, "train/learning_rate": 1e-3}))]
    assert second.ends == [("b", "FINISHED")]


def test_a_trial_ends_as_its_event_says_after_its_last_point(run: RunDirectory) -> None:
    begin(run, "b")
    told = Told()
    curves = Tracking(run, [told])
    for trial, kind in (("a", "trial_finished"), ("b", "trial_failed")):
        steps(run, trial, 1)
        curves.look()
        steps(run, trial, 2)
        run.event(kind, trial=trial, status="complete", message="diverged")
        curves.look()
        assert told.points[-1][1].tokens == 128
    assert told.ends == [("a", "FINISHED"), ("b", "FAILED")]
    steps(run, "a", 3)  # a stopped trial that is continued
    curves.end("FINISHED")
    assert told.points[-1][1].tokens == 192 and told.ends[-1] == ("a", "FINISHED")


def test_a_tracker_that_fails_ends_no_run_and_is_told_no_more(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(Told):
        name = "failing"

        def tell(self, trial: str, about: Any, points: list[Point]) -> None:
            raise ConnectionError("no server\nat this address")

    well = Told()
    curves = Tracking(run, [Failing(), well])
    for step in (1, 2):
        steps(run, "a", step)
        curves.look()
    curves.end("FINISHED")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("trackers: failing is dropped: no server")
    (event,) = [event for event in run.events() if event["event"] == "tracker_failed"]
    assert event["tracker"] == "failing" and event["message"] == "no server"
    assert len(well.points) == 2 == len(shown(run)["train/loss"])


def test_what_is_logged_while_a_run_runs_is_told_meanwhile_and_at_its_end(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "LOOK_S", 0.01)
    with pytest.raises(KeyboardInterrupt), tracked(run, "name", []):
        steps(run, "a", 1)
        deadline = time.monotonic() + 20
        while not run.tensorboard("a").exists() or "train/loss" not in shown(run):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        steps(run, "a", 2)
        raise KeyboardInterrupt
    assert len(shown(run)["train/loss"]) == 2


def test_it_travels_with_a_run_in_storage_and_goes_on_from_there(tmp_path: Path, run: RunDirectory) -> None:
    run.write_config({"seed": 0})
    steps(run, "a", 1, 2)
    Tracking(run, []).look()
    (tmp_path / "there").mkdir()
    BucketCopy((tmp_path / "there").as_uri(), run).push()
    other = RunDirectory(tmp_path / "another machine")
    BucketCopy((tmp_path / "there").as_uri(), other).pull()
    steps(other, "a", 2, 3)
    Tracking(other, []).look()
    assert [tokens for tokens, _ in shown(other)["train/loss"]] == [64, 128, 192]
    BucketCopy((tmp_path / "there").as_uri(), other).push()
    (file,) = (tmp_path / "there").rglob("*tfevents*")
    assert file.read_bytes() == other.tensorboard("a").read_bytes(), "one file a trial, there too"


def test_a_loss_that_is_no_number_is_told_as_it_is(run: RunDirectory) -> None:
    run.log_step("a", step=1, tokens=64, loss=math.nan)
    Tracking(run, []).look()
    assert math.isnan(shown(run)["train/loss"][0][1])


def test_tensorboard_itself_reads_it(run: RunDirectory) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )
    steps(run, "a", 1, 2)
    rung(run, "a", 0, 128)
    Tracking(run, []).look()
    read = event_accumulator.EventAccumulator(str(run.trial("a"))).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(64, 10.0), (128, 5.0)]
    assert [event.value for event in read.Scalars("validation/winogrande_margin")] == [3.0]
    assert "hparams" in read.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name


@pytest.mark.parametrize("left", [None, ModuleSpec("wandb", None, is_package=True)], ids=["nothing", "its folder"])
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, left: ModuleSpec | None) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    found = {"wandb": left, "mlflow": ModuleSpec("mlflow", None, origin="mlflow/__init__.py")}
    monkeypatch.setattr("minitron_search.tracking.trackers.find_spec", found.get)
    check_installed(["mlflow"])
    with pytest.raises(ValueError, match=r"^trackers: wandb is not installed; valid: mlflow, or pip install 'minitron"):
        check_installed(["wandb", "mlflow"])


# W&B and MLflow as they are


def test_wandb_has_a_run_for_each_trial(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    pytest.importorskip("wandb", reason="pip install 'minitron-search[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    log_in(["wandb"])
    begin(run, "b")
    steps(run, "a", 1, 2)
    rung(run, "a", 0, 128)
    steps(run, "b", 1)
    Tracking(run, [tracker_of("wandb", "small", run)]).end("FINISHED")
    steps(run, "a", 3)
    Tracking(run, [tracker_of("wandb", "small", run)]).end("FINISHED")  # another session
    deadline = time.monotonic() + 60  # its own process writes the files
    runs = wandb_runs(tmp_path)
    while sum(len(history) for _, history in runs) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
        runs = wandb_runs(tmp_path)
    about = {(made["name"], made["group"], made["project"]) for made, _ in runs}
    assert about == {("a", "small", "ours"), ("b", "small", "ours")}
    assert len({made["id"] for made, _ in runs}) == 2 and len(runs) == 3
    first, *_, last = [history for made, history in runs if made["name"] == "a"]
    assert [(row["_step"], row["train/loss"]) for row in first] == [(64, 10.0), (128, 5.0)]
    assert first[1]["validation/kl"] == 1.0
    assert [(row["_step"], row["train/loss"]) for row in last] == [(192, pytest.approx(10 / 3))]
    assert runs[0][0]["config"]["hidden_size"] == 48


def wandb_runs(folder: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """In the order in which they began."""
    return [wandb_run(file) for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]


def wandb_run(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What W&B's own file of a run says of it, and its history."""
    from wandb.proto import wandb_internal_pb2

    made: dict[str, Any] = {}
    history = []
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            about = record.run
            made = {"id": about.run_id, "name": about.display_name, "group": about.run_group,
                    "project": about.project}  # fmt: skip
            made["config"] = {item.key: json.loads(item.value_json) for item in about.config.update}
        elif record.WhichOneof("record_type") == "history":
            history.append({
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            })  # fmt: skip
    return made, history


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format: blocks of 32 KiB, counted from before W&B's own header of 7 bytes; a record in one piece
    (1), or in a first (2), some (3) and a last (4)."""
    at, whole = 7, b""
    content = bytes(7) + content
    while len(content) - at >= 7:
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install 'minitron-search[wandb]'")

    def no_key() -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", no_key)
    with pytest.raises(ValueError, match="^trackers: wandb: No API key.*valid: .*WANDB_MODE=offline"):
        log_in(["wandb"])


def test_mlflow_has_a_run_for_each_trial_in_which_another_session_goes_on(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking_of = pytest.importorskip("mlflow.tracking", reason="pip install 'minitron-search[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    begin(run, "b")
    steps(run, "a", *range(1, 600))  # more values than one call takes
    rung(run, "a", 0, 64 * 599)
    steps(run, "b", 1)
    run.event("trial_failed", trial="b", message="diverged")
    curves = Tracking(run, [tracker_of("mlflow", "small", run)])
    curves._events = type(curves._events)(run.events_log)  # the event is of this session
    curves.end("KILLED")
    client = tracking_of.MlflowClient()

    def runs() -> dict[str, Any]:
        experiment = client.get_experiment_by_name("small").experiment_id
        return {found.info.run_name: found for found in client.search_runs([experiment])}

    assert {name: found.info.status for name, found in runs().items()} == {"a": "KILLED", "b": "FAILED"}
    steps(run, "a", 600)
    Tracking(run, [tracker_of("mlflow", "small", run)]).end("FINISHED")
    assert {name: found.info.status for name, found in runs().items()} == {"a": "FINISHED", "b": "FAILED"}
    found = runs()["a"]
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == [64 * step for step in range(1, 601)]
    assert found.data.metrics["validation/kl"] == 1.0 and found.data.params["hidden_size"] == "48"


def test_a_file_of_another_kind_of_end_is_cut_to_its_last_whole_point(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents"
    EventFile(path, {"seed": 0}, ["x"]).append([Point(1, {"x": 1.0}), Point(2, {"x": 2.0})])
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 4096)  # a file system's, after a loss of power
    assert EventFile(path, {"seed": 0}, ["x"]).points == 2
    assert path.read_bytes() == whole
