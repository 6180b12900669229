"""Load a model: a teacher from its folder, a student from its weights, tensors one by one.

Every load is whole: a weight that is missing, of another shape or not the model's is an error, never a random number.
"""

import json
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
from minitron_search.models.families import in_model, is_extra, student_config, weights

Reader = Callable[[str], Tensor]


def load_model(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Return the model in a folder, all of its weights from its safetensors files, in `dtype` (auto: as it is stored).

    Raises ValueError for a weight that is missing, of another shape, or not the model's.
    """
    family: Any = AutoModelForCausalLM
    model, info = family.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are told of below
        output_loading_info=True,
    )
    check_loaded(str(folder), info)
    return model


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
    check_loaded(f"the weights of a {config.model_type}", info)
    return model.eval()


def random_student(config: PretrainedConfig, architecture: Architecture, seed: int) -> PreTrainedModel:
    """Return the control of Figure 6 (a): the same shape from random initialisation, as the family initialises."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = student_config(config, architecture)
        return AutoModelForCausalLM.from_config(student, dtype=torch.float32, trust_remote_code=False).eval()


def reader(folder: Path) -> Reader:
    """Return a reader of a folder's weights by their names in the model, memory-mapped: processes on one node share the
    pages. Raises ValueError for a name that no weight has."""
    files = [safe_open(path, framework="pt") for path in weight_files(folder)]
    where = {in_model(stored): (file, stored) for file in files for stored in file.keys()}

    def read(name: str) -> Tensor:
        if name not in where:
            raise ValueError(f"{folder}: its safetensors files hold no {name}")
        file, stored = where[name]
        return file.get_tensor(stored)

    return read


def weight_files(folder: Path) -> list[Path]:
    """Return the files that from_pretrained reads: one, or those that the index names, sorted; none without either.

    Raises ValueError for an index that cannot be read.
    """
    single = folder / "model.safetensors"
    return [single] if single.is_file() else [folder / name for name in sorted(set(weight_index(folder).values()))]


def weight_index(folder: Path) -> dict[str, str]:
    """Return which file holds which weight, as the index says; nothing without an index. Raises ValueError as
    `weight_files`."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        inside = all(isinstance(name, str) and Path(name).name == name for name in listed.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} cannot be read as an index of weights") from error
    if not inside:
        raise ValueError(f"{index.name} names a weight file that is not a file of its folder")
    return listed


def check_loaded(what: str, info: Mapping[str, Any]) -> None:
    """Raise ValueError unless all weights of the model, and no others, were loaded."""
    unexpected = [name for name in info["unexpected_keys"] if not is_extra(in_model(name))]
    for fault, names in (
        ("lacks", info["missing_keys"]),
        ("holds what is not the model's,", unexpected),
        ("holds another shape of", [name for name, *_ in info["mismatched_keys"]]),
    ):
        if names:
            raise ValueError(f"teacher.model: {what} {fault} {sorted(names)[0]} (of {len(names)} such weights); valid: "
                             "weights and config.json as save_pretrained writes them together")  # fmt: skip
