"""What a run will compute, counted from its configuration: tokens and FLOPs, stage by stage; and what it has computed.

Products only (`architecture.forward_flops`): a forward pass counts 1, a backward pass 2. Where a number depends on how
the run goes it is the plain case: every rung passes one trial in `reduction_factor` (ASHA passes a few more).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PretrainedConfig

from minitron_search.config.schema import Config, WinograndeConfig
from minitron_search.data.winogrande import HUB, load_examples
from minitron_search.depth import sweep
from minitron_search.distillation import teacher_cache
from minitron_search.models.architecture import Architecture, forward_flops
from minitron_search.models.families import sizes, sizes_of, weights
from minitron_search.records.paths import cache_folder
from minitron_search.search.space import COORDINATES, SearchSpace
from minitron_search.trials.settings import CONTROLS, correction_tokens

# Tokens of an example and of each of its shots once packed, where there is no tokenizer to ask: the embedded questions
# and the embedded teacher's tokenizer give 14.5, and 122 with 5 shots.
EXAMPLE_TOKENS, SHOT_TOKENS = 15, 22
HUB_EXAMPLES = 1267  # validation split of winogrande_xl


# What a trial is spent on, by its arm; the teacher is not trained, and what a benchmark trains afterwards is its own.
STAGE_OF = {"search": "search", **dict.fromkeys(CONTROLS, "search"), "untrained": "retrain", "retrained": "retrain"}


class Phase(NamedTuple):
    """Of the search: `trials` that each train `tokens` further and are scored `scorings` times."""

    trials: int
    tokens: int
    scorings: int


@dataclass(frozen=True)
class Work:
    """One stage. tokens: trained on, or put through the teacher. The rest are FLOPs, by how they are spread:
    `training` and `forward` over all workers of the stage, `scoring` over its trials (one worker of each, in the run's
    precision), `alone` on one worker, in float32. steps: of the optimizer, of all trainings together."""

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
    """FLOPs of a token, and of a scoring, in one run. `option_tokens`: packed Winogrande tokens of one scoring;
    `teaching`: the model that students are distilled from."""

    def __init__(self, config: Config, space: SearchSpace, teaching: PretrainedConfig, precision: str,
                 option_tokens: int):  # fmt: skip
        self.config, self.space, self.option_tokens = config, space, option_tokens
        self.length = config.corpus.sequence_length
        self.teacher = forward_flops(weights(teaching), sizes(teaching), self.length)
        self.teacher_head = 2 * teaching.hidden_size * teaching.vocab_size
        self.live = asked_live(config, teaching, precision)

    def student(self, architecture: Architecture) -> int:
        return forward_flops(self.space.weights, sizes_of(self.space.config, architecture), self.length)

    def training(self, student: int) -> int:
        """Of one token of distillation, given those of its forward pass through the student."""
        asked = self.config.distillation
        passes = 4 if asked.gradient_checkpointing else 3
        return passes * student + self.asking()

    def asking(self) -> int:
        """Of what a token of distillation needs of the teacher."""
        asked = self.config.distillation
        if asked.loss == "ce" and not asked.intermediate:
            return 0
        if self.live:  # in parallel it takes a step of its own besides
            return (4 if self.config.teacher.correction.parallel else 1) * self.teacher
        return 0 if asked.teacher_cache == "topk" else self.teacher_head

    def scoring(self, student: int) -> int:
        """Validation windows with the teacher's head beside the student's, Winogrande, and the measured speed."""
        windows = self.config.corpus.validation_samples
        timed = min(4, windows) + 1
        return (windows * self.length * (student + self.teacher_head)
                + (self.option_tokens + timed * self.length) * student)  # fmt: skip


def workload(costs: Costs) -> dict[str, Work]:
    """The stages of the run that cost anything, in order."""
    config, space = costs.config, costs.space
    found: dict[str, Work] = {}
    if corrected := whole_batches(config, correction_tokens(config)):
        scored = 2 * costs.scoring(costs.teacher)  # before and after
        found["correction"] = Work(
            corrected, training=3 * costs.teacher * corrected, alone=scored, steps=corrected // batch_tokens(config)
        )
    if "importance" in config.stages:
        found["importance"] = _importance(costs)
    if "depth" in config.stages:
        found["depth"] = _depth(costs)
    if set(config.stages) & {"search", "retrain"}:
        found["teacher"] = _teacher(costs)
    student = costs.student(space.typical())
    if "search" in config.stages:
        phases = search_phases(config, min(config.search.trials, len(space)))
        tokens = sum(phase.trials * phase.tokens for phase in phases)
        scorings = sum(phase.trials * phase.scorings for phase in phases)
        found["search"] = Work(
            tokens, training=tokens * costs.training(student), scoring=scorings * costs.scoring(student),
            steps=tokens // batch_tokens(config),
        )  # fmt: skip
    if "retrain" in config.stages:
        tokens = retrained(config) * whole_batches(config, config.retraining.tokens)
        found["retrain"] = Work(
            tokens, training=tokens * costs.training(student), alone=2 * retrained(config) * costs.scoring(student),
            steps=tokens // batch_tokens(config),
        )  # fmt: skip
    return found


def search_phases(config: Config, trials: int) -> list[Phase]:
    """All that the search trains, given how many architectures it proposes. A phase of the search is a line here."""
    asked, last = config.search, whole_batches(config, config.search.rungs[-1])
    finalists = min(asked.reduction_factor * retrained(config), trials)
    further = (
        Phase(finalists * max(0, asked.finalist_seeds - asked.seeds), last, len(asked.rungs)),
        Phase(len(CONTROLS) * retrained(config) if asked.controls else 0, last, len(asked.rungs)),
    )
    return [*proposal_phases(config, trials), *(phase for phase in further if phase.trials)]


def proposal_phases(config: Config, trials: int) -> list[Phase]:
    """Of what is proposed, with one seed or several: a phase a rung. Where `search.tokens` is given, as many trials as
    it allows."""
    asked, steps = config.search, rung_steps(config)
    if asked.scheduler == "hyperband":
        passing = [_hyperband(asked.reduction_factor, len(steps), rung) for rung in range(len(steps))]
        counts = np.ceil(trials * np.array(passing))
        if asked.tokens != "auto":  # what is not spent on proposals continues those that were stopped
            share = asked.tokens / (asked.seeds * (counts * steps).sum())
            counts = np.minimum(trials, np.ceil(counts * min(1, share)))
    else:  # ASHA passes a few more
        counts = np.array(halving(config, trials))
        left = 0 if asked.tokens == "auto" else asked.tokens // asked.seeds - int((counts * steps).sum())
        for rung in reversed(range(1, len(steps))):  # the best of the highest rung go on with what is left
            more = min(left // steps[rung], counts[rung - 1] - counts[rung])
            counts[rung] += more
            left -= more * steps[rung]
    return [Phase(asked.seeds * int(count), step, 1) for count, step in zip(counts, steps, strict=True)]


def halving(config: Config, proposals: int) -> list[int]:
    """Architectures at every rung of successive halving (Jamieson & Talwalkar 2016, algorithm 1): of `proposals` the
    best 1 / `reduction_factor` of each rung go on, at least one; where `search.tokens` is given, no more than leave
    every later rung its share. A first rung at 0 tokens takes all proposals, whatever the tokens."""
    asked, steps = config.search, rung_steps(config)
    factor, tokens = asked.reduction_factor, math.inf if asked.tokens == "auto" else asked.tokens

    def counts(first: int) -> list[int]:
        return [max(1, first // factor**rung) for rung in range(len(steps))]

    def cost(counts: list[int]) -> int:
        return asked.seeds * sum(count * step for count, step in zip(counts, steps, strict=True))

    widest = next((n for n in range(proposals, 1, -1) if cost(counts(n)) <= tokens), 1)
    return [proposals if steps[0] == 0 else widest, *counts(widest)[1:]]


def rung_steps(config: Config) -> list[int]:
    """Tokens of a trial from each rung to the next."""
    return np.diff([0, *(whole_batches(config, rung) for rung in config.search.rungs)]).tolist()


def _hyperband(factor: int, rungs: int, rung: int) -> float:
    """The share of all trials that reaches a rung: bracket s stops nobody before rung s, and Tune puts a trial in it
    with a weight of e ** -s."""
    weights = np.exp(-np.arange(max(rungs - 1, 1)))
    shares = [factor ** -max(0, rung - bracket) for bracket in range(len(weights))]
    return float(np.dot(weights / weights.sum(), shares))


def search_tokens(config: Config) -> int:
    """Of all that the search proposes together: further seeds of finalists and controls come on top."""
    return sum(phase.trials * phase.tokens for phase in proposal_phases(config, config.search.trials))


def retrained(config: Config) -> int:
    """How many architectures are retrained; at least one where a test decides."""
    return 1 if config.search.promote == "not_worse" else config.search.promote


def batch_tokens(config: Config) -> int:
    length = config.corpus.sequence_length
    return math.ceil(config.distillation.batch_tokens / length) * length


def whole_batches(config: Config, tokens: int) -> int:
    """What a training of `tokens` sees: milestones are rounded up to whole batches."""
    return math.ceil(tokens / batch_tokens(config)) * batch_tokens(config)


def gang_workers(config: Config, slots: int) -> int:
    """Workers of one training that has the cluster for itself: as many as can share a batch equally."""
    windows = batch_tokens(config) // config.corpus.sequence_length
    return max(count for count in range(1, slots * config.resources.workers_per_trial + 1) if windows % count == 0)


def asked_live(config: Config, teaching: PretrainedConfig, precision: str) -> bool:
    """Whether the teacher is asked for every batch rather than once; on this machine's disk, where that decides."""
    asked = config.distillation
    if config.teacher.correction.parallel or asked.teacher_cache == "off" or asked.intermediate:
        return True
    if asked.teacher_cache != "auto":
        return False
    needed = train_tokens(config) * teaching.hidden_size * (2 if precision == "bfloat16" else 4)
    return needed > teacher_cache.budget_bytes(asked.teacher_cache_bytes, cache_folder() / "teacher_cache")


