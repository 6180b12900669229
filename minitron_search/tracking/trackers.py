"""Weights & Biases and MLflow: one of their runs for each trial, resumed with the trial.

Project, server, key and offline mode are set by their own environment variables. The configuration's `trackers` names
them; they are installed with `pip install 'minitron-search[wandb]'` or `[mlflow]`.
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

MOST_METRICS = 1000  # in one call to MLflow


class Tracker(Protocol):
    """A service that trials are shown in."""

    name: str

    def tell(self, trial: str, about: Mapping[str, Any], points: Sequence[Point]) -> None:
        """Log points of a trial; `about` is the content of its architecture.json."""

    def end(self, trial: str, status: str) -> None:
        """End a trial's run with status FINISHED, FAILED, or KILLED for one that may be resumed."""


def check_installed(trackers: Sequence[str]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    for name in trackers:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder that W&B wrote is no package
            others = ",".join(other for other in trackers if other != name) or "[]"
            raise ValueError(f"trackers: {name} is not installed; valid: {others}, or "
                             f"pip install 'minitron-search[{name}]'")  # fmt: skip


def log_in(trackers: Sequence[str]) -> None:
    """Log in to W&B, which asks for a missing key if there is a terminal. Raises ValueError where it gets none."""
    if "wandb" not in trackers:
        return
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise ValueError(f"trackers: wandb: {error}; valid: `wandb login` first, or WANDB_MODE=offline") from None


def tracker_of(name: str, group: str, run_dir: RunDirectory) -> Tracker:
    """Return tracker `name`; `group` is the name that the trials of this run share."""
    return (Wandb if name == "wandb" else Mlflow)(group, run_dir)


def _id(run_dir: RunDirectory, trial: str) -> str:
    """Return a globally unique id of a trial: runs of one configuration have trials of the same ids."""
    return f"{trial}-{run_dir.events()[0]['time']:.3f}"


class Wandb:
    """Weights & Biases."""

    name = "wandb"

    def __init__(self, group: str, run_dir: RunDirectory):
        self.group, self.run_dir = group, run_dir
        self._runs: dict[str, Any] = {}

    def tell(self, trial: str, about: Mapping[str, Any], points: Sequence[Point]) -> None:
        if trial not in self._runs:
            self._runs[trial] = self._begin(trial, about)
        for point in points:
            self._runs[trial].log(point.values, step=point.tokens)

    def _begin(self, trial: str, about: Mapping[str, Any]) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minitron_search"),
            group=os.environ.get("WANDB_RUN_GROUP", self.group),
            id=_id(self.run_dir, trial),
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
    """MLflow."""

    name = "mlflow"

    def __init__(self, group: str, run_dir: RunDirectory):
        self.experiment, self.run_dir = os.environ.get("MLFLOW_EXPERIMENT_NAME", group), run_dir
        self._runs: dict[str, str] = {}

    def tell(self, trial: str, about: Mapping[str, Any], points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        if trial not in self._runs:
            self._runs[trial] = self._begin(trial, about)
        now = int(1000 * time.time())
        metrics = [Metric(tag, value, now, point.tokens) for point in points for tag, value in point.values.items()]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._runs[trial], metrics=metrics[start : start + MOST_METRICS])

    def _begin(self, trial: str, about: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        client, tag = self._client, "minitron_search.trial"
        existing = client.get_experiment_by_name(self.experiment)
        experiment = existing.experiment_id if existing else client.create_experiment(self.experiment)
        same = client.search_runs([experiment], f"tags.`{tag}` = '{_id(self.run_dir, trial)}'")
        if same:
            client.update_run(same[0].info.run_id, status="RUNNING")
            return same[0].info.run_id
        created = client.create_run(
            experiment, run_name=trial, tags={tag: _id(self.run_dir, trial), "run": self.run_dir.root.name}
        )
        shown = [Param(key, str(value)) for key, value in about.items() if isinstance(value, str | int | float)]
        client.log_batch(created.info.run_id, params=shown)
        return created.info.run_id

    @cached_property
    def _client(self) -> Any:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table that it creates
        from mlflow.tracking import MlflowClient

        return MlflowClient()

    def end(self, trial: str, status: str) -> None:
        self._client.set_terminated(self._runs.pop(trial), status)
