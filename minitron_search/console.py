"""What a person following a run sees: one line an event, with the time, in a terminal and in a job's log alike."""

import time

from rich.console import Console

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    console.print(time.strftime("%H:%M:%S"), text, markup=False)
