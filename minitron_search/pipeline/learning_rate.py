"""Settle the learning rates that are `auto` before anything is trained."""

from dataclasses import replace
from typing import Any

import ray

from minitron_search.architecture_search.state import make_trial
from minitron_search.cluster.placement import on_all_cpus
from minitron_search.messages.console import say
from minitron_search.pipeline.events import stage
from minitron_search.planning.prepare import Prepared
from minitron_search.planning.workload import planned_probe, run_tokens
from minitron_search.records.directory import chosen_rate
from minitron_search.trials.learning_rate import probed
from minitron_search.trials.settings import RATES, automatic_rates, distillation_settings, rule_rate, with_rate


def settle_rates(prepared: Prepared, inputs: ray.ObjectRef) -> Prepared:
    """Return the run with a number for every learning rate that is `auto`: the one that it began with, or else the
    embedded teacher's, a probe's, or the rule's, which is written down and said."""
    config, run_dir = prepared.config, prepared.run_dir
    if all(getattr(config, section).learning_rate != "auto" for section in RATES):
        return prepared
    found = chosen_rate(run_dir)
    if found is None:
        found = choose_rate(prepared, inputs)
        run_dir.write_learning_rate(found)
        run_dir.event("learning_rate", **found)
    say(f"learning rate: {found['rate']:g}, {found['how']}")
    return replace(prepared, config=with_rate(config, found["rate"]))


def choose_rate(prepared: Prepared, inputs: ray.ObjectRef) -> dict[str, Any]:
    """Return the learning rate, `how` it was chosen, and all that a probe found."""
    config, space, run_dir = prepared.config, prepared.space, prepared.run_dir
    rule, probe = rule_rate(config.teacher.model), planned_probe(config)
    if not automatic_rates(config):
        return {"rate": rule, "how": "known for the embedded teacher"}
    if probe is None:
        return {"rate": rule, "how": "by the teacher's size: this run is too short for a probe, or its students train "
                "on several workers"}  # fmt: skip
    settings = distillation_settings(config, prepared.precision)
    trial = make_trial(space, space.typical(), "probe", settings, seed=config.seed,
                       initialization=config.distillation.initialization)  # fmt: skip
    calibration = prepared.corpus.calibration if config.corpus.calibration is None else None
    with stage(run_dir, "probe"):
        found = on_all_cpus(run_dir, probed, inputs, trial, probe, rule, calibration)
    share = (found["trained_tokens"] + found["scored_tokens"] / 3) / run_tokens(config)
    losses = ", ".join(f"{row['rate']:.2g}: {row['lm_loss']:.3f}" if row["lm_loss"] is not None else
                       f"{row['rate']:.2g}: diverged" for row in found["rates"])  # fmt: skip
    say(f"learning rate: LM loss after {found['steps']} steps at {losses}; untrained {found['untrained']:.3f}; "
        f"{share:.1%} of the run's training")  # fmt: skip
    how = ("chosen by a probe of a few steps of one candidate" if found["helped"] else
           "the lowest of a probe's rates: after a few steps NONE of them was below the untrained trim")  # fmt: skip
    return {**found, "share": share, "how": how}
