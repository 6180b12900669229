"""Two thin adapters that place a trial: a Ray Train worker group, or the Tune trial's own process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig

from minitron_search.config import Resources
from minitron_search.distillation import DivergedError
from minitron_search.run_directory import RunDirectory
from minitron_search.trial import Trial, run_trial

WORKER_RESTARTS = 2  # of a worker group whose worker died: it goes on from its last checkpoint


def fit(materials: ray.ObjectRef, trial: Trial, resources: Resources, decided: bool, callbacks: list) -> None:
    """Run `trial` in a Ray Train worker group; returns when it has ended, raises when it failed."""
    workers = {
        "CPU": resources.cpus_per_worker,
        **({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
    }
    run = ray.get(materials).run
    TorchTrainer(
        _worker,
        # a list hides the reference from Ray, which would otherwise ship the object inside the configuration
        train_loop_config={"materials": [materials], "trial": trial, "decided": decided},
        scaling_config=ScalingConfig(
            num_workers=resources.workers_per_trial,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=workers,
        ),
        run_config=RunConfig(
            # a reused name resumes that run, even a finished one: every attempt has its own
            name=f"{trial.id}-{os.getpid()}-{ray.get_runtime_context().get_job_id()}",
            storage_path=str(run.scratch.absolute()),
            failure_config=FailureConfig(max_failures=WORKER_RESTARTS, controller_failure_limit=WORKER_RESTARTS),
            callbacks=callbacks,
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    context = ray.train.get_context()
    materials, trial, rank = ray.get(config["materials"][0]), config["trial"], context.get_world_rank()
    with diverging_ends(materials.run, trial, rank):
        run_trial(
            materials,
            trial,
            ray.train.report,
            decided=config["decided"],
            rank=rank,
            world_size=context.get_world_size(),
        )


@contextmanager
def diverging_ends(run: RunDirectory, trial: Trial, rank: int = 0) -> Iterator[None]:
    """A trial whose loss diverges has failed and says so; it is not started again, which would only repeat it."""
    try:
        yield
    except DivergedError as error:
        if rank == 0:
            run.event("trial_failed", trial=trial.id, message=str(error))


def tune_function(materials: ray.ObjectRef, resources: Resources) -> Callable[[dict[str, Any]], None]:
    """What Ray Tune runs for one trial; its configuration is {"trial": Trial}."""

    def through_train(config: dict[str, Any]) -> None:
        from ray.tune.integration.ray_train import TuneReportCallback

        fit(materials, config["trial"], resources, decided=True, callbacks=[TuneReportCallback()])

    def inline(config: dict[str, Any]) -> None:
        made = ray.get(materials)
        with diverging_ends(made.run, config["trial"]):
            run_trial(made, config["trial"], ray.tune.report, decided=True)

    return through_train if resources.launcher == "train" else inline
