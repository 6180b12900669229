"""Place the search's trials: in a Ray Train worker group, or in the Tune trial's own process.

A row reaches Tune from the trial's log, where it is written first; Ray's own way, a queue, is one more process
for every trial.
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

Launcher = Callable[[ray.ObjectRef, RunDirectory, ResourcesConfig, Trial], None]

standing: WorkerGroup | None = None  # of this process, which Tune reuses for one trial after another


def tune_function(
    inputs: ray.ObjectRef, run_dir: RunDirectory, resources: ResourcesConfig
) -> Callable[[dict[str, Any]], None]:
    """Return what Ray Tune runs for one trial; its configuration is {"trial": Trial}."""
    return followed(LAUNCHERS[resources.launcher], inputs, run_dir, resources)


def followed(
    launch: Launcher, inputs: ray.ObjectRef, run_dir: RunDirectory, resources: ResourcesConfig
) -> Callable[[dict[str, Any]], None]:
    """Return a function for Tune that runs `launch` on its trial and reports the trial's rungs as they are logged."""

    def placed(config: dict[str, Any]) -> None:
        trial = config["trial"]
        log = run_dir.follow(trial.id)
        running = in_background(lambda: launch(inputs, run_dir, resources, trial))
        ended, since = False, time.monotonic()
        while not ended:
            # first: what is logged last is then read below
            ended = bool(wait([running], run_dir.files.poll_s(time.monotonic() - since)).done)
            for line in log.new():
                if line["kind"] == "rung" and line["rung"] not in run_dir.decisions(trial.id):
                    ray.tune.report(line)
                    since = time.monotonic()
        running.result()

    return placed


def inline(inputs: ray.ObjectRef, run_dir: RunDirectory, resources: ResourcesConfig, trial: Trial) -> None:
    """Run a trial in this process."""
    from minitron_search.trials.runner import run_to_end

    run_dir.event("trial_placed", trial=trial.id, node=ray.util.get_node_ip_address())
    run_to_end(ray.get(inputs).here(), trial)


def through_train(inputs: ray.ObjectRef, run_dir: RunDirectory, resources: ResourcesConfig, trial: Trial) -> None:
    """Run a trial in the worker group of this process, which is started for its first trial."""
    global standing
    while standing is None or standing.ended.done() or not standing.run(trial, decided=True):
        standing = WorkerGroup(inputs, run_dir, resources, "search")


LAUNCHERS: dict[str, Launcher] = {"train": through_train, "inline": inline}  # resources.launcher -> how
