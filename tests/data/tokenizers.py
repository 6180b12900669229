"""Small tokenizers that do what large ones are known for: add tokens by themselves, cross words, lose characters."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<en>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def of_bytes(merges: tuple[tuple[str, str], ...] = (), *, words: bool = True, adds: str | None = None) -> Any:
    """Bytes as tokens, `merges` besides; `words`: no merge crosses a space. `adds`: `<s> $A </s>`, in that form."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, *ALPHABET, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, adds)


def without_spaces() -> Any:
    """Letters as tokens and none for a space, capitals or any other character: all of those are lost or `<unk>`."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, "<unk>", *"abcdefghijklmnopqrstuvwxyz."])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "")])
    return _fast(backend, None, unk_token="<unk>")


def of_words(*words: str) -> Any:
    """Whole words as tokens, `<unk>` for any other."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(backend, None, unk_token="<unk>")


def _fast(backend: Tokenizer, adds: str | None, **special: str) -> PreTrainedTokenizerFast:
    if adds is not None:
        numbers = [(token, backend.token_to_id(token)) for token in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<en>"], **special
    )


CROSSING = (("Ġ", "w"), ("s", "Ġw"), ("e", "Ġ"), ("d", "Ġ"))
KINDS = {
    "EOS at the end": of_bytes(adds="$A </s>"),
    "BOS and EOS": of_bytes(adds="<s> $A </s>"),
    "a language tag": of_bytes(adds="<en> $A </s>"),
    "tokens that cross words": of_bytes(CROSSING, words=False),
    "no token for a space": without_spaces(),
}
