"""Load the configuration: YAML and dotted flags in, a checked `Config` out, or one message that says what is wrong."""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from minitron_search.config.keys import ABLATION_TEXT, fields, keys, kind_of, value_type
from minitron_search.config.plain_yaml import TEXTUAL, Kind, parse, scalar
from minitron_search.config.schema import Config
from minitron_search.config.synonyms import synonym
from minitron_search.records.paths import at_home

MOST_BYTES = 2**20  # of a configuration


def load_config(file: str | None, overrides: list[str]) -> Config:
    """Load the configuration of a YAML file (or the embedded default) with dotted overrides on top.

    Raises ValueError with one message that names every wrong key, its value and a valid alternative.
    """
    return configured(read_yaml(file) if file else {}, overrides)


def configured(values: Mapping[str, Any], overrides: list[str]) -> Config:
    """Return the configuration of plain values with overrides on top. Raises ValueError as `load_config` does."""
    resolved = parse_config(values).dump()
    given = dict(pairs(overrides))
    follows = {"name", "teacher.model"} & given.keys() and "output" not in given
    if follows and resolved["output"] == f"runs/{resolved['name']}":
        resolved["output"] = ""  # the folder follows the name
    if values.get("name", "auto") == "auto":
        resolved["name"] = "auto"  # and the name the teacher
    override(resolved, overrides)
    return parse_config(resolved)


def override(values: dict[str, Any], overrides: list[str]) -> None:
    """Set `--KEY.SUBKEY VALUE` in `values`. Raises ValueError for an argument that is not an option or has no value."""
    for key, text in dict(pairs(overrides)).items():
        if key == "output" and not text:
            raise ValueError("output: '' is not valid; valid: a folder or an address, as in runs/first")
        _set(values, key, _flag_value(key, text))


