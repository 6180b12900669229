"""Check that every token a run reads has a row in the embedding of its teacher."""

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from minitron_search.config.schema import Config
from minitron_search.data.corpus import Corpus
from minitron_search.messages.console import say

READ = ("bos_token", "eos_token", "unk_token")  # any text may begin with one, end with one or hold one
NAMED = ("bos_token_id", "eos_token_id")  # what generate() begins and ends with, where it is given no other


def check_special_tokens(config: Config, tokenizer: PreTrainedTokenizerBase, pruned: PretrainedConfig) -> None:
    """Raise ValueError if a special token that texts are made of is no row of the embedding; say it of one that only
    the model's configuration names. No run reads that one, and GPT-2's stay in models of other vocabularies."""
    for name in READ:
        token, number = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        if number is not None and number >= pruned.vocab_size:
            where = f"teacher.model: {config.teacher.model!r}: its {name}"
            raise ValueError(_beyond(where, token, number, pruned.vocab_size))
    for name in NAMED:
        named = getattr(pruned, name, None)
        for number in named if isinstance(named, list) else [named]:
            if number is not None and not 0 <= number < pruned.vocab_size:
                say(f"teacher.model: {config.teacher.model}: config.json names {name} {number}, and the embedding has "
                    f"{pruned.vocab_size} rows; this run reads the tokenizer's, generate() of the student may "
                    "not")  # fmt: skip


def check_windows(config: Config, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ValueError for a token of a window that is no row of the embedding; otherwise say which tokens are none."""
    for name in ("validation", "train", "calibration"):
        beyond = _first_beyond(getattr(corpus, name), vocab_size)
        if beyond is not None:
            source = getattr(config.corpus, name) or config.corpus.train  # calibration windows are drawn from it
            token = str(tokenizer.convert_ids_to_tokens(beyond))
            raise ValueError(
                _beyond(f"corpus.{name}: {source!r}: in its texts or between them", token, beyond, vocab_size)
            )
    others = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= vocab_size)
    if others:
        first = ", ".join(f"{token!r} ({number})" for number, token in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        say(f"teacher.model: {config.teacher.model}: its tokenizer has tokens beyond the {vocab_size} rows of the "
            f"embedding, {first}{more}; this run reads none of them")  # fmt: skip


def _first_beyond(windows: np.ndarray, vocab_size: int) -> int | None:
    beyond = windows[windows >= vocab_size]
    return int(beyond[0]) if len(beyond) else None


def _beyond(where: str, token: str, number: int, vocab_size: int) -> str:
    return (f"{where} {token!r} is token {number} of the tokenizer, and the embedding has {vocab_size} rows; valid: a "
            "teacher whose embedding was resized with its tokenizer (resize_token_embeddings)")  # fmt: skip
