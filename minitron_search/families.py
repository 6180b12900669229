"""Where each axis lives in each decoder family; what is refused, and why.

A family is a declaration: the names of its modules and, for every weight, which dimension is which axis. All
that trims, permutes or counts reads that table, so it is written once and holds for every model of the family.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, PretrainedConfig, PreTrainedModel

from minitron_search.architecture import Architecture, Weight


@dataclass(frozen=True)
class Family:
    """Names are relative: module names to a decoder layer, weight names in `layer_weights` likewise.

    Dimensions: `hidden`, `mlp` (intermediate_size), `query` (num_attention_heads * head_dim), `key_value`
    (num_key_value_heads * head_dim), `head_dim`, `vocab`.
    """

    model_types: tuple[str, ...]
    layers: str  # the list of decoder layers
    norms: tuple[str, ...]  # whose output feeds attention or the MLP
    attention_output: str  # its input is the heads' output
    mlp_output: str  # its input is the MLP's neurons
    weights: dict[str, tuple[str, ...]]
    layer_weights: dict[str, tuple[str, ...]]
    per_layer: tuple[str, ...] = ()  # configuration keys that are lists over layers


LLAMA = Family(
    model_types=("llama", "mistral"),
    layers="model.layers",
    norms=("input_layernorm", "post_attention_layernorm"),
    attention_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    weights={
        "model.embed_tokens.weight": ("vocab", "hidden"),
        "model.norm.weight": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    },
    layer_weights={
        "input_layernorm.weight": ("hidden",),
        "post_attention_layernorm.weight": ("hidden",),
        "self_attn.q_proj.weight": ("query", "hidden"),
        "self_attn.q_proj.bias": ("query",),
        "self_attn.k_proj.weight": ("key_value", "hidden"),
        "self_attn.k_proj.bias": ("key_value",),
        "self_attn.v_proj.weight": ("key_value", "hidden"),
        "self_attn.v_proj.bias": ("key_value",),
        "self_attn.o_proj.weight": ("hidden", "query"),
        "self_attn.o_proj.bias": ("hidden",),
        "mlp.gate_proj.weight": ("mlp", "hidden"),
        "mlp.gate_proj.bias": ("mlp",),
        "mlp.up_proj.weight": ("mlp", "hidden"),
        "mlp.up_proj.bias": ("mlp",),
        "mlp.down_proj.weight": ("hidden", "mlp"),
        "mlp.down_proj.bias": ("hidden",),
    },
    per_layer=("layer_types",),
)

FAMILIES = (LLAMA,)


def family_of(config: PretrainedConfig) -> Family:
    """Raises ValueError for a family that is not supported, naming those that are."""
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    if getattr(config, "quantization_config", None):
        raise ValueError("teacher.model: its weights are quantised, and trimming needs full weights; "
                         "valid: the unquantised model it was made from")  # fmt: skip
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    raise ValueError(f"teacher.model: family {config.model_type!r} is not supported; supported: {supported}")


def sizes(config: PretrainedConfig) -> dict[str, int]:
    """The size of every named dimension, and `layers`."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {
        "hidden": config.hidden_size,
        "mlp": config.intermediate_size,
        "query": config.num_attention_heads * head_dim,
        "key_value": key_value_heads * head_dim,
        "head_dim": head_dim,
        "vocab": config.vocab_size,
        "layers": config.num_hidden_layers,
    }


def whole(config: PretrainedConfig) -> Architecture:
    """The teacher itself as an architecture: the identity of trimming."""
    dims = sizes(config)
    return Architecture(
        hidden_size=dims["hidden"],
        intermediate_size=dims["mlp"],
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=dims["key_value"] // dims["head_dim"],
        layers=tuple(range(config.num_hidden_layers)),
    )


def sizes_of(config: PretrainedConfig, architecture: Architecture) -> dict[str, int]:
    """The dimensions of `architecture` inside the teacher `config`."""
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
    """The configuration a stock `from_pretrained` needs for `architecture`; `head_dim` is always written."""
    family = family_of(config)
    student = copy.deepcopy(config)
    if config.model_type == "llama" and architecture.hidden_size % architecture.num_attention_heads:
        student = _as_mistral(config)
    student.hidden_size = architecture.hidden_size
    student.intermediate_size = architecture.intermediate_size
    student.num_attention_heads = architecture.num_attention_heads
    student.num_key_value_heads = architecture.num_key_value_heads
    student.num_hidden_layers = architecture.num_hidden_layers
    student.head_dim = sizes(config)["head_dim"]
    for key in family.per_layer:
        values = getattr(config, key, None)
        if values is not None:
            setattr(student, key, [values[layer] for layer in architecture.layers])
    return student


def _as_mistral(config: PretrainedConfig) -> PretrainedConfig:
    """The same function under a name whose configuration may say hidden_size 448 with 6 heads of 64.

    transformers 5 refuses that of `llama` even with `head_dim` written (huggingface/transformers#46082); without
    biases and without a sliding window Mistral is Llama, weight names included.
    """
    known = {key: value for key, value in config.to_dict().items() if key in MistralConfig.__dataclass_fields__}
    known |= {"model_type": "mistral", "sliding_window": None, "architectures": ["MistralForCausalLM"]}
    return MistralConfig(**known)


def is_expressible(config: PretrainedConfig, architecture: Architecture) -> bool:
    """Whether a stock configuration can say this shape: Llama with biases needs heads that divide hidden_size."""
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return not (config.model_type == "llama" and biased
                and architecture.hidden_size % architecture.num_attention_heads)  # fmt: skip


def weights(config: PretrainedConfig) -> list[Weight]:
    """Every parameter of the model `config` describes, tied ones once, with the axis of each dimension.

    The names are those of the model itself, built without memory: a weight the family does not declare, or of
    another size than its dimensions, is refused (ValueError) rather than copied wrongly.
    """
    family, dims = family_of(config), sizes(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    listed = []
    for name, parameter in model.named_parameters():
        layer, local = split_name(family, name)
        declared = family.weights.get(local) if layer is None else family.layer_weights.get(local)
        if declared is None or tuple(parameter.shape) != tuple(dims[dim] for dim in declared):
            raise ValueError(f"teacher.model: this {config.model_type} has a weight {name} of shape "
                             f"{tuple(parameter.shape)} that its family does not declare")  # fmt: skip
        embedding = "vocab" in declared
        lookup = parameter is model.get_input_embeddings().weight and not tied
        listed.append(Weight(name, declared, layer, embedding, matmul=len(declared) == 2 and not lookup))
    return listed


def split_name(family: Family, name: str) -> tuple[int | None, str]:
    """(layer, name inside the layer) of a weight; (None, name) for one outside the layers."""
    prefix = family.layers + "."
    if not name.startswith(prefix):
        return None, name
    layer, _, local = name.removeprefix(prefix).partition(".")
    return int(layer), local


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_submodule(family_of(model.config).layers)  # type: ignore[return-value]


def final_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The body's output after the final norm: (batch, length, hidden_size). No key-value cache is kept.

    `attention_mask` may be an additive (batch, 1, length, length) mask.
    """
    output = model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
    )
    return output.last_hidden_state


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Output head on normed hidden states (..., hidden_size): logits (..., vocab)."""
    return model.get_output_embeddings()(hidden)
