"""The output head, from final hidden states to logits: one way to build it, one to apply it."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from minitron_search.models.families import vocabulary_tables, weights
from minitron_search.models.loading import reader


class OutputHead(NamedTuple):
    """logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap).

    Granite has a scale (it divides by `logits_scaling`), Cohere too (`logit_scale`), Gemma 2 a cap.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of normed hidden states (..., H), scaled and capped as the family does."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def frozen(self, precision: str) -> "OutputHead":
        """Return the head without gradients, its weight once and for all in the dtype of the products."""
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        bias = None if self.bias is None else self.bias.detach().float()
        return self._replace(weight=self.weight.detach().to(dtype), bias=bias)


def output_head(model: PreTrainedModel | Path) -> OutputHead:
    """Build the head of a model, on its own weights, or of the model in a folder, memory-mapped."""
    if isinstance(model, Path):
        config, read = AutoConfig.from_pretrained(model, trust_remote_code=False), reader(model)
        listed = weights(config)
        biases = [read(weight.name) for weight in listed if weight.dims == ("vocab",)]
        weight, bias = read(vocabulary_tables(listed)[-1]), biases[0] if biases else None
    else:
        config, module = model.config, model.get_output_embeddings()
        weight, bias = module.weight, module.bias
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    return OutputHead(weight, bias, scale, getattr(config, "final_logit_softcapping", None))
