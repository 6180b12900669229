"""Load the configuration: YAML and dotted flags in, a checked `Config` out, or one message that says what is wrong."""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minitron_search.config.schema import Config


def load_config(file: str | None, overrides: list[str]) -> Config:
    """Load the configuration of a YAML file (or the embedded default) with dotted overrides on top.

    Raises ValueError with one message that names every wrong key, its value and a valid alternative.
    """
    resolved = parse_config(read_yaml(file) if file else {}).dump()
    given = dict(_pairs(overrides))
    if "name" in given and "output" not in given and resolved["output"] == f"runs/{resolved['name']}":
        resolved["output"] = ""  # the folder follows the name
    override(resolved, overrides)
    return parse_config(resolved)


def override(values: dict[str, Any], overrides: list[str]) -> None:
    """Set `--KEY.SUBKEY VALUE` in `values`. Raises ValueError for an argument that is not an option or has no value."""
    for key, text in dict(_pairs(overrides)).items():
        _set(values, key, _value(text))


def parse_config(values: Mapping[str, Any]) -> Config:
    """Check plain values and return the configuration they make. Raises ValueError as `load_config` does."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(dict.fromkeys(_messages(error)))) from None


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `key: left value, right value` for every leaf in which two dumped configurations differ."""
    for key in [*left, *(key for key in right if key not in left)]:
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} there, {b!r} asked now"


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its default; a misspelt key is compared with them."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.default
        if section := _section(field.annotation):
            yield from keys(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def is_ablation(file: str) -> bool:
    """Tell whether a YAML file defines an ablation, which has arms. Raises ValueError as `load_config` does."""
    return "arms" in read_yaml(file)


def read_yaml(file: str) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(near)}" if near else ""
        raise ValueError(f"--config: no file {file!r}{hint}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {file} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"--config: {file} holds a {type(values).__name__}; valid: a mapping such as `seed: 0`")
    return values


def _pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every `--a.b VALUE` and `--a.b=VALUE`, in order."""
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is not an option; valid: --search.trials 16")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key}: no value given; {_suggest(key) or f'valid: --{key} VALUE'}")
            text = rest.pop(0)
        yield key.replace("-", "_"), text


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # `*.txt` is an alias to YAML and a glob to a user
        return text


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if values.get(parent) is None:  # not there, or an optional section that was left out
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise ValueError(f"{key}: {parent} is {values[parent]!r}, not a section; {_suggest(key)}")
        values = values[parent]
    values[leaf] = value


def _suggest(key: str) -> str:
    # of `distillation.lr` the section `distillation` is no correction
    known = [name for name, default in keys() if not (isinstance(default, BaseModel) and key.startswith(f"{name}."))]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    return f"did you mean {(same_leaf or near)[0]}?" if same_leaf or near else ""


def _messages(error: ValidationError) -> Iterator[str]:
    known = [name for name, _ in keys()]
    problems = error.errors()
    for problem in problems:
        if problem["type"] == "literal_error" and problem["ctx"]["expected"] in ("'auto'", "'not_worse'"):
            continue  # the other half of `auto or a count` says what was wrong
        # the location also names the union's member (`Axis`, `constrained-int`); a user's keys are what is kept
        parts: list[str] = []
        for part in map(str, problem["loc"]):
            named = ".".join(name for name in [*parts, part] if not name.isdigit())
            if problem["type"] == "extra_forbidden" or part.isdigit() or named in known:
                parts.append(part)
        key = ".".join(parts)
        if problem["type"] == "extra_forbidden":
            siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
            hint = _suggest(key) or "valid: " + ", ".join(siblings)
            yield f"{key}: unknown key (value {problem['input']!r}); {hint}"
        elif problem["type"] == "value_error":
            message = str(problem["ctx"]["error"])
            yield (message if re.match(r"[a-z_]+\.[a-z_.]+: ", message) else f"{key}: {problem['input']!r}: {message}")
        else:
            message = problem["msg"].removeprefix("Input should be ").partition(", unable to parse")[0]
            yield f"{key}: {problem['input']!r} is not valid; valid: {message}{_default_of(key)}"


def _default_of(key: str) -> str:
    default = dict(keys()).get(key)
    plain = isinstance(default, int | float | str | tuple) and default != ""
    return f", such as {default}" if plain else ""
