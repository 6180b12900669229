"""The output head: final hidden states to logits, with a family's scale and softcap; one way to build it, one to apply it."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from minitron_search.config.types import Precision
from minitron_search.models.families import vocabulary_tables, weights
from minitron_search.models.loading import reader


class OutputHead(NamedTuple):
    """logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Output head on normed hidden states (..., hidden_size): logits (..., vocab), scaled and capped as the family
    does (Granite divides by `logits_scaling`, Gemma 2 caps)."""
    logits = model.get_output_embeddings()(hidden) * head_scale(model.config)
    cap = head_softcap(model.config)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def head_scale(config: PretrainedConfig) -> float:
    """What the output head's products are multiplied by."""
    return (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)


def head_softcap(config: PretrainedConfig) -> float | None:
    """c where logits are c * tanh(logits / c)."""
    return getattr(config, "final_logit_softcapping", None)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's head with its family's scale (Granite) and soft-cap (Gemma)."""
    head = model.get_output_embeddings()
    return OutputHead(head.weight, head.bias, head_scale(model.config), head_softcap(model.config))


def frozen_head(head: OutputHead, precision: Precision) -> OutputHead:
    """Without gradients, its weight once and for all in the dtype of the products."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    bias = None if head.bias is None else head.bias.detach().float()
    return head._replace(weight=head.weight.detach().to(dtype), bias=bias)


def load_head(folder: Path) -> OutputHead:
    """The output head of such a folder, memory-mapped."""
    config, read = AutoConfig.from_pretrained(folder), reader(folder)
    listed = weights(config)
    biases = [weight.name for weight in listed if weight.dims == ("vocab",)]
    bias = read(biases[0]) if biases else None
    return OutputHead(read(vocabulary_tables(listed)[-1]), bias, head_scale(config), head_softcap(config))
