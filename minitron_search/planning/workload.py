"""Count what a run will compute, and has computed: tokens and FLOPs, stage by stage, from its configuration.

Products only (`architecture.forward_flops`): a forward pass counts 1, a backward pass 2. Where a number depends on how
the run goes it is the plain case: every rung passes one trial in `reduction_factor` (ASHA passes a few more).
"""

import math
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from minitron_search.architecture_search.schedule import batch_tokens, retrained, search_phases, whole_batches
from minitron_search.architecture_search.space import COORDINATES, SearchSpace
from minitron_search.config.inputs import WinograndeConfig
from minitron_search.config.schema import Config
from minitron_search.data.winogrande import HUB, load_examples
from minitron_search.depth import sweep
from minitron_search.distillation import teacher_cache
from minitron_search.importance.methods import method_of
from minitron_search.models.architecture import Architecture, forward_flops
from minitron_search.models.families import sizes, sizes_of, weights
from minitron_search.records.paths import cache_folder
from minitron_search.trials.learning_rate import MOST_RATES, Probe, probe_of
from minitron_search.trials.settings import CONTROLS, automatic_rates, correction_tokens
from minitron_search.trials.speed import REPEATS

# Tokens of an example and of each of its shots once packed, where there is no tokenizer to ask: the embedded questions
# and the embedded teacher's tokenizer give 14.5, and 122 with 5 shots.
EXAMPLE_TOKENS, SHOT_TOKENS = 15, 22
HUB_EXAMPLES = 1267  # validation split of winogrande_xl


# What a trial is spent on, by its arm; the teacher is not trained, and what a benchmark trains afterwards is its own.
STAGE_OF = {"search": "search", **dict.fromkeys(CONTROLS, "search"), "untrained": "retrain", "retrained": "retrain"}


@dataclass(frozen=True)
class Work:
    """The work of one stage.

    tokens: trained on, or put through the teacher. The rest are FLOPs, by how they are spread: `training` and `forward`
    over all workers of the stage, `scoring` over its trials (one worker of each, in the run's precision), `alone` on
    one worker, in float32. steps: of the optimizer, of all trainings together.
    """

    tokens: int
    training: float = 0.0
    forward: float = 0.0
    scoring: float = 0.0
    alone: float = 0.0
    steps: int = 0

    @property
    def flops(self) -> float:
        return self.training + self.forward + self.scoring + self.alone


class Costs:
    """FLOPs of a token, and of a scoring, in one run.

    `teacher`: the model that students are distilled from. `option_tokens`: packed Winogrande tokens of one scoring.
    """

    def __init__(self, config: Config, space: SearchSpace, teacher: PretrainedConfig, precision: str,
                 option_tokens: int):  # fmt: skip
        self.config, self.space, self.option_tokens = config, space, option_tokens
        self.teacher_config, self.precision = teacher, precision
        self.length = config.corpus.sequence_length
        self.teacher = forward_flops(weights(teacher), sizes(teacher), self.length)
        self.teacher_head = 2 * teacher.hidden_size * teacher.vocab_size
        self.live = runs_live(config, teacher, precision)

    def student(self, architecture: Architecture) -> int:
        """Return the FLOPs of one token's forward pass through a student."""
        return forward_flops(self.space.weights, sizes_of(self.space.config, architecture), self.length)

    def training(self, student: int) -> int:
        """Return the FLOPs of one token of distillation, given those of its forward pass through the student."""
        passes = 4 if self.config.distillation.gradient_checkpointing else 3
        return passes * student + self.teaching()

    def teaching(self) -> int:
        """Return the FLOPs of what a token of distillation needs of the teacher."""
        settings = self.config.distillation
        if settings.loss == "ce" and not settings.intermediate:
            return 0
        if self.live:  # in parallel it takes a step of its own besides
            return (4 if self.config.teacher.correction.parallel else 1) * self.teacher
        return 0 if settings.teacher_cache == "topk" else self.teacher_head

    def scoring(self, student: int) -> int:
        """Return the FLOPs of a scoring: validation windows with both heads, and Winogrande."""
        windows = self.config.corpus.validation_samples
        return windows * self.length * (student + self.teacher_head) + self.option_tokens * student


