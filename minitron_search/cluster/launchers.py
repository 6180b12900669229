"""Two thin adapters that place the search's trials: a Ray Train worker group, or the Tune trial's own process.

A row reaches Tune from the trial's log, where it is written first; Ray's own way, a queue, is one more process
a trial.
"""

import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import ray
import ray.tune

from minitron_search.cluster.worker_groups import WorkerGroup, in_background
from minitron_search.config.training import ResourcesConfig
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.trial import Trial

standing: WorkerGroup | None = None  # of this process, which Tune reuses for one trial after another


def tune_function(
    materials: ray.ObjectRef, run: RunDirectory, resources: ResourcesConfig
) -> Callable[[dict[str, Any]], None]:
    """What Ray Tune runs for one trial; its configuration is {"trial": Trial}."""
    return followed(inline if resources.launcher == "inline" else through_train, materials, run, resources)


def followed(
    work: Callable[[ray.ObjectRef, RunDirectory, ResourcesConfig, Trial], None],
    materials: ray.ObjectRef,
    run: RunDirectory,
    resources: ResourcesConfig,
) -> Callable[[dict[str, Any]], None]:
    """`work`, and its rungs reported as they are logged."""

    def placed(config: dict[str, Any]) -> None:
        trial = config["trial"]
        log = run.follow(trial.id)
        running = in_background(lambda: work(materials, run, resources, trial))
        ended, since = False, time.monotonic()
        while not ended:
            # first: what is logged last is then read below
            ended = bool(wait([running], run.files.poll_s(time.monotonic() - since)).done)
            for line in log.new():
                if line["kind"] == "rung" and line["rung"] not in run.decisions(trial.id):
                    ray.tune.report(line)
                    since = time.monotonic()
        running.result()

    return placed


def inline(materials: ray.ObjectRef, run: RunDirectory, resources: ResourcesConfig, trial: Trial) -> None:
    from minitron_search.trials.runner import run_to_end

    run.event("trial_placed", trial=trial.id, node=ray.util.get_node_ip_address())
    run_to_end(ray.get(materials).here(), trial)


def through_train(materials: ray.ObjectRef, run: RunDirectory, resources: ResourcesConfig, trial: Trial) -> None:
    global standing
    while standing is None or standing.ended.done() or not standing.run(trial, decided=True):
        standing = WorkerGroup(materials, run, resources, "search")
