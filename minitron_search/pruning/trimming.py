"""Trim a teacher: (teacher, rankings, architecture) to student, a pure function.

The teacher is permuted once so that every axis is in descending importance; then every width candidate is a
leading slice of every matrix, and candidates nest.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from minitron_search.models.architecture import Architecture
from minitron_search.models.families import (
    family_of,
    sizes,
    split_name,
    student_config,
    vocabulary_tables,
    weights,
    whole,
)
from minitron_search.models.loading import Reader, load_model, reader, student_of
from minitron_search.pruning.rankings import Rankings
from minitron_search.records import cache


def permute_teacher(
    teacher_folder: Path, rankings: Rankings, folder: Path, dtype: str = "auto", vocab_size: int | None = None
) -> Path:
    """Write the teacher with every axis in descending importance: the same function, a stock folder.

    `dtype` is float32, bfloat16, or auto for the dtype it is stored in. `vocab_size`: how many rows of the vocabulary's
    tables are kept, the first; None for all. Without the others, the softmax is over those that are kept. The folder
    appears whole or not at all; one that exists already is left as it is.
    """

    def write(into: Path) -> None:
        teacher = load_model(teacher_folder, dtype)
        state = dict(teacher.named_parameters())
        permuted = trimmed_weights(state.__getitem__, teacher.config, whole(teacher.config), rankings)
        with torch.no_grad():
            for name, parameter in state.items():
                parameter.copy_(permuted[name])
        if vocab_size is not None and vocab_size < teacher.config.vocab_size:
            teacher.resize_token_embeddings(vocab_size)
        teacher.save_pretrained(into)

    cache.make_once(folder, write)
    return folder


def trim(teacher_folder: Path, architecture: Architecture, rankings: Rankings | None = None) -> PreTrainedModel:
    """Return the student of `architecture`, float32, with weights of its own: writing to it leaves the teacher alone.

    `rankings` None means that the folder holds the permuted teacher: leading slices, read from memory-mapped
    files, so that only what is kept is read.
    """
    config = AutoConfig.from_pretrained(teacher_folder, trust_remote_code=False)
    rankings = rankings or Rankings.identity(config)
    kept = trimmed_weights(reader(teacher_folder), config, architecture, rankings)
    own = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in kept.items()}
    return student_of(student_config(config, architecture), own)


def trimmed_weights(
    read: Reader, config: PretrainedConfig, architecture: Architecture, rankings: Rankings
) -> dict[str, Tensor]:
    """Return every weight of the student by its name there; a view wherever what is kept is a leading slice.

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
    """Put the ratio of the widths into the embedding: Gemma multiplies embeddings by sqrt(hidden_size), so a narrower
    student would begin with a smaller residual stream than its teacher. A head tied to it reads the final norm's output
    only, and that norm, which multiplies by 1 + weight, takes the ratio back."""
    embedding, norm = tables[0], f"{final_norm}.weight"
    state[embedding] = state[embedding].float() * shrunk**0.5
    if len(tables) == 1:
        state[norm] = (1 + state[norm].float()) / shrunk**0.5 - 1


def _take(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    if torch.equal(index, torch.arange(len(index))):
        return tensor.narrow(axis, 0, len(index))
    return tensor.index_select(axis, index)


def as_views(folder: Path, architecture: Architecture) -> PreTrainedModel:
    """Return the student of `architecture` inside the permuted teacher in `folder`, in the dtype of the folder: of a
    float32 one, the weights that `trim` copies. It is not to be written to.

    A parameter is one strided tensor, and what is kept is one wherever it leads each dimension: whole layers, hidden
    channels, neurons, whole groups of heads. Elsewhere the few weights concerned are copied:

    - query heads dropped inside groups, where more than one group is left: the weights with a `query` dimension (in a
      stock model a head's place says its group, so no order of the teacher's heads makes them lead in every group);
    - projections fused one after another (`q+k+v` of GPT-2 and Phi-3, `gate+up` of Phi-3) where a part shrinks;
    - Gemma's embedding where hidden_size shrinks, which is scaled, and with a tied head its final norm;
    - the bias of a tied head (Phi), which transformers pads anew.

    Matrix products read rows at any stride, no slower and to the same bits (MKL, but for single rows).
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kept = trimmed_weights(reader(folder), config, architecture, Rankings.identity(config))
    return student_of(student_config(config, architecture), kept, config.dtype)
