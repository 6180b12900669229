"""LaCo (Yang et al. 2024, arXiv:2402.11187): rear layers collapse into one before them.

RDSC merge of m layers into layer l: theta_l + sum over k = 1..m of (theta_{l+k} - theta_l), of every matrix of
attention and MLP and its bias; norms stay layer l's. It is linear, so what comes of merges of merges is, for every
layer that is kept, one whole number for each of the teacher's layers. (The authors' notebooks subtract the layer that
they are adding to, which leaves theta_{l+m} alone; here it is the equation.)

The paper merges while the similarity is above a threshold, and takes the depth that comes out. Here the depth is
given: merging ends when it is reached, the last merge taking only what is left to take; and where the algorithm has
come to the first layer before that, it begins again from the last with the threshold lowered by `THRESHOLD_STEP`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from minitron_search.models import device
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import family_of, final_hidden, split_name, student_config, weights, whole
from minitron_search.models.loading import Reader, reader, student_of
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import trimmed_weights

# The paper's for Llama-2-7B, which has 32 layers: C layers become one, merges are at least I apart,
# layer L is the first that is merged into, T is the similarity that has to be kept.
C, INTERVAL, FIRST, THRESHOLD = 4, 2, 1, 0.65
THRESHOLD_STEP = 0.05
# of calibration text: the paper's is a few short sentences
WINDOWS, TOKENS = 8, 64

Layer = dict[int, int]  # a sum of the teacher's layers: how often each is in it
Merged = Mapping[int, Layer]  # by layer that is kept


def collapsed(folder: Path, windows: np.ndarray, lengths: Iterable[int]) -> list[dict[int, Layer]]:
    """Return, for every number of layers to lose, what LaCo makes of the model in `folder`: its kept layers as
    `Merged`.

    The similarity is the cosine between the final hidden states of teacher and merged model, all of a window's
    positions as one vector, averaged over the first `TOKENS` tokens of the first `WINDOWS` of `windows` (samples,
    length).
    """
    config, read = AutoConfig.from_pretrained(folder, trust_remote_code=False), reader(folder)
    rows = torch.from_numpy(windows[:WINDOWS, :TOKENS].astype(np.int64)).to(device.device())
    expected = _states(merged_model(read, config, whole(config), {}), rows)
    known: dict[tuple, float] = {}

    def similarity(layers: Sequence[Layer]) -> float:
        key = tuple(tuple(sorted(layer.items())) for layer in layers)
        if key not in known:
            stack = {_base(layer): layer for layer in layers}
            architecture = Architecture(**{**whole(config).to_dict(), "layers": tuple(stack)})
            states = _states(merged_model(read, config, architecture, stack), rows)
            known[key] = float(torch.cosine_similarity(states, expected, dim=-1).mean())
        return known[key]

    return [_collapse(config.num_hidden_layers, length, similarity) for length in lengths]


def _collapse(depth: int, length: int, similarity: Callable[[Sequence[Layer]], float]) -> dict[int, Layer]:
    """Run Algorithm 1 until `length` of `depth` layers are gone; `similarity(layers)` is of a stack of layers, each a
    sum."""
    layers: list[Layer] = [{layer: 1} for layer in range(depth)]
    first = min(FIRST, depth - length - 1)  # where one layer is left, it is the first
    threshold, at = THRESHOLD, max(first, depth - C)
    while (left := length - (depth - len(layers))) > 0:
        if at < first:
            threshold, at = threshold - THRESHOLD_STEP, max(first, len(layers) - C)
        taken = min(C - 1, left, len(layers) - 1 - at)
        tried = [*layers[:at], _sum(layers[at : at + taken + 1]), *layers[at + taken + 1 :]]
        if taken > 0 and similarity(tried) > threshold:
            layers, at = tried, min(at - INTERVAL, len(tried) - C)
        else:
            at -= 1
    return {_base(layer): layer for layer in layers}


def _sum(layers: Sequence[Layer]) -> Layer:
    """Merge the layers after the first into the first (RDSC)."""
    total = {layer: (2 - len(layers)) * count for layer, count in layers[0].items()}
    for other in layers[1:]:
        for layer, count in other.items():
            total[layer] = total.get(layer, 0) + count
    return total


def _base(layer: Layer) -> int:
    """Return the layer that others were merged into: the first, whatever it counts for."""
    return min(layer)


def merging(read: Reader, config: PretrainedConfig, merged: Merged) -> Reader:
    """Return a reader that gives the weights of kept layers as `merged` says, float32, and those of other layers as
    `read` does."""
    family = family_of(config)
    products = {weight.name.rpartition(".")[0] for weight in weights(config) if weight.matmul}

    def merged_read(name: str) -> Tensor:
        layer, local = split_name(family, name)
        if layer is None or merged.get(layer, {layer: 1}) == {layer: 1} or name.rpartition(".")[0] not in products:
            return read(name)
        parts = [count * read(f"{family.layers}.{other}.{local}").float() for other, count in merged[layer].items()]
        return torch.stack(parts).sum(0)

    return merged_read


def merged_model(
    read: Reader, config: PretrainedConfig, architecture: Architecture, merged: Merged
) -> PreTrainedModel:  # fmt: skip
    """Return the student of `architecture`, whose widths are the teacher's, with weights of its own, float32."""
    state = trimmed_weights(merging(read, config, merged), config, architecture, Rankings.identity(config))
    own = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in state.items()}
    return student_of(student_config(config, architecture), own)


def _states(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Return the final hidden states, after the norm, (windows, length x hidden_size)."""
    with torch.no_grad():
        return final_hidden(device.on_device(model), rows).float().flatten(1)
