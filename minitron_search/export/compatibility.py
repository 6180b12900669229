"""Compatibility of a student with llama.cpp and vLLM: what their code assumes of a family beside its config.json.

Read from the code of vLLM 0.33, and for llama.cpp of October 2026, whose converter and runtime were run on students
of the families (docs/deploying.md).
"""

from transformers import PretrainedConfig

from minitron_search.models.families import sizes

NOT_CONVERTED = {  # by convert_hf_to_gguf.py
    "ministral": "it does not know the family",
    "opt": "it does not know the family",
    "gpt_neox": "it reads rotary_pct, which transformers 5 takes out of a configuration, and needs transformers 4",
}
# families whose attention a tool makes as wide as hidden_size, whatever head_dim and num_attention_heads say
AS_WIDE_AS_HIDDEN = {
    "llama.cpp": ("qwen2", "granite", "olmo", "olmo2", "olmo3", "phi", "phi3", "exaone4", "nemotron", "starcoder2",
                  "cohere"),
    "vLLM": ("qwen2",),
}  # fmt: skip
FOUR_TIMES = ("phi", "gpt2")  # the converter takes their MLP to be four times as wide as hidden_size
# families whose embedding is the output head, whatever tie_word_embeddings says (importance.method pca unties it)
ALWAYS_TIED = {"llama.cpp": ("gemma", "gemma2", "cohere"), "vLLM": ("gemma2", "cohere")}
# lists over layers that llama.cpp does not read: every so many layers it takes one to be of the other kind
PERIODS = {
    "gemma2": ("layer_types", "full_attention", 2),
    "gemma3_text": ("layer_types", "full_attention", 6),
    "smollm3": ("no_rope_layers", 0, 4),
}


def refusals(config: PretrainedConfig) -> dict[str, str]:
    """Return, by tool, why it refuses a student of this configuration or would compute something else."""
    reasons = {}
    name, dims = config.model_type, sizes(config)
    for tool, families in AS_WIDE_AS_HIDDEN.items():
        if name in families and dims["query"] != dims["hidden"]:
            reasons[tool] = (f"it takes the heads of a {name} to be hidden_size / num_attention_heads wide, and here "
                           f"{config.num_attention_heads} of {dims['head_dim']} are not {dims['hidden']}")  # fmt: skip
    if name in NOT_CONVERTED:
        reasons["llama.cpp"] = f"{NOT_CONVERTED[name]} ({name})"
    if name in FOUR_TIMES and dims["mlp"] != 4 * dims["hidden"]:
        reasons["llama.cpp"] = (
            f"it takes the MLP of a {name} to be 4 x {dims['hidden']} wide, and this one is {dims['mlp']}"
        )
    for tool, families in ALWAYS_TIED.items():
        if name in families and not config.tie_word_embeddings:
            reasons[tool] = (
                f"it takes the embedding of a {name} for its output head, and this one has a head of its own"
            )
    key, other, period = PERIODS.get(name, ("", None, 0))
    if key and [value == other for value in getattr(config, key)] != [
        layer % period == period - 1 for layer in range(config.num_hidden_layers)
    ]:
        reasons["llama.cpp"] = f"it takes {key} of a {name} to repeat every {period} layers, and these do not"
    if getattr(config, "query_pre_attn_scalar", dims["head_dim"]) != dims["head_dim"]:
        reasons["llama.cpp"] = f"it scales the attention of a {name} by head_dim, and this has a query_pre_attn_scalar"
    return reasons


def renamed(teacher: PretrainedConfig, student: PretrainedConfig) -> str:
    """Return why a student is stored as one of another family than its teacher; an empty text where it is not."""
    if student.model_type == teacher.model_type:
        return ""
    return (f"Its teacher is a {teacher.model_type} and it is stored as a {student.model_type}, which computes the "
            f"same: transformers takes no {teacher.model_type} whose hidden_size, here {student.hidden_size}, its "
            f"num_attention_heads, here {student.num_attention_heads}, do not divide.")  # fmt: skip


def complete(config: PretrainedConfig) -> None:
    """Add the keys of transformers 4 that llama.cpp's converter reads and that transformers 5 does not write."""
    if config.model_type == "gpt2":
        config.n_ctx = config.n_positions
    if config.model_type == "gpt_neox":
        config.rotary_pct = config.rope_parameters["partial_rotary_factor"]
