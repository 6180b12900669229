"""Tiny random teachers: their shapes, weights, tokenizer and folder, made in milliseconds."""

import inspect
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from minitron_search.models.architecture import Architecture
from minitron_search.models.families import is_expressible, sizes, whole
from minitron_search.models.family_tables import FAMILIES as DECLARED

logging.disable_progress_bar()  # of weights that take milliseconds: they bury what a test that fails says

FAMILIES = {name: family for family in DECLARED for name in family.model_types}
RATIOS = (1, 3, 4, 7)  # query heads per key-value head
WORDS = np.array("the quick brown fox jumps over a lazy dog and runs away, far away; then 12 wolves sleep.".split())


HALF_ROTARY = ("phi", "phi3", "stablelm", "gpt_neox", "nemotron", "glm4")  # half of a head is rotated, in pairs
# (model_type, query heads per key-value head): every family, with every ratio that it can have
HEADED = [(name, ratio) for name, family in FAMILIES.items() for ratio in (RATIOS if family.grouped_query else (1,))]


def family_seeds(seeds: int, more: int = 20) -> list[tuple[str, int]]:
    """(model_type, seed below `seeds`): every family once, each with the next seed, and `more` that are drawn."""
    names = list(FAMILIES)
    once = [(name, place % seeds) for place, name in enumerate(names)]
    left = [(name, seed) for name in names for seed in range(seeds) if (name, seed) not in once]
    return once + [left[at] for at in sorted(np.random.default_rng(0).permutation(len(left))[:more])]


def over(cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of one item that is made of every case: a value of its first argument, or a tuple of its first ones.

    Each has a `tmp_path` and a `monkeypatch` of its own; what fails says of which case it was.
    """
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        fixtures = list(inspect.signature(test).parameters.values())[len(tuples[0]) :]

        def once(**given: Any) -> None:
            for number, case in enumerate(tuples):
                with ExitStack() as stack:
                    own = dict(given)
                    if "tmp_path" in own:
                        own["tmp_path"] = given["tmp_path"] / f"{number}-case"
                        own["tmp_path"].mkdir()
                    if "monkeypatch" in own:
                        own["monkeypatch"] = stack.enter_context(given["monkeypatch"].context())
                    try:
                        test(*case, **own)
                    except Exception as error:
                        error.add_note(f"the case: {', '.join(map(repr, case))}")
                        raise

        once.__signature__ = inspect.Signature(fixtures)  # type: ignore[attr-defined]
        once.__name__, once.__doc__, once.__module__ = test.__name__, test.__doc__, test.__module__
        return once

    return decorated


def config(model_type: str = "llama", **given: Any) -> PretrainedConfig:
    """Three layers, 4 query heads in 2 groups (in 4 where a family has no groups); what is given replaces what is
    here. Names are Llama's, whatever the family calls them."""
    family = FAMILIES[model_type]
    shape = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8 if model_type == "phi" else 6,  # phi rotates half of it, in pairs
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **given,
    }
    shape[family.mlp_key] = shape.pop("intermediate_size")
    if family.head_dim == "derived":
        del shape["head_dim"]
    if not family.grouped_query:
        del shape["num_key_value_heads"]
    return CONFIG_MAPPING[model_type](**shape)


