"""Find each axis in the model of a configuration, and make the configuration of what is left of it.

The families themselves are declarations (`family_tables.py`): the names of modules and, for every weight, which
dimension is which axis. All that trims, permutes or counts reads them through this module, so it is written once
and holds for every model of every family.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from minitron_search.models.architecture import Architecture, Weight, dimension
from minitron_search.models.family_tables import ENCODER_DECODER, FAMILIES, REFUSED, Family
from minitron_search.models.patches import llama_as_mistral


def family_of(config: PretrainedConfig) -> Family:
    """Return the declaration of this model's family, with what this configuration varies.

    Raises ValueError, with the reason, for what is refused; and for a family nobody declared, naming those that are.
    """
    name = config.model_type
    if getattr(config, "quantization_config", None):
        raise ValueError("teacher.model: its weights are quantised, and trimming needs full weights; "
                         "valid: the unquantised model it was made from")  # fmt: skip
    for family in FAMILIES:
        if name in family.model_types:
            for key, value, reason in family.unsupported:
                if _value(config, key) == value:
                    raise ValueError(f"teacher.model: this {name} has {key} {value}: {reason}; "
                                     f"valid: a {name} with another {key}")  # fmt: skip
            for key, value, fields in family.variants:
                if _value(config, key) == value:
                    family = dataclasses.replace(family, **fields)
            return family
    named = [refused for refused in REFUSED if name in refused.model_types]
    telling = [refused for refused in REFUSED if any(getattr(config, key, None) for key in refused.keys)]
    if config.is_encoder_decoder:
        telling.append(ENCODER_DECODER)
    for refused in named + telling:
        raise ValueError(f"teacher.model: family {name!r} is refused: {refused.reason}")
    supported = ", ".join(sorted(known for family in FAMILIES for known in family.model_types))
    raise ValueError(f"teacher.model: family {name!r} is not supported; supported: {supported}")


def sizes(config: PretrainedConfig) -> dict[str, int]:
    """Return the size of every named dimension, and `layers`."""
    family = family_of(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = (family.grouped_query and getattr(config, "num_key_value_heads", None)) or heads
    return {
        "hidden": config.hidden_size,
        "mlp": getattr(config, family.mlp_key) or 4 * config.hidden_size,  # GPT-2 may leave n_inner to its class
        "query": heads * head_dim,
        "key_value": key_value_heads * head_dim,
        "head_dim": head_dim,
        "vocab": config.vocab_size,
        "position": config.max_position_embeddings + family.position_offset,
        "layers": config.num_hidden_layers,
    }


def whole(config: PretrainedConfig) -> Architecture:
    """Return the teacher itself as an architecture: the identity of trimming."""
    dims = sizes(config)
    return Architecture(
        hidden_size=dims["hidden"],
        intermediate_size=dims["mlp"],
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=dims["key_value"] // dims["head_dim"],
        layers=tuple(range(config.num_hidden_layers)),
    )


def sizes_of(config: PretrainedConfig, architecture: Architecture) -> dict[str, int]:
    """Return the dimensions of `architecture` inside the teacher `config`."""
    dims = sizes(config)
    return {
        **dims,
        "hidden": architecture.hidden_size,
        "mlp": architecture.intermediate_size,
        "query": architecture.num_attention_heads * dims["head_dim"],
        "key_value": architecture.num_key_value_heads * dims["head_dim"],
        "layers": architecture.num_hidden_layers,
    }


def student_config(config: PretrainedConfig, architecture: Architecture) -> PretrainedConfig:
    """Return the configuration that a stock `from_pretrained` needs for `architecture`; `head_dim` is written wherever
    the family reads it. Raises ValueError, with the nearest valid value, for a shape that no stock configuration says.
    """
    family = family_of(config)
    refusal = why_not_expressible(config, architecture)
    if refusal:
        raise ValueError(refusal)
    student = copy.deepcopy(config)
    if config.model_type == "llama" and architecture.hidden_size % architecture.num_attention_heads:
        student = llama_as_mistral(config)
    for key in family.hidden_keys:
        setattr(student, key, architecture.hidden_size)
    setattr(student, family.mlp_key, architecture.intermediate_size)
    student.num_attention_heads = architecture.num_attention_heads
    if family.grouped_query:
        student.num_key_value_heads = architecture.num_key_value_heads
    student.num_hidden_layers = architecture.num_hidden_layers
    if family.head_dim != "derived":
        student.head_dim = sizes(config)["head_dim"]
    for key in family.per_layer:
        values = getattr(config, key, None)
        if values is not None:
            setattr(student, key, [values[layer] for layer in architecture.layers])
    student.__dict__.pop("auto_map", None)  # the student is of a stock class, whatever code came with the teacher
    return student


def is_expressible(config: PretrainedConfig, architecture: Architecture) -> bool:
    """Return True where a stock configuration of the teacher's family can say this shape."""
    return why_not_expressible(config, architecture) is None


