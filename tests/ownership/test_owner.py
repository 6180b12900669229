"""One process at a time writes an output; the next has it when that one has ended, and its orphans write nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from minitron_search.cli import main
from minitron_search.ownership import owner, stored_object
from minitron_search.ownership.owner import HeldError, Owner, held
from minitron_search.records.bucket import bucket_copy
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import LostError
from minitron_search.records.paths import OWNER, inside
from minitron_search.records.transfer import NodeTransfer
from tests.runs import ROOT

HOLDER = """
import subprocess, sys, time
from minitron_search.ownership.owner import held
with held(sys.argv[1]):
    subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(60)"], close_fds=False)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def holder(request: pytest.FixtureRequest) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Starts a process that holds an output, and has a child that inherits whatever can be inherited."""
    started = []

    def start(output: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen([sys.executable, "-c", HOLDER, output], stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "child\n"
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_process_is_refused_with_the_name_of_the_first(
    tmp_path: Path, holder: Callable[[str], "subprocess.Popen[str]"], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    process = holder(str(output))
    for arguments in ([], ["--resume"]):
        assert main(["--output", str(output), *arguments]) == 2
        message = capsys.readouterr().err
        assert f"output: {output} is being written by process {process.pid} on " in message and ", since 20" in message
    assert sorted(path.name for path in output.iterdir()) == [".lock", ".owner"]


def test_a_killed_holder_is_replaced_at_once_though_its_child_lives(
    tmp_path: Path, holder: Callable[[str], "subprocess.Popen[str]"]
) -> None:
    process = holder(str(tmp_path / "run"))
    process.kill()
    process.wait()
    began = time.monotonic()
    with held(str(tmp_path / "run")):
        assert time.monotonic() - began < 1
        with pytest.raises(HeldError, match=f"process {os.getpid()} on"), held(str(tmp_path / "run")):
            raise AssertionError
    with held(str(tmp_path / "run")):
        pass


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    with held(str(output)):
        assert output.is_dir()
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="is not a folder that can be written to; valid: a new folder"):
            with held(str(wrong)):
                raise AssertionError


def test_of_many_that_begin_together_one_has_it(tmp_path: Path) -> None:
    """Each holds it for a moment; the file that is locked is removed and made again all the while."""
    inside, most, refused = 0, 0, 0
    counted, wrong = threading.Lock(), list[BaseException]()

    def work() -> None:
        nonlocal inside, most, refused
        for _ in range(20):
            try:
                with held(str(tmp_path / "run")):
                    with counted:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0.002)
                    with counted:
                        inside -= 1
            except HeldError:
                refused += 1
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and most == 1 and refused < 80


def test_what_outlives_its_driver_appends_nothing(tmp_path: Path) -> None:
    with held(str(tmp_path / "run")) as first:
        orphan = RunDirectory(tmp_path / "run", first.files)
        orphan.event("trial_started", trial="a")
        orphan.log_step("a", step=1)
        first.record.write_text(replace(first.owner, token="of a successor").text())
        for harm in (
            lambda: orphan.event("trial_started", trial="b"),
            lambda: orphan.log_step("a", step=2),
            lambda: orphan.log_rung("a", {"trial": "a", "rung": 0}),
            lambda: orphan.files.replace(tmp_path / "run" / "job", b""),
        ):
            with pytest.raises(LostError, match="was taken over by another process"):
                harm()
        first.record.unlink()
        with pytest.raises(LostError):
            orphan.event("trial_started", trial="c")
    assert [event["trial"] for event in orphan.events()] == ["a"] and len(orphan.metrics("a")) == 1


# In storage


@pytest.fixture(params=["s3", "plain"])
def address(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3_address: Callable[[str, str], str],
) -> str:
    """An address of the test's own: of S3 with its conditions, and of what has none."""
    if request.param == "plain":
        monkeypatch.setattr(stored_object, "SETTLE_S", 0.05)
        monkeypatch.setattr(stored_object, "find_spec", lambda name: None)
    return s3_address("runs", f"{tmp_path.name}-{request.param}")


def elsewhere(address: str, **changes: object) -> Owner:
    """Write into storage that a process on another machine holds the output."""
    made = replace(Owner.this_process(), host="elsewhere", machine="another", pid=7, **changes)  # type: ignore[arg-type]
    assert stored_object.stored_object(address, ".owner").write(made.text().encode(), None) is not None
    return made


def test_a_holder_on_another_machine_is_named_until_it_is_silent(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(address)
    with pytest.raises(HeldError, match=r"process 7 on elsewhere, since .*, heard of \d+ s ago.*silent for 60 s"):
        with held(address):
            raise AssertionError
    monkeypatch.setattr(owner, "EXPIRY_S", -60.0)  # clocks of storage and of this test differ by less
    with held(address) as hold:
        hold.check()
    assert stored_object.stored_object(address, ".owner").read() is None


def test_a_holder_of_this_machine_whose_process_is_gone_is_replaced_at_once(address: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = replace(Owner.this_process(), pid=ended.pid)
    assert stored_object.stored_object(address, ".owner").write(gone.text().encode(), None)
    with held(address) as hold:
        hold.check()


def test_a_process_whose_number_was_given_again_is_gone() -> None:
    mine = Owner.this_process()
    assert not mine.is_gone() and replace(mine, started="1").is_gone()
    assert not replace(mine, started="1", machine="another").is_gone()


def test_who_is_replaced_learns_it_and_writes_nothing_more(address: str, tmp_path: Path) -> None:
    with held(address) as hold:
        run = RunDirectory(address, hold.files)
        run.event("run_started")
        bucket = bucket_copy(address, run, hold.check)
        assert bucket is not None
        bucket.push()
        transfer = NodeTransfer(address, run.root, run_is_shared=False, token=hold.owner.token)
        folder = tmp_path / "cache" / "made"
        folder.mkdir(parents=True)
        (folder / "file").write_text("")
        transfer.put(folder)
        assert hold.stored is not None
        hold.stored.delete()
        other = elsewhere(address)

        with pytest.raises(LostError):
            transfer.delete(folder)
        with pytest.raises(LostError, match="was taken over by process 7 on elsewhere"):
            bucket.push()
        for write in (lambda: run.event("run_finished"), lambda: run.decide("one", 0, "stop")):
            with pytest.raises(LostError):
                write()
    kept = stored_object.stored_object(address, ".owner").read()
    assert kept is not None and Owner.parse(kept.content) == other, "it is not released by who has lost it"
    assert transfer.has(folder)


def test_a_holder_keeps_being_heard_of(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_S", 0.05)
    with held(address) as hold:
        assert hold.stored is not None
        oldest = -10.0
        for _ in range(200):  # S3 tells time in seconds
            kept = hold.stored.read()
            assert kept is not None
            if kept.age_s < oldest - 0.5:
                break
            oldest = max(oldest, kept.age_s)
            time.sleep(0.05)
        else:
            raise AssertionError("it only grew older")
        hold.stored.delete()  # by whoever cleans up the bucket
        while hold.stored.read() is None:
            time.sleep(0.05)
        hold.check()


def test_of_two_that_write_at_once_one_is_told_that_it_has_not(address: str) -> None:
    objects = [stored_object.stored_object(address, "one") for _ in range(2)]
    first = objects[0].write(b"a", None)
    assert first is not None and objects[1].write(b"b", None) is None
    second = objects[1].write(b"b", first)
    assert second is not None and objects[0].write(b"c", first) is None
    kept = objects[0].read()
    assert kept is not None and kept.content == b"b"
    objects[0].delete()
    assert objects[1].read() is None


@pytest.mark.parametrize("address", ["s3"], indirect=True)
def test_storage_that_refuses_conditions_can_hold_a_run(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_object, "SETTLE_S", 0.05)
    objects = [stored_object.stored_object(address, "one") for _ in range(2)]
    for kept in objects:
        assert isinstance(kept, stored_object.S3Object)
        stock = kept.client.put_object

        def refuses(stock: Any = stock, **given: Any) -> Any:
            if given.keys() & {"IfNoneMatch", "IfMatch"}:
                raise ClientError({"Error": {"Code": "NotImplemented", "Message": "a header"}}, "PutObject")
            return stock(**given)

        monkeypatch.setattr(kept.client, "put_object", refuses)
    first = objects[0].write(b"a", None)
    assert first is not None and objects[1].write(b"b", None) is None
    assert objects[0].write(b"b", first) is not None and objects[1].write(b"c", first) is None


def test_an_address_with_a_space_is_one_place_for_all_who_read_it(address: str, tmp_path: Path) -> None:
    spaced = address.replace("//runs/", "//runs/a%20team/")
    with held(spaced) as hold:
        folder = tmp_path / "cache" / "made"
        folder.mkdir(parents=True)
        NodeTransfer(spaced, hold.record.parent, run_is_shared=False, token=hold.owner.token).put(folder)
        assert stored_object.PlainObject(inside(spaced, OWNER)).read() is not None


def test_an_owner_in_the_making_is_no_other_owner(address: str) -> None:
    with held(address) as hold:
        stored_object.PlainObject(inside(address, OWNER))._put(b"")
        hold.check()
        NodeTransfer(address, hold.record.parent, run_is_shared=False, token=hold.owner.token)._check()


def test_a_bucket_that_is_not_there_is_refused(address: str) -> None:
    wrong = address.replace("//runs/", "//no-such-bucket/")
    with pytest.raises(
        ValueError, match="output: s3://no-such-bucket/.* cannot be written to: .*; valid: a bucket"
    ) as raised:
        with held(wrong):
            raise AssertionError
    assert not isinstance(raised.value, HeldError) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"token": 1}', "\x00", json.dumps({"pid": "x"})])
def test_an_owner_that_cannot_be_read_is_nobody(text: str) -> None:
    assert Owner.parse(text) is None


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, in which nobody can make a folder")
def test_an_output_that_nobody_can_make_is_named() -> None:
    with pytest.raises(ValueError, match="output: /proc/nowhere: .*; valid: "), held("/proc/nowhere"):
        pass
