"""Read YAML and flags: text as it is written, every key once, and nothing that does not end."""

import re
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import yaml

MOST_VALUES, DEEPEST = 20_000, 40  # of a file, aliases counted as often as they are used


class Kind(Enum):
    """What a key holds, as far as reading it goes: the type of the key decides what `1.10` or `no` is, not YAML."""

    TEXT = "text"
    TEXT_OR_NULL = "text or null"
    TEXTS = "a list of text"
    SECTION = "a section"
    OTHER = "numbers, booleans, a list of numbers"


TEXTUAL = (Kind.TEXT, Kind.TEXT_OR_NULL, Kind.TEXTS)


class _Loader(yaml.SafeLoader):
    """YAML without its octal and sexagesimal numbers and its dates; those stay as they are written."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > 2 * DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]{0,300})", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|"
              r"\.(?:nan|NaN|NAN)", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse(text: str, where: str, kind_of: Callable[[str], Kind], prefix: str = "") -> Any:
    """Return the plain values of a YAML text. `kind_of`: the kind of a dotted key; `prefix`: the key that `text` is of.

    Raises ValueError, with `where` and the line, for what is no YAML, a key given twice, and more than `MOST_VALUES`.
    """
    try:
        reader = _Reader(text, where, kind_of)
        root = reader.loader.get_single_node()
        return None if root is None else reader.value(root, prefix)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        what = problem or " ".join(str(error).split())
        raise ValueError(f"{where} is not valid YAML: {line}{what}; valid: lines such as `seed: 0`") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; valid: at most {DEEPEST} levels") from None


def scalar(text: str, kind: Kind) -> Any:
    """Return the value of one flag: text as it was typed, anything else as a plain scalar of YAML."""
    if kind in (Kind.TEXT, Kind.TEXTS):
        return text
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text.strip(), (True, False))
    if kind is Kind.TEXT_OR_NULL:
        return None if text in ("null", "Null", "NULL") else text
    return loader.construct_object(yaml.ScalarNode(tag, text.strip()))


class _Reader:
    """Makes plain values of YAML's nodes, which still know their lines and how they were written."""

    def __init__(self, text: str, where: str, kind_of: Callable[[str], Kind]):
        self.loader, self.where, self.kind_of = _Loader(text), where, kind_of
        self.values = 0

    def value(self, node: yaml.Node, key: str, depth: int = 0) -> Any:
        self.values += 1
        if self.values > MOST_VALUES:
            raise ValueError(f"{self.where} holds more than {MOST_VALUES:,} values, aliases counted each time; valid: "
                             "fewer")  # fmt: skip
        if depth > DEEPEST:
            raise ValueError(f"{self.where}, line {node.start_mark.line + 1}: is nested too deeply, or an alias holds "
                             f"itself; valid: at most {DEEPEST} levels")  # fmt: skip
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, key, depth + 1) for item in node.value]
        return self.scalar(node, self.kind_of(key))

    def scalar(self, node: yaml.Node, kind: Kind) -> Any:
        """Return a scalar; for a key of text one without quotes is what is written, and `~` there is a folder."""
        if node.style is None and kind in TEXTUAL and node.tag != "tag:yaml.org,2002:null":
            return node.value
        if node.value == "~" and node.style is None and kind in (Kind.TEXT, Kind.TEXTS):
            return node.value
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # of a tag, as in `!!int x`
            raise ValueError(f"{self.where}, line {node.start_mark.line + 1}: {str(error)[:200]}; valid: the value "
                             "without a tag") from None  # fmt: skip

    def mapping(self, node: yaml.MappingNode, key: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name, item, line in self.pairs(node):
            if name in lines:
                whole = f"{key}.{name}" if key else name
                raise ValueError(f"{self.where}, line {line}: {whole} is given twice, first in line {lines[name]}; "
                                 "valid: once")  # fmt: skip
            lines[name] = line
            if name == "<<":
                under = self.value(item, key, depth + 1)
                for one in under if isinstance(under, list) else [under]:
                    merged = {**(one if isinstance(one, dict) else {}), **merged}
            else:
                found[name] = self.value(item, f"{key}.{name}" if key else name, depth + 1)
        return {**merged, **found}

    def pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, int]]:
        for name, item in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise ValueError(f"{self.where}, line {line}: a key is a list or a mapping; valid: the name of a key")
            yield name.value, item, line
