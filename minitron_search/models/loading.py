"""Load a model: a teacher from its folder, a student from its weights, tensors one by one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from minitron_search.models.architecture import Architecture
from minitron_search.models.families import in_model, student_config, weights

Reader = Callable[[str], Tensor]


def load_teacher(folder: Path) -> PreTrainedModel:
    """Return the model of a folder that `permute_teacher` wrote, on memory-mapped weights, which processes of one node
    share. They are not to be written to."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    read = reader(folder)
    return student_of(config, {weight.name: read(weight.name) for weight in weights(config)}, config.dtype)


def student_of(
    config: PretrainedConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a stock model on exactly the tensors of `state` (tied ones once), not copies, in evaluation mode."""
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = family.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert not info["missing_keys"], info
    return model.eval()


def random_student(config: PretrainedConfig, architecture: Architecture, seed: int) -> PreTrainedModel:
    """Return the control of Figure 6 (a): the same shape from random initialisation, as the family initialises."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = student_config(config, architecture)
        return AutoModelForCausalLM.from_config(student, dtype=torch.float32, trust_remote_code=False).eval()


def reader(folder: Path) -> Reader:
    """Return a reader of a folder's weights by their names in the model, memory-mapped: processes on one node share the
    pages."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {in_model(stored): (file, stored) for file in files for stored in file.keys()}

    def read(name: str) -> Tensor:
        file, stored = where[name]
        return file.get_tensor(stored)

    return read
