"""Every metric that a run reports or ranks by. To add one, compute it and put it here.

`METRICS` is what a configuration accepts as an objective, a search ranks by, a paired test compares, a tracker is told,
and a table or a figure is labelled with.
"""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """A metric, whose key in `METRICS` is its column of `trials.parquet`, or its name in `depth.parquet`.

    name: in a sentence or a title. heading: in a narrow column. unit: "" for a number without one.
    sign: 1 where lower is better, -1 where higher is: sign x value is minimised.
    independent: what its values are independent over, and so what its standard error and its tests count: validation
        windows, or Winogrande questions (with their twins, where they have some). A shape's numbers have no error.
    objective: whether a search may minimise it.
    error, n: of a metric that every trial is scored on, the columns of its standard error and of its number of values.
    values: its single values in a trial's log (`RunDirectory.log_scores`), whose mean it is.
    """

    name: str
    heading: str
    unit: str
    sign: Literal[1, -1]
    independent: Literal["window", "question", "shape"]
    objective: bool = False
    error: str = ""
    n: str = ""
    values: str = ""

    @property
    def title(self) -> str:
        """Its name with its unit, as an axis is labelled."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


METRICS: dict[str, Metric] = {
    # scored on every trial; the order is that of tables and figures
    "lm_loss": Metric(
        "LM loss", "LM loss", "nats per token", 1, "window", objective=True,
        error="lm_loss_stderr", n="lm_loss_n", values="lm_loss",
    ),
    "kl": Metric(
        "KL to the teacher", "KL", "nats per token", 1, "window", objective=True,
        error="kl_stderr", n="lm_loss_n", values="kl",
    ),
    "winogrande_acc": Metric(
        "Winogrande accuracy", "Winogrande", "", -1, "question",
        error="winogrande_acc_stderr", n="winogrande_n", values="winogrande_correct",
    ),
    "winogrande_margin": Metric(
        "Winogrande margin", "margin", "nats", -1, "question", objective=True,
        error="winogrande_margin_stderr", n="winogrande_n", values="winogrande_margin",
    ),
    # of a block of layers in the teacher
    "bi": Metric("block importance", "BI", "1 - cosine", 1, "window"),
    "angular": Metric("angular distance", "angular", "of pi", 1, "window"),
    "taylor": Metric("Taylor importance", "Taylor", "nats", 1, "window"),
    # known from an architecture's shape, without training it
    "params": Metric("parameters", "parameters", "", 1, "shape", objective=True),
    "non_embedding_params": Metric("non-embedding parameters", "non-embedding", "", 1, "shape", objective=True),
    "memory_bytes": Metric("memory", "memory", "bytes", 1, "shape", objective=True),
}  # fmt: skip


def scored() -> tuple[str, ...]:
    """Return the metrics that every trial is scored on."""
    return tuple(name for name, metric in METRICS.items() if metric.error)


def compared_metrics() -> tuple[str, ...]:
    """Return the scored metrics in the order of paired tests: those that a search may rank by come first."""
    return tuple(sorted(scored(), key=lambda name: not METRICS[name].objective))


def score_columns() -> tuple[str, ...]:
    """Return the columns of `trials.parquet` that hold a trial's scores: metrics, their standard errors and counts.

    A count that several metrics share follows the one it is named after, or else the last of them.
    """
    columns: list[str] = []
    for name in scored():
        metric = METRICS[name]
        sharing = [other for other in scored() if METRICS[other].n == metric.n]
        named = [other for other in sharing if metric.n == f"{other}_n"]
        columns += [name, metric.error, *([metric.n] if name == (named or sharing)[-1] else [])]
    return tuple(columns)


def objectives() -> tuple[str, ...]:
    """Return what a search may minimise: what is measured first, then what a shape has."""
    return (*ranking_objectives(), *(name for name, m in METRICS.items() if m.objective and m.independent == "shape"))


def ranking_objectives() -> tuple[str, ...]:
    """Return the objectives that are measured, by which rungs may rank."""
    return tuple(name for name, m in METRICS.items() if m.objective and m.independent != "shape")
