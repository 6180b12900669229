"""Whatever stops a command is one message with a status; nothing reads stdin; SIGTERM is as Ctrl-C."""

import io
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import report
from minitron_search.config.types import as_number
from minitron_search.messages import failures
from minitron_search.messages.console import LogConsole
from minitron_search.messages.failures import BegunError, message_of, reading, run_command


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


class _OddError(Exception):
    """Of a library, with a message of several lines."""


@pytest.mark.parametrize(
    "error",
    [KeyError("weight_map"), TypeError("NoneType"), RecursionError("too deep"), MemoryError(), _OddError("a\n\n  b"),
     sqlite3.DatabaseError("malformed"), AssertionError(), ImportError("No module named 'torch'"),
     FileNotFoundError(2, "No such file", "x"), StopIteration(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_any_error_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith("minitron_search: ") and said.count("\n") == 1 and "Traceback" not in said
    assert type(error).__name__ in said or str(error) in said or "memory" in said


def test_a_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(failures.DEBUG, "1")
    assert run_command(raising(KeyError("x"))) == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_was_read_is_named_unless_the_error_says_enough() -> None:
    for error in (KeyError("weight_map"), ValueError("bad\nmagic")):
        with pytest.raises(ValueError, match=r"^index\.json: .*(weight_map|bad magic).*; valid: whole files$"):
            with reading("index.json", "whole files"):
                raise error
    with pytest.raises(ValueError, match=r"^a\.key: 5; valid: 6$"), reading("index.json", "whole files"):
        raise ValueError("a.key: 5; valid: 6")
    with pytest.raises(ValueError, match=r"^a\.key: 5 is not it; valid: whole files$"), reading("x", "whole files"):
        raise ValueError("a.key: 5 is not it")
    with pytest.raises(KeyboardInterrupt), reading("index.json", "whole files"):
        raise KeyboardInterrupt


def test_a_fault_of_the_program_says_where_it_is() -> None:
    try:
        as_number(None)
        json.loads("{")
    except ValueError as error:
        assert "Expecting" in message_of(error)
    try:
        report.span(None)  # type: ignore[arg-type]
    except (TypeError, AttributeError) as error:
        assert "line " in message_of(error) and failures.DEBUG in message_of(error)


@pytest.mark.parametrize(
    ("cause", "again", "wrote", "status"),
    [(KeyError("x"), "python -m a --resume", True, 1), (KeyError("x"), None, False, 2),
     (KeyboardInterrupt(), "python -m a --resume", True, 130), (KeyboardInterrupt(), None, False, 130)],
)  # fmt: skip
def test_a_run_is_continued_only_where_there_is_one(
    cause: BaseException, again: str | None, wrote: bool, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        try:
            raise cause
        except BaseException as error:
            raise BegunError(again, wrote) from error

    assert run_command(work) == status
    said = capsys.readouterr().err
    assert said.endswith("; continue with: python -m a --resume\n") if again else "--resume" not in said


def test_sigterm_stops_as_ctrl_c_does_with_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    before, tidied = signal.getsignal(signal.SIGTERM), []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not cut the tidying short
            tidied.append(True)
            raise KeyboardInterrupt from None  # as who catches it on the way may do

    assert run_command(work) == 143
    assert tidied and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "minitron_search: terminated before anything was written\n"


def test_a_question_finds_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours = sys.stdin
    assert run_command(lambda: len(input("remove it? [y/N]"))) == 2
    assert "EOFError" in capsys.readouterr().err and sys.stdin is ours


def test_nobody_reads_the_output_any_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())

    def work() -> int:
        LogConsole(file=sys.stdout).print("x")
        return 0

    assert run_command(work) == 2
    assert "broken pipe" in capsys.readouterr().err


def test_a_report_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        assert report.main([str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 1 and "Traceback" not in said
