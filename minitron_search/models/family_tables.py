"""The decoder families, as declarations: names of modules, axes of weights, configuration keys; and what is refused.

A new family is an entry of `FAMILIES`. `families.py` reads these tables and nothing else knows a family by name.
Checked against the modules of transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """One family of decoders: its modules, the axes of its weights, its configuration keys.

    Names are relative: module names to a decoder layer, weight names in `layer_weights` likewise.

    Dimensions: `hidden`, `mlp` (intermediate_size), `query` (num_attention_heads * head_dim), `key_value`
    (num_key_value_heads * head_dim), and, never trimmed, `head_dim`, `vocab` and `position`. Fused ones:
    `query+key_value+key_value` are laid one after another, `query|key_value|key_value` one group of heads after
    another.

    head_dim: `free`, a configuration may give any; `dividing`, any, as long as num_attention_heads divides
    hidden_size; `derived`, it is hidden_size / num_attention_heads, so hidden_size shrinks with the heads.
    """

    model_types: tuple[str, ...]
    layers: str  # the list of decoder layers
    final_norm: str
    # whose output feeds attention or the MLP; where none does (`readers`), whose output joins the stream that does
    norms: tuple[str, ...]
    attention_output: str  # its input is the heads' output
    mlp_output: str  # its input is the MLP's neurons
    weights: Mapping[str, tuple[str, ...]]
    layer_weights: Mapping[str, tuple[str, ...]]
    readers: tuple[str, ...] = ()  # modules that read the residual stream itself, where no norm feeds them (OLMo 2)
    per_layer: tuple[str, ...] = ()  # configuration keys that are lists over layers
    head_dim: Literal["free", "dividing", "derived"] = "free"
    grouped_query: bool = True  # False: no num_key_value_heads, every query head has its own
    hidden_keys: tuple[str, ...] = ("hidden_size",)  # configuration keys that hold it
    mlp_key: str = "intermediate_size"
    position_offset: int = 0  # rows of the learned positions before the first
    embedding_scaled: bool = False  # by sqrt(hidden_size), and norms multiply by 1 + weight
    stored: Mapping[str, str] = field(default_factory=dict)  # beginnings of names in files -> in the model
    # of a layer: what old files hold beside the weights, masks and frequencies that modules make themselves
    extras: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    variants: tuple[tuple[str, Any, Mapping[str, Any]], ...] = ()  # (key, value): the fields that differ then
    unsupported: tuple[tuple[str, Any, str], ...] = ()  # (key, value): why not


def _layer_weights(parts: Mapping[str, tuple[str, ...]], output: int = 0) -> dict[str, tuple[str, ...]]:
    """List weights and biases of linear layers and of norms, by module name. output: where a weight has its output
    dimension, last (-1) in Conv1D."""
    listed = {}
    for name, dims in parts.items():
        listed[f"{name}.weight"] = dims
        listed[f"{name}.bias"] = (dims[output],)
    return listed


_LLAMA_WEIGHTS = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "model.norm.weight": ("hidden",),
    "model.norm.bias": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}
_LLAMA_LAYER = _layer_weights({
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key_value", "hidden"),
    "self_attn.v_proj": ("key_value", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_proj": ("mlp", "hidden"),
    "mlp.up_proj": ("mlp", "hidden"),
    "mlp.down_proj": ("hidden", "mlp"),
})  # fmt: skip
_HEAD_NORMS = {"self_attn.q_norm.weight": ("head_dim",), "self_attn.k_norm.weight": ("head_dim",)}
_SANDWICH_NORMS = {
    "pre_feedforward_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
}

LLAMA = Family(
    model_types=("llama",),
    layers="model.layers",
    final_norm="model.norm",
    norms=("input_layernorm", "post_attention_layernorm"),
    attention_output="self_attn.o_proj",
    mlp_output="mlp.down_proj",
    weights=_LLAMA_WEIGHTS,
    layer_weights=_LLAMA_LAYER,
    per_layer=("layer_types",),
    head_dim="dividing",
)
# Qwen2.5 is qwen2, SmolLM2 is llama. Where the class names no head_dim (qwen2, smollm3, granite, olmo2, phi3) its
# modules still read one from the configuration.
LLAMA_LIKE = replace(
    LLAMA, model_types=("mistral", "ministral", "qwen2", "granite", "seed_oss", "ernie4_5", "olmo"), head_dim="free"
)
SMOLLM3 = replace(LLAMA_LIKE, model_types=("smollm3",), per_layer=("layer_types", "no_rope_layers"))
QWEN3 = replace(LLAMA_LIKE, model_types=("qwen3",), layer_weights=_LLAMA_LAYER | _HEAD_NORMS)

GEMMA = replace(LLAMA_LIKE, model_types=("gemma",), embedding_scaled=True)
GEMMA2 = replace(
    LLAMA,
    model_types=("gemma2",),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    layer_weights=_LLAMA_LAYER | _SANDWICH_NORMS,
    embedding_scaled=True,
    unsupported=(("use_bidirectional_attention", True, "its attention is not causal"),),
)
GEMMA3 = replace(GEMMA2, model_types=("gemma3_text",), layer_weights=_LLAMA_LAYER | _SANDWICH_NORMS | _HEAD_NORMS)

PHI3 = replace(
    LLAMA_LIKE,
    model_types=("phi3",),
    layer_weights=_LLAMA_LAYER
    | {
        "self_attn.qkv_proj.weight": ("query+key_value+key_value", "hidden"),
        "mlp.gate_up_proj.weight": ("mlp+mlp", "hidden"),
    },
    # its check of long RoPE reads head_dim as hidden_size / num_attention_heads, even where one is given
    variants=(("rope_parameters.rope_type", "longrope", {"head_dim": "derived"}),),
)

OLMO2 = replace(
    LLAMA_LIKE,
    model_types=("olmo2",),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    readers=("self_attn.q_proj", "mlp.gate_proj"),
    layer_weights=_LLAMA_LAYER
    | _SANDWICH_NORMS
    | {"self_attn.q_norm.weight": ("query",), "self_attn.k_norm.weight": ("key_value",)},
)

OLMO3 = replace(OLMO2, model_types=("olmo3",))
EXAONE4 = replace(OLMO2, model_types=("exaone4",), layer_weights=_LLAMA_LAYER | _SANDWICH_NORMS | _HEAD_NORMS)
GLM4 = replace(
    LLAMA_LIKE,
    model_types=("glm4",),
    layer_weights=_LLAMA_LAYER
    | {
        "mlp.gate_up_proj.weight": ("mlp+mlp", "hidden"),
        "post_self_attn_layernorm.weight": ("hidden",),
        "post_mlp_layernorm.weight": ("hidden",),
    },
)

# Minitron-4B and 8B and the 15B teacher they were cut from: a plain MLP, norms that multiply by 1 + weight
NEMOTRON = replace(LLAMA_LIKE, model_types=("nemotron",))
STARCODER2 = replace(
    LLAMA_LIKE,
    model_types=("starcoder2",),
    mlp_output="mlp.c_proj",
    layer_weights=_LLAMA_LAYER | _layer_weights({"mlp.c_fc": ("mlp", "hidden"), "mlp.c_proj": ("hidden", "mlp")}),
)
COHERE = replace(
    LLAMA_LIKE,
    model_types=("cohere",),
    norms=("input_layernorm",),
    unsupported=(("use_qk_norm", True, "its query and key norms have a weight a head"),),
)
PHI = replace(
    LLAMA_LIKE,
    model_types=("phi",),
    final_norm="model.final_layernorm",
    norms=("input_layernorm",),
    attention_output="self_attn.dense",
    mlp_output="mlp.fc2",
    weights=_LLAMA_WEIGHTS
    | {
        "model.final_layernorm.weight": ("hidden",),
        "model.final_layernorm.bias": ("hidden",),
        "lm_head.bias": ("vocab",),
    },
    layer_weights=_LLAMA_LAYER
    | _layer_weights({
        "self_attn.dense": ("hidden", "query"),
        "mlp.fc1": ("mlp", "hidden"),
        "mlp.fc2": ("hidden", "mlp"),
    }),
    unsupported=(("qk_layernorm", True, "its query and key norms follow no axis that is described here"),),
)  # fmt: skip

STABLELM = replace(
    LLAMA,
    model_types=("stablelm",),
    head_dim="derived",
    variants=(("use_parallel_residual", True, {"norms": ("input_layernorm",)}),),
    unsupported=(("qk_layernorm", True, "its query and key norms are a module a head"),),
)

GPT_NEOX = Family(
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    norms=("input_layernorm", "post_attention_layernorm"),
    attention_output="attention.dense",
    mlp_output="mlp.dense_4h_to_h",
    weights={
        "gpt_neox.embed_in.weight": ("vocab", "hidden"),
        "gpt_neox.final_layer_norm.weight": ("hidden",),
        "gpt_neox.final_layer_norm.bias": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    },
    layer_weights=_layer_weights({
        "input_layernorm": ("hidden",),
        "post_attention_layernorm": ("hidden",),
        "attention.query_key_value": ("query|key_value|key_value", "hidden"),
        "attention.dense": ("hidden", "query"),
        "mlp.dense_h_to_4h": ("mlp", "hidden"),
        "mlp.dense_4h_to_h": ("hidden", "mlp"),
    }),
    head_dim="derived",
    grouped_query=False,
    stored={"embed_out.": "lm_head."},
    extras=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)  # fmt: skip

GPT2 = Family(
    model_types=("gpt2",),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    norms=("ln_1", "ln_2"),
    attention_output="attn.c_proj",
    mlp_output="mlp.c_proj",
    weights={
        "transformer.wte.weight": ("vocab", "hidden"),
        "transformer.wpe.weight": ("position", "hidden"),
        "transformer.ln_f.weight": ("hidden",),
        "transformer.ln_f.bias": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    },
    layer_weights=_layer_weights(
        {
            "ln_1": ("hidden",),
            "attn.c_attn": ("hidden", "query+key_value+key_value"),
            "attn.c_proj": ("query", "hidden"),
            "ln_2": ("hidden",),
            "mlp.c_fc": ("hidden", "mlp"),
            "mlp.c_proj": ("mlp", "hidden"),
        },
        output=-1,
    ),
    head_dim="derived",
    grouped_query=False,
    mlp_key="n_inner",
    stored={name: f"transformer.{name}" for name in ("wte.", "wpe.", "h.", "ln_f.")},
    extras=("attn.bias", "attn.masked_bias"),
    unsupported=(
        ("scale_attn_by_inverse_layer_idx", True, "its attention is scaled by the layer's index"),
        ("add_cross_attention", True, "it attends to an encoder"),
    ),
)

OPT = Family(
    model_types=("opt",),
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    attention_output="self_attn.out_proj",
    mlp_output="fc2",
    weights={
        "model.decoder.embed_tokens.weight": ("vocab", "hidden"),
        "model.decoder.embed_positions.weight": ("position", "hidden"),
        "model.decoder.final_layer_norm.weight": ("hidden",),
        "model.decoder.final_layer_norm.bias": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    },
    layer_weights=_layer_weights({
        "self_attn.q_proj": ("query", "hidden"),
        "self_attn.k_proj": ("key_value", "hidden"),
        "self_attn.v_proj": ("key_value", "hidden"),
        "self_attn.out_proj": ("hidden", "query"),
        "self_attn_layer_norm": ("hidden",),
        "fc1": ("mlp", "hidden"),
        "fc2": ("hidden", "mlp"),
        "final_layer_norm": ("hidden",),
    }),
    head_dim="derived",
    grouped_query=False,
    hidden_keys=("hidden_size", "word_embed_proj_dim"),
    mlp_key="ffn_dim",
    position_offset=2,
    stored={"decoder.": "model.decoder."},
    unsupported=(
        ("do_layer_norm_before", False, "it normalises after each sum and projects its embeddings (OPT-350m)"),
        ("_remove_final_layer_norm", True, "it has no final norm"),
    ),
)  # fmt: skip

FAMILIES = (
    LLAMA, LLAMA_LIKE, SMOLLM3, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI, PHI3, OLMO2, OLMO3, EXAONE4, GLM4, NEMOTRON,
    STARCODER2, COHERE, STABLELM, GPT_NEOX, GPT2, OPT,
)  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """A refusal and its reason, told by the family's name or by a key that its configuration has."""

    reason: str
    model_types: tuple[str, ...]
    keys: tuple[str, ...]


