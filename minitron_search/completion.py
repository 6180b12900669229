"""What a shell completes on a line that begins with `minitron-search`: commands, flags and the words that they take."""

from collections.abc import Mapping

from minitron_search.config.keys import choices, fields, is_list, section_of
from minitron_search.options import Arguments

REGISTRATION = "complete -o default -C '{program} completion' {program}"
SHELLS = {
    "bash": REGISTRATION,
    "zsh": f"autoload -Uz compinit bashcompinit && compinit && bashcompinit && {REGISTRATION}",
}


def completed(line: str, commands: Mapping[str, Arguments]) -> list[str]:
    """Return what the last word of a line may become, the empty one after a space too; nothing where it may be a file.

    The last of a list's words is completed where they are separated by commas.
    """
    _, *before, begun = line.split() if not line[-1:].isspace() else [*line.split(), ""]
    if not before:
        words = list(commands)
    elif before[0] not in commands:
        words = []
    else:
        flags, positional = _words(commands[before[0]])
        words = list(flags) if begun.startswith("-") else list(flags.get(before[-1], positional))
    head = begun[: begun.rfind(",") + 1]
    return [head + word for word in words if word.startswith(begun.removeprefix(head))]


def _words(arguments: Arguments) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Return every flag of a command with the words that it takes, and the words that stand by themselves."""
    flags: dict[str, tuple[str, ...]] = {"--help": tuple(name for name, _ in fields()) if arguments.keys else ()}
    positional: tuple[str, ...] = ()
    for action in (action for parser in arguments.parsers for action in parser._actions):
        words = tuple(action.choices or ())
        flags |= dict.fromkeys(action.option_strings, words)
        positional += () if action.option_strings else words
    for name, field in fields() if arguments.keys else ():
        if section_of(field.annotation) is None or is_list(field.annotation):
            flags[f"--{name}"] = choices(field.annotation)
    return flags, positional
