"""Winogrande examples -> option scores: accuracy, margin, standard errors.

The arithmetic is lm-eval's `winogrande` task (partial scoring, Trinh and Le 2018): the blank is filled with
either option and the text after the blank is scored given the text before it. The cost is lower: all option
sequences become prefix trees, several trees share a row, and a common beginning (the shots, the sentence up
to the blank, the other sentence of a twin pair) is computed once. A tree is stored in preorder with, for
every token, where its subtree ends, so that "a token sees its own ancestors" is one comparison.
"""

import difflib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from minitron_search.models.families import final_hidden, head_logits

EMBEDDED = Path(__file__).parent / "embedded" / "winogrande.jsonl"
HUB = "allenai/winogrande"
FEWSHOT_SEED = 1234  # lm-eval's default `fewshot_random_seed`
HEAD_CHUNK = 512  # positions whose full-vocabulary logits exist at once


@dataclass(frozen=True)
class Example:
    """One question: `sentence` holds one `_`, which `answer` (1 or 2) says how to fill."""

    sentence: str
    option1: str
    option2: str
    answer: int

    @property
    def beginnings(self) -> tuple[str, str]:
        """The text before the blank followed by either option."""
        before = self.sentence[: self.sentence.index("_")]
        return before + self.option1, before + self.option2

    @property
    def ending(self) -> str:
        """The text after the blank: what is scored."""
        return self.sentence[self.sentence.index("_") + 1 :].strip()


def load_examples(source: str, limit: int | None = None) -> list[Example]:
    """The first `limit` examples (all when None) of `source`, in order.

    `source` is `embedded`, a `.jsonl` file of `{"sentence", "option1", "option2", "answer"}` records, or
    `allenai/winogrande` (the validation split of winogrande_xl). Raises ValueError for a source that cannot
    be read, for a record that is not a Winogrande question (naming file and line), and for a `limit` outside
    1..number of examples.
    """
    if source == HUB:
        examples = _from_hub()
    elif source == "embedded":
        examples = _from_file(EMBEDDED)
    elif source.endswith(".jsonl"):
        examples = _from_file(Path(source))
    else:
        raise ValueError(f"winogrande.source: {source!r} is none of: embedded, a .jsonl file, {HUB}")
    if not examples:
        raise ValueError(f"winogrande.source: {source} holds no examples; give a file with at least one")
    if limit is not None and not 1 <= limit <= len(examples):
        raise ValueError(
            f"winogrande.limit: {limit} is outside 1..{len(examples)}, the number of examples in {source}; "
            "null takes all"
        )
    return examples[:limit]


def _from_file(path: Path) -> list[Example]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.jsonl")], cutoff=0.4)
        hint = f"near it: {', '.join(near)}" if near else "valid: embedded, or a file that exists"
        raise ValueError(f"winogrande.source: no file {path}; {hint}")
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                raise ValueError(f"{where}: not valid JSON ({error})") from None
            examples.append(_parse(record, where))
    return examples


def _from_hub() -> list[Example]:
    try:
        import datasets  # here, because it takes a second to import and only this source needs it

        records = datasets.load_dataset(HUB, "winogrande_xl", split="validation")
    except Exception as error:  # the Hub's client fails in a dozen types; the cause is in the message
        raise ValueError(
            f"winogrande.source: {HUB} could not be loaded ({type(error).__name__}: {error}); without the "
            "Hugging Face Hub, use embedded or a .jsonl file"
        ) from error
    return [_parse(record, f"{HUB} validation, row {row}") for row, record in enumerate(records)]


def _parse(record: object, where: str) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not an object with sentence, option1, option2 and answer")
    for field in ("sentence", "option1", "option2", "answer"):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{where}: field {field!r} is missing or not a string")
    if record["answer"] not in ("1", "2"):  # Winogrande's test split has an empty answer
        raise ValueError(f'{where}: answer is {record["answer"]!r}; valid: "1" or "2" (a test split has none)')
    for field in ("option1", "option2"):
        if not record[field].strip():
            raise ValueError(f"{where}: {field} is blank")
    blanks = record["sentence"].count("_")
    if blanks != 1:
        raise ValueError(f"{where}: sentence has {blanks} `_`; valid: exactly one, where the option goes")
    example = Example(record["sentence"], record["option1"], record["option2"], int(record["answer"]))
    if not example.ending:
        raise ValueError(f"{where}: sentence has nothing after its `_`, so there is nothing to score")
    return example


