"""Read from an ablation.json the ablation that goes on, and hold what is asked for against it."""

import json
from copy import deepcopy
from typing import Any

from minitron_search.ablation.definition import BEFORE, Ablation, defined, nested
from minitron_search.config import loading
from minitron_search.planning.checks import is_placement
from minitron_search.records.directory import ABLATION_FILE


def begun_as(kept: str, overrides: list[str]) -> Ablation:
    """Return the ablation that an ablation.json, of which `kept` is the text, defines, with dotted overrides on top.

    Raises ValueError for overrides that change more than where it runs, and for a file that defines none.
    """
    output = dict(loading.pairs(overrides)).get("output")
    try:
        definition = json.loads(kept)["definition"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"output: {output}/{ABLATION_FILE} does not say how the ablation is defined; valid: the same "
                         "command with --config") from None  # fmt: skip
    values = deepcopy(definition)
    loading.override(values, overrides)
    changed = [
        f"{key}: {there!r} there, {asked!r} asked now"
        for key, there, asked in loading.changes(definition, values)
        if not is_placement(_in_a_run(key)) and not _alike(_in_a_run(key), there, asked)
    ]
    if changed:
        raise ValueError(f"output: {output} holds an ablation of another configuration; {'; '.join(changed)}; valid: "
                         "the same values, or another folder")  # fmt: skip
    return defined({**values, "output": output}, {}, "")


def _in_a_run(key: str) -> str:
    """Return the key of a run's configuration that a key of an ablation sets."""
    first, _, rest = key.partition(".")
    return rest.partition(".")[2] if first in ("arms", BEFORE) else key


def _alike(key: str, there: Any, asked: Any) -> bool:
    """Return whether two ways to write a key's value mean the same, as `4K` and 4000 do."""
    try:
        one, other = (loading.parse_config(nested(key, value)) for value in (there, asked))
    except ValueError:
        return False
    return one == other
