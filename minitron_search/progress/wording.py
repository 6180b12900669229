"""Write a run's progress in words: one line of a log, and the parts that a line and a display share."""

import time

from minitron_search.progress.state import Progress, StageProgress, TrialProgress

DAY_S = 86400


def progress_line(state: Progress) -> str:
    """Return the overall progress in a line."""
    stage = current(state)
    parts = [f"progress: {percent(state.share)} of the run"]
    if stage is not None:
        at = f"{stage.name} {percent(stage.share)}" if stage.share else f"{stage.name} begins"
        parts.append(f"{at}, {tried(state)}" if stage.name == "search" else at)
    so_far = [f"{clock(state.elapsed)} so far"] if state.left is None else []
    return "; ".join([*parts, *so_far, time_left(state)])


def current(state: Progress) -> StageProgress | None:
    """Return the stage that runs; None between stages."""
    return next((stage for stage in state.stages if stage.runs), None)


def tried(state: Progress) -> str:
    """Return how many candidates have been tried, of how many."""
    return f"{state.tried}/{state.trials} tried"


def percent(share: float) -> str:
    """Return a share without rounding it up: only what is over is at 100%."""
    return f"{int(100 * share + 1e-9)}%"


def time_left(state: Progress) -> str:
    """Return when a run will end, or that this is not known yet."""
    if state.left is None or state.ends_at is None:
        return "no forecast yet"
    unforeseen = [stage.name for stage in state.stages if stage.left is None]
    if (stage := current(state)) is not None and stage.name in unforeseen:
        return f"no forecast of the {stage.name}"
    then = f", then {' and '.join(unforeseen)}" if unforeseen else ""
    return f"about {duration(state.left)} left, done at {moment(state.ends_at, state.left)}{then}"


def duration(seconds: float) -> str:
    """Return a duration as precisely as it can be meant: 40 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds: 0:12:40."""
    whole = int(max(0.0, seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def moment(at: float, ahead: float) -> str:
    """Return the time of the day, and the date where that is a day or more ahead."""
    return time.strftime("%H:%M" if ahead < DAY_S / 2 else "%b %d %H:%M", time.localtime(at))


def loss(trial: TrialProgress) -> str:
    """Return the LM loss of a trial with its standard error."""
    if trial.loss is None:
        return "-"
    return f"{trial.loss:.3f} +- {trial.error:.3f}" if trial.error is not None else f"{trial.loss:.3f}"