ENCODER_DECODER = Refusal(
    "an encoder-decoder, and every axis here is a decoder's; valid: a decoder-only model",
    ("t5", "mt5", "umt5", "t5gemma", "bart", "mbart", "pegasus", "marian", "whisper"),
    (),  # its configuration says is_encoder_decoder
)
REFUSED = (
    Refusal(
        "a multimodal wrapper, and only a language model alone is trimmed; valid: its text model, saved by itself",
        ("gemma3", "gemma3n", "gemma4", "llama4", "llava", "llava_next", "mistral3", "mllama", "paligemma", "qwen2_vl",
         "qwen2_5_vl", "qwen2_5_omni", "qwen3_vl", "qwen3_5", "smolvlm", "idefics3", "phi4_multimodal"),
        ("vision_config", "audio_config", "text_config", "thinker_config"),
    ),
    ENCODER_DECODER,
    Refusal(
        "a state-space or hybrid model, whose layers have axes that are not described here; valid: a pure transformer",
        ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "nemotron_h", "granitemoehybrid",
         "falcon_h1", "recurrent_gemma", "rwkv", "lfm2", "qwen3_next", "olmo_hybrid"),
        ("mamba_d_state", "mamba_expand", "mamba_num_heads", "state_size", "ssm_cfg", "linear_num_key_heads",
         "hybrid_override_pattern", "conv_L_cache", "lru_width"),
    ),
    Refusal(
        "it attends through multi-head latent attention, whose heads share low-rank projections; "
        "valid: a model with plain or grouped-query attention",
        ("deepseek_v2", "deepseek_v3", "minicpm3", "kimi_k2", "longcat_flash"),
        ("kv_lora_rank", "q_lora_rank"),
    ),
    Refusal(
        "a mixture of experts, and experts are not an axis here; valid: a dense model",
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "granitemoeshared", "gpt_oss", "dbrx",
         "jetmoe", "ernie4_5_moe", "glm4_moe", "flex_olmo", "minimax"),
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
    ),
)  # fmt: skip
