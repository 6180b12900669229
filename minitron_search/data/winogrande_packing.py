"""Pack Winogrande options into rows: shared beginnings once, no option seeing another.

The arithmetic is lm-eval's `winogrande` task (partial scoring, Trinh and Le 2018): the blank is filled with
either option and the text after the blank is scored given the text before it. The cost is lower: all option
sequences become prefix trees, several trees share a row, and a common beginning (the shots, the sentence up
to the blank, the other sentence of a twin pair) is computed once. A tree is stored in preorder with, for
every token, where its subtree ends, so that "a token sees its own ancestors" is one comparison.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from transformers import PreTrainedTokenizerBase

from minitron_search.data.winogrande import FEWSHOT_SEED, Example
from minitron_search.messages.console import say


def shot_texts(examples: Sequence[Example], shots: int) -> list[str]:
    """Return the few-shot text before every example: `shots` answered others, joined by blank lines.

    Exactly what lm-eval builds for a `winogrande` task whose only split is `examples`: one generator
    (seed 1234) walks over the examples in order and draws shots + 1 of them for each, of which the example
    itself, or else the last one, is dropped. (On the Hub's data set lm-eval draws from the train split.)
    """
    if shots < 0 or (shots > 0 and shots >= len(examples)):
        raise ValueError(
            f"winogrande.shots: {shots} is outside 0..{len(examples) - 1}: shots are drawn from the other "
            f"examples, and there are {len(examples)} in all"
        )
    if shots == 0:
        return [""] * len(examples)
    generator = random.Random(FEWSHOT_SEED)
    texts = []
    for example in examples:
        drawn = [shot for shot in generator.sample(examples, shots + 1) if shot != example][:shots]
        if len(drawn) < shots:  # copies of the example in the file were drawn too
            others = [shot for shot in examples if shot != example]
            if len(others) < shots:
                raise ValueError(f"winogrande.shots: {shots} is more than the {len(others)} examples that differ")
            drawn = generator.sample(others, shots)
        texts.append("".join(f"{shot.beginnings[shot.answer - 1]} {shot.ending}\n\n" for shot in drawn))
    return texts


@dataclass(frozen=True)
class PackedOptions:
    """All option sequences of n examples, as prefix trees in rows; longest rows first.

    Arrays over (rows, length): `input_ids`; `position_ids`, the positions in the unpacked sequences;
    `subtree_end`, for a token in column c the first column after its descendants (c + 1 for padding).
    `row_lengths` (rows,): columns in use. Arrays over scored continuation tokens, ordered by row: the `row`
    and `column` whose hidden state predicts the token, the token itself (`target`), and the `option` it
    belongs to: 2 * example + 0 or 1. `answers` (n,): 1 or 2. `twin` (n,): examples with the same two options share a
    number. Errors over examples count twins as independent, but a model that prefers an option gets one of them right
    (SmolLM2's students: correlations of -0.4 to -0.8), so comparisons are over twins.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    row_lengths: np.ndarray
    row: np.ndarray
    column: np.ndarray
    target: np.ndarray
    option: np.ndarray
    answers: np.ndarray
    twin: np.ndarray

    def batches(self, batch_tokens: int) -> list[slice]:
        """Split the rows into consecutive ones of about `batch_tokens` tokens together, at least one row each."""
        batches, start = [], 0
        while start < len(self.row_lengths):
            width = int(self.row_lengths[start])  # the first row is the widest
            rows = max(1, batch_tokens // width)
            batches.append(slice(start, min(start + rows, len(self.row_lengths))))
            start += rows
        return batches


def pack(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    shots: int = 0,
    row_length: int = 256,
    max_length: int = 2048,
    vocab_size: int | None = None,
) -> PackedOptions:
    """Tokenise as lm-eval does and pack the trees into rows of `row_length` tokens, first-fit decreasing.

    `max_length` is the model's `max_position_embeddings`: a longer sequence loses tokens on its left, as in
    lm-eval. A tree longer than `row_length` gets a row of its own length. Special tokens (Gemma's BOS) are
    those the tokenizer adds by itself. Raises ValueError for `shots` the examples cannot give, and, by its number, for
    an example of which nothing can be scored: `max_length` cannot hold the text after the blank, the tokenizer leaves
    no token of it or before it, or makes one that is no row of an embedding of `vocab_size` rows.
    """
    if not examples:
        raise ValueError("winogrande: no examples to score; give at least one")
    contexts, continuations = _encode(examples, shot_texts(examples, shots), tokenizer)
    sequences = []  # what the model reads: the last token is only predicted
    _check(examples, contexts, continuations, tokenizer, max_length, vocab_size)
    for context, continuation in zip(contexts, continuations, strict=True):
        sequences.append(tuple((context + continuation)[-(max_length + 1) : -1]))

    trees = [_Tree(sequences, options) for options in _group(sequences, row_length)]
    trees.sort(key=lambda tree: len(tree.tokens), reverse=True)
    rows = _filled_rows(trees, row_length)

    row_lengths = np.array([sum(len(tree.tokens) for tree in row) for row in rows])
    input_ids = np.zeros((len(rows), row_lengths[0]), np.int64)
    position_ids = np.zeros_like(input_ids)
    subtree_end = np.tile(np.arange(1, row_lengths[0] + 1), (len(rows), 1))
    scored: list[tuple[int, int, int, int]] = []
    for index, row in enumerate(rows):
        start = 0
        for tree in row:
            end = start + len(tree.tokens)
            input_ids[index, start:end] = tree.tokens
            position_ids[index, start:end] = tree.depths
            subtree_end[index, start:end] = np.array(tree.ends) + start
            for option, path in tree.paths.items():
                continuation = continuations[option]
                columns = path[-len(continuation) :]
                scored += [(index, start + c, token, option) for c, token in zip(columns, continuation, strict=True)]
            start = end
    row_of, column, target, option_of = np.array(scored, np.int64).T
    answers = np.array([example.answer for example in examples])
    numbers: dict[tuple[str, ...], int] = {}
    twin = np.array([
        numbers.setdefault(tuple(sorted((example.option1, example.option2))), len(numbers)) for example in examples
    ])  # fmt: skip
    return PackedOptions(
        input_ids, position_ids, subtree_end, row_lengths, row_of, column, target, option_of, answers, twin
    )


def _filled_rows(trees: Sequence["_Tree"], row_length: int) -> list[list["_Tree"]]:
    """Put each tree, the largest first, into the first row with room for it; longest rows first."""
    rows: list[list[_Tree]] = []
    free: list[int] = []
    for tree in trees:
        size = len(tree.tokens)
        fits = next((row for row, left in enumerate(free) if left >= size), None)
        if fits is None:
            rows.append([tree])
            free.append(row_length - size)
        else:
            rows[fits].append(tree)
            free[fits] -= size
    rows.sort(key=lambda row: sum(len(tree.tokens) for tree in row), reverse=True)
    return rows


def _encode(
    examples: Sequence[Example], shots: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    """Return context and continuation tokens of every option, two per example: lm-eval's `_encode_pair`.

    The continuation is what the whole text has beyond as many tokens as the context has alone, whatever those are: a
    tokenizer that ends every text with EOS ends the context so too, in the middle of what the model reads.
    """
    contexts, wholes = [], []
    for example, shot in zip(examples, shots, strict=True):
        for beginning in example.beginnings:
            contexts.append((shot + beginning).rstrip())  # a trailing space goes with the continuation
            wholes.append(f"{shot}{beginning} {example.ending}")
    context_ids, whole_ids = _ids(contexts, tokenizer), _ids(wholes, tokenizer)
    continuations = [whole[len(context) :] for context, whole in zip(context_ids, whole_ids, strict=True)]
    return context_ids, continuations


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of every text with what the tokenizer adds by itself; without, as lm-eval has it, where a text
    begins with the words of BOS (or EOS, where there is none)."""
    ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]  # type: ignore[assignment]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is not None:
        words = str(tokenizer.decode(first))
        for number, text in enumerate(texts):
            if text.startswith(words):
                ids[number] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[assignment]
    return ids


def _check(
    examples: Sequence[Example], contexts: Sequence[list[int]], continuations: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase, max_length: int, vocab_size: int | None,
) -> None:  # fmt: skip
    """Raise ValueError, by its number, for the first example of which nothing can be scored; see `pack`."""
    alike = []
    for option, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        number = option // 2
        beyond = [token for token in context + continuation if vocab_size is not None and token >= vocab_size]
        if beyond:
            raise _unscored(number, examples, f"{tokenizer.convert_ids_to_tokens(beyond[0])!r} is token {beyond[0]} of "
                            f"the tokenizer, and the embedding has {vocab_size} rows")  # fmt: skip
        if not context:
            raise _unscored(number, examples, "the tokenizer makes no token of the text up to the blank")
        if not continuation:
            raise _unscored(number, examples, f"the tokenizer leaves no token of the text after the blank: with it the "
                            f"whole has {len(context)} tokens or fewer, as many as what comes before has alone "
                            "(tokens that cross words, or lost characters)")  # fmt: skip
        if len(continuation) > max_length:
            raise _unscored(
                number, examples, f"{len(continuation)} tokens after the blank exceed max_length {max_length}"
            )
        if option % 2 and contexts[option - 1] == context and continuations[option - 1] == continuation:
            alike.append(number)
    if len(alike) == len(examples):
        raise _unscored(alike[0], examples, "its two options are the same tokens, and so are those of every example")
    if alike:
        say(
            f"winogrande: of {len(alike)} of {len(examples)} examples, the first being number {alike[0] + 1}, the "
            "tokenizer makes the same tokens with either option; option 1 counts as chosen there, as in lm-eval"
        )


def _unscored(number: int, examples: Sequence[Example], reason: str) -> ValueError:
    return ValueError(f"winogrande.source: example {number + 1} ({examples[number].sentence[:60]!r}) cannot be scored: "
                      f"{reason}; valid: questions that this tokenizer can tell apart, or a smaller "
                      "winogrande.limit")  # fmt: skip


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _group(sequences: Sequence[tuple[int, ...]], row_length: int) -> list[list[int]]:
    """Group options that make a tree together: an example's two, and those of twins while they fit in a row."""
    examples = sorted(range(len(sequences) // 2), key=lambda example: sequences[2 * example])
    groups: list[list[int]] = []
    for example in examples:
        options, first = [2 * example, 2 * example + 1], sequences[2 * example]
        twins = bool(groups) and 2 * _shared(first, sequences[groups[-1][-2]]) >= len(first)
        if twins and len(_Tree(sequences, groups[-1] + options).tokens) <= row_length:
            groups[-1] += options
        else:
            groups.append(options)
    return groups


class _Tree:
    """The prefix tree of sequences in preorder: `tokens`, `depths`, `ends` by node; `paths` by option."""

    def __init__(self, sequences: Sequence[tuple[int, ...]], options: Iterable[int]):
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.paths: dict[int, list[int]] = {}
        previous: tuple[int, ...] = ()
        path: list[int] = []
        # In lexicographic order a sequence shares most with the one before it, so new nodes come in preorder.
        for option in sorted(options, key=lambda option: sequences[option]):
            sequence = sequences[option]
            shared = _shared(sequence, previous)
            first = len(self.tokens)
            self.tokens += sequence[shared:]
            self.depths += range(shared, len(sequence))
            path = path[:shared] + list(range(first, len(self.tokens)))
            self.ends += [0] * (len(sequence) - shared)
            for node in path:
                self.ends[node] = len(self.tokens)
            self.paths[option], previous = path, sequence
