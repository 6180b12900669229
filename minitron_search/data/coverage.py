"""Say how much of a text a tokenizer cannot express: unknown tokens, and characters that become no token."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from minitron_search.messages.console import say

SAMPLE = 20_000  # characters of a source that are looked at, when it is tokenised
MATTERS, ALL = 0.01, 0.99  # the shares from which on it is said, and refused


class Coverage(NamedTuple):
    """tokens: how many the sample has. unknown: the share of them that are the unknown token. lost: the share of its
    characters, white space apart, of which no token is made."""

    tokens: float
    unknown: float
    lost: float


def check_expressible(field: str, found: Coverage | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say what share of a source a tokenizer loses, where it matters. Raises ValueError, with the key, if all of it."""
    if found is None or max(found.unknown, found.lost) < MATTERS:
        return
    told = (f"of its first {SAMPLE:,} characters this tokenizer makes {found.tokens:,.0f} tokens, {found.unknown:.1%} "
            f"of them {tokenizer.unk_token!r}, and loses {found.lost:.1%} of the characters")  # fmt: skip
    if not found.tokens or max(found.unknown, found.lost) >= ALL:
        raise ValueError(f"{field}: {told}; valid: a text in the language of teacher.model's tokenizer")
    say(f"{field}: {told}")


def coverage(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Coverage | None:
    """Return what a tokenizer makes of texts, None for none. Only a fast tokenizer says which characters it reads."""
    tokens = unknown = lost = characters = 0
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        tokens += len(encoded["input_ids"])
        if tokenizer.unk_token_id is not None:
            unknown += encoded["input_ids"].count(tokenizer.unk_token_id)
        if tokenizer.is_fast:
            read = {at for start, end in encoded["offset_mapping"] for at in range(start, end)}
            seen = [at for at, character in enumerate(text) if not character.isspace()]
            characters, lost = characters + len(seen), lost + len(set(seen) - read)
    return Coverage(tokens, unknown / max(tokens, 1), lost / max(characters, 1)) if texts else None


def sampled(texts: Iterable[str], sample: list[str]) -> Iterator[str]:
    """Yield texts, the first `SAMPLE` characters of which are added to `sample`."""
    left = SAMPLE
    for text in texts:
        if left > 0:
            sample.append(text[:left])
            left -= len(text)
        yield text
