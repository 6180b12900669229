"""search_spaces/template.yaml and docs/configuration.md, made from the configuration's model.

python -m tests.project.configuration        # write both
"""

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minitron_search.config.keys import default_of, described, fields, is_list, section_of, value_type, written
from minitron_search.config.schema import Config
from tests.runs import ROOT

TEMPLATE, DOCUMENT = ROOT / "search_spaces" / "template.yaml", ROOT / "docs" / "configuration.md"
WIDTH, COMMENTS = 120, 32  # columns of a line, and the one in which comments begin
TEMPLATE_HEAD = """\
# Every configuration key with its default: this file as it is asks for what no file asks for. Copy it, keep what you
# change. Numbers may be written 8K, 90M, 4.5B or 1e-4; auto, null and none are values. A line that starts with `#:`
# shows a key that is off, as null or [] would say: without the `#:` it is on.
"""
DOCUMENT_HEAD = """\
# Configuration

Every key, section by section. A YAML file (`--config FILE`) has them as in `search_spaces/template.yaml`. Each is a
flag of `python -m minitron_search.run` and of `minitron-search run` too, and goes before the file: `--search.trials 16`
or `--search.trials=16`. Of a flag that is given twice the last one holds.

| what | as it may be written |
|---|---|
| `INT`, `FLOAT` | `16`, `8K`, `90M`, `4.5B`, `2T` (decimal suffixes), `1e-4`, `1_000` |
| `TEXT` | as it is typed: `--name 1.10` is a name, not a number |
| a list, `INT,...` | `1K,2K` or `[1K, 2K]`; one value is a list of one |
| a section | YAML: `--search '{trials: 3}'`; what it leaves out has its default |
| `null` | nothing, or no limit |

`minitron-search run --help` shows the same, `--help search` a section of it, `--help search.trials` a key.
"""


def template() -> str:
    """Return the template: every key with its default, and its description as a comment."""
    return TEMPLATE_HEAD + "".join(f"{line}\n" for line in _yaml(Config, Config.model_construct(), 0, set()))


def _yaml(model: type[BaseModel], defaults: Any, depth: int, told: set[str]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        default, section = getattr(defaults, name, field.default), section_of(field.annotation)
        if section is None or is_list(field.annotation) or section in REPEATED:
            yield from _in_one_line(name, field, default, depth, told)
            continue
        if depth == 0:
            yield ""
        yield from _commented(f"{name}:", described(field), depth)
        yield from _yaml(section, default, depth + 1, told)


def _in_one_line(name: str, field: FieldInfo, default: Any, depth: int, told: set[str]) -> Iterator[str]:
    """Yield a key with its value, under what the parts of the value are where they were not told yet."""
    section = section_of(field.annotation)
    if section in REPEATED:
        for part, inner in section.model_fields.items():
            if (line := f"{part}: {described(inner)}") not in told:
                told.add(line)
                yield from _comment(line, depth)
    off = not default and field.examples
    value = field.examples[0] if off and field.examples else default
    yield from _commented(f"{'#: ' if off else ''}{name}: {_flow(value)}", described(field), depth)


def _flow(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return written(value) or '""'


def _commented(code: str, text: str, depth: int) -> Iterator[str]:
    """Yield a line with its comment beside it, which goes on below; of a long line above it."""
    line = "  " * depth + code
    if len(line) >= COMMENTS:
        yield from _comment(text, depth)
        yield line
        return
    for number, part in enumerate(_wrapped(text, COMMENTS)):
        yield f"{'' if number else line:<{COMMENTS}}# {part}"


def _comment(text: str, depth: int) -> Iterator[str]:
    for part in _wrapped(text, 2 * depth):
        yield f"{'  ' * depth}# {part}"


def _wrapped(text: str, column: int) -> list[str]:
    return textwrap.wrap(text, WIDTH - column - 2, break_long_words=False, break_on_hyphens=False)


def _uses() -> Counter[type[BaseModel]]:
    """Count of how many keys a section is the type of; one that adds to another counts for that too."""
    sections = [section_of(field.annotation) for _, field in fields() if not is_list(field.annotation)]
    return Counter(base for section in sections if section for base in section.__mro__ if base in sections)


USES = _uses()
# sections that several keys have, such as a limit or an axis, are shown in one line
REPEATED = {section for section in USES if max(USES[base] for base in section.__mro__) > 1}


def document() -> str:
    """Return the document: a table of its keys for every section."""
    named: dict[str, list[str]] = {"": []}
    heads = {"": "## Of the whole run\n"}
    for key, field in fields():
        parent = key.rpartition(".")[0]
        if section_of(field.annotation):
            off = "" if default_of(key) is not None else " Off unless one of its keys is given."
            named[key], heads[key] = [], f"## {key}\n\n{_markdown(described(field))}{off}\n"
        if not section_of(field.annotation) or is_list(field.annotation):
            default = _flow(default_of(key))
            named[parent].append(
                f"| `{key}` | {_type(field).strip()} | `{default}` | {_markdown(described(field))} |\n"
            )
    parts = [DOCUMENT_HEAD]
    for key, rows in named.items():
        parts.append(
            heads[key]
            + ("\n| key | type | default | what it is |\n|---|---|---|---|\n" + "".join(rows) if rows else "")
        )
    return "\n".join(parts)


def _markdown(text: str) -> str:
    for sign in "*<|":
        text = text.replace(sign, f"\\{sign}")
    return text


def _type(field: FieldInfo) -> str:
    """Return what a key takes, and what its numbers are held to, as `INT` 1 to 1,000."""
    kind = value_type(field.annotation).replace("|", "\\|")
    bounds = list(_bounds([field]))
    low, above = (max((bound for name, bound in bounds if name == sign), default=None) for sign in ("ge", "gt"))
    high, below = (min((bound for name, bound in bounds if name == sign), default=None) for sign in ("le", "lt"))
    told = [
        f"{_number(low)} to {_number(high)}" if low is not None and high is not None else "",
        f"at least {_number(low)}" if low is not None and high is None else "",
        f"above {_number(above)}" if above is not None and low is None else "",
        f"at most {_number(high)}" if high is not None and low is None else "",
        f"below {_number(below)}" if below is not None else "",
    ]
    return f"`{kind}` " + ", ".join(filter(None, told))


def _bounds(parts: Any) -> Iterator[tuple[str, float]]:
    """Yield every bound in the parts of an annotation, by its name in annotated_types."""
    for part in parts:
        yield from ((name, getattr(part, name)) for name in ("ge", "gt", "le", "lt") if hasattr(part, name))
        yield from _bounds([*part.metadata, part.annotation] if isinstance(part, FieldInfo) else get_args(part))


def _number(bound: float) -> str:
    if bound < 10**9:
        return f"{bound:,}".removesuffix(".0")
    power = int(bound).bit_length() - 1
    return f"2^{power}" if bound == 2**power else f"{float(bound):g}".replace("e+", "e").replace("e0", "e")


if __name__ == "__main__":
    TEMPLATE.write_text(template())
    DOCUMENT.write_text(document())
