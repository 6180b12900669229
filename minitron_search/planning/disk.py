"""Count the bytes that a run takes on disk at its peak, by what they are; and how many it leaves."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from minitron_search.architecture_search.schedule import batch_tokens, retrained, search_phases
from minitron_search.config.schema import Config
from minitron_search.distillation.teacher_cache import DTYPES
from minitron_search.importance.methods import method_of
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, weights
from minitron_search.planning.workload import Costs, train_tokens
from minitron_search.records.paths import cache_folder, working_folder
from minitron_search.trials.settings import correction_tokens, retraining_settings

CHECKPOINT_BYTES = 12  # of a parameter: float32, two moments
LOGS, LOGS_OF_TRIAL = 10**6, 10**5  # the study and the tables, and what a trial writes down; a report is 5 MB more


class Place(NamedTuple):
    """A folder that a run writes to, as a configuration names it."""

    name: str
    folder: Path


def places(config: Config) -> tuple[Place, Place]:
    """Return where the run is, and where the caches are."""
    return Place("output", working_folder(config.output)), Place("MINITRON_SEARCH_CACHE", cache_folder())


def existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest above it that is there."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def cached(costs: Costs) -> dict[str, int]:
    """Return what a run puts into the cache, unless an earlier one did: bytes by what they are."""
    config, teacher = costs.config, costs.teacher_config
    if not set(config.stages) & {"search", "retrain"}:
        return {}
    parameters = parameter_count(weights(teacher), sizes(teacher))
    stored = torch.bfloat16 if teacher.dtype == torch.bfloat16 else torch.float32
    computing = DTYPES[costs.precision]
    copies = stored.itemsize + (computing.itemsize if computing != stored else 0)
    if method_of(config.importance.method).rotates:
        copies += 4
    windows = config.corpus.validation_samples * costs.length
    if not costs.live and config.distillation.loss != "ce":
        windows += train_tokens(config)  # topk is smaller
    corrected = CHECKPOINT_BYTES * parameters if correction_tokens(config) else 0
    return {
        "permuted teacher": copies * parameters,
        "teacher's outputs": windows * teacher.hidden_size * computing.itemsize,
        **({"corrected teacher": corrected} if corrected else {}),
    }


def run_bytes(costs: Costs, at_once: int, parameters: int | None = None) -> dict[str, int]:
    """Return what is in the run directory at its peak, bytes by what they are.

    `at_once`: trials of the search. `parameters`: of a student, those of the typical one unless given.
    """
    config, space = costs.config, costs.space
    parameters = parameters or space.measures(space.typical()).params
    one = CHECKPOINT_BYTES * parameters
    if config.teacher.correction.parallel:  # the teacher is in every checkpoint of a student
        one += CHECKPOINT_BYTES * space.measures(space.teacher).params
    moments = [{"checkpoints": searched_checkpoints(config, at_once) * one}] if "search" in config.stages else []
    if "retrain" in config.stages:
        students = kept(costs, parameters)["best/"]
        steps = retraining_settings(config, "float32").checkpoint_tokens or 0
        several = config.retraining.tokens > max(steps, batch_tokens(config))
        # the newest checkpoint and, while it is written, the one before; then the newest, and its student in the making
        moments += [{"checkpoints": one * (2 if several else 1), "best/": students - students // retrained(config)},
                    {"checkpoints": one, "best/": students}]  # fmt: skip
    held = max(moments, key=lambda held: sum(held.values()), default={})
    return {name: size for name, size in {**held, "logs": LOGS + LOGS_OF_TRIAL * config.search.trials}.items() if size}


def searched_checkpoints(config: Config, at_once: int) -> int:
    """Return how many checkpoints a search has at most: of all that reached its first rung above 0 tokens, and one more
    of each that writes its next."""
    rungs = len(config.search.rungs)
    phases = search_phases(config, config.search.trials)
    trained = [phase.trials for phase in phases[:rungs] if phase.tokens]
    going_on = min(at_once, trained[1]) if len(trained) > 1 else 0
    return max(trained[0] + going_on, *(min(2 * at_once, 2 * phase.trials) for phase in phases[rungs:]), 0)


def kept(costs: Costs, parameters: int | None = None) -> dict[str, int]:
    """Return what the run directory holds in the end."""
    config, space = costs.config, costs.space
    parameters = parameters or space.measures(space.typical()).params
    element = 2 if config.retraining.dtype == "bfloat16" else 4
    if config.retraining.dtype == "auto" and space.config.dtype == torch.bfloat16:
        element = 2
    students = retrained(config) * element * parameters if "retrain" in config.stages else 0
    return {"best/": students, "logs": LOGS + LOGS_OF_TRIAL * config.search.trials}


def in_words(parts: Mapping[str, int]) -> str:
    """Return `3.1 GB (checkpoints 2.2, permuted teacher 0.5)`, the largest first."""
    listed = sorted(((size, name) for name, size in parts.items() if size >= 5e6), reverse=True)
    inside = ", ".join(f"{name} {size / 1e9:.2f}" for size, name in listed)
    return f"{sum(parts.values()) / 1e9:.2f} GB" + (f" ({inside})" if inside else "")
