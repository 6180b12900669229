"""What is shown of a run: on a terminal, in a log, with hostile names, and what is left when it ends in any way."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from minitron_search.messages import console as messages
from minitron_search.messages.escaping import UNSEEN
from minitron_search.progress import live
from minitron_search.progress.display import drawing
from minitron_search.progress.state import Progress, StageProgress, TrialProgress
from minitron_search.progress.wording import clock, duration, percent, progress_line
from tests.runs import ROOT

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
HOSTILE = "[bold red]a\x1b[2J\u202e[/] :bomb:\nb"


def a_state(name: str = "run", trials: int = 3, share: float = 0.42, stage: str = "search") -> Progress:
    def trial(number: int) -> TrialProgress:
        return TrialProgress(f"search-{name}{number}", True, number, 10**number, 3.25, 0.027, 1234.5)

    stages = tuple(
        StageProgress(part, part == stage, share, 12.0, 75.0) for part in ("importance", "search", "retrain")
    )
    running = tuple(map(trial, range(trials)))
    return Progress(name, stages, 3, 5, running, running[:3], 190.0, 240.0, time.time() + 240, share, False)


def drawn(state: Progress, width: int, height: int) -> list[str]:
    terminal = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None,
                       legacy_windows=False)  # fmt: skip
    terminal.print(drawing(state, width, height))
    return terminal.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width, height", [(80, 24), (140, 50), (80, 12), (60, 5), (200, 3)])
@pytest.mark.parametrize("trials", [0, 1, 3, 40])
def test_the_display_fits_its_terminal(width: int, height: int, trials: int) -> None:
    for name in ("run", "n" * 300, HOSTILE):
        lines = drawn(a_state(name, trials), width, height)
        assert len(lines) < height and max(map(len, lines)) <= width
        whole = next(line for line in lines if line)
        assert "42%" in whole and "0:03:10" in whole and ("about 4 min left" in whole or width < 80)


def test_the_display_has_stages_and_trials() -> None:
    text = "\n".join(drawn(a_state(), 80, 24))
    for part in ("importance", "search", "retrain", "3/5 tried", "running", "best", "3.250 +- 0.027", "1,234", "100"):
        assert part in text, part
    assert "and " in "\n".join(drawn(a_state(trials=40), 80, 24)), "what does not fit is counted"


def test_what_others_named_is_shown_and_not_obeyed() -> None:
    text = "\n".join(drawn(a_state(HOSTILE, 1), 140, 24))
    assert not UNSEEN.search(text.replace("\n", ""))
    assert r"[bold red]a\x1b[2J\u202e[/] :bomb: b" in text, "neither markup nor an emoji, in one line"


def test_numbers_in_words() -> None:
    durations = {0: "1 s", 40: "40 s", 99: "99 s", 100: "2 min", 3600: "60 min", 12_000: "3 h 20 min"}
    assert {seconds: duration(seconds) for seconds in durations} == durations
    assert [percent(s) for s in (0, 0.999, 1, 0.29)] == ["0%", "99%", "100%", "29%"]
    assert clock(3725) == "1:02:05"


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line[9:] for line in capsys.readouterr().out.splitlines()]


def test_without_a_terminal_stages_and_silence_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line as a stage begins, another after a silence, none meanwhile; no control character, even when colours are
    asked for."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(live, "LOOK_S", 0.01)
    looks, silence = [0], [0.0]
    monkeypatch.setattr(live, "said_at", lambda: time.monotonic() - silence[0])

    def read(now: float) -> Progress:
        looks[0] += 1
        return a_state(HOSTILE, 30, stage="search" if looks[0] > 1 else "importance")

    def until(more: int) -> None:
        end = looks[0] + more
        while looks[0] < end:
            time.sleep(0.01)

    with live.shown(read):
        until(5)
        assert [line.split(";")[1] for line in said(capsys)] == [" importance 42%", " search 42%, 3/5 tried"]
        silence[0] = live.SILENCE_S - 1
        until(5)
        assert said(capsys) == []
        silence[0] = live.SILENCE_S + 1
        until(3)
    lines = said(capsys)
    assert lines and set(lines) == {progress_line(a_state())}
    left = r"about 4 min left, done at \d\d:\d\d"
    assert re.fullmatch(rf"progress: 42% of the run; search 42%, 3/5 tried; {left}", lines[0])


def test_a_long_line_is_whole_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    text = "word :warning: [b] " * 40
    messages.say(text)
    assert [line.rstrip() for line in said(capsys)] == [text.rstrip()]


def test_what_cannot_be_shown_does_not_stop_a_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOOK_S", 0.01)
    looks = []

    def read(now: float) -> Progress:
        looks.append(now)
        raise OSError("now") if len(looks) < 3 else ZeroDivisionError("odd")

    with live.shown(read):
        while len(looks) < 3:
            time.sleep(0.01)
        time.sleep(0.1)
    assert len(looks) == 3
    assert said(capsys) == ["progress: not shown any more: ZeroDivisionError: odd"]


SCRIPT = """
import sys, time
from minitron_search.messages.console import say
from minitron_search.messages.failures import run_command
from minitron_search.progress.live import shown
from tests.progress.test_live import a_state, HOSTILE

