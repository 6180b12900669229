"""`minitron-search COMMAND ...`: one command for what the package does. `minitron-search run` is
`python -m minitron_search.run`, and takes the same flags.

Each entry of `COMMANDS` is a few lines over a module, which is imported when it is asked for: `--help` waits for none.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minitron_search import cli
from minitron_search.config.loading import is_ablation
from minitron_search.messages.failures import reading, run_command

PROGRAM = "minitron-search"
SPACES = Path(__file__).parent / "search_spaces"  # a link to the folder at the top; in a wheel the files themselves


class Command(NamedTuple):
    """A word after `minitron-search`: what follows it, what it does, and the function that is given the rest."""

    follows: str
    does: str
    run: Callable[[list[str]], int]


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status; what went wrong is one message on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    return run_command(partial(_run, given[0], given[1:]))


def script() -> None:
    """Be the console script: no library that asks something is given an answer, as in `run.py`."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.__stdin__.fileno() if sys.__stdin__ else 0)
    sys.exit(main())


def usage() -> str:
    """Return what `--help` prints."""
    width = max(len(f"{name} {command.follows}") for name, command in COMMANDS.items())
    lines = [f"  {f'{name} {command.follows}':<{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join([
        f"usage: {PROGRAM} COMMAND ...", "", *lines, "",
        f"CONFIG: a YAML file, or one of {shipped()}, or an ablation in {SPACES.name}/ablations.",
        "MODEL: smollm2-135m (embedded), a folder, or a name on the Hub. FLAGS: --stages, --output, --resume,",
        "--dry-run, and every key of the configuration (search_spaces/template.yaml has them all): --search.trials 16",
    ])  # fmt: skip


def _run(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(f"{name!r} is not a command; valid: {', '.join(COMMANDS)}")
    return COMMANDS[name].run(rest)


def shipped() -> str:
    """Return the names of the searches that are shipped, in a line."""
    return ", ".join(path.stem for path in sorted(SPACES.glob("*.yaml")))


def configuration(name: str) -> str | None:
    """Return the file of a configuration that is named by its path, or by its name among those that are shipped; None
    for what is neither."""
    if Path(name).expanduser().is_file():
        return str(Path(name).expanduser())
    for folder in (SPACES, SPACES / "ablations"):
        if (file := folder / f"{Path(name).name.removesuffix('.yaml')}.yaml").is_file() and "/" not in name:
            return str(file)
    return None


def with_config(arguments: list[str]) -> list[str]:
    """Return the flags of `python -m minitron_search.run` for `[CONFIG] FLAGS`. Raises ValueError for no CONFIG."""
    if not arguments or arguments[0].startswith("-"):
        return arguments
    file = configuration(arguments[0])
    if file is None:
        raise ValueError(f"{arguments[0]!r} is neither a file nor a configuration that is shipped; valid: a YAML file, "
                         f"or one of {shipped()}")  # fmt: skip
    return ["--config", file, *arguments[1:]]


def run(arguments: list[str]) -> int:
    return cli.command(with_config(arguments))


def depth(arguments: list[str]) -> int:
    return cli.command([*with_config(arguments), "--stages", "depth,report"])


def ablate(arguments: list[str]) -> int:
    flags = with_config(arguments)
    if flags[:1] == ["--config"] and not is_ablation(flags[1]):
        raise ValueError(f"{flags[1]}: it has no arms, so it is a search; valid: {PROGRAM} run {flags[1]}")
    return cli.command(flags)


def plan(arguments: list[str]) -> int:
    """Print a dry run; of a model write a configuration for it first, which the dry run is then of."""
    if not arguments or arguments[0].startswith("-") or configuration(arguments[0]):
        return cli.command([*with_config(arguments), "--dry-run"])
    parser = cli.Parser(prog=f"{PROGRAM} plan MODEL", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--params", default="auto")
    parser.add_argument("--write", metavar="FILE", type=Path)
    options, flags = parser.parse_known_args(arguments)
    from minitron_search.api.suggestion import suggestion

    text = suggestion(options.model, options.params)
    file = options.write or Path(f"{options.model.rstrip('/').rpartition('/')[2]}.yaml")
    with reading(f"--write: {file}", "a new file, in a folder that can be written to"):
        with open(file, "x", encoding="utf-8") as into:
            into.write(text)
    print(text)
    status = cli.command(["--config", str(file), *flags, "--dry-run"])
    print(f"written: {file}; {PROGRAM} run {file} runs it")
    return status


def prune(arguments: list[str]) -> int:
    """Write the best trim of a model, untrained."""
    parser = cli.Parser(prog=f"{PROGRAM} prune MODEL", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--params", default="auto")
    parser.add_argument("--text", default="docstrings")
    parser.add_argument("--trials", type=int, default=16)
    options = parser.parse_args(arguments)
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise ValueError(f"output: {options.output} is there already; valid: a new folder")
    from minitron_search import api

    student = api.prune(options.model, options.params, text=options.text, trials=options.trials)
    assert student.candidates is not None
    print(student.candidates.drop(columns="layers").to_string(index=False))
    print(f"{student!r}\nwritten: {student.save(options.output)}; it is not trained: {PROGRAM} run, or ms.distill")
    return 0


def report(arguments: list[str]) -> int:
    from analysis.report import main as write

    return write(arguments)


def compare(arguments: list[str]) -> int:
    runs = [word for word in arguments if not word.startswith("-")]
    if len(runs) < 2:
        raise ValueError(f"compare: {len(runs)} runs; valid: two or more folders of runs")
    return report(arguments)


def evaluate(arguments: list[str]) -> int:
    """Run lm-eval's tasks on the teacher and the students of a run that has retrained."""
    parser = cli.Parser(prog=f"{PROGRAM} evaluate RUN", allow_abbrev=False)
    parser.add_argument("run")
    parser.add_argument("tasks", nargs="?", default="table_1")
    options, flags = parser.parse_known_args(arguments)
    asked = ["--output", options.run, "--resume", "--stages", "retrain,report", "--evaluation.tasks", options.tasks]
    return cli.command([*asked, *flags])


COMMANDS = {
    "run": Command("[CONFIG] FLAGS", "search, retrain and report", run),
    "plan": Command("[CONFIG | MODEL [--params 4.5B]] FLAGS", "say what that would do and cost; write a configuration "
                    "for a model", plan),
    "depth": Command("[CONFIG] FLAGS", "measure what removing each block of layers does", depth),
    "prune": Command("MODEL FOLDER [--params 90M]", "write the best trim for a budget, not trained", prune),
    "ablate": Command("CONFIG FLAGS", "run the arms of an ablation and compare them", ablate),
    "report": Command("RUN", "write the report of a run", report),
    "compare": Command("RUN RUN ... [--output FILE]", "write one page about several runs", compare),
    "evaluate": Command("RUN [TASKS]", "run lm-eval's tasks on the teacher and the students of a run", evaluate),
}  # fmt: skip

if __name__ == "__main__":
    script()
