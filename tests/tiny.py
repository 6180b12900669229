"""Tiny random teachers: their shapes, weights, tokenizer and folder, made in milliseconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from minitron_search.architecture import Architecture
from minitron_search.families import is_expressible, whole

RATIOS = (1, 3, 4, 7)  # query heads per key-value head
WORDS = np.array("the quick brown fox jumps over a lazy dog and runs away, far away; then 12 wolves sleep.".split())


def config(model_type: str = "llama", **given: Any) -> PretrainedConfig:
    """Three layers, 4 query heads in 2 groups; what is given replaces what is here."""
    family = {"llama": LlamaConfig, "mistral": MistralConfig}[model_type]
    return family(**{
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **given,
    })  # fmt: skip


def random_config(seed: int, ratio: int | None = None, **given: Any) -> PretrainedConfig:
    """Any shape this project supports: Llama or Mistral, tied or not, biased or not, any `RATIOS`."""
    draw = np.random.default_rng(seed)
    ratio = ratio or int(draw.choice(RATIOS))
    groups = int(draw.integers(1, 4))
    heads = groups * ratio
    model_type = "llama" if draw.random() < 0.7 else "mistral"
    shape = {
        # `llama` refuses a hidden_size that its heads do not divide
        "hidden_size": heads * int(draw.integers(2, 5)),
        "intermediate_size": int(draw.integers(5, 30)),
        "num_hidden_layers": int(draw.integers(2, 6)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 2 * int(draw.integers(1, 5)),
        "tie_word_embeddings": bool(draw.integers(2)),
        "rms_norm_eps": float(10 ** draw.uniform(-6, -2)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(10 ** draw.uniform(2, 5))},
    }
    if model_type == "llama":
        shape |= {"attention_bias": bool(draw.integers(2)), "mlp_bias": bool(draw.integers(2))}
    else:
        shape |= {"sliding_window": int(draw.choice([5, 64]))}
    return config(model_type, **{**shape, **given})


def random_architecture(teacher: PretrainedConfig, seed: int, **given: Any) -> Architecture:
    """Any part of the teacher that a stock configuration can say; axes that are given are not drawn."""
    draw = np.random.default_rng(seed)
    shape = whole(teacher)
    ratio = shape.num_attention_heads // shape.num_key_value_heads
    layers = draw.permutation(shape.num_hidden_layers)[: draw.integers(1, shape.num_hidden_layers + 1)]
    while True:
        groups = given.get("num_key_value_heads", int(draw.integers(1, shape.num_key_value_heads + 1)))
        drawn = {
            "hidden_size": int(draw.integers(1, shape.hidden_size + 1)),
            "intermediate_size": int(draw.integers(1, shape.intermediate_size + 1)),
            "num_attention_heads": groups * int(draw.integers(1, ratio + 1)),
            "num_key_value_heads": groups,
            "layers": tuple(sorted(layers.tolist())),
        }
        architecture = Architecture(**{**drawn, **given})
        if is_expressible(teacher, architecture):
            return architecture


def model(teacher: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Float32, evaluation mode; no weight is at the value a family starts it with, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(teacher, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return made.eval()


def tokens(teacher: PretrainedConfig, rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """(rows, length) int64."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, teacher.vocab_size, (rows, length)))


def logits(of: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """(rows, length, vocab), without a key-value cache."""
    with torch.no_grad():
        return of(input_ids, use_cache=False).logits


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: `<s>` 0, `</s>` 1, 258 in all; no special token is added to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def teacher_folder(folder: Path, seed: int = 0, **given: Any) -> Path:
    """A whole teacher: configuration, weights and tokenizer; 4 layers of hidden_size 24 unless given."""
    made = tokenizer()
    shape = {"vocab_size": len(made), "num_hidden_layers": 4, "max_position_embeddings": 256, **given}
    model(config(**shape), seed).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def winogrande_file(path: Path, examples: int = 4) -> Path:
    """Questions in Winogrande's format, answers alternating."""
    lines = [
        {"sentence": f"Ann met Bea {n} times, _ waved.", "option1": "Ann", "option2": "Bea", "answer": f"{1 + n % 2}"}
        for n in range(examples)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prose(words: int, seed: int = 0) -> str:
    """Text of `words` words, the same every time."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words).tolist())
