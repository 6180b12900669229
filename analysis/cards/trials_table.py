"""Every trial at its last rung, in a table that sorts by any column."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd

from analysis.page import formatting as f
from analysis.page.card import Card
from analysis.page.tables import row_anchor
from analysis.run_data import RunData, last_rungs
from minitron_search.messages.escaping import in_html
from minitron_search.records.metrics import METRICS, scored

NUMBER = ' class="number"'
Format = Callable[[pd.Series], str]


def _fixed(column: str, digits: int) -> Format:
    return lambda row: f.fixed(row[column], digits)


def _with_error(metric: str, digits: int) -> Format:
    return lambda row: f.plus_minus(row[metric], row[METRICS[metric].error], digits)


def _integer(column: str) -> Format:
    return lambda row: f.integer(row[column])


# Column to sort by, heading, unit, and the text of a cell; None is plain text.
COLUMNS: tuple[tuple[str, str, str, Format | None], ...] = (
    ("trial", "trial", "", None),
    ("arm", "arm", "", None),
    ("status", "status", "", None),
    ("tokens", "tokens", "", lambda row: f.tokens(row["tokens"])),
    ("rung", "rung", "", _integer("rung")),
    *((name, METRICS[name].name, METRICS[name].unit, _with_error(name, 3)) for name in scored()),
    ("bi", "BI", "dropped block", _fixed("bi", 3)),
    ("params", "parameters", "", lambda row: f.millions(row["params"])),
    ("non_embedding_params", "non-embedding", "", lambda row: f.millions(row["non_embedding_params"])),
    ("hidden_size", "hidden_size", "", _integer("hidden_size")),
    ("intermediate_size", "intermediate_size", "", _integer("intermediate_size")),
    ("num_attention_heads", "num_attention_heads", "", _integer("num_attention_heads")),
    ("num_key_value_heads", "num_key_value_heads", "", _integer("num_key_value_heads")),
    ("num_hidden_layers", "num_hidden_layers", "", _integer("num_hidden_layers")),
    ("drop_block_start", "drop_block_start", "", _integer("drop_block_start")),
    ("drop_block_length", "drop_block_length", "", _integer("drop_block_length")),
    ("memory_bytes", "memory", "", lambda row: f.bytes_(row["memory_bytes"])),
    ("tokens_per_second", "speed", "tokens/s", f.speed),
    ("seconds", "time", "", lambda row: f.duration(row["seconds"])),
    ("seed", "seed", "", _integer("seed")),
    ("proposal", "proposal", "", _integer("proposal")),
    ("architecture", "architecture", "id", None),
)


class TrialsTableInfo(NamedTuple):
    """What the card shows. rows: each trial's last rung. all_rungs: the whole trials table."""

    rows: pd.DataFrame
    all_rungs: pd.DataFrame


def trials_table_info(run: RunData) -> TrialsTableInfo:
    return TrialsTableInfo(last_rungs(run.trials), run.trials)


def trials_table_of(runs: Sequence[RunData]) -> TrialsTableInfo:
    """Return the tables of several runs, one after the other, with a column `run`."""
    tables = [table for table in (run.trials.assign(run=run.name) for run in runs) if len(table)]
    last = [last_rungs(table) for table in tables]
    empty = runs[0].trials.iloc[:0]
    return TrialsTableInfo(*(pd.concat(frames, ignore_index=True) if frames else empty for frames in (last, tables)))


def trials_table_html(info: TrialsTableInfo, of: str = "") -> str:
    """Return the table. of: the heading of the column `run`, where there are several."""
    columns = (*COLUMNS[:1], ("run", of, "", None), *COLUMNS[1:]) if of else COLUMNS
    heads = "".join(
        f'<th scope="col" aria-sort="none"{NUMBER if text else ""}><button type="button">{heading}</button>'
        f"<small>{unit}</small></th>"
        for _, heading, unit, text in columns
    )
    body = ""
    for _, row in info.rows.iterrows():
        anchor = "" if of else f' id="{row_anchor(row["trial"])}"'  # of several runs, two may have the same trial
        body += f"<tr{anchor}>{''.join(_cell(row, name, text) for name, _, _, text in columns)}</tr>"
    return (
        '<p class="filter"><input type="search" placeholder="filter the rows" aria-label="filter the rows"></p>'
        f'<div class="scroll tall" tabindex="0"><table class="trials"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(row: pd.Series, column: str, text: Format | None) -> str:
    if text is not None:
        key = "" if f.missing(row[column]) else repr(float(row[column]))
        return f'<td class="number" data-key="{key}">{text(row)}</td>'
    value = in_html(str(row[column]))
    if column == "trial":
        return f'<th scope="row">{value}</th>'
    if column == "status":
        return f'<td><span class="status" data-status="{value}">{value}</span></td>'
    return f"<td>{value}</td>"


def trials_table_count(info: TrialsTableInfo) -> str:
    rows = f.plural(len(info.all_rungs), "row")
    return f"n = {f.plural(len(info.rows), 'trial')}, {rows} over all rungs in the CSV; ± is one standard error."


def trials_card(run: RunData) -> Card:
    title = "Trials"
    read = (
        "One row per trial at its last rung. Click a heading to sort, type to filter; compare trials of one rung only."
    )
    info = trials_table_info(run)
    if info.rows.empty:
        return Card(title, read, reason="No trial has a row yet.")
    return Card(
        title,
        read,
        trials_table_count(info),
        trials_table_html(info),
        data=(("trials", info.all_rungs),),
    )
