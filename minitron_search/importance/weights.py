"""Importance read from weights: what every hidden channel, MLP neuron and head owns, and how large it is.

An element owns a slice of every weight that has its axis: a neuron a row of the up and gate projections and a column
of the down projection, a head its rows of q and columns of o and an equal share of its group's rows of k and v, a
hidden channel a row or column of every matrix of the model, tied ones once, and an entry of every norm.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minitron_search.models.architecture import Weight, parts
from minitron_search.models.families import sizes, weights, whole
from minitron_search.pruning.rankings import apart

Reader = Callable[[str], Tensor]
# by (weight name, axis, part of a fused axis): one number for each slice along that axis, (channels,), (neurons,),
# (heads,) or (groups,)
SliceSums = dict[tuple[str, int, int], Tensor]

CUT = ("hidden", "mlp", "query", "key_value")  # the dimensions that width axes cut


class Scores(NamedTuple):
    """One score an element. hidden: (hidden_size,). mlp: (layers, intermediate_size). heads: (layers,
    num_attention_heads). rotation: (hidden_size, hidden_size) where `hidden` is of the rotated teacher's channels: its
    columns are theirs."""

    hidden: Tensor
    mlp: Tensor
    heads: Tensor
    rotation: Tensor | None = None


def magnitude(config: PretrainedConfig, read: Reader) -> Scores:
    """Return the L2 norm of everything an element owns."""
    sums: SliceSums = {}
    dims = sizes(config)
    for weight in weights(config):
        sums |= slice_sums(weight, read(weight.name).float().square(), dims)
    squares = of_elements(config, sums)
    return Scores(squares.hidden.sqrt(), squares.mlp.sqrt(), squares.heads.sqrt())


def wanda(config: PretrainedConfig, read: Reader, squares: Mapping[str, Tensor]) -> Scores:
    """Return |weight| x L2 norm of the activations it multiplies (Wanda, arXiv:2306.11695, equation 1), summed over
    what an element owns. Norms, biases and a look-up table multiply no activations and are left out.

    squares: by weight name, the sum over calibration tokens of each input's square, (inputs,).
    """
    sums: SliceSums = {}
    inputs, dims = input_axes(config), sizes(config)
    for weight in weights(config):
        if weight.matmul:
            matrix = read(weight.name).float().abs()
            norms = squares[weight.name].to(matrix.device).sqrt()
            scaled = matrix * (norms if inputs[weight.name] == 1 else norms[:, None])
            sums |= slice_sums(weight, scaled, dims)
    return of_elements(config, sums)


def random(config: PretrainedConfig, seed: int) -> Scores:
    """Return uniform scores in [0, 1): the control that ignores the model."""
    generator, shape = torch.Generator().manual_seed(seed), whole(config)
    return Scores(
        torch.rand(shape.hidden_size, generator=generator),
        torch.rand(shape.num_hidden_layers, shape.intermediate_size, generator=generator),
        torch.rand(shape.num_hidden_layers, shape.num_attention_heads, generator=generator),
    )


def slice_sums(weight: Weight, values: Tensor, dims: Mapping[str, int]) -> SliceSums:
    """Sum `values`, of the shape of `weight`, over each element's slice: an entry for every axis that can be cut.
    A slice of the query or key-value axis is a whole head or group. dims: the teacher's `sizes`."""
    sums = {}
    for axis, dim in enumerate(weight.dims):
        if not set(parts(dim)) <= set(CUT):
            continue
        total = values.sum([other for other in range(values.ndim) if other != axis]) if values.ndim > 1 else values
        for part, (name, own) in enumerate(zip(parts(dim), apart(dim, total, dims), strict=True)):
            per_head = name in ("query", "key_value")
            sums[weight.name, axis, part] = own.unflatten(0, (-1, dims["head_dim"])).sum(1) if per_head else own
    return sums


def of_elements(config: PretrainedConfig, sums: SliceSums) -> Scores:
    """Return the sum over an element's slices. Every head of a group owns an equal share of its key and value heads."""
    shape = whole(config)
    layers, group_size = shape.num_hidden_layers, shape.num_attention_heads // shape.num_key_value_heads
    scores = Scores(
        torch.zeros(shape.hidden_size),
        torch.zeros(layers, shape.intermediate_size),
        torch.zeros(layers, shape.num_attention_heads),
    )
    known = {weight.name: weight for weight in weights(config)}
    for (name, axis, part), total in sums.items():
        weight, total = known[name], total.cpu()
        dim = parts(weight.dims[axis])[part]
        if dim == "hidden":
            scores.hidden.add_(total)
        elif dim == "mlp":
            scores.mlp[weight.layer].add_(total)
        elif dim == "query":
            scores.heads[weight.layer].add_(total)
        else:
            assert dim == "key_value", weight
            scores.heads[weight.layer].add_(total.repeat_interleave(group_size) / group_size)
    return scores


def input_axes(config: PretrainedConfig) -> dict[str, int]:
    """Return which axis of every matrix product's weight is its input: 1 of a Linear, 0 of GPT-2's Conv1D."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {
        weight.name: 0 if isinstance(model.get_submodule(weight.name.rpartition(".")[0]), Conv1D) else 1
        for weight in weights(config)
        if weight.matmul
    }


class InputSquares:
    """Sums over tokens of the squared inputs of every matrix product, fed by hooks during the forward pass."""

    def __init__(self, teacher: PreTrainedModel):
        self.products = [weight for weight in weights(teacher.config) if weight.matmul]
        self.totals: dict[str, Tensor] = {}
        self.last: tuple[Tensor | None, Tensor | None] = (None, None)

    @contextmanager
    def watching(self, teacher: PreTrainedModel) -> Iterator[None]:
        handles = [
            teacher.get_submodule(weight.name.rpartition(".")[0]).register_forward_pre_hook(self._input(weight.name))
            for weight in self.products
            if not weight.embedding  # the output head is not called: its input is the body's output
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_of_rows(self, final: Tensor) -> None:
        for weight in self.products:
            if weight.embedding:
                self._add(weight.name, final)
        self.last = (None, None)

    def _input(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple) -> None:
            self._add(name, inputs[0])

        return hook

    def _add(self, name: str, x: Tensor) -> None:
        if x is not self.last[0]:  # q, k and v read one tensor, gate and up another
            self.last = (x, x.flatten(0, -2).float().square().sum(0))
        assert self.last[1] is not None
        self.totals[name] = self.totals.get(name, 0) + self.last[1]
