"""A decoder LM taken apart: embedding, layers one by one, final norm, output head.

The layers are the model's own modules, called with the arguments its own forward pass gives them (masks, rotary
embeddings); that pass is run once per input with the layers replaced by recorders. A streamed model keeps nothing
of its layers, embedding or head in memory but what is in use: each is mapped from the safetensors files when it is
reached and dropped afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minitron_search.models.device import autocast
from minitron_search.models.families import decoder_layers, family_of, vocabulary_tables, weights
from minitron_search.models.loading import load_teacher, reader
from minitron_search.models.output_head import OutputHead, output_head


class Inputs(NamedTuple):
    """Everything that the layers read. stream: (batch, length, hidden_size) float32, the residual stream before layer
    0. arguments: what each layer is called with beside it, by position and by name."""

    stream: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class LayerwiseModel:
    """One model on one device, its layers called one by one. Calls are made inside `computing()`.

    streamed: layers, embedding and head are read again from `folder` each time they are needed, instead
    of being held in memory. The numbers are the same.
    """

    def __init__(self, folder: Path, precision: str, device: torch.device | str = "cpu", streamed: bool = False):
        self.folder, self.precision, self.device, self.streamed = folder, precision, torch.device(device), streamed
        self.model = load_teacher(folder)  # memory-mapped: nothing is read yet
        self.config = self.model.config
        self.layers = decoder_layers(self.model)
        family = family_of(self.config)
        self.prefix = family.layers
        tables = vocabulary_tables(weights(self.config))
        self.embedding_name, self.head_name = tables[0], tables[-1]  # one table where they are tied
        self._head = output_head(self.model)
        self.embedding: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[assignment]
        if streamed:
            self._drop_weights()
        else:
            self.embedding.to(self.device)
            self._head = self._on_device(self._head)
            for layer in self.layers:
                self._fill(layer, dict(layer.named_parameters()))
        self.body = self.model.base_model
        self.final_norm: nn.Module = self.model.get_submodule(family.final_norm)
        self.recorders = [_Recorder() for _ in self.layers]
        self.model.set_submodule(self.prefix, nn.ModuleList(self.recorders))
        for part in self.body.modules():
            if part is not self.embedding and not list(part.children()):  # final norm, positions, rotary embedding
                part.to(self.device, torch.float32)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with torch.inference_mode(), autocast(self.precision, self.device):
            yield

    def begin(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Inputs:
        """Return what the first layer reads, for arguments as of `families.final_hidden`."""
        with self._present(self.embedding, self.embedding_name.removesuffix(".weight"), cast=False):
            stream = nn.functional.embedding(input_ids.to(self.device), self.embedding.weight).float()
            stream = stream * getattr(self.embedding, "scalar_embed_scale", 1.0)  # Gemma's, in float32
        self.body(inputs_embeds=stream, position_ids=position_ids, attention_mask=attention_mask, use_cache=False)
        return Inputs(self.recorders[0].stream, [recorder.arguments for recorder in self.recorders])

    @contextmanager
    def layer(self, index: int, inputs: Inputs) -> Iterator[Callable[[Tensor], Tensor]]:
        """Give layer `index` as a function of the residual stream before it, which returns the stream after it."""
        module = self.layers[index]
        with self._present(module, f"{self.prefix}.{index}"):
            positional, named = inputs.arguments[index]
            yield lambda stream: module(stream, *positional, **named)

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """Give the output head, in the dtype of the products, for hidden states that went through `final_norm`."""
        if self.streamed:
            yield self._on_device(self._head._replace(weight=reader(self.folder)(self.head_name)))
        else:
            yield self._head

    def _drop_weights(self) -> None:
        for module in (*self.layers, self.embedding, self.model.get_output_embeddings()):
            _empty(module)
        self._head = self._head._replace(weight=self.model.get_output_embeddings().weight)

    @contextmanager
    def _present(self, module: nn.Module, prefix: str, cast: bool = True) -> Iterator[None]:
        if not self.streamed:
            yield
            return
        read = reader(self.folder)  # opened anew: what it has mapped is unmapped with its last tensor
        self._fill(module, {name: read(f"{prefix}.{name}") for name, _ in module.named_parameters()}, cast)
        try:
            yield
        finally:
            _empty(module)

    def _fill(self, module: nn.Module, state: dict[str, Tensor], cast: bool = True) -> None:
        """Give `module` these tensors, its matrices in the dtype of the products: autocast then has no cast to do."""
        dtypes = {2: torch.bfloat16 if self.precision == "bfloat16" else torch.float32}
        placed = {
            name: tensor.detach().to(self.device, dtypes.get(tensor.ndim, torch.float32) if cast else tensor.dtype)
            for name, tensor in state.items()
        }
        module.load_state_dict(placed, assign=True)

    def _on_device(self, head: OutputHead) -> OutputHead:
        return head._replace(weight=head.weight.to(self.device)).frozen(self.precision)


def _empty(module: nn.Module) -> None:
    """Drop the weights, and keep what no file holds (the scale of Gemma's embedding)."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


class _Recorder(nn.Module):
    """A stand-in for a layer that keeps what the layer would have been called with."""

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        self.stream, self.arguments = hidden_states, (positional, named)
        return hidden_states
