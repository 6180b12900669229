"""Plan a run before it begins: its stages in order, and how much of each there is to do."""

from typing import NamedTuple

from minitron_search.architecture_search.schedule import (
    candidate_trials,
    retrained,
    search_phases,
    whole_batches,
)
from minitron_search.config.schema import Config
from minitron_search.planning.workload import planned_probe, train_tokens
from minitron_search.records.metrics import METRICS
from minitron_search.trials.settings import correction_tokens

CUTS = 30  # scorings that a depth sweep is taken for where nobody has forecast it


class Plan(NamedTuple):
    """What a run is going to do.

    stages: the units of every stage, in order; a unit is the work of a token of training, and 0 is work that nobody can
    foresee. scoring: the units of one scoring. trials: of candidates. ranks_by, sign: the metric of the best trial, and
    its sign, as in `METRICS`.
    """

    name: str
    stages: dict[str, float]
    scoring: float = 0.0
    trials: int = 0
    ranks_by: str = "lm_loss"
    sign: int = 1


def plan_of(config: Config, architectures: int, option_tokens: int) -> Plan:
    """Return the plan of a run.

    architectures: how many its space has. option_tokens: packed Winogrande tokens of one scoring.
    """
    length, stages = config.corpus.sequence_length, set(config.stages)
    scoring = (config.corpus.validation_samples * length + option_tokens) / 3  # a forward pass of the three of training
    searches, retrains, trains = "search" in stages, "retrain" in stages, bool(stages & {"search", "retrain"})
    proposed = min(config.search.trials, architectures)
    phases = search_phases(config, proposed) if searches else []
    probe = planned_probe(config) if trains else None
    retraining = retrained(config) * (whole_batches(config, config.retraining.tokens) + 2 * scoring)
    evaluates = retrains and bool(config.evaluation.tasks)
    units = {
        "correction": (correction_tokens(config) > 0, correction_tokens(config) + 2 * scoring),
        "importance": ("importance" in stages, config.corpus.calibration_samples * length / 3),
        "depth": ("depth" in stages, CUTS * scoring),
        "teacher": (trains, train_tokens(config) / 3 + scoring),
        "probe": (probe is not None, probe.trained_tokens + probe.scored_tokens / 3 if probe else 0),
        "search": (searches, sum(phase.trials * (phase.tokens + phase.scorings * scoring) for phase in phases)),
        "retrain": (retrains, retraining),
        "speed": (trains, (1 + proposed * searches) * length),
        "evaluation": (evaluates, 0.0),
        "report": ("report" in stages, scoring),
    }
    return Plan(
        name=config.name,
        stages={name: float(work) for name, (planned, work) in units.items() if planned},
        scoring=scoring,
        trials=candidate_trials(config, proposed) if searches else 0,
        ranks_by=config.search.ranks_by,
        sign=METRICS[config.search.ranks_by].sign,
    )
