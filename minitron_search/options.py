"""The arguments of the commands that are no keys of the configuration, as argparse's parsers."""

import argparse
from typing import NamedTuple, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are messages like all others, and whose help is `usage.show_help`."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; valid: --help lists the options")


class Arguments(NamedTuple):
    """What a command takes: the arguments of its parsers, the first of which names it, and the configuration's keys."""

    parsers: tuple[argparse.ArgumentParser, ...]
    keys: bool = True


def run_parser() -> Parser:
    """Return the parser of a run's own options, which leaves the flags of keys to `config.loading`."""
    does = "Find the best smaller architecture inside a trained decoder LM, and prove it."
    parser = Parser("python -m minitron_search.run", does)
    parser.add_argument("--config", metavar="FILE", help="YAML file. Without one: the embedded default.")
    parser.add_argument("--resume", action="store_true", help="Continue the run in --output, which needs nothing else.")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="Say what would be done and cost, and spend nothing."
    )
    return parser


def help_asked(words: list[str]) -> str | None:
    """Return what --help is asked of: a section or key, or '' for all; None where help is not asked."""
    place = next((place for place, word in enumerate(words) if word in ("-h", "--help")), None)
    if place is None:
        return None
    return next((word for word in words[place + 1 : place + 2] if not word.startswith("-")), "")