def parse_config(values: Mapping[str, Any]) -> Config:
    """Check plain values and return the configuration they make. Raises ValueError as `load_config` does."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(dict.fromkeys(_messages(error)))) from None


def misspelt(values: Mapping[str, Any]) -> str:
    """Return the messages of `parse_config` about single keys, '' if there are none: those of values that others rule
    out are left out, because more may be given elsewhere."""
    try:
        Config.model_validate(values)
    except ValidationError as error:
        return "\n".join(dict.fromkeys(_messages(error, pairs_too=False)))
    return ""


def changes(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, left value, right value) for every leaf in which two dumped configurations differ."""
    for key in [*left, *(key for key in right if key not in left)]:
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from changes(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[str]:
    """Yield `key: left value, right value` for every leaf in which two dumped configurations differ."""
    for key, a, b in changes(left, right):
        yield f"{key}: {a!r} there, {b!r} asked now"


def check_ablation_keys(file: str, overrides: list[str]) -> None:
    """Raise ValueError for keys of an ablation, or of its arms, that there are not, and for values of another type."""
    values = read_yaml(file)
    override(values, overrides)
    own = (*ABLATION_TEXT, "architecture", "arms", "before")
    said = [misspelt({key: value for key, value in values.items() if key not in own})]
    for place in ("arms", "before"):
        runs = values.get(place)
        for name, given in runs.items() if isinstance(runs, dict) else ():
            if isinstance(given, dict):
                lines = misspelt({key: value for key, value in given.items() if key != "architecture"})
                said += [f"{place}.{name}: {line}" for line in lines.splitlines()]
    if found := [line for line in said if line]:
        raise ValueError("\n".join(found))


def is_ablation(file: str) -> bool:
    """Tell whether a YAML file defines an ablation, which has arms. Raises ValueError as `load_config` does."""
    return "arms" in read_yaml(file)


def read_yaml(file: str) -> dict[str, Any]:
    """Return the plain values of a YAML file. Raises ValueError for a file that is not there, and for one that holds
    anything but a mapping."""
    path = Path(at_home(file))
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.yaml") if other.is_file())
        hint = f"valid: {', '.join(near[:8]) or 'the path of a YAML file'}"
        kind = "a folder" if path.is_dir() else "not a regular file" if path.exists() else ""
        raise ValueError(f"--config: {f'{file!r} is {kind}' if kind else f'no file {file!r}'}; {hint}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"--config: {file} has {size:,} bytes; valid: a YAML file of at most {MOST_BYTES:,}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {file} cannot be read ({error}); valid: a YAML file in UTF-8") from None
    return yaml_values(text, f"--config: {file}")


def yaml_values(text: str, where: str) -> dict[str, Any]:
    """Return the plain values of a YAML text. Raises ValueError, with `where`, if it holds anything but a mapping."""
    values = parse(text, where, kind_of)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds a {type(values).__name__}; valid: a mapping such as `seed: 0`")
    return values


def pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every `--a.b VALUE` and `--a.b=VALUE`, in order."""
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is not an option; valid: --search.trials 16")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                field = dict(fields()).get(key.replace("-", "_"))
                value = value_type(field.annotation) if field else "VALUE"
                hint = "" if field else suggestion(key)
                raise ValueError(f"--{key}: no value given; {hint or f'valid: --{key} {value}'}")
            text = rest.pop(0)
        yield key.replace("-", "_"), text


def _flag_value(key: str, text: str) -> Any:
    """Return the value of a flag: YAML for sections and lists in brackets, else one value of the key's own type."""
    kind = kind_of(key)
    in_brackets = kind not in (Kind.TEXT, Kind.TEXT_OR_NULL) and text.lstrip().startswith(("[", "{"))
    if kind is Kind.SECTION or in_brackets:
        try:
            return parse(text, f"--{key}: {text!r}", kind_of, key)
        except ValueError:
            if kind in TEXTUAL:  # `[ab].txt`
                return text
            raise
    return scalar(text, kind)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if values.get(parent) is None:  # not there, or an optional section that was left out
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise ValueError(f"{key}: {parent} is {values[parent]!r}, not a section; {suggestion(key)}")
        values = values[parent]
    values[leaf] = value


def suggestion(key: str) -> str:
    """Return a question that names the key that a wrong one may mean, by meaning or by letters; '' if none is near."""
    # of `distillation.lr` the section `distillation` is no correction
    known = [name for name, default in keys() if not (isinstance(default, BaseModel) and key.startswith(f"{name}."))]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    if meant := synonym(key):
        return f"did you mean {meant}?"
    return f"did you mean {(same_leaf or near)[0]}?" if same_leaf or near else ""


def _messages(error: ValidationError, pairs_too: bool = True) -> Iterator[str]:
    """Yield a line for every key that is wrong. `pairs_too`: also for values that others rule out."""
    known = [name for name, _ in keys()]
    wrong: dict[str, list[str]] = {}  # what would be valid, by each type that a key may have
    values: dict[str, Any] = {}
    told: set[str] = set()  # of a key that may have several types one message is enough
    for problem in error.errors():
        # the location also names the union's member (`Axis`, `constrained-int`); a user's keys are what is kept
        parts: list[str] = []
        for part in map(str, problem["loc"]):
            named = ".".join(name for name in [*parts, part] if not name.isdigit())
            if problem["type"] == "extra_forbidden" or part.isdigit() or named in known:
                parts.append(part)
        key = ".".join(part if part.isprintable() else repr(part) for part in parts)
        if problem["type"] == "extra_forbidden":
            siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
            hint = suggestion(key) or "valid: " + ", ".join(siblings)
            yield f"{key}: unknown key (value {shown(problem['input'])}); {hint}"
        elif problem["type"] == "value_error":
            message = str(problem["ctx"]["error"])
            told.add(key)
            whole = re.match(r"[a-z_]+(\.[a-z_]+)*: ", message)
            if pairs_too or not whole:
                yield message if whole else f"{key}: {shown(problem['input'])}: {message}"
        else:
            message = problem["msg"].removeprefix("Input should be ").partition(", unable to parse")[0]
            wrong.setdefault(key, []).append(message)
            values[key] = problem["input"]
    for key, valid in ((key, valid) for key, valid in wrong.items() if key not in told):
        yield (f"{key}: {shown(values[key])} is not valid; valid: {' or '.join(dict.fromkeys(reversed(valid)))}"
               f"{_default_of(key)}")  # fmt: skip


def shown(value: Any) -> str:
    """Return a value as a message shows it: in one line, and cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def _default_of(key: str) -> str:
    default = dict(keys()).get(key)
    plain = isinstance(default, int | float | str | tuple) and default != ""
    return f", such as {default}" if plain else ""
