"""(teacher, rankings, architecture) -> student; pure.

The teacher is permuted once so that every axis is in descending importance; then every width candidate is a
leading slice of every matrix, and candidates nest.
"""

import os
import shutil
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

from minitron_search.losses.output_loss import OutputHead
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import (
    family_of,
    head_scale,
    head_softcap,
    in_model,
    sizes,
    split_name,
    student_config,
    vocabulary_tables,
    weights,
    whole,
)
from minitron_search.pruning.rankings import Rankings

Reader = Callable[[str], Tensor]


def permute_teacher(teacher_folder: Path, rankings: Rankings, folder: Path, dtype: str = "auto") -> Path:
    """Write the teacher with every axis in descending importance: the same function, a stock folder.

    `dtype` is float32, bfloat16, or auto for the dtype it is stored in. The folder appears whole or not at all;
    one that exists already is left as it is.
    """
    if folder.exists():
        return folder
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=dtype)
    state = dict(teacher.named_parameters())
    permuted = trimmed_weights(state.__getitem__, teacher.config, whole(teacher.config), rankings)
    with torch.no_grad():
        for name, parameter in state.items():
            parameter.copy_(permuted[name])
    save_once(teacher, folder)
    return folder


def save_once(model: PreTrainedModel, folder: Path) -> None:
    """Write a stock folder that appears whole or not at all, and is the same whoever writes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was first: its folder is the same
        shutil.rmtree(temporary)


def load_teacher(folder: Path) -> PreTrainedModel:
    """The model of a folder that `permute_teacher` wrote, on memory-mapped weights: processes of one node share
    them. They are not to be written to."""
    config = AutoConfig.from_pretrained(folder)
    read = reader(folder)
    return student_of(config, {weight.name: read(weight.name) for weight in weights(config)}, config.dtype)


def load_head(folder: Path) -> OutputHead:
    """The output head of such a folder, memory-mapped."""
    config, read = AutoConfig.from_pretrained(folder), reader(folder)
    listed = weights(config)
    biases = [weight.name for weight in listed if weight.dims == ("vocab",)]
    bias = read(biases[0]) if biases else None
    return OutputHead(read(vocabulary_tables(listed)[-1]), bias, head_scale(config), head_softcap(config))


def trim(teacher_folder: Path, architecture: Architecture, rankings: Rankings | None = None) -> PreTrainedModel:
    """The student of `architecture`, float32, with weights of its own (writing into it leaves the teacher be).

    `rankings` None means that the folder holds the permuted teacher: leading slices, read from memory-mapped
    files, so that only what is kept is read.
    """
    config = AutoConfig.from_pretrained(teacher_folder)
    rankings = rankings or Rankings.identity(config)
    kept = trimmed_weights(reader(teacher_folder), config, architecture, rankings)
    own = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in kept.items()}
    return student_of(student_config(config, architecture), own)


def student_of(
    config: PretrainedConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A stock model on exactly the tensors of `state` (tied ones once), not copies; evaluation mode."""
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = family.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert not info["missing_keys"], info
    return model.eval()


def random_student(config: PretrainedConfig, architecture: Architecture, seed: int) -> PreTrainedModel:
    """The control of Figure 6 (a): the same shape from random initialisation, as the family initialises."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(student_config(config, architecture), dtype=torch.float32).eval()


def trimmed_weights(
    read: Reader, config: PretrainedConfig, architecture: Architecture, rankings: Rankings
) -> dict[str, Tensor]:
    """Every weight of the student by its name there; a view wherever what is kept is a leading slice.

    Fused projections are copies, and so is a scaled embedding where hidden_size shrinks.
    """
    family, head_dim = family_of(config), sizes(config)["head_dim"]
    position = {layer: index for index, layer in enumerate(architecture.layers)}
    state, listed = {}, weights(config)
    for weight in listed:
        if weight.layer is not None and weight.layer not in position:
            continue
        name = weight.name
        if weight.layer is not None:
            name = f"{family.layers}.{position[weight.layer]}.{split_name(family, name)[1]}"
        tensor = read(weight.name)
        for axis, dim in enumerate(weight.dims):
            index = rankings.kept(architecture, weight.layer, dim, head_dim)
            if index is not None:
                tensor = _take(tensor, axis, index)
        state[name] = tensor
    if family.embedding_scaled and architecture.hidden_size < config.hidden_size:
        tables = vocabulary_tables(listed)
        _keep_scale_of_embedding(state, tables, family.final_norm, config.hidden_size / architecture.hidden_size)
    return state


def _keep_scale_of_embedding(state: dict[str, Tensor], tables: list[str], final_norm: str, shrunk: float) -> None:
    """Gemma multiplies embeddings by sqrt(hidden_size), so a narrower student would begin with a smaller residual
    stream than its teacher: the ratio goes into the embedding. A head tied to it reads the final norm's output only,
    and that norm, which multiplies by 1 + weight, takes the ratio back."""
    embedding, norm = tables[0], f"{final_norm}.weight"
    state[embedding] = state[embedding].float() * shrunk**0.5
    if len(tables) == 1:
        state[norm] = (1 + state[norm].float()) / shrunk**0.5 - 1


def reader(folder: Path) -> Reader:
    """Weights of a folder by their names in the model, memory-mapped: processes on one node share the pages."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {in_model(stored): (file, stored) for file in files for stored in file.keys()}

    def read(name: str) -> Tensor:
        file, stored = where[name]
        return file.get_tensor(stored)

    return read


def _take(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    if torch.equal(index, torch.arange(len(index))):
        return tensor.narrow(axis, 0, len(index))
    return tensor.index_select(axis, index)
