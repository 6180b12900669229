"""Show the progress of what runs: on a terminal as a display under the lines that are said, elsewhere as lines."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.live import Live

from minitron_search.messages.console import console, is_terminal, said_at, say
from minitron_search.messages.failures import described
from minitron_search.progress.display import drawing
from minitron_search.progress.state import Progress
from minitron_search.progress.wording import current, progress_line

LOOK_S = 1.0
SILENCE_S = 60.0  # without a terminal: after which a line says how far the run is


@contextmanager
def shown(read: Callable[[float], Progress]) -> Iterator[None]:
    """While the block runs, show what `read` returns for the Unix time; afterwards the terminal is as it was."""
    show = _displayed if on_terminal() else _in_lines
    with show(read):
        yield


def on_terminal() -> bool:
    """Return whether what is printed goes to a terminal that can draw."""
    return console.is_terminal and console.is_interactive and console.encoding.lower().startswith("utf")


@contextmanager
def _displayed(read: Callable[[float], Progress]) -> Iterator[None]:
    """Draw under the lines that are said. What other code prints to a terminal comes above the display too."""
    live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=is_terminal(sys.stderr))

    def draw() -> None:
        picture = drawing(read(time.time()), console.width, console.height)
        with console.printing:
            live.update(picture, refresh=True)

    def stop() -> None:
        with console.printing, suppress(OSError):  # of a terminal that is gone
            live.stop()

    try:
        with console.printing:
            live.start()
        with _repeated(draw, stop):
            yield
    finally:
        stop()


@contextmanager
def _in_lines(read: Callable[[float], Progress]) -> Iterator[None]:
    """Say how far the run is when a stage begins, and when nothing was said for a while."""
    before: list[str | None] = [None]

    def look() -> None:
        state = read(time.time())
        stage = current(state)
        name = stage.name if stage is not None else before[0]
        if name != before[0] or time.monotonic() - said_at() >= SILENCE_S:
            before[0] = name
            say(progress_line(state))

    with _repeated(look, lambda: None):
        yield


@contextmanager
def _repeated(look: Callable[[], None], give_up: Callable[[], None]) -> Iterator[None]:
    """While the block runs, call `look` every `LOOK_S` in a thread of its own, which never stops the run.

    `give_up` is called where `look` fails for good.
    """
    over = threading.Event()

    def follow() -> None:
        while not over.is_set():
            try:
                look()
            except BrokenPipeError:  # whoever says the next line of the run meets it too, and ends the run
                console.quiet = False
                return
            except OSError:  # of a log, at this moment
                pass
            except Exception as error:  # of any kind: none is worth a run
                give_up()
                say(f"progress: not shown any more: {described(error)}")
                return
            over.wait(LOOK_S)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)