def random_config(seed: int, ratio: int | None = None, model_type: str | None = None, **given: Any) -> PretrainedConfig:
    """Any shape and any option of a family (Llama or Mistral unless one is given), tied or not, any `RATIOS`."""
    draw = np.random.default_rng(seed)
    ratio = ratio or int(draw.choice(RATIOS))
    groups = int(draw.integers(1, 4))
    drawn_type = "llama" if draw.random() < 0.7 else "mistral"
    model_type = model_type or drawn_type
    family = FAMILIES[model_type]
    heads = groups * ratio if family.grouped_query else int(draw.integers(2, 6))
    head_dim = (4 if model_type in HALF_ROTARY else 2) * int(draw.integers(1, 5))
    shape = {
        # some refuse a hidden_size that its heads do not divide, or do not make up
        "hidden_size": heads * (head_dim if family.head_dim == "derived" else int(draw.integers(2, 5))),
        "intermediate_size": int(draw.integers(5, 30)),
        "num_hidden_layers": int(draw.integers(2, 6)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "tie_word_embeddings": bool(draw.integers(2)),
        **_options(model_type, draw),
    }
    return config(model_type, **{**shape, **given})


def _options(model_type: str, draw: np.random.Generator) -> dict[str, Any]:
    def maybe(*names: str) -> dict[str, Any]:
        return {name: bool(draw.integers(2)) for name in names}

    epsilon, theta = float(10 ** draw.uniform(-6, -2)), float(10 ** draw.uniform(2, 5))
    rope = {"rope_type": "default", "rope_theta": theta}
    rms = {"rms_norm_eps": epsilon, "rope_parameters": rope}
    partial = {"rope_parameters": {**rope, "partial_rotary_factor": 0.5}}
    window = {"sliding_window": int(draw.choice([5, 64]))}
    gemma = {
        **window,
        "rms_norm_eps": epsilon,
        "query_pre_attn_scalar": 7,
        "final_logit_softcapping": float(draw.uniform(2, 9)),
    }
    biases = maybe("attention_bias", "mlp_bias")
    return {
        "llama": {**rms, **biases},
        "mistral": {**rms, **window},
        "ministral": {**rms, **window},
        "seed_oss": {**rms, **maybe("attention_bias", "attention_out_bias")},
        "ernie4_5": {**rms, **maybe("use_bias")},
        "olmo": {"rope_parameters": rope, "clip_qkv": float(draw.choice([0.5, 8.0])), **maybe("attention_bias")},
        "qwen2": {**rms, **window, **maybe("use_sliding_window"), "max_window_layers": 1},
        "qwen3": {**rms, **window, **maybe("use_sliding_window", "attention_bias"), "max_window_layers": 1},
        "smollm3": {**rms, **window, **maybe("use_sliding_window"), **biases, "no_rope_layer_interval": 2},
        "granite": {**rms, **biases, "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5,
                    "attention_multiplier": 0.3},
        "gemma": {**rms, **maybe("attention_bias")},
        "gemma2": {**gemma, "rope_parameters": rope, "attn_logit_softcapping": 3.0},
        "gemma3_text": {**gemma, "sliding_window_pattern": 2},
        "phi3": {"rms_norm_eps": epsilon, **window, **partial},
        "phi": {"layer_norm_eps": epsilon, **partial},
        "olmo2": {**rms, **maybe("attention_bias")},
        "olmo3": {**rms, **window, **maybe("attention_bias")},
        "exaone4": {**rms, **window, "sliding_window_pattern": 2},
        "glm4": {"rms_norm_eps": epsilon, **partial, **maybe("attention_bias")},
        "nemotron": {"norm_eps": epsilon, **partial, **maybe("attention_bias", "mlp_bias")},
        "starcoder2": {"norm_epsilon": epsilon, "rope_parameters": rope, **window, **maybe("use_bias")},
        "cohere": {"layer_norm_eps": epsilon, "rope_parameters": rope, **maybe("attention_bias"), "logit_scale": 0.25},
        "stablelm": {"layer_norm_eps": epsilon, **partial, **maybe("use_qkv_bias", "use_parallel_residual")},
        "gpt_neox": {"layer_norm_eps": epsilon, **partial, **maybe("use_parallel_residual", "attention_bias")},
        "gpt2": {"layer_norm_epsilon": epsilon, **maybe("scale_attn_weights")},
        "opt": maybe("enable_bias", "layer_norm_elementwise_affine"),
    }[model_type]  # fmt: skip


def wide_window(model_type: str) -> dict[str, int]:
    """Of a family with sliding windows, one that no test's text leaves."""
    return {"sliding_window": 64} if "sliding_window" in _options(model_type, np.random.default_rng(0)) else {}


def random_architecture(teacher: PretrainedConfig, seed: int, **given: Any) -> Architecture:
    """Any part of the teacher that a stock configuration can say; axes that are given are not drawn, but for a
    hidden_size that the heads make up."""
    draw = np.random.default_rng(seed)
    shape, family = whole(teacher), FAMILIES[teacher.model_type]
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
            **given,
        }
        if family.head_dim == "derived":
            drawn["hidden_size"] = drawn["num_attention_heads"] * sizes(teacher)["head_dim"]
        architecture = Architecture(**drawn)
        if is_expressible(teacher, architecture):
            return architecture


def model(teacher: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Float32, evaluation mode; no weight is at the value a family starts it with, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(teacher, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.3)
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


def input_files(folder: Path) -> Path:
    """A teacher, a text and questions that are all in order: `teacher`, `text.txt` and `questions.jsonl`."""
    teacher_folder(folder / "teacher")
    (folder / "text.txt").write_text(prose(4_000))
    winogrande_file(folder / "questions.jsonl")
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


def sparse_weights(file: Path, config: PretrainedConfig) -> None:
    """Write a safetensors file of `config`'s weights, all zeros, which takes no room on the disk."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        written.truncate(8 + len(text) + end)