def workload(costs: Costs) -> dict[str, Work]:
    """Return the stages of the run that cost anything, in order."""
    config, space = costs.config, costs.space
    by_stage: dict[str, Work] = {}
    if corrected := whole_batches(config, correction_tokens(config)):
        scored = 2 * costs.scoring(costs.teacher)  # before and after
        by_stage["correction"] = Work(
            corrected, training=3 * costs.teacher * corrected, alone=scored, steps=corrected // batch_tokens(config)
        )
    if "importance" in config.stages:
        by_stage["importance"] = _importance(costs)
    if "depth" in config.stages:
        by_stage["depth"] = _depth(costs)
    if set(config.stages) & {"search", "retrain"}:
        by_stage["teacher"] = _teacher(costs)
    student = costs.student(space.typical())
    if set(config.stages) & {"search", "retrain"} and (probe := planned_probe(config)):
        by_stage["probe"] = Work(
            probe.trained_tokens + probe.scored_tokens, training=probe.trained_tokens * costs.training(student),
            alone=probe.scored_tokens * student, steps=MOST_RATES * probe.steps,
        )  # fmt: skip
    if "search" in config.stages:
        phases = search_phases(config, min(config.search.trials, len(space)))
        tokens = sum(phase.trials * phase.tokens for phase in phases)
        scorings = sum(phase.trials * phase.scorings for phase in phases)
        by_stage["search"] = Work(
            tokens, training=tokens * costs.training(student), scoring=scorings * costs.scoring(student),
            steps=tokens // batch_tokens(config),
        )  # fmt: skip
    if "retrain" in config.stages:
        tokens = retrained(config) * whole_batches(config, config.retraining.tokens)
        by_stage["retrain"] = Work(
            tokens, training=tokens * costs.training(student), alone=2 * retrained(config) * costs.scoring(student),
            steps=tokens // batch_tokens(config),
        )  # fmt: skip
    if set(config.stages) & {"search", "retrain"}:
        by_stage["speed"] = _speed(costs, student)
    return by_stage


def planned_probe(config: Config) -> Probe | None:
    """Return the probe of the learning rate that a run makes; None where its rates are known, or left to the rule."""
    return probe_of(config, run_tokens(config)) if automatic_rates(config) else None


def run_tokens(config: Config) -> int:
    """Return the tokens that a whole run trains students on, search and retraining."""
    searched = sum(phase.trials * phase.tokens for phase in search_phases(config, config.search.trials))
    return searched + retrained(config) * whole_batches(config, config.retraining.tokens)


def runs_live(config: Config, teacher: PretrainedConfig, precision: str) -> bool:
    """Return whether the teacher runs for every batch rather than once; this machine's disk may decide."""
    settings = config.distillation
    if config.teacher.correction.parallel or settings.teacher_cache == "off" or settings.intermediate:
        return True
    if settings.teacher_cache != "auto":
        return False
    needed = train_tokens(config) * teacher.hidden_size * (2 if precision == "bfloat16" else 4)
    return needed > teacher_cache.budget_bytes(settings.teacher_cache_bytes, cache_folder() / "teacher_cache")


def train_tokens(config: Config) -> int:
    """Return the tokens of the text that students are distilled on, in whole windows."""
    length = config.corpus.sequence_length
    longest = max(config.search.rungs[-1], config.retraining.tokens, correction_tokens(config))
    return math.ceil(longest / length) * length


def option_tokens(config: WinograndeConfig) -> int:
    """Return about how many tokens the packed questions are, without a tokenizer."""
    if config.source == HUB:
        examples = min(config.limit or HUB_EXAMPLES, HUB_EXAMPLES)
    else:
        examples = len(load_examples(config.source, config.limit))
    return examples * (EXAMPLE_TOKENS + config.shots * SHOT_TOKENS)


