"""Logs here and on another node: the same lines, whoever reads and writes them, in the order they were written."""

import pickle
import threading
from pathlib import Path

import pytest
import ray

from minitron_search.cluster.remote_logs import FarFiles, KeptFiles, keep_files
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import LOCAL, Files, Log, append_line, read_lines


@pytest.fixture(scope="module")
def far(shared_ray: Path) -> Files:
    """As on another node than the actor's."""
    return FarFiles(keep_files().actor, "another node")


@pytest.fixture(params=["local", "far"])
def files(request: pytest.FixtureRequest) -> Files:
    return LOCAL if request.param == "local" else request.getfixturevalue("far")


def test_a_log_is_read_once_as_it_grows(tmp_path: Path, files: Files) -> None:
    path = tmp_path / "trials" / "a" / "notes.jsonl"
    log = Log(path, files)
    assert log.new() == [] and read_lines(path, files) == []
    for number in range(3):
        append_line(path, {"n": number}, durable=number == 1, files=files)
    assert log.new() == [{"n": 0}, {"n": 1}, {"n": 2}] and log.new() == []
    with open(path, "a") as cut_short:
        cut_short.write('{"n": 3')
    assert log.new() == []
    append_line(path, {"n": 4}, files=files)
    assert log.new() == [{"n": 4}] and read_lines(path, files)[-1] == {"n": 4}


def test_lines_of_several_writers_do_not_mix(tmp_path: Path, files: Files) -> None:
    def write(writer: int) -> None:
        for number in range(50):
            append_line(tmp_path / "log", {"writer": writer, "n": number, "pad": "x" * 500}, durable=False, files=files)

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    found = read_lines(tmp_path / "log", files)
    for writer in range(4):
        assert [line["n"] for line in found if line["writer"] == writer] == list(range(50))


def test_files_and_their_names(tmp_path: Path, files: Files) -> None:
    assert files.names(tmp_path / "none") == [] and files.read(tmp_path / "none") == b""
    files.replace(tmp_path / "box" / "job", b"\x00\xff")
    assert files.read(tmp_path / "box" / "job") == b"\x00\xff" and files.read(tmp_path / "box" / "job", 1) == b"\xff"
    files.replace(tmp_path / "box" / "job", b"")
    assert files.names(tmp_path / "box") == ["job"] and files.read(tmp_path / "box" / "job") == b""


def test_a_run_that_is_sent_reads_and_writes_where_it_was_sent_from(tmp_path: Path, far: FarFiles) -> None:
    node = ray.get_runtime_context().get_node_id()
    run = RunDirectory(tmp_path / "run", KeptFiles(far.actor, node))
    here = pickle.loads(ray.cloudpickle.dumps(run))
    assert type(here.files) is KeptFiles
    there = pickle.loads(ray.cloudpickle.dumps(RunDirectory(tmp_path / "run", far)))
    assert type(there.files) is FarFiles
    there.event("trial_placed", trial="a")
    there.log_step("a", loss=1.0)
    there.log_rung("a", {"trial": "a", "rung": 0})
    run.decide("a", 0, "stop")
    assert [event["event"] for event in run.events()] == ["trial_placed"]
    assert there.decisions("a")[0]["decision"] == "stop"
    assert [line["kind"] for line in run.follow("a").new()] == ["step", "rung"] and len(there.metrics("a")) == 2
    assert run.rungs() == [{"trial": "a", "rung": 0}]

    @ray.remote(num_cpus=0)
    def elsewhere(sent: RunDirectory) -> str:
        sent.event("from a task")
        return type(sent.files).__name__

    assert ray.get(elsewhere.remote(run)) == "KeptFiles"  # of this node too
    assert run.events()[-1]["event"] == "from a task"
