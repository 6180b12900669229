"""Probe learning rates: train one candidate for a few steps at several rates, and take the one that does best.

It is for `auto`, of a teacher that no rate is known for (`settings.automatic_rates`). Every rate starts from the same
trim and reads the same windows; its LM loss is taken on calibration windows, which are neither trained on nor what the
run reports. What is taken lies between the rates that were tried (`between`), and is raised for the run's larger steps.
All of it takes at most `SHARE` of what the run trains; a run of which that is too little for
`FEWEST_STEPS` has no probe.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from minitron_search.config.schema import Config
from minitron_search.distillation import loop
from minitron_search.distillation.training_log import DivergedError
from minitron_search.evaluation.scoring import lm_losses
from minitron_search.evaluation.statistics import interval
from minitron_search.models.device import on_device, release_memory
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.runner import initial_student, teacher_of
from minitron_search.trials.trial import Trial

FACTOR = 3.0  # from one rate to the next
MOST_RATES = 4  # of which the first three are around the rule's
SHARE = 0.03  # of the run's training tokens, with a scored token counted as a third of a trained one
JUDGED_SHARE = 0.25  # of that, for scoring
FEWEST_STEPS, MOST_STEPS = 4, 16
MOST_JUDGED = 16  # windows
# The best rate rises with the windows of a step. By this power of their ratio the rates that probes of one window found
# for SmolLM2 are the best ones of four (docs/results.md); theory has 1/2 for Adam and small batches (2405.14578).
BATCH_POWER = 0.25


@dataclass(frozen=True)
class Probe:
    """What a probe takes. batch, judged, run_batch: windows, the last of a step of the run."""

    steps: int
    batch: int
    judged: int
    length: int
    run_batch: int

    @property
    def trained_tokens(self) -> int:
        """The tokens that all rates together train on, at the most."""
        return MOST_RATES * self.steps * self.batch * self.length

    @property
    def scored_tokens(self) -> int:
        """The tokens that are scored, at the most: for every rate, and for the trim."""
        return (MOST_RATES + 1) * self.judged * self.length


def probe_of(config: Config, run_tokens: int) -> Probe | None:
    """Return the probe that a run which trains on `run_tokens` can pay for; None where it can pay for none, or where
    one process cannot train a student."""
    length, resources = config.corpus.sequence_length, config.resources
    if resources.workers_per_trial > 1 or resources.strategy == "fsdp2":
        return None
    windows = SHARE * run_tokens / length / MOST_RATES  # of a rate, in trained windows
    trained = int((1 - JUDGED_SHARE) * windows)
    judged = min(MOST_JUDGED, int(3 * JUDGED_SHARE * windows * MOST_RATES / (MOST_RATES + 1)))
    if trained < FEWEST_STEPS or judged < 2:
        return None
    steps = min(MOST_STEPS, trained)
    run_batch = -(-config.distillation.batch_tokens // length)
    available = config.corpus.calibration_samples if config.corpus.calibration is None else MOST_JUDGED
    return Probe(steps, min(run_batch, trained // steps), min(judged, available), length, run_batch)


def probed(
    inputs: TrialInputs, trial: Trial, probe: Probe, middle: float, calibration: np.ndarray | None
) -> dict[str, Any]:  # fmt: skip
    """Return what the probe found: the `rate` that the run takes, every one of `rates` with its loss, whether the best
    of them `helped`, and what it took. Where none is below the untrained trim, `rate` is the lowest.

    `middle`: the rate to begin with. Then come the ones beside it, and one more on the side where the best of them is,
    if that is an end. calibration: the windows whose loss is taken, (n, length), of the text that is trained on; None
    where there are none, for the last train windows, which the probe then does not read.
    """
    windows = inputs.train if calibration is None else calibration
    windows = windows[-probe.judged :]
    if calibration is None:
        inputs = replace(inputs, train=inputs.train[: -probe.judged])
    began, losses = time.monotonic(), dict[float, np.ndarray | None]()
    torch.set_num_threads(trial.settings.threads or 1)
    precision = trial.settings.precision
    untrained = lm_losses(on_device(initial_student(inputs, trial, trains=False)).eval(), windows, precision)

    def mean(rate: float) -> float:
        found = losses[rate]
        return float("inf") if found is None else float(found.mean())

    waiting = [middle, *_beside(middle)]
    while waiting:
        rate = waiting.pop(0)
        losses[rate] = _trained_loss(inputs, trial, probe, rate, windows)
        if not waiting and len(losses) < MOST_RATES:
            best = min(losses, key=mean)
            waiting = [rate for rate in _beside(best) if not min(losses) <= rate <= max(losses)]
    best = min(losses, key=mean)
    helped = mean(best) < untrained.mean()
    means = {rate: mean(rate) for rate in losses}
    return {
        "rate": chosen(means, probe.run_batch / probe.batch) if helped else min(losses),
        "helped": bool(helped),
        "untrained": float(untrained.mean()),
        "rates": [_row(rate, losses[rate], untrained) for rate in sorted(losses)],
        **asdict(probe),
        "architecture": trial.architecture.id,
        "trained_tokens": len(losses) * probe.steps * probe.batch * probe.length,
        "scored_tokens": (len(losses) + 1) * windows.size,
        "seconds": time.monotonic() - began,
    }


def chosen(losses: Mapping[float, float], batches: float) -> float:
    """Return the rate that a run takes after its probe, two digits.

    losses: by rate, inf where it diverged. batches: how many windows a step of the run has for one of the probe's.
    """
    return float(f"{between(losses) * batches**BATCH_POWER:.2g}")


def between(losses: Mapping[float, float]) -> float:
    """Return the rate where the parabola through the best rate and the two beside it is least, over the logarithm of
    the rate; the best rate itself where it is an end, or where one beside it diverged."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda place: losses[rates[place]])
    if at in (0, len(rates) - 1):
        return rates[at]
    below, best, above = (losses[rate] for rate in rates[at - 1 : at + 2])
    curvature = below - 2 * best + above
    if not 0 < curvature < math.inf:
        return rates[at]
    steps = math.log(rates[at + 1] / rates[at]), math.log(rates[at] / rates[at - 1])
    return rates[at] * math.exp((below - above) / (2 * curvature) * sum(steps) / 2)


