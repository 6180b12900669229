"""Importance and trimming, in this process."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from minitron_search.api.model import Model, load
from minitron_search.api.shape import WIDTHS, Shape
from minitron_search.config.inputs import ImportanceConfig
from minitron_search.importance.importance import Importance, measure
from minitron_search.importance.methods import METHODS, method_of
from minitron_search.models.device import on_device, resolve
from minitron_search.models.families import student_config, whole
from minitron_search.models.loading import load_model, student_of
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import trimmed_weights


def measure_importance(
    teacher: "Model | PreTrainedModel | str | Path",
    windows: np.ndarray,
    method: str = "activation",
    *,
    batch: Literal["l1", "l2", "mean", "variance"] = "l2",
    sequence: Literal["mean", "l2", "variance"] = "mean",
    seed: int = 0,
    precision: str = "auto",
) -> Importance:
    """Return the importance of every hidden channel, MLP neuron and head, and the BI of every block of layers.

    `windows` (n, length): tokens of calibration text. `method`: activation (2407.14679, section 2.2), random,
    magnitude, taylor or wanda; `batch` and `sequence` aggregate activations. `seed`: of method random.

    Raises ValueError for an unknown method or aggregation.
    """
    model = load(teacher)
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not a method; valid: {', '.join(METHODS)}")
    if method == "pca":
        raise ValueError("method: pca rotates the teacher, which a search does before it trims; valid: another "
                         "method, or a configuration with importance.method pca")  # fmt: skip
    try:
        config = ImportanceConfig(method=method, batch=batch, sequence=sequence)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['input']!r}; valid: {first['msg']}") from None
    taught = model.model
    if method_of(method).dtype == torch.float32 and taught.dtype != torch.float32:
        taught = on_device(load_model(model.folder(), torch.float32)).eval()
    return measure(taught, windows, config, seed=seed, precision=resolve(precision))


def trim(
    teacher: "Model | PreTrainedModel | str | Path", shape: Shape, importance: Importance | None = None
) -> Model:  # fmt: skip
    """Return the student of `shape`, float32: of every weight what `importance` ranks first. It is not trained.

    `importance` may be left out where only layers go. Raises ValueError for a shape of another teacher, and for one
    whose widths shrink without importance.
    """
    model = load(teacher)
    own, asked = whole(model.config), shape.architecture
    if whole(shape.config) != own or shape.config.model_type != model.config.model_type:
        raise ValueError(f"shape: it is one inside another model than {model.name}; valid: teacher.shape.smaller(...)")
    shrinks = [name for name in WIDTHS if getattr(asked, name) < getattr(own, name)]
    if shrinks and importance is None:
        raise ValueError(f"importance: none given, and {', '.join(shrinks)} shrinks; valid: "
                         "measure_importance(teacher, text.calibration)")  # fmt: skip
    rankings = Rankings.identity(model.config)
    if importance is not None:
        _check_sizes(model, importance)
        rankings = importance.rankings(own.num_key_value_heads)
    kept = trimmed_weights(model.reader(), model.config, asked, rankings)
    own_weights = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in kept.items()}
    student = student_of(student_config(model.config, asked), own_weights)
    return Model(f"a student of {model.name}", student.config, model.tokenizer, model=on_device(student).eval())


def _check_sizes(model: Model, importance: Importance) -> None:
    own = whole(model.config)
    expected = (own.hidden_size, (own.num_hidden_layers, own.intermediate_size))
    measured = (len(importance.hidden), tuple(importance.mlp.shape))
    if measured != expected:
        raise ValueError(f"importance: it was measured on a model of hidden_size {measured[0]} and {measured[1][0]} "
                         f"layers of {measured[1][1]} neurons, and {model.name} has {expected[0]} and {expected[1][0]} "
                         f"of {expected[1][1]}; valid: measure_importance of this model")  # fmt: skip
