"""`python -m tests.two_at_once [ROUNDS]`: two runs in one output, started a second apart, again and again.

One has to go on and leave a complete table, the other to be refused with status 2 and the name of the first. Every
third round the first is killed instead, and `--resume` has to go on at once.
"""

import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.runs import Command, rows, tiny_inputs

ROUNDS = 20
SMALL = (
    "--search.trials", "1", "--search.controls", "false", "--search.rungs", "64,128", "--retraining.tokens", "128",
    "--stages", "importance,search", "--resources.launcher", "inline", "--search.concurrency", "1",
)  # fmt: skip


def one_round(command: Command, number: int, expected: list) -> tuple[list, str]:
    """Return the table of the first run, and what was said to the second."""
    output = command.folder / f"run-{number}"
    first = command.start(output, *SMALL)
    time.sleep(1)
    again = ("--resume",) if number % 2 else ()
    second = command.start(output, *SMALL, *again)
    refused, _ = second.communicate(timeout=300)
    assert second.returncode == 2, refused
    assert f"is being written by process {first.pid} on" in refused, refused
    if number % 3 == 2:
        assert first.stdout is not None
        while "rung 0" not in (line := first.stdout.readline()):
            assert line, "it ended before its first rung"
        first.send_signal(signal.SIGKILL)
        first.wait()
        first = command.start(output, *SMALL, "--resume")
    printed, _ = first.communicate(timeout=600)
    assert first.returncode == 0, printed
    table = rows(output)
    assert not expected or table == expected, "the table is another one"
    return table, refused.strip().splitlines()[-1]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        command, table = Command(Path(folder), tiny_inputs(Path(folder))), []
        for number in range(rounds):
            table, refused = one_round(command, number, table)
            print(f"round {number + 1}: {len(table)} rows; {refused}", flush=True)


if __name__ == "__main__":
    main()