def _importance(costs: Costs) -> Work:
    settings = costs.config.importance
    tokens = settings.rounds * (settings.samples or costs.config.corpus.calibration_samples) * costs.length
    pruned = costs.student(costs.space.teacher)
    body = pruned - 2 * costs.space.teacher.hidden_size * costs.space.config.vocab_size
    return Work(tokens, forward=tokens * (body + (3 * pruned if method_of(settings.method).gradients else 0)))


def _teacher(costs: Costs) -> Work:
    """Return the work of computing the teacher's outputs for every window, and its own scores."""
    config = costs.config
    settings, validation = config.distillation, config.corpus.validation_samples * costs.length
    cached = 0 if costs.live or settings.loss == "ce" else train_tokens(config)
    heads = cached * costs.teacher_head if settings.teacher_cache == "topk" else 0
    return Work(
        cached + validation,
        forward=(cached + validation) * (costs.teacher - costs.teacher_head) + heads,
        alone=costs.scoring(costs.student(costs.space.teacher)),
    )


def _speed(costs: Costs, student: int) -> Work:
    """Return the work of timing every shape of the search, and the teacher's, alone; each is trimmed once more."""
    shapes = min(costs.config.search.trials, len(costs.space)) if "search" in costs.config.stages else 0
    tokens = (1 + REPEATS) * costs.length
    return Work((1 + shapes) * tokens, scoring=tokens * (shapes * student + costs.student(costs.space.teacher)))


def _depth(costs: Costs) -> Work:
    """Return the work of the sweep: cuts share the layers before their block, and each runs those after it.

    A cut whose loss is measured runs the output head too.
    """
    settings, layers = costs.config.depth, costs.space.teacher.num_hidden_layers
    pruned = costs.student(costs.space.teacher)
    head = 2 * costs.space.teacher.hidden_size * costs.space.config.vocab_size
    layer = (pruned - head) / layers
    lengths = sweep.in_layers(settings.lengths, layers)
    blocks, single = sweep.blocks(lengths, layers), sweep.blocks([1], layers)
    losses, choices = "lm_loss" in settings.metrics, "winogrande" in settings.metrics
    on_text = set(blocks if losses else []) | set(single if losses or choices else [])
    sets = len(lengths) if losses or choices else 0  # one by one: each about a walk of its own

    def walked(cuts: set[sweep.Cut], sets: int) -> float:
        after = sum(layers - cut[-1] - 1 for cut in cuts)
        return layer * (layers * (1 + sets) + after) + head * (len(cuts) + sets)

    text, tokens = costs.config.corpus.validation_samples * costs.length, 0
    forward = text * walked(on_text, sets if losses else 0)
    tokens += text
    if choices:
        forward += costs.option_tokens * walked(set(blocks), sets)
        tokens += costs.option_tokens
    if "taylor" in settings.metrics:
        forward += 3 * text * pruned
    return Work(tokens, forward=forward)


def spent(costs: Costs, rows: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Return (tokens, FLOPs) of the search and of the retraining so far, from the rows of the trials' logs.

    Every trial counts with its own architecture, trained as far as its last row and scored at each.
    """
    totals = {"search": (0, 0.0), "retrain": (0, 0.0)}
    before: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        stage = STAGE_OF.get(row["arm"])
        if stage is None:
            continue
        widths = {name: row[name] for name in COORDINATES[:4]}
        student = costs.student(Architecture(**widths, layers=tuple(range(row["num_hidden_layers"]))))
        new = row["tokens"] - before.get(row["trial"], 0)
        before[row["trial"]] = row["tokens"]
        tokens, flops = totals[stage]
        totals[stage] = tokens + new, flops + new * costs.training(student) + costs.scoring(student)
    return totals
