"""The keys of the configuration: their names, sections, types and defaults, as flags and documents show them."""

import re
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minitron_search.config.plain_yaml import Kind
from minitron_search.config.schema import Config

ABLATION_TEXT = ("question", "figure", "base", "baseline")  # the keys of an ablation's own that hold text
TYPES = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false", type(None): "null"}


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its default; a misspelt key is compared with them."""
    for name, field in fields(model, prefix):
        yield name, field.default


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key with its field, a section before its keys."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if section := section_of(field.annotation):
            yield from fields(section, f"{prefix}{name}.")


def default_of(key: str) -> Any:
    """Return the default of a dotted key: that of its section by itself, where the default leaves the section out."""
    value: Any = Config.model_construct()
    model: type[BaseModel] = Config
    for name in key.split("."):
        field = model.model_fields[name]
        value, model = getattr(value, name, field.default), section_of(field.annotation) or model
    return value


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation holds, be it optional or in a list; None if it holds none."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def is_list(annotation: Any) -> bool:
    """Tell whether an annotation is a list and nothing else."""
    return get_origin(annotation) is tuple


def described(field: FieldInfo) -> str:
    """Return what a key is in one line: its own description, or that of its section."""
    section = section_of(field.annotation)
    return " ".join((field.description or cleandoc((section and section.__doc__) or "")).split())


def written(value: Any) -> str:
    """Return a value as a flag is given it: `0,4K,12K`, `null`, `1e-5`."""
    if isinstance(value, tuple | list):
        return ",".join(map(written, value)) or "[]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value and value % 1000 == 0:
        return f"{value // 1000}K"
    return str(value).replace("e-0", "e-")


def choices(annotation: Any) -> tuple[str, ...]:
    """Return the words that a key takes, in the order of its type; there may be other values too."""
    return tuple(re.findall(r"[a-z][a-z0-9_]*", value_type(annotation)))


def value_type(annotation: Any) -> str:
    """Return the values that a key takes, as `auto|INT` or `{wandb|mlflow},...`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value_type(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is tuple:
        parts = [_in_list(part) for part in inner if part is not Ellipsis]
        return ",".join([*parts, "..."] if Ellipsis in inner else parts)
    if origin in (Union, UnionType):
        parts = [value_type(part) for part in inner]
        return "|".join(part for part in parts if f"{part},..." not in parts)
    return TYPES.get(annotation, "SECTION")


def _in_list(annotation: Any) -> str:
    text = value_type(annotation)
    return f"{{{text}}}" if "|" in text else text


@cache
def _kinds() -> dict[str, Kind]:
    return {name: _kind(field.annotation) for name, field in fields()}


def _kind(annotation: Any) -> Kind:
    if section_of(annotation):
        return Kind.SECTION
    types = set(_types(annotation))
    if types - {type(None), tuple} != {str}:
        return Kind.OTHER
    return Kind.TEXTS if tuple in types else Kind.TEXT_OR_NULL if type(None) in types else Kind.TEXT


def _types(annotation: Any) -> Iterator[type]:
    """Yield the types that an annotation is made of, and tuple for a list of them."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _types(inner[0])
    elif origin is Literal:
        yield from map(type, inner)
    elif origin in (Union, UnionType, tuple):
        if origin is tuple:
            yield tuple
        for part in inner:
            if part is not Ellipsis:
                yield from _types(part)
    else:
        yield annotation


def kind_of(key: str) -> Kind:
    """Return what a dotted key holds, in an ablation too; `OTHER` for one that there is not."""
    first, _, rest = key.partition(".")
    if first in ("arms", "before"):
        key = rest.partition(".")[2]
    return Kind.TEXT if key in ABLATION_TEXT else _kinds().get(key, Kind.OTHER)
