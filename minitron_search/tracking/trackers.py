"""Weights & Biases and MLflow: a run of theirs for each trial, which a continued trial goes on in.

All that is theirs to say (project, server, key, offline) is in their own environment variables. They are asked for by
`trackers`, and come with `pip install 'minitron-search[wandb]'` or `[mlflow]`.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

from minitron_search.records.directory import RunDirectory
from minitron_search.tracking.tensorboard import Point

MOST_METRICS = 1000  # of one call to MLflow


class Tracker(Protocol):
    name: str

    def tell(self, trial: str, about: Mapping[str, Any], points: Sequence[Point]) -> None:
        """`about`: what architecture.json says of the trial."""

    def end(self, trial: str, status: str) -> None:
        """status: FINISHED, FAILED, or KILLED for a trial that is to go on another time."""


def check_installed(trackers: Sequence[str]) -> None:
    """Raises ValueError for a tracker whose package is not there."""
    for name in trackers:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package: W&B leaves one where it wrote
            others = ",".join(other for other in trackers if other != name) or "[]"
            raise ValueError(f"trackers: {name} is not installed; valid: {others}, or "
                             f"pip install 'minitron-search[{name}]'")  # fmt: skip


def log_in(trackers: Sequence[str]) -> None:
    """W&B asks for its key where it has none, if there is a terminal. Raises ValueError where it gets none."""
    if "wandb" not in trackers:
        return
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise ValueError(f"trackers: wandb: {error}; valid: `wandb login` before, or WANDB_MODE=offline") from None


def tracker_of(name: str, group: str, run: RunDirectory) -> Tracker:
    """group: the name that the trials of this run have in common."""
    return (Wandb if name == "wandb" else Mlflow)(group, run)


def _id(run: RunDirectory, trial: str) -> str:
    """Of a trial in all of the world: runs of one configuration have trials of the same ids."""
    return f"{trial}-{run.events()[0]['time']:.3f}"


class Wandb:
    name = "wandb"

    def __init__(self, group: str, run: RunDirectory):
        self.group, self.run = group, run
        self._runs: dict[str, Any] = {}

    def tell(self, trial: str, about: Mapping[str, Any], points: Sequence[Point]) -> None:
        if trial not in self._runs:
            self._runs[trial] = self._begun(trial, about)
        for point in points:
            self._runs[trial].log(point.values, step=point.tokens)

    def _begun(self, trial: str, about: Mapping[str, Any]) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minitron_search"),
            group=os.environ.get("WANDB_RUN_GROUP", self.group),
            id=_id(self.run, trial),
            name=trial,
            job_type=about["arm"],
            config=dict(about),
            resume="allow",
            reinit="create_new",  # several trials at once
            settings=wandb.Settings(console="off", silent=True),
        )

    def end(self, trial: str, status: str) -> None:
        self._runs.pop(trial).finish(exit_code=int(status != "FINISHED"))


class Mlflow:
    name = "mlflow"

    def __init__(self, group: str, run: RunDirectory):
        self.experiment, self.run = os.environ.get("MLFLOW_EXPERIMENT_NAME", group), run
        self._runs: dict[str, str] = {}

    def tell(self, trial: str, about: Mapping[str, Any], points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        if trial not in self._runs:
            self._runs[trial] = self._begun(trial, about)
        now = int(1000 * time.time())
        told = [Metric(tag, value, now, point.tokens) for point in points for tag, value in point.values.items()]
        for start in range(0, len(told), MOST_METRICS):
            self._client.log_batch(self._runs[trial], metrics=told[start : start + MOST_METRICS])

    def _begun(self, trial: str, about: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        client, tag = self._client, "minitron_search.trials.trial"
        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.experiment)
        same = client.search_runs([experiment], f"tags.`{tag}` = '{_id(self.run, trial)}'")
        if same:
            client.update_run(same[0].info.run_id, status="RUNNING")
            return same[0].info.run_id
        made = client.create_run(
            experiment, run_name=trial, tags={tag: _id(self.run, trial), "run": self.run.root.name}
        )
        shown = [Param(key, str(value)) for key, value in about.items() if isinstance(value, str | int | float)]
        client.log_batch(made.info.run_id, params=shown)
        return made.info.run_id

    @cached_property
    def _client(self) -> Any:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        from mlflow.tracking import MlflowClient

        return MlflowClient()

    def end(self, trial: str, status: str) -> None:
        self._client.set_terminated(self._runs.pop(trial), status)