def train_tokens(config: Config) -> int:
    """Of the text that students are distilled on, in whole windows."""
    length = config.corpus.sequence_length
    longest = max(config.search.rungs[-1], config.retraining.tokens, correction_tokens(config))
    return math.ceil(longest / length) * length


def option_tokens(asked: WinograndeConfig) -> int:
    """About how many tokens the packed questions are, without a tokenizer."""
    if asked.source == HUB:
        examples = min(asked.limit or HUB_EXAMPLES, HUB_EXAMPLES)
    else:
        examples = len(load_examples(asked.source, asked.limit))
    return examples * (EXAMPLE_TOKENS + asked.shots * SHOT_TOKENS)


def _importance(costs: Costs) -> Work:
    asked = costs.config.importance
    tokens = asked.rounds * (asked.samples or costs.config.corpus.calibration_samples) * costs.length
    pruned = costs.student(costs.space.teacher)
    body = pruned - 2 * costs.space.teacher.hidden_size * costs.space.config.vocab_size
    return Work(tokens, forward=tokens * (body + (3 * pruned if asked.method == "taylor" else 0)))


def _teacher(costs: Costs) -> Work:
    """What it says of every window, and its own scores."""
    config = costs.config
    asked, validation = config.distillation, config.corpus.validation_samples * costs.length
    cached = 0 if costs.live or asked.loss == "ce" else train_tokens(config)
    heads = cached * costs.teacher_head if asked.teacher_cache == "topk" else 0
    return Work(
        cached + validation,
        forward=(cached + validation) * (costs.teacher - costs.teacher_head) + heads,
        alone=costs.scoring(costs.student(costs.space.teacher)),
    )