def why_not_expressible(config: PretrainedConfig, architecture: Architecture) -> str | None:
    """Return why no stock configuration says this shape, with what it could say; None where one does."""
    family, name = family_of(config), config.model_type
    hidden_size, heads = architecture.hidden_size, architecture.num_attention_heads
    if not family.grouped_query and architecture.num_key_value_heads != heads:
        return (f"num_key_value_heads: {architecture.num_key_value_heads} with num_attention_heads {heads}: every head "
                f"of a {name} has its own key and value; valid: num_key_value_heads {heads}")  # fmt: skip
    if family.head_dim == "derived":
        head_dim = sizes(config)["head_dim"]
        if hidden_size != heads * head_dim:
            return (f"hidden_size: {hidden_size} with num_attention_heads {heads}: a {name} has heads of hidden_size / "
                    f"num_attention_heads, here {head_dim}; valid: hidden_size {heads * head_dim}")  # fmt: skip
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    exported = name == "llama" and not biased  # as Mistral, which has no biases
    if family.head_dim == "dividing" and hidden_size % heads and not exported:
        below = hidden_size - hidden_size % heads
        valid = " or ".join(str(size) for size in (below, below + heads) if 0 < size <= config.hidden_size)
        return (f"hidden_size: {hidden_size} with num_attention_heads {heads}: a {name} needs a hidden_size that "
                f"num_attention_heads divides; valid: {valid or heads}")  # fmt: skip
    return None


def weights(config: PretrainedConfig) -> list[Weight]:
    """List every parameter of the model that `config` describes, tied ones once, with the axis of each dimension.

    The names are those of the model itself, built without memory: a weight the family does not declare, or of
    another size than its dimensions, is refused (ValueError) rather than copied wrongly.
    """
    family, dims = family_of(config), sizes(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    listed = []
    for name, parameter in model.named_parameters():
        layer, local = split_name(family, name)
        declared = family.weights.get(local) if layer is None else family.layer_weights.get(local)
        if declared is None or tuple(parameter.shape) != tuple(dimension(dims, dim) for dim in declared):
            raise ValueError(f"teacher.model: this {config.model_type} has a weight {name} of shape "
                             f"{tuple(parameter.shape)} that its family does not declare")  # fmt: skip
        embedding = "vocab" in declared
        lookup = (parameter is model.get_input_embeddings().weight and not tied) or "position" in declared
        listed.append(Weight(name, declared, layer, embedding, matmul=len(declared) == 2 and not lookup))
    return listed


def vocabulary_tables(listed: list[Weight]) -> list[str]:
    """Return the names of the input embedding and of the output head: one where they are tied."""
    return [weight.name for weight in listed if weight.dims == ("vocab", "hidden")]


def split_name(family: Family, name: str) -> tuple[int | None, str]:
    """Split the name of a weight into (layer, name inside the layer); (None, name) for one outside the layers."""
    prefix = family.layers + "."
    if not name.startswith(prefix):
        return None, name
    layer, _, local = name.removeprefix(prefix).partition(".")
    return int(layer), local


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of the model's decoder layers."""
    return model.get_submodule(family_of(model.config).layers)  # type: ignore[return-value]


def final_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return the body's output after the final norm: (batch, length, hidden_size). No key-value cache is kept.

    `attention_mask` may be an additive (batch, 1, length, length) mask.
    """
    output = model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
    )
    return output.last_hidden_state


def in_model(stored: str) -> str:
    """Return the model's name of a weight that a file may call otherwise (Pythia's head is `embed_out` in files)."""
    for family in FAMILIES:
        for beginning, name in family.stored.items():
            if stored.startswith(beginning):
                return name + stored.removeprefix(beginning)
    return stored


def is_extra(name: str) -> bool:
    """Return True for what files of a family hold beside its weights, by the name that it would have in the model."""
    for family in FAMILIES:
        local = name.removeprefix(family.layers + ".").partition(".")[2]
        if name.startswith(family.layers + ".") and local in family.extras:
            return True
    return False


def _value(config: PretrainedConfig, key: str) -> Any:
    """Return the value of a configuration key, or of a key of a dictionary in it (`rope_parameters.rope_type`)."""
    outer, _, inner = key.partition(".")
    value = getattr(config, outer, None)
    return value.get(inner) if inner and value else value
