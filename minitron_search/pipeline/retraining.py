"""Retrain the promoted candidates in full: from the trim, cosine schedule, checkpoints, one worker group at a time."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.architecture_search.schedule import gang_workers
from minitron_search.cluster.worker_groups import WorkerGroup
from minitron_search.config.schema import Config
from minitron_search.config.training import ResourcesConfig
from minitron_search.messages.console import say
from minitron_search.records.damage import CheckpointDamage
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.runner import run_to_end
from minitron_search.trials.trial import Trial

PROGRESS_S = 20.0
TASK_RESTARTS = 2  # of a training whose node was lost: it goes on from its last checkpoint
# What trains, as it is called on the console -> the key that a user lowers if it diverges
LEARNING_RATES = {"retrain": "retraining.learning_rate", "correction": "teacher.correction.learning_rate"}


def gang(config: Config, slots: int) -> ResourcesConfig:
    """Return the resources of all workers that can share a batch equally: the search is over, nothing else runs."""
    return config.resources.model_copy(update={"workers_per_trial": gang_workers(config, slots)})


def train_on_cluster(
    config: Config, trial: Trial, inputs: ray.ObjectRef, slots: int, run_dir: RunDirectory, *, what: str = "retrain"
) -> None:
    """Train one trial, such as a promoted candidate, on a whole worker group; one that was cut off goes on.

    `inputs`: its `TrialInputs`, whose run is `run_dir`. `what`: a key of `LEARNING_RATES`. Raises RuntimeError if the
    training diverges.
    """
    seen = len(run_dir.events())
    training = _start(config, trial, inputs, slots, run_dir)
    damage = CheckpointDamage(run_dir)
    _follow(training, trial, run_dir, what)
    damage.say_new()
    ray.get(training)
    failed = [event for event in run_dir.events()[seen:] if event["event"] == "trial_failed"]
    if failed:
        raise RuntimeError(f"{what}: {failed[-1]['message']}; a smaller {LEARNING_RATES[what]} may help")


def _start(
    config: Config, trial: Trial, inputs: ray.ObjectRef, slots: int, run_dir: RunDirectory
) -> ray.ObjectRef:  # fmt: skip
    """Start the training in a task: in a driver's main thread Ray Train would take Ctrl-C and exit with 0."""
    inline = config.resources.launcher == "inline"

    def placed(hidden: list[ray.ObjectRef]) -> None:
        if inline:
            run_to_end(ray.get(hidden[0]).here(), trial, decided=False)
        else:
            group = WorkerGroup(hidden[0], run_dir, gang(config, slots), trial.id)
            group.run(trial, decided=False)
            group.close()

    resources = config.resources.of_worker() if inline else {}
    cpus, gpus, memory = (resources.pop(name, 0) for name in ("CPU", "GPU", "memory"))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    place: Any = "DEFAULT" if inline else here  # a task that only waits for a group stays on the driver's node
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        memory=memory or None,  # type: ignore[arg-type]  # None is its default
        resources=resources,
        max_retries=TASK_RESTARTS,
        scheduling_strategy=place,
    )(placed)
    return task.remote([inputs])  # a list hides the reference from Ray, which would otherwise resolve it


def _follow(training: ray.ObjectRef, trial: Trial, run_dir: RunDirectory, what: str) -> None:
    """Say how far `training` is, until it ends."""
    total, log = trial.settings.total_tokens, run_dir.follow(trial.id)
    while not ray.wait([training], timeout=PROGRESS_S)[0]:
        steps = [line for line in log.new() if line["kind"] == "step"]
        if steps:
            last = steps[-1]
            left = max(0, total - last["tokens"]) / last["tokens_per_second"] / 60
            say(f"{what}: {last['tokens']:,} of {total:,} tokens, loss {last['loss']:.3f}, "
                f"{last['tokens_per_second']:.0f} tokens/s, about {left:.0f} min left")  # fmt: skip
