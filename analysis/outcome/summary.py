"""Teacher, untrained trim, best candidate and retrained student side by side, and the outcome in words."""

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from analysis.page import formatting as f
from analysis.page import palette
from analysis.page.card import Card
from analysis.page.tables import trial_link
from analysis.run_data import RunData, best_candidate, of_arm
from minitron_search.messages.escaping import in_html
from minitron_search.records.metrics import METRICS, scored
from minitron_search.records.summary import against_trims, harm_sentences

COLOURS = (palette.INK, palette.PURPLE, palette.ORANGE, palette.GREEN)  # of the four models, from the left
BEST_TITLES = {True: "Best candidate", False: "Leading candidate"}  # by whether it was promoted
ONE_SIDED_95 = 1.645  # standard errors of a coin, above one half, before an accuracy is called above chance


class SummaryInfo(NamedTuple):
    """What the card shows. rows: column title -> row of the trials table; only the arms that exist yet. warning: ""
    where the teacher's accuracy is clearly above chance, or was not measured. harm: what there is to say of students
    that are above their untrained trims."""

    rows: dict[str, pd.Series]
    colours: dict[str, str]
    outcome: str
    warning: str
    harm: list[str]


def summary_info(run: RunData) -> SummaryInfo:
    columns, promoted = columns_of(run)
    best_title = BEST_TITLES[promoted]
    return SummaryInfo(
        rows={title: row for title, row in columns.items() if row is not None},
        colours=dict(zip(columns, COLOURS, strict=True)),
        outcome=outcome(
            columns["Teacher"], columns["Untrained trim"], columns[best_title], columns["Retrained student"], promoted
        ),
        warning=chance_warning(run),
        harm=harm_sentences(against_trims(run.trials.to_dict("records"), run.scores)),
    )


def columns_of(run: RunData) -> tuple[dict[str, pd.Series | None], bool]:
    """Return each model's row of the trials table by its title, None where there is none yet, and whether the best
    candidate was promoted."""
    best = best_candidate(run.trials)
    architecture = None if best is None else str(best[0]["architecture"])
    promoted = best is not None and best[1]
    return {
        "Teacher": of_arm(run.trials, "teacher"),
        "Untrained trim": of_arm(run.trials, "untrained", architecture),
        BEST_TITLES[promoted]: None if best is None else best[0],
        "Retrained student": of_arm(run.trials, "retrained", architecture),
    }, promoted


def outcome(
    teacher: pd.Series | None,
    untrained: pd.Series | None,
    best: pd.Series | None,
    retrained: pd.Series | None,
    promoted: bool,
) -> str:
    """Say in one or two sentences, which a reader could repeat, what came of the run."""
    last = retrained if retrained is not None else best
    if last is None or f.missing(last["lm_loss"]):
        return "No candidate has been scored yet."
    if retrained is not None:
        subject = "The retrained student"
    else:
        subject = "The best candidate" if promoted else "The leading candidate so far"
    text = f"{subject} has {f.millions(last['params'])} parameters"
    if teacher is None:
        loss = f.plus_minus(last["lm_loss"], last["lm_loss_stderr"], 3)
        return f"{text} and an LM loss of {loss} nats per token."
    gap = last["lm_loss"] - teacher["lm_loss"]
    text += (
        f", {last['params'] / teacher['params']:.0%} of the teacher’s, and an LM loss of "
        f"{f.fixed(last['lm_loss'], 3)} nats per token, {f.fixed(abs(gap), 3)} "
        f"{'above' if gap >= 0 else 'below'} the teacher’s, after {f.tokens(last['tokens'])} tokens."
    )
    if untrained is not None and last["lm_loss"] >= untrained["lm_loss"]:
        text += (f" Training won nothing back: its untrained trim has {f.fixed(untrained['lm_loss'], 3)}, "
                 f"{f.fixed(last['lm_loss'] - untrained['lm_loss'], 3)} less.")  # fmt: skip
    elif untrained is not None and untrained["lm_loss"] > teacher["lm_loss"]:
        lost = untrained["lm_loss"] - teacher["lm_loss"]
        back = (untrained["lm_loss"] - last["lm_loss"]) / lost
        text += f" Trimming alone cost {f.fixed(lost, 3)} nats; training won {back:.0%} of that back."
    return text