def shot_texts(examples: Sequence[Example], shots: int) -> list[str]:
    """The few-shot text before every example: `shots` answered others, joined by blank lines.

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
        """Consecutive rows of about `batch_tokens` tokens together, at least one row each."""
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
) -> PackedOptions:
    """Tokenises as lm-eval does and packs the trees into rows of `row_length` tokens, first-fit decreasing.

    `max_length` is the model's `max_position_embeddings`: a longer sequence loses tokens on its left, as in
    lm-eval. A tree longer than `row_length` gets a row of its own length. Special tokens (Gemma's BOS) are
    those the tokenizer adds by itself. Raises ValueError for `shots` the examples cannot give and for a text
    after the blank that `max_length` cannot hold.
    """
    if not examples:
        raise ValueError("winogrande: no examples to score; give at least one")
    contexts, continuations = _encode(examples, shot_texts(examples, shots), tokenizer)
    sequences = []  # what the model reads: the last token is only predicted
    for context, continuation in zip(contexts, continuations, strict=True):
        if len(continuation) > max_length:
            raise ValueError(f"winogrande: {len(continuation)} tokens after the blank exceed max_length {max_length}")
        sequences.append(tuple((context + continuation)[-(max_length + 1) : -1]))

    trees = [_Tree(sequences, options) for options in _group(sequences, row_length)]
    trees.sort(key=lambda tree: len(tree.tokens), reverse=True)
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


def _encode(
    examples: Sequence[Example], shots: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    """Context and continuation tokens of every option, two per example: lm-eval's `_encode_pair`."""
    contexts, wholes = [], []
    for example, shot in zip(examples, shots, strict=True):
        for beginning in example.beginnings:
            contexts.append((shot + beginning).rstrip())  # a trailing space goes with the continuation
            wholes.append(f"{shot}{beginning} {example.ending}")
    context_ids: list[list[int]] = tokenizer(contexts)["input_ids"]  # type: ignore[assignment]
    whole_ids: list[list[int]] = tokenizer(wholes)["input_ids"]  # type: ignore[assignment]
    continuations = [whole[len(context) :] for context, whole in zip(context_ids, whole_ids, strict=True)]
    return context_ids, continuations


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _group(sequences: Sequence[tuple[int, ...]], row_length: int) -> list[list[int]]:
    """Options that make a tree together: an example's two, and those of twins while they fit in a row."""
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


def model_inputs(
    packed: PackedOptions, rows: slice, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, position_ids, mask) of `rows`.

    Shapes (batch, length), (batch, length) and (batch, 1, length, length); the mask is additive, of `dtype`.
    """
    length = int(packed.row_lengths[rows.start])  # rows are sorted: the first is the longest
    input_ids, position_ids, subtree_end = (
        torch.from_numpy(array[rows, :length]).to(device)
        for array in (packed.input_ids, packed.position_ids, packed.subtree_end)
    )
    columns = torch.arange(length, device=device)
    # Query q sees key k when k comes no later and q is still inside k's subtree: k is q or an ancestor of it.
    sees = (columns[None, :] <= columns[:, None]) & (columns[:, None] < subtree_end[:, None, :])
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
    return input_ids, position_ids, mask[:, None]


def option_log_likelihoods(
    packed: PackedOptions, rows: slice, hidden: Tensor, head: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """Log-likelihood (nats) of every option scored in `rows`; 0 for options in other rows, so batches add up.

    `hidden`: (batch, length, hidden_size), the final hidden states of these rows (after the final norm);
    `head` turns (positions, hidden_size) into logits (positions, vocab). Only positions that predict a scored
    token go through it. log-softmax in float32, sums in float64. Returns (2 * n,) float64, option 2i and 2i +
    1 being example i's.
    """
    here = (packed.row >= rows.start) & (packed.row < rows.stop)
    length = hidden.shape[1]
    flat = (packed.row[here] - rows.start) * length + packed.column[here]
    # Twins' continuations share positions: each goes through the head once.
    positions, scored = np.unique(flat, return_inverse=True)
    order = np.argsort(scored, kind="stable")
    scored, targets, options = scored[order], packed.target[here][order], packed.option[here][order]
    states = hidden.reshape(-1, hidden.shape[-1])
    values = []
    for start in range(0, len(positions), HEAD_CHUNK):
        chunk = torch.from_numpy(positions[start : start + HEAD_CHUNK]).to(hidden.device)
        logits = head(states[chunk]).float()
        low, high = np.searchsorted(scored, (start, start + HEAD_CHUNK))
        which = torch.from_numpy(scored[low:high] - start).to(hidden.device)
        target = torch.from_numpy(targets[low:high]).to(hidden.device)
        values.append((logits[which, target] - logits.logsumexp(-1)[which]).cpu())
    sums = np.zeros(2 * len(packed.answers))
    np.add.at(sums, options, torch.cat(values).double().numpy())
    return sums


@dataclass(frozen=True)
class WinograndeScore:
    """`accuracy` in 0..1; `margin` in nats: the right option's log-likelihood minus the wrong one's, mean.

    Standard errors are over the n examples as lm-eval gives them (sample standard deviation / sqrt(n)); the
    two sentences of a twin pair are counted as independent, which they are not. They are nan for n = 1.
    """

    accuracy: float
    accuracy_stderr: float
    margin: float
    margin_stderr: float
    n: int
    log_likelihoods: np.ndarray  # (n, 2) float64


def by_example(log_likelihoods: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(correct, margin) of every example, (n,) each, from log-likelihoods (n, 2) and answers (n,) in {1, 2}.

    correct is 1 or 0; margin, nats, is the right option's log-likelihood minus the wrong one's.
    """
    each, right = np.arange(len(answers)), answers.astype(np.int64) - 1
    correct = (log_likelihoods.argmax(1) == right).astype(np.float64)  # a tie chooses option 1, as in lm-eval
    return correct, log_likelihoods[each, right] - log_likelihoods[each, 1 - right]


def score_from_log_likelihoods(log_likelihoods: np.ndarray, answers: np.ndarray) -> WinograndeScore:
    """Arguments as `by_example`."""
    n = len(answers)
    correct, margins = by_example(log_likelihoods, answers)

    def stderr(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")

    return WinograndeScore(
        accuracy=float(correct.mean()),
        accuracy_stderr=stderr(correct),
        margin=float(margins.mean()),
        margin_stderr=stderr(margins),
        n=n,
        log_likelihoods=log_likelihoods,
    )


def check_window(config: PretrainedConfig, packed: PackedOptions) -> None:
    """Raises ValueError when the sequences do not fit in the model's sliding window, which the tree mask would
    ignore."""
    window = getattr(config, "sliding_window", None)
    longest = int(packed.position_ids.max()) + 1
    if window is not None and longest > window:
        raise ValueError(
            f"winogrande.shots: an example with its shots is {longest} tokens, beyond the model's sliding "
            f"window of {window}; use fewer shots"
        )


def evaluate(
    model: PreTrainedModel, packed: PackedOptions, precision: str = "float32", batch_tokens: int = 4096
) -> WinograndeScore:
    """Scores `model` (float32 weights) on `packed`; `precision` is float32 or bfloat16 (autocast).

    Raises ValueError as `check_window`.
    """
    check_window(model.config, packed)
    device, was_training = model.device, model.training
    model.eval()
    sums = np.zeros(2 * len(packed.answers))
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for rows in packed.batches(batch_tokens):
            hidden = final_hidden(model, *model_inputs(packed, rows, device, model.dtype))
            sums += option_log_likelihoods(packed, rows, hidden, lambda states: head_logits(model, states))
    model.train(was_training)
    return score_from_log_likelihoods(sums.reshape(-1, 2), packed.answers)
