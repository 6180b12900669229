"""Draw a run's progress for a terminal: a bar for all of it and for every stage, the running and the best trials."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minitron_search.messages.escaping import visible
from minitron_search.progress import wording
from minitron_search.progress.state import Progress, StageProgress, TrialProgress

TEXT_WIDTH = 66  # columns of a stage's row beside its bar
SHARE, CLOCK, GAP = 4, 8, 2  # columns of 100%, of 10:00:00, and between two columns
BARS = 8, 40  # columns of the narrowest and the widest bar
NAME = 24  # columns of a trial's name: an arm and ten digits
WIDE = 100


def drawing(state: Progress, width: int, height: int) -> Group:
    """Return the progress as Rich draws it on a terminal of `width` columns and `height` lines, which it fits in."""
    room = height - 2  # the last line stays free, and so does one for what is said
    stages: Sequence[StageProgress] = state.stages
    if len(stages) + 2 > room:
        stages = [stage for stage in stages if stage.runs][: max(0, room - 1)]
    apart: list[RenderableType] = [Text("")] if len(stages) + 2 <= room else []
    parts = [*apart, _stages(state, stages, width)]
    room -= len(apart) + 1 + len(stages)
    rows, more = _chosen(state, room - 2)
    if rows:
        parts += [Text(""), _trials(rows, more, width)]
    return Group(*parts)


def _stages(state: Progress, stages: Sequence[StageProgress], width: int) -> Table:
    grid = Table.grid(padding=(0, GAP, 0, 0))
    bar = min(BARS[1], max(BARS[0], width - TEXT_WIDTH))
    name = 13 if width < WIDE else 30
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=name)
    grid.add_column(width=bar)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    left = width - name - bar - SHARE - CLOCK - 4 * GAP
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=max(1, left))
    grid.add_row(_plain(state.name or "run", "bold"), _bar(state.share, bar), wording.percent(state.share),
                 wording.clock(state.elapsed), Text(wording.time_left(state), "bold"))  # fmt: skip
    for stage in stages:
        grid.add_row(_plain(stage.name, "" if stage.runs else "dim"), _bar(stage.share, bar),
                     wording.percent(stage.share), wording.clock(stage.elapsed) if stage.elapsed else "-",
                     _about(state, stage))  # fmt: skip
    return grid


def _about(state: Progress, stage: StageProgress) -> Text:
    """Return the time that a stage still needs, and of the search how many trials have been tried."""
    parts = [f"about {wording.duration(stage.left)}"] if stage.left and stage.share < 1 else []
    if stage.name == "search" and state.tried:
        parts.append(wording.tried(state))
    return Text(", ".join(parts))


def _bar(share: float, width: int) -> ProgressBar:
    return ProgressBar(total=1.0, completed=share, width=width)


def _chosen(state: Progress, most: int) -> tuple[list[tuple[str, TrialProgress]], int]:
    """Return at most `most` trials, each as running or best, and how many running ones are left out."""
    best = [("best", trial) for trial in state.best][: max(0, most - 1)]
    running = [("running", trial) for trial in state.running]
    room = max(0, most - len(best))
    if len(running) <= room:
        return [*running, *best], 0
    return [*running[: max(0, room - 1)], *best], len(running) - max(0, room - 1)


def _trials(rows: Sequence[tuple[str, TrialProgress]], more: int, width: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("trial", no_wrap=True, overflow="ellipsis", max_width=NAME if width < WIDE else 2 * NAME)
    table.add_column("", no_wrap=True)
    for name in ("rung", "tokens", "LM loss", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for how, trial in rows:
        table.add_row(
            _plain(trial.name), how, "-" if trial.rung is None else str(trial.rung), f"{trial.tokens:,}",
            wording.loss(trial), f"{trial.tokens_per_second:,.0f}" if trial.tokens_per_second else "-",
        )  # fmt: skip
    if more:
        table.add_row(f"and {more} more", "running")
    return table


def _plain(text: str, style: str = "") -> Text:
    """Return text of others for one cell: it is neither markup nor more than a line."""
    return Text(" ".join(visible(text).split()), style)