def at_chance(run: RunData) -> list[str] | None:
    """Return the metrics on which the teacher is no better than chance, as the run's own tests found; before they are
    made, by the standard error that a coin's accuracy would have. None where the teacher has no accuracy."""
    if tested := run.evidence.get("at_chance"):
        return [METRICS[metric].name for metric, test in tested.items() if test["at_chance"]]
    teacher = of_arm(run.trials, "teacher")
    if teacher is None or f.missing(teacher["winogrande_acc"]):
        return None
    bar = 0.5 + ONE_SIDED_95 * 0.5 / teacher["winogrande_n"] ** 0.5
    return [] if teacher["winogrande_acc"] > bar else [METRICS["winogrande_acc"].name]


def chance_warning(run: RunData) -> str:
    teacher = of_arm(run.trials, "teacher")
    if teacher is None or METRICS["winogrande_acc"].name not in (at_chance(run) or ()):
        return ""
    accuracy = f.plus_minus(teacher["winogrande_acc"], teacher["winogrande_acc_stderr"], 3)
    return (
        f"The teacher’s Winogrande accuracy, {accuracy} on {f.integer(teacher['winogrande_n'])} examples, is not "
        "clearly above chance (0.5), so accuracy ranks nothing in this run. LM loss does; the margin is the finer "
        "measure of Winogrande."
    )


def share(row: pd.Series, teacher: pd.Series | None, column: str) -> str:
    return "" if teacher is None or row is teacher else f"{row[column] / teacher[column]:.1%} of the teacher"


def gap(row: pd.Series, teacher: pd.Series | None, column: str) -> str:
    if teacher is None or row is teacher or f.missing(row[column] - teacher[column]):
        return ""
    return f"{row[column] - teacher[column]:+.3f} against the teacher".replace("-", "−")


def speed_up(row: pd.Series, teacher: pd.Series | None, column: str) -> str:
    if teacher is None or row is teacher or f.missing(row[column]) or not teacher[column] > 0:
        return ""
    return f"{row[column] / teacher[column]:.2f}× the teacher"


Line = tuple[str, str, Callable[[pd.Series], str], Callable[[pd.Series, pd.Series | None], str] | None]


def _metric_line(name: str) -> Line:
    metric = METRICS[name]
    return (
        metric.name,
        metric.unit,
        lambda row: f.plus_minus(row[name], row[metric.error], 3),
        (lambda row, teacher: gap(row, teacher, name)) if name == "lm_loss" else None,
    )


# Label, unit, the value, and the small line under it.
LINES: tuple[Line, ...] = (
    ("Parameters", "", lambda r: f.millions(r["params"]), lambda r, t: share(r, t, "params")),
    (
        "Non-embedding",
        "parameters",
        lambda r: f.millions(r["non_embedding_params"]),
        lambda r, t: share(r, t, "non_embedding_params"),
    ),
    *map(_metric_line, scored()),
    (
        "Speed",
        "tokens per second",
        f.speed,
        lambda r, t: speed_up(r, t, "tokens_per_second"),
    ),
    ("Trained on", "tokens", lambda r: f.tokens(r["tokens"]), None),
)


def summary_html(info: SummaryInfo) -> str:
    teacher = info.rows.get("Teacher")
    heads = "".join(
        f'<th scope="col"><span class="dot" style="background:{"currentColor" if c == palette.INK else c}">'
        f"</span>{title}<small>{trial_link(info.rows[title]['trial'])}</small></th>"
        for title, c in info.colours.items()
        if title in info.rows
    )
    body = ""
    for label, unit, value, under in LINES:
        body += f'<tr><th scope="row">{label}<small>{unit}</small></th>'
        for row in info.rows.values():
            small = under(row, teacher) if under else ""
            body += f"<td>{value(row)}<small>{small}</small></td>"
        body += "</tr>"
    said = [*info.harm, *([info.warning] if info.warning else [])]
    warning = "".join(f'<p class="warning" role="note">{in_html(sentence)}</p>' for sentence in said)
    return (
        f'<p class="outcome">{in_html(info.outcome)}</p>{warning}'
        f'<div class="scroll"><table class="compare"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def summary_count(info: SummaryInfo) -> str:
    row = next(iter(info.rows.values()))
    return (
        f"n = {f.integer(row['lm_loss_n'])} validation windows and {f.integer(row['winogrande_n'])} "
        "Winogrande questions; ± is one standard error."
    )


def summary_card(run: RunData) -> Card:
    title = "Summary"
    read = "Left to right: the teacher, what trimming broke, what the search found, and what retraining made of it."
    info = summary_info(run)
    if not info.rows:
        return Card(title, read, reason="No model has been scored yet: the trials table has no rows.")
    data = pd.DataFrame(list(info.rows.values())).assign(model=list(info.rows))
    return Card(title, read, summary_count(info), summary_html(info), data=(("summary", data),))