def _depth(costs: Costs) -> Work:
    """Cuts share the layers before their block; each walks those after it and, where its loss is asked, the head."""
    asked, layers = costs.config.depth, costs.space.teacher.num_hidden_layers
    pruned = costs.student(costs.space.teacher)
    head = 2 * costs.space.teacher.hidden_size * costs.space.config.vocab_size
    layer = (pruned - head) / layers
    lengths = sweep.in_layers(asked.lengths, layers)
    blocks, single = sweep.blocks(lengths, layers), sweep.blocks([1], layers)
    losses, choices = "lm_loss" in asked.metrics, "winogrande" in asked.metrics
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
    if "taylor" in asked.metrics:
        forward += 3 * text * pruned
    return Work(tokens, forward=forward)


def spent(costs: Costs, rows: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """(tokens, FLOPs) of the search and the retraining so far, of the rows of the trials' logs: every trial's own
    architecture, trained as far as its last row and scored at each."""
    found = {"search": (0, 0.0), "retrain": (0, 0.0)}
    before: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        stage = STAGE_OF.get(row["arm"])
        if stage is None:
            continue
        widths = {name: row[name] for name in COORDINATES[:4]}
        student = costs.student(Architecture(**widths, layers=tuple(range(row["num_hidden_layers"]))))
        new = row["tokens"] - before.get(row["trial"], 0)
        before[row["trial"]] = row["tokens"]
        tokens, flops = found[stage]
        found[stage] = tokens + new, flops + new * costs.training(student) + costs.scoring(student)
    return found
