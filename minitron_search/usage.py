"""The help of every command: tyro shows the arguments of argparse's parsers and the keys of the configuration.

tyro parses nothing here: argparse and `config.loading` do.
"""

import argparse
from collections.abc import Iterator
from typing import Annotated, Any

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from minitron_search.config.keys import default_of, described, fields, is_list, section_of, value_type, written
from minitron_search.config.loading import suggestion
from minitron_search.config.schema import Config
from minitron_search.options import Arguments

VALUES = """Values:
- numbers: 8K, 90M, 4.5B or 1e-4
- lists: 1,2 or [1, 2]
- a whole section, as YAML: --search '{trials: 3}'

Of a flag that is given twice the last one holds. --help SECTION and --help KEY show a part: --help search."""
REGISTRY = ConstructorRegistry()


def show_help(arguments: Arguments, of: str = "") -> None:
    """Print the help of a command, or, with `of`, of one section or key.

    Raises ValueError for a section or key that there is not.
    """
    parser = arguments.parsers[0]
    part = of if arguments.keys else ""
    shown = (_part(part),) if part else tuple(_all_of(arguments))
    description = f"{parser.description}\n\n{VALUES}" if arguments.keys and not part else parser.description
    command = type("Command", (_Shown,), {"flags": shown})
    try:
        tyro.cli(command, prog=parser.prog, description=description, args=["--help"], registry=REGISTRY,
                 use_underscores=True)  # fmt: skip
    except SystemExit:  # with which tyro ends
        pass


class _Shown:
    """A type that tyro takes for a command, with these flags."""

    flags: tuple[StructFieldSpec, ...]


@REGISTRY.struct_rule
def _flags_of(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return the flags of a command or of a section, None for any other type."""
    if isinstance(info.type, type) and issubclass(info.type, _Shown):
        return StructConstructorSpec(info.type, info.type.flags)
    if isinstance(info.type, type) and issubclass(info.type, BaseModel):
        return StructConstructorSpec(info.type, tuple(_keys(info.type, info.default)))
    return None


def _all_of(arguments: Arguments) -> Iterator[StructFieldSpec]:
    for parser in arguments.parsers:
        yield from map(_argument, parser._actions)
    if arguments.keys:
        yield from _keys(Config, Config.model_construct())


def _part(of: str) -> StructFieldSpec:
    key = of.replace("-", "_")
    field = dict(fields()).get(key)
    if field is None:
        raise ValueError(f"--help: {of!r} is neither a section nor a key; {suggestion(key) or 'valid: --help search'}")
    return _flag(key, field, default_of(key))


def _argument(action: argparse.Action) -> StructFieldSpec:
    """Return an argument of a parser's own: a word, a switch, or a flag with a value."""
    hint = tyro.conf.arg(
        aliases=[flag for flag in action.option_strings if flag[2:] != action.dest] or None,
        help_behavior_hint=f"(default: {action.default})" if action.default else "",
    )
    value = _value(f"{action.metavar} ..." if action.nargs == "+" else str(action.metavar))
    kind: Any = Annotated[object, value, hint]
    if not action.option_strings:
        kind = Annotated[object, value, hint, tyro.conf.Positional]
    elif action.nargs == 0:
        kind = Annotated[bool, tyro.conf.FlagCreatePairsOff, hint]
    default = tyro.MISSING if action.required else action.default
    text = (action.help or "").replace("%%", "%")
    return StructFieldSpec(name=action.dest, type=kind, default=default, helptext=text)


def _keys(section: type[BaseModel], defaults: Any) -> Iterator[StructFieldSpec]:
    for name, field in section.model_fields.items():
        yield _flag(name, field, getattr(defaults, name, field.default))


def _flag(name: str, field: FieldInfo, default: Any) -> StructFieldSpec:
    section = section_of(field.annotation)
    if section is None or is_list(field.annotation):
        hint = tyro.conf.arg(help_behavior_hint=f"(default: {written(default) or 'empty'})")
        kind = Annotated[object, _value(value_type(field.annotation)), hint]
        return StructFieldSpec(name=name, type=kind, default=default, helptext=described(field))
    text = described(field)
    if default is None:
        text, default = f"{text} Off unless one of its keys is given.", section.model_construct()
    for inner, part in section.model_fields.items():
        if (of := section_of(part.annotation)) and all(section_of(f.annotation) for f in of.model_fields.values()):
            text += f"\n\n{inner}: {described(part)}"  # it has no keys of its own beside which to say so
    return StructFieldSpec(name=name, type=section, default=default, helptext=text)


def _value(kind: str) -> PrimitiveConstructorSpec[Any]:
    """Return how tyro shows a value of this kind."""
    return PrimitiveConstructorSpec(
        nargs=1, metavar=kind, instance_from_str=lambda given: given[0], is_instance=lambda value: True,
        str_from_instance=lambda value: [written(value)],
    )  # fmt: skip
