"""End every failure in one message: what is wrong, where, and what would do, or how to go on.

`run_command` is the one net, around a whole command. What says in its message what would be valid is told as it is.
Anything else that was raised gets the name of its type, and where it can be said, the input that was being read
(`reading`). `MINITRON_SEARCH_DEBUG=1` prints Python's traceback as well.
"""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from minitron_search.messages.console import complain

DEBUG = "MINITRON_SEARCH_DEBUG"
OURS = ("minitron_search", "analysis")
LONGEST = 600  # characters that are told of a message which is not ours


class BegunError(Exception):
    """What stopped a run that had begun; the error itself is the cause.

    again: the command that continues the run, None where there is nothing to continue. wrote: whether this session has
    written to the run. message: what the error means, where that takes more than the error itself.
    """

    def __init__(self, again: str | None, wrote: bool, message: str | None = None):
        super().__init__(again, wrote, message)
        self.again, self.wrote, self.message = again, wrote, message


@contextmanager
def reading(what: str, valid: str) -> Iterator[None]:
    """While the block runs, let an error that does not say what would be valid name `what`, and `valid`."""
    try:
        yield
    except Exception as error:
        if is_told(error):
            raise
        if re.match(r"[a-z_]+(\.[a-z_]+)+: ", str(error)):  # names its key by itself
            raise ValueError(f"{error}; valid: {valid}") from error
        raise ValueError(f"{what}: {described(error)}; valid: {valid}") from error


def is_told(error: BaseException) -> bool:
    """Return whether an error's message says what would be valid."""
    return "valid: " in str(error) or "did you mean " in str(error)


def described(error: BaseException) -> str:
    """Return an error in one line: with its type, unless it is of those whose messages say enough by themselves."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    kind = type(error).__name__
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({text})' if text else ''}"
    if not text:
        return kind
    return text if type(error) in (ValueError, RuntimeError, OSError, FileNotFoundError) else f"{kind}: {text}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def message_of(error: BaseException) -> str:
    """Return what an error has to tell a user."""
    if is_told(error):
        return str(error).strip()
    if isinstance(error, ImportError):
        return f"{described(error)}; valid: an environment with what pyproject.toml asks for: pip install -e ."
    if isinstance(error, MemoryError):
        return f"{described(error)}; valid: a machine with more, a smaller model, or less text at once"
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more (broken pipe); valid: the command with its output in a file"
    raised = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in raised if set(Path(frame.filename).parts) & set(OURS)]
    said = bool(raised) and raised[-1] in ours and (raised[-1].line or "").startswith("raise ")
    if isinstance(error, OSError) or said:
        return str(error).strip() if said else described(error)
    place = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    return f"{described(error)}{place}; {DEBUG}=1 shows where it happened"


def run_command(work: Callable[[], int]) -> int:
    """Run a command and return its exit status; whatever stops it is one message on stderr.

    Status 2: nothing was written. 1: something was. 130: Ctrl-C. 143: SIGTERM.
    """
    with terminable() as signals, no_input():
        try:
            return work()
        except (Exception, KeyboardInterrupt) as error:
            return told(error, bool(signals))


def told(error: BaseException, terminated: bool = False) -> int:
    """Print one message about what stopped a command, SIGTERM or something else; return the exit status."""
    begun = error if isinstance(error, BegunError) else None
    cause = error.__cause__ if begun and error.__cause__ else error
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(cause)
    if isinstance(cause, BrokenPipeError):
        with suppress(AttributeError, OSError):  # Python flushes stdout when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    again = f"; continue with: {begun.again}" if begun and begun.again else ""
    if isinstance(cause, KeyboardInterrupt):
        how = "terminated" if terminated else "interrupted"
        kept = "; every finished row is kept" if again else " before anything was written"
        return complain(f"{how}{kept}{again}", 143 if terminated else 130)
    message = (begun and begun.message) or message_of(cause)
    return complain(message + again, 1 if begun and begun.wrote else 2)


@contextmanager
def terminable() -> Iterator[list[int]]:
    """While the block runs, raise KeyboardInterrupt at the first SIGTERM, as Ctrl-C does; yield the signals so far.

    Who catches it on its way may raise a KeyboardInterrupt of its own: that list says what it was.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def end(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) == 1:  # a second one must not cut short what the first began to put in order
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def no_input() -> Iterator[None]:
    """While the block runs, let whatever asks a question find no answer: nothing is read from stdin."""
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before
