"""Runs from a notebook: search with a configuration, and read what any run left."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console

from minitron_search.api.html import table
from minitron_search.config.loading import configured, read_yaml
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import located
from minitron_search.records.summary import chosen_rows, harm_of, summary_table, winner

if TYPE_CHECKING:
    from minitron_search.api.model import Model


class Run:
    """A run directory, read only: a run that goes on is read as it is now."""

    def __init__(self, output: str | Path) -> None:
        """Raises ValueError for a folder that holds no run."""
        self.directory = RunDirectory(located(str(output)))
        if not self.directory.config.is_file():
            raise ValueError(f"output: {output} holds no run (no config.yaml); valid: the --output of a run")

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that it runs with, as in config.yaml."""
        return self.directory.read_config()

    @property
    def trials(self) -> pd.DataFrame:
        """trials.parquet: a row for every rung of every trial, of the teacher, the controls and the retraining."""
        return pd.DataFrame(self.directory.read_trials())

    @property
    def events(self) -> pd.DataFrame:
        """events.jsonl."""
        return pd.DataFrame(self.directory.events())

    @property
    def report(self) -> Path:
        """The file of the report; it is there when the run has written it."""
        return self.directory.report

    def best(self, rank: int = 1) -> "Model":
        """Return the retrained student promoted `rank`-th. Raises ValueError where there is none."""
        from minitron_search.api.model import load  # torch, which the tables do without

        folder = self.directory.best(rank)
        if not folder.is_dir():
            raise ValueError(f"rank: {self.directory.root} holds no {folder.name}/; valid: a run that has retrained")
        return load(folder)

    def __repr__(self) -> str:
        # in a notebook Rich would show the table at once, whatever its file
        console = Console(record=True, width=110, file=io.StringIO(), force_jupyter=False)
        console.print(summary_table(self.directory))
        told = [str(self.directory.root), console.export_text().rstrip(), winner(self.directory)]
        return "\n".join([line for line in told if line] + harm_of(self.directory))

    def _repr_html_(self) -> str:
        rows = [
            (name, f"{row['params'] / 1e6:.1f}M", f"{row['tokens']:,}", f"{row['lm_loss']:.4f}",
             f"{row['lm_loss_stderr']:.4f}", f"{row['winogrande_acc']:.3f}")
            for name, row in chosen_rows(self.directory.read_trials())
        ]  # fmt: skip
        return table(("", "parameters", "tokens", "LM loss", "standard error", "Winogrande"), rows)


def search(
    config: str | Path | Mapping[str, Any] | None = None, output: str | Path | None = None, **overrides: Any
) -> Run:  # fmt: skip
    """Run what a configuration asks for, to the end, and return the run.

    `config`: a YAML file, its content, or None for the embedded default. `output`: the run directory; one that holds
    this run already is continued. `overrides`: dotted keys with `__` for the dots: search__trials=8. Ray is started in
    this process unless RAY_ADDRESS names a cluster.

    Raises ValueError, before anything is computed, for what is wrong.
    """
    from minitron_search.commands import search as run_search  # Ray, which nothing else here needs
    from minitron_search.ownership.owner import held

    values = read_yaml(str(config)) if isinstance(config, str | Path) else dict(config or {})
    flags = [f"--{key.replace('__', '.')}={_text(value)}" for key, value in overrides.items()]
    flags += [f"--output={output}"] if output is not None else []
    parsed = configured(values, flags)
    resumed = RunDirectory(located(parsed.output)).config.is_file()
    with held(parsed.output) as hold:
        run_search(parsed, resumed, hold)
    return Run(parsed.output)


def open_run(output: str | Path) -> Run:
    """Return the run in a folder. Raises ValueError where there is none."""
    return Run(output)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
