"""The schedule: which phase has how many trials at how many tokens, by successive halving or Hyperband."""

import math
from typing import NamedTuple

import numpy as np

from minitron_search.config.schema import Config
from minitron_search.trials.settings import CONTROLS


class Phase(NamedTuple):
    """One part of a search: `trials` that each train `tokens` further and are scored `scorings` times."""

    trials: int
    tokens: int
    scorings: int


def search_phases(config: Config, trials: int) -> list[Phase]:
    """Return all that a search trains when it proposes `trials` architectures: a phase a rung, then the finalists'
    further seeds and the controls."""
    settings, last = config.search, whole_batches(config, config.search.rungs[-1])
    further = (
        Phase(_further_seeds(config, trials), last, len(settings.rungs)),
        Phase(len(CONTROLS) * retrained(config) if settings.controls else 0, last, len(settings.rungs)),
    )
    return [*proposal_phases(config, trials), *(phase for phase in further if phase.trials)]


def candidate_trials(config: Config, trials: int) -> int:
    """Return how many trials of candidates a search starts when it proposes `trials` architectures: each with its
    seeds, and the finalists' further ones."""
    return proposal_phases(config, trials)[0].trials + _further_seeds(config, trials)


def _further_seeds(config: Config, trials: int) -> int:
    finalists = min(config.search.reduction_factor * retrained(config), trials)
    return finalists * max(0, config.search.finalist_seeds - config.search.seeds)


def proposal_phases(config: Config, trials: int) -> list[Phase]:
    """Return the phases of what is proposed, with one seed or several: a phase a rung. Where `search.tokens` is given,
    they have as many trials as it allows."""
    settings, steps = config.search, rung_steps(config)
    if settings.scheduler == "hyperband":
        passing = [_hyperband(settings.reduction_factor, len(steps), rung) for rung in range(len(steps))]
        counts = np.ceil(trials * np.array(passing))
        if settings.tokens != "auto":  # what is not spent on proposals continues those that were stopped
            share = settings.tokens / (settings.seeds * (counts * steps).sum())
            counts = np.minimum(trials, np.ceil(counts * min(1, share)))
    else:  # ASHA passes a few more
        counts = np.array(halving(config, trials))
        left = 0 if settings.tokens == "auto" else settings.tokens // settings.seeds - int((counts * steps).sum())
        for rung in reversed(range(1, len(steps))):  # the best of the highest rung go on with what is left
            more = min(left // steps[rung], counts[rung - 1] - counts[rung])
            counts[rung] += more
            left -= more * steps[rung]
    return [Phase(settings.seeds * int(count), step, 1) for count, step in zip(counts, steps, strict=True)]


def halving(config: Config, proposals: int) -> list[int]:
    """Return the number of architectures at every rung of successive halving (Jamieson & Talwalkar 2016, algorithm 1).
    The best 1 / `reduction_factor` of each rung go on, at least one; where `search.tokens` is given, no more than leave
    every later rung its share. A first rung at 0 tokens takes all proposals, whatever the tokens."""
    settings, steps = config.search, rung_steps(config)
    factor, tokens = settings.reduction_factor, math.inf if settings.tokens == "auto" else settings.tokens

    def counts(first: int) -> list[int]:
        return [max(1, first // factor**rung) for rung in range(len(steps))]

    def cost(counts: list[int]) -> int:
        return settings.seeds * sum(count * step for count, step in zip(counts, steps, strict=True))

    widest = next((n for n in range(proposals, 1, -1) if cost(counts(n)) <= tokens), 1)
    return [proposals if steps[0] == 0 else widest, *counts(widest)[1:]]


def rung_steps(config: Config) -> list[int]:
    """Return the tokens that a trial trains on from each rung to the next."""
    return np.diff([0, *(whole_batches(config, rung) for rung in config.search.rungs)]).tolist()


def _hyperband(factor: int, rungs: int, rung: int) -> float:
    """Return the share of all trials that reaches a rung: bracket s stops nobody before rung s, and Tune puts a trial
    in it with a weight of e ** -s."""
    weights = np.exp(-np.arange(max(rungs - 1, 1)))
    shares = [factor ** -max(0, rung - bracket) for bracket in range(len(weights))]
    return float(np.dot(weights / weights.sum(), shares))


def search_tokens(config: Config) -> int:
    """Return the tokens of all proposals together; further seeds of finalists and controls come on top."""
    return sum(phase.trials * phase.tokens for phase in proposal_phases(config, config.search.trials))


def retrained(config: Config) -> int:
    """Return how many architectures are retrained; at least one where a test decides."""
    return 1 if config.search.promote == "not_worse" else config.search.promote


def batch_tokens(config: Config) -> int:
    """Return the tokens of one batch: `distillation.batch_tokens` rounded up to whole windows."""
    length = config.corpus.sequence_length
    return math.ceil(config.distillation.batch_tokens / length) * length


def whole_batches(config: Config, tokens: int) -> int:
    """Return the tokens that a training of `tokens` sees: milestones are rounded up to whole batches."""
    return math.ceil(tokens / batch_tokens(config)) * batch_tokens(config)


def gang_workers(config: Config, slots: int) -> int:
    """Return the number of workers of one training that has the cluster for itself: as many as can share a batch
    equally."""
    windows = batch_tokens(config) // config.corpus.sequence_length
    return max(count for count in range(1, slots * config.resources.workers_per_trial + 1) if windows % count == 0)
