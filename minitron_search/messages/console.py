"""Print what a person follows a run by: one line an event, with the time, in a terminal and in a job's log alike."""

import sys
import textwrap
import threading
import time
from typing import Any

from rich.console import Console

from minitron_search.messages.escaping import visible


class LogConsole(Console):
    """A console whose lost reader is an error like others: Rich ends the process at once, without a word.

    `printing` is held while anything is printed: what one thread prints over a display is computed from what is on the
    terminal, which no other thread changes meanwhile. Whoever also takes a lock of the display takes this one first.
    """

    printing = threading.RLock()

    def __enter__(self) -> "LogConsole":
        self.printing.acquire()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.printing.release()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError("stdout")

    @property
    def is_terminal(self) -> bool:
        """Whether it prints to a terminal, whatever FORCE_COLOR says: a job's log holds no control characters."""
        return super().is_terminal and is_terminal(self.file)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal."""
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:  # closed
        return False


# a job's log has no width of its own; the summary table needs 100 columns
console = LogConsole(highlight=False, soft_wrap=True, width=None if is_terminal(sys.stdout) else 120)
_said = [time.monotonic()]


def say(text: str) -> None:
    """Print a line with the time: the one way by which the program tells what it does.

    A terminal would break it anywhere, so there it is broken between words; in a job's log it is one line.
    """
    line = f"{time.strftime('%H:%M:%S')} {visible(text)}"
    if console.is_terminal:
        line = "\n".join(_between_words(part, console.width) for part in line.split("\n"))
    console.print(line, markup=False, emoji=False)
    _said[0] = time.monotonic()


def _between_words(line: str, width: int) -> str:
    """Return a line as several that are as wide as the terminal; a longer word, such as a path, stays whole."""
    return textwrap.fill(line, width, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)


def said_at() -> float:
    """Return when the last line was said, by the clock of `time.monotonic`."""
    return _said[0]


def complain(problem: Exception | str, status: int) -> int:
    """Print what is wrong on stderr and return `status`."""
    print(f"minitron_search: {visible(problem)}", file=sys.stderr)
    return status