def work():
    share, odd = iter(range(10**6)), []
    with shown(lambda now: a_state(HOSTILE, next(share) % 5, next(share) % 7 / 7 / (not odd))):
        for number in range(int(sys.argv[2])):
            say(f"line {number} " + "of words " * 15)
            print(f"printed {number}")
            print(f"warned {number}", file=sys.stderr)
            time.sleep(0.1)
        say("READY")
        if sys.argv[1] == "odd":
            odd.append(1)
            time.sleep(0.5)
            say("goes on")
        if sys.argv[1] == "raise":
            raise ValueError("wrong; valid: right")
        if sys.argv[1] == "wait":
            time.sleep(60)
    say("table")
    return 0

import minitron_search.progress.live as live
live.LOOK_S = 0.03
sys.exit(run_command(work))
"""


def on_a_terminal(*arguments: str, then: Callable[[int], None]) -> tuple[int, bytes]:
    """Run SCRIPT on a terminal of its own; its exit status, and all that it wrote."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        environment = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, "-c", SCRIPT, *arguments], {**os.environ, **environment})
    written, is_ready, late = b"", False, time.monotonic() + 120
    while time.monotonic() < late:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                written += os.read(terminal, 65536)
            except OSError:  # all that had it open have ended
                break
        if b"READY" in written and not is_ready:
            is_ready = True
            time.sleep(0.2)
            then(pid)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written


@pytest.mark.parametrize(
    "how, then, status, last",
    [("end", lambda pid: None, 0, "table"), ("odd", lambda pid: None, 0, "table"),
     ("raise", lambda pid: None, 2, "wrong; valid: right"),
     ("wait", lambda pid: os.kill(pid, signal.SIGINT), 130, "interrupted before anything was written"),
     ("wait", lambda pid: os.kill(pid, signal.SIGTERM), 143, "terminated before anything was written")],
    ids=["end", "failure", "exception", "ctrl-c", "sigterm"],
)  # fmt: skip
def test_a_terminal_is_left_as_it_was(how: str, then: Callable[[int], None], status: int, last: str) -> None:
    """The display is gone before the table or the message, the cursor is there, and no line was torn."""
    ended, written = on_a_terminal(how, "8", then=then)
    assert ended == status, written.decode()
    assert HIDE in written and written.rfind(SHOW) > written.rfind(HIDE)
    seen = screen(written, 80)
    assert seen[-1].endswith(last), seen
    assert not any("%" in line or "━" in line for line in seen), "the display is gone"
    assert ("progress: not shown any more" in "".join(seen)) == ("goes on" in "".join(seen)) == (how == "odd")
    for number in range(8):
        at = next(i for i, line in enumerate(seen) if f"line {number} of words" in line)
        assert (" ".join([seen[at][9:], *(line[9:] for line in seen[at + 1 : at + 3])]).split("printed")[0].split()
                == f"line {number} {'of words ' * 15}".split())  # fmt: skip
        assert f"printed {number}" in seen and f"warned {number}" in seen


def screen(written: bytes, width: int) -> list[str]:
    """What is to be seen, and was scrolled past, of what was written: the few sequences that Rich moves by."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written.decode()):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token[0] == "\x1b":
            count = int(re.sub(r"\D", "", token) or 1)
            if token[-1] == "A":
                row = max(0, row - count)
            elif token[-1] == "K":
                lines[row] = ""
        else:
            assert len(token) + column <= width, token
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines if line.strip()]


def test_a_broken_pipe_ends_the_run_with_its_message(tmp_path: Path) -> None:
    """Also when it is the progress that meets it first: the run's next line does too."""
    script = SCRIPT.replace("live.LOOK_S = 0.03", "live.LOOK_S, live.SILENCE_S = 0.01, 0")
    with open(tmp_path / "errors", "wb") as errors:
        process = subprocess.Popen([sys.executable, "-c", script, "end", "600"], cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=errors, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 2
    told = (tmp_path / "errors").read_text()
    assert "nobody reads the output any more" in told and "Traceback" not in told
