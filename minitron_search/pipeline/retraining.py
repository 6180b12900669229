"""Full retraining of the promoted candidates: from the trim, cosine schedule, checkpoints, one gang at a time."""

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.cluster.worker_groups import WorkerGroup
from minitron_search.config.schema import Config
from minitron_search.config.training import ResourcesConfig
from minitron_search.records.directory import RunDirectory
from minitron_search.search.schedule import gang_workers
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.runner import run_to_end, run_trial
from minitron_search.trials.trial import Trial

PROGRESS_S = 20.0
TASK_RESTARTS = 2  # of a training whose node was lost: it goes on from its last checkpoint


def gang(config: Config, slots: int) -> ResourcesConfig:
    """All the workers of the cluster that can share a batch equally: the search is over, and nothing else runs."""
    return config.resources.model_copy(update={"workers_per_trial": gang_workers(config, slots)})


def retrain(
    config: Config, trial: Trial, materials: ray.ObjectRef, slots: int, progress: Callable[[str], None],
    run: RunDirectory, *, what: str = "retrain",
) -> None:  # fmt: skip
    """Train one trial, a promoted candidate say, on a whole worker group; a training that was cut off goes on.

    `run` is that of the materials. `what` it is, to whoever follows it.

    From a task of its own: in a driver's main thread Ray Train would take Ctrl-C for itself and exit with 0.
    """
    inline = config.resources.launcher == "inline"
    total = trial.settings.total_tokens
    seen = len(run.events())

    def placed(hidden: list[ray.ObjectRef]) -> None:
        if inline:
            run_to_end(ray.get(hidden[0]).here(), trial, decided=False)
        else:
            group = WorkerGroup(hidden[0], run, gang(config, slots), trial.id)
            group.run(trial, decided=False)
            group.close()

    asked = config.resources.of_worker() if inline else {}
    cpus, gpus = asked.pop("CPU", 0), asked.pop("GPU", 0)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    place: Any = "DEFAULT" if inline else here  # what only waits for a group is on no node that goes
    task = ray.remote(
        num_cpus=cpus, num_gpus=gpus, resources=asked, max_retries=TASK_RESTARTS, scheduling_strategy=place
    )(placed)
    running = task.remote([materials])
    log = run.follow(trial.id)
    while not ray.wait([running], timeout=PROGRESS_S)[0]:
        steps = [line for line in log.new() if line["kind"] == "step"]
        if steps:
            last = steps[-1]
            left = max(0, total - last["tokens"]) / last["tokens_per_second"] / 60
            progress(f"{what}: {last['tokens']:,} of {total:,} tokens, loss {last['loss']:.3f}, "
                     f"{last['tokens_per_second']:.0f} tokens/s, about {left:.0f} min left")  # fmt: skip
    ray.get(running)
    failed = [event for event in run.events()[seen:] if event["event"] == "trial_failed"]
    if failed:
        key = "teacher.correction.learning_rate" if what == "correction" else "retraining.learning_rate"
        raise RuntimeError(f"{what}: {failed[-1]['message']}; a smaller {key} may hold")


def score_now(materials: TrialInputs, trial: Trial) -> None:
    """Score a trial that does not train, here, unless it has been."""
    if not any(row["kind"] == "rung" for row in materials.run.metrics(trial.id)):
        run_trial(materials, trial, decided=False)
