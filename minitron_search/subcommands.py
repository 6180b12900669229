"""`minitron-search COMMAND ...`: one command for what the package does. `minitron-search run` is
`python -m minitron_search.run`, and takes the same flags.

Each entry of `COMMANDS` is a few lines over a module, which is imported when it is asked for: `--help` waits for none.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from analysis.arguments import add_arguments as add_report
from minitron_search import cli
from minitron_search.completion import SHELLS, completed
from minitron_search.config.loading import is_ablation
from minitron_search.messages.failures import reading, run_command
from minitron_search.options import Arguments, Parser, help_asked, run_parser

PROGRAM = "minitron-search"
SPACES = Path(__file__).parent / "search_spaces"  # a link to the folder at the top; in a wheel the files themselves


class Command(NamedTuple):
    """A word after `minitron-search`: what follows it, what it does, the function that is given the rest, the one that
    adds its own arguments to a parser, and whether it takes the flags of a run too."""

    follows: str
    does: str
    run: Callable[[list[str]], int]
    add: Callable[[argparse.ArgumentParser], None]
    flags: bool = True


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
        f"CONFIG: a YAML file, or one of {', '.join(shipped())}, or an ablation in {SPACES.name}/ablations.",
        "MODEL: smollm2-135m (embedded), a folder, or a name on the Hub. FLAGS: --stages, --output, --resume,",
        f"--dry-run, and every key of the configuration, as --search.trials 16: {PROGRAM} run --help has them all.",
    ])  # fmt: skip


def _run(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(f"{name!r} is not a command; valid: {', '.join(COMMANDS)}")
    if (part := help_asked(rest)) is not None:
        from minitron_search.usage import show_help  # tyro, which nothing else needs

        show_help(arguments_of(name), part)
        return 0
    return COMMANDS[name].run(rest)


def arguments_of(name: str) -> Arguments:
    """Return everything that a command takes."""
    command = COMMANDS[name]
    return Arguments((parser_of(name), *([run_parser()] if command.flags else [])), command.flags)


def parser_of(name: str) -> Parser:
    """Return the parser of a command's own arguments, those of a run left out."""
    does = COMMANDS[name].does
    parser = Parser(f"{PROGRAM} {name}", f"{does[0].upper()}{does[1:]}.")
    COMMANDS[name].add(parser)
    return parser


def shipped(folder: Path = SPACES) -> list[str]:
    """Return the names of the searches that are shipped."""
    return [path.stem for path in sorted(folder.glob("*.yaml"))]


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
                         f"or one of {', '.join(shipped())}")  # fmt: skip
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
    options, flags = parser_of("plan").parse_known_args(arguments)
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
    options = parser_of("prune").parse_args(arguments)
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
    options, flags = parser_of("evaluate").parse_known_args(arguments)
    asked = ["--output", options.run, "--resume", "--stages", "retrain,report", "--evaluation.tasks", options.tasks]
    return cli.command([*asked, *flags])


def completion(arguments: list[str]) -> int:
    """Print the line that makes a shell complete; of a line that is being written, which the shell says, the words."""
    if "COMP_LINE" in os.environ:
        line = os.environ["COMP_LINE"][: int(os.environ.get("COMP_POINT", len(os.environ["COMP_LINE"])))]
        for word in completed(line, {name: arguments_of(name) for name in COMMANDS}):
            print(word)
        return 0
    print(SHELLS[parser_of("completion").parse_args(arguments).shell].format(program=PROGRAM))
    return 0


def add_config(parser: argparse.ArgumentParser) -> None:
    known = list(dict.fromkeys((*shipped(), *shipped(SPACES / "ablations"))))
    parser.add_argument(
        "file", nargs="?", metavar="CONFIG", choices=known, help="YAML file, or the name of a shipped one."
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="The model to write a configuration for, or a configuration (CONFIG)."
    )
    parser.add_argument(
        "--params", metavar="NUMBER", default="auto", help="Parameters of the student, as 4.5B or 55%%."
    )
    parser.add_argument("--write", metavar="FILE", type=Path, help="Where to write the configuration of a model.")


def add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="smollm2-135m (embedded), a folder, or a name on the Hub.")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="A new folder, which the trim is written to.")
    parser.add_argument("--params", metavar="NUMBER", default="auto", help="Parameters of the student, as 90M or 67%%.")
    parser.add_argument("--text", metavar="SOURCE", default="docstrings", help="Text to measure on, as corpus.train.")
    parser.add_argument("--trials", metavar="INT", type=int, default=16, help="How many trims are tried.")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="The folder or address of a run that has retrained.")
    parser.add_argument("tasks", metavar="TASKS", nargs="?", default="table_1", help="As evaluation.tasks.")


def add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="bash|zsh", choices=list(SHELLS), help="The shell that is to complete.")


COMMANDS = {
    "run": Command("[CONFIG] FLAGS", "search, retrain and report", run, add_config),
    "plan": Command("[CONFIG | MODEL [--params 4.5B]] FLAGS", "say what that would do and cost; write a configuration "
                    "for a model", plan, add_plan),
    "depth": Command("[CONFIG] FLAGS", "measure what removing each block of layers does", depth, add_config),
    "prune": Command("MODEL FOLDER [--params 90M]", "write the best trim for a budget, not trained", prune, add_prune,
                     flags=False),
    "ablate": Command("CONFIG FLAGS", "run the arms of an ablation and compare them", ablate, add_config),
    "report": Command("RUN", "write the report of a run", report, add_report, flags=False),
    "compare": Command("RUN RUN ... [--output FILE]", "write one page about several runs", compare, add_report,
                       flags=False),
    "evaluate": Command("RUN [TASKS]", "run lm-eval's tasks on the teacher and the students of a run", evaluate,
                        add_evaluate),
    "completion": Command("bash | zsh", "print the line that makes a shell complete these words", completion,
                          add_completion, flags=False),
}  # fmt: skip

if __name__ == "__main__":
    script()
