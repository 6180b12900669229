"""What a student's configuration says for the engines that load it: its family's name, and keys of transformers 4."""

from transformers import PretrainedConfig


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
