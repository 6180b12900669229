"""What a person following a run sees: one line an event, with the time, in a terminal and in a job's log alike."""

import sys
import time

from rich.console import Console

# a job's log has no width of its own; the summary table needs 100 columns
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def say(text: str) -> None:
    console.print(time.strftime("%H:%M:%S"), text, markup=False)
