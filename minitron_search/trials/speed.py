"""Measure the tokens per second of every shape among a run's trials, one after another, when nothing else runs.

Measured beside other trials, the speed of one shape differed threefold within a table.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from minitron_search.evaluation.scoring import throughput
from minitron_search.models.architecture import Architecture
from minitron_search.models.device import on_device, trim_memory
from minitron_search.pruning.trimming import trim
from minitron_search.records.directory import SHAPE, RunDirectory, shape_of
from minitron_search.trials.inputs import TrialInputs

REPEATS = 8  # timed passes of a shape, after one that warms up; each a window


def unmeasured(run_dir: RunDirectory) -> dict[tuple, Architecture]:
    """Return the shapes of finished rungs whose speed is not known, each with the architecture that it is timed on: the
    first trial's, for its layers may be of several types."""
    known, missing = run_dir.speeds(), dict[tuple, Architecture]()
    for row in run_dir.rungs():
        shape = shape_of(row)
        if row.get("tokens_per_second") is None and shape not in known and shape not in missing:
            described = json.loads((run_dir.trial(row["trial"]) / "architecture.json").read_text())
            missing[shape] = Architecture.of_trial(described)
    return missing


def measure_speeds(inputs: TrialInputs, shapes: Mapping[tuple, Architecture], threads: int) -> None:
    """Time a forward pass of each of `shapes` in the run's precision, on `threads` threads; each is an event.

    What is timed is a trim: how fast a shape is depends on no weight.
    """
    torch.set_num_threads(threads)
    for shape, architecture in shapes.items():
        student = on_device(trim(inputs.teacher_folder, architecture))
        speed, error = throughput(student, inputs.validation, inputs.precision, REPEATS)
        fields: dict[str, Any] = dict(zip(SHAPE, shape, strict=True))
        inputs.run_dir.event("speed_measured", **fields, tokens_per_second=speed, tokens_per_second_stderr=error,
                             repeats=REPEATS)  # fmt: skip
        del student
        trim_memory()
