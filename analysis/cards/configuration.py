"""The configuration and environment of a run, and what differs between several."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import yaml

from analysis.page import formatting as f
from analysis.page.card import Card
from analysis.run_data import RunData
from minitron_search.messages.escaping import in_html

# What decides which validation windows are scored: LM losses of runs that agree in these may be paired.
SAME_WINDOWS = ("teacher.model", "corpus.validation", "corpus.sequence_length", "corpus.validation_samples")
# Differ between any two runs, and say nothing.
OWN = ("name", "output")


def configuration_html(run: RunData) -> str:
    parts = []
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        parts.append(f"<details open><summary>config.yaml</summary><pre>{_coloured(text)}</pre></details>")
    if run.environment:
        text = json.dumps(run.environment, indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>environment.json</summary><pre>{_coloured(text)}</pre></details>")
    return "".join(parts)


def _coloured(text: str) -> str:
    """Escape YAML or indented JSON, and set its keys apart from their values."""
    key = re.compile(r"^(\s*(?:- )?)((?:&quot;)?[\w.\-/]+(?:&quot;)?)(:)", re.MULTILINE)
    return key.sub(r'\1<span class="key">\2</span>\3', in_html(text))


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every leaf under its dotted key: `{"a": {"b": [1]}}` -> ("a.b", "[1]")."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def differing(runs: Sequence[RunData]) -> pd.DataFrame:
    """Return a row per key of the configurations or environments that is not the same in all `runs`, a column per
    run."""
    rows = []
    for kind, sources in (
        ("config.yaml", [run.config for run in runs]),
        ("environment.json", [run.environment for run in runs]),
    ):
        leaves = [dict(dotted(values)) for values in sources]
        for key in dict.fromkeys(key for leaf in leaves for key in leaf):
            values = [leaf.get(key, f.MISSING) for leaf in leaves]
            if len(set(values)) > 1 and key not in OWN:
                rows.append({"file": kind, "key": key, **dict(zip([run.name for run in runs], values, strict=True))})
    return pd.DataFrame(rows, columns=["file", "key", *(run.name for run in runs)])


def other_windows(runs: Sequence[RunData]) -> list[str]:
    """Return those of `SAME_WINDOWS` that differ between the runs."""
    leaves = [dict(dotted(run.config)) for run in runs]
    return [key for key in SAME_WINDOWS if len({leaf.get(key) for leaf in leaves}) > 1]


def configuration_card(run: RunData) -> Card:
    title = "Configuration and environment"
    read = "What is needed to run this again: the resolved configuration, the versions and the machine."
    if not run.config and not run.environment:
        return Card(title, read, reason="This folder has neither config.yaml nor environment.json.")
    sample = f"n = {len(dict(dotted(run.config)))} settings; units are in their names, or in the README."
    return Card(title, read, sample, configuration_html(run))