def _beside(rate: float) -> tuple[float, float]:
    """Return the rates next to one, of two digits, as a person would write them."""
    return float(f"{rate / FACTOR:.2g}"), float(f"{rate * FACTOR:.2g}")


def _row(rate: float, losses: np.ndarray | None, untrained: np.ndarray) -> dict[str, float | None]:
    """Return a rate's LM loss with the 95% interval of its difference from the trim's; None of one that diverged."""
    if losses is None:
        return {"rate": rate, "lm_loss": None, "low": None, "high": None}
    low, high = interval(losses - untrained)
    return {"rate": rate, "lm_loss": float(losses.mean()), "low": low, "high": high}


def _trained_loss(
    inputs: TrialInputs, trial: Trial, probe: Probe, rate: float, windows: np.ndarray
) -> np.ndarray | None:  # fmt: skip
    """Return the LM loss of `windows` after the probe's steps at a rate; None if the training diverges."""
    tokens = probe.steps * probe.batch * probe.length
    settings = replace(
        trial.settings, total_tokens=tokens, milestones=(), checkpoint_tokens=None, learning_rate=rate,
        batch_tokens=probe.batch * probe.length,
    )  # fmt: skip
    asked = replace(trial, settings=settings)
    student = on_device(initial_student(inputs, asked))
    try:
        loop.train(student, inputs.train, settings, teacher_of(inputs, asked))
    except DivergedError:
        return None
    finally:
        release_memory()
    losses = lm_losses(student.eval(), windows, trial.settings.precision)
    return losses if np.isfinite(losses).all() else None
