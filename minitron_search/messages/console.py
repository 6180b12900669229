"""Print what a person follows a run by: one line an event, with the time, in a terminal and in a job's log alike."""

import sys
import time

from rich.console import Console

from minitron_search.messages.escaping import visible


class LogConsole(Console):
    """A console whose lost reader is an error like others: Rich ends the process at once, without a word."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError("stdout")


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


# a job's log has no width of its own; the summary table needs 100 columns
console = LogConsole(highlight=False, soft_wrap=True, width=None if _is_terminal() else 120)


def say(text: str) -> None:
    """Print a line with the time: the one way by which the program tells what it does."""
    console.print(time.strftime("%H:%M:%S"), visible(text), markup=False)


def complain(problem: Exception | str, status: int) -> int:
    """Print what is wrong on stderr and return `status`."""
    print(f"minitron_search: {visible(problem)}", file=sys.stderr)
    return status
