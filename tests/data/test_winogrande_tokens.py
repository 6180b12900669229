"""Whatever a tokenizer does, an example is scored as lm-eval scores it, or refused by its number."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minitron_search.data.winogrande import Example, load_examples
from minitron_search.data.winogrande_packing import _encode, pack, shot_texts
from minitron_search.evaluation.winogrande import evaluate
from tests.data.tokenizers import CROSSING, KINDS, of_bytes, of_words

EXAMPLES = [
    Example("Ann met Bea on the pier and _ waved at the boats.", "Ann", "Bea", 1),
    Example("The cup did not fit the box as the _ was too small .", "cup", "box ", 2),  # a trailing space
    Example("_ was late, said everyone else.", "Anna", "Bob", 2),
    Example("<s> Once Tom saw Tim, and _ was seen.", "Tom", "Tim", 2),  # begins as the tokenizer would
    Example("Many birds and dogs slept; the _   woke first", "birds", "dogs", 1),
]


def model_of(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def harness(tokenizer: Any) -> Any:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(pretrained=model_of(tokenizer), tokenizer=tokenizer, batch_size=4)


def pairs(examples: list[Example], shots: int) -> list[tuple[str, str]]:
    """What lm-eval's task asks: its own functions, shots before them."""
    from lm_eval.tasks.winogrande import preprocess_winogrande as task

    asked = []
    for example, shot in zip(examples, shot_texts(examples, shots), strict=True):
        doc = {**vars(example), "answer": str(example.answer)}
        asked += [(shot + choice, " " + task.doc_to_target(doc)) for choice in task.doc_to_choice(doc)]
    return asked


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_equals_lm_eval(kind: str) -> None:
    from lm_eval.api.instance import Instance

    tokenizer, theirs = KINDS[kind], harness(KINDS[kind])
    for shots in (0, 2):
        asked = pairs(EXAMPLES, shots)
        contexts, continuations = _encode(EXAMPLES, shot_texts(EXAMPLES, shots), tokenizer)
        assert list(zip(contexts, continuations, strict=True)) == [theirs._encode_pair(*pair) for pair in asked]
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
            for number, pair in enumerate(asked)
        ]
        expected = [value for value, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
        score = evaluate(model_of(tokenizer), pack(EXAMPLES, tokenizer, shots, vocab_size=len(tokenizer)))
        np.testing.assert_allclose(score.log_likelihoods.ravel(), expected, atol=1e-3, rtol=1e-5)


def test_the_kinds_are_what_they_are_called() -> None:
    text = "as we sat."
    for kind, tokenizer in KINDS.items():
        ids, bare = (tokenizer(text, add_special_tokens=added)["input_ids"] for added in (True, False))
        added = len(ids) - len(bare)
        assert added == {"EOS at the end": 1, "BOS and EOS": 2, "a language tag": 2}.get(kind, 0)
    assert "sĠw" in KINDS["tokens that cross words"].tokenize(text)
    assert KINDS["no token for a space"].tokenize(text) == list("aswesat.")


def test_an_ending_inside_the_token_before_it_is_refused_by_number() -> None:
    tokenizer = of_bytes((("c", "Ġ"), ("cĠ", ".")), words=False)
    swallowed = Example("Who came first was _ .", "abc", "bcc", 1)
    with pytest.raises(ValueError, match=r"winogrande\.source: example 2 .*Who came first.*no token of the text after"):
        pack([EXAMPLES[0], swallowed], tokenizer)


def test_an_option_of_no_token_is_refused_by_number() -> None:
    tokenizer = KINDS["no token for a space"]
    tokenizer.backend_tokenizer.model.unk_token = None  # then what it does not know is lost
    lost = Example("_ was late.", "ÄÖ", "ÖÜ", 1)
    try:
        with pytest.raises(ValueError, match=r"example 1 .*no token of the text up to the blank"):
            pack([lost], tokenizer)
    finally:
        tokenizer.backend_tokenizer.model.unk_token = "<unk>"


def test_options_that_are_one_to_the_tokenizer_are_said_and_all_of_them_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = of_words("Ann", "Bea", "waved", "left", ".")
    known, unknown = Example("_ waved.", "Ann", "Bea", 1), Example("_ left.", "Tom", "Tim", 2)
    pack([known, unknown], tokenizer)
    assert "of 1 of 2 examples, the first being number 2," in capsys.readouterr().out
    with pytest.raises(ValueError, match="example 1 .*same tokens"):
        pack([unknown], tokenizer)


def test_a_token_beyond_the_embedding_is_refused_by_example_token_and_rows() -> None:
    tokenizer = of_bytes(CROSSING, words=False)
    rows = len(tokenizer) - len(CROSSING)
    pack([EXAMPLES[2]], of_bytes(), vocab_size=rows)
    with pytest.raises(ValueError, match=rf"example 1 .*'Ġw' is token {rows} .* has {rows} rows"):
        pack([EXAMPLES[2]], tokenizer, vocab_size=rows)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sentence", "A good \ud83d day, _ said.", "field 'sentence': character 8 .*half of a surrogate pair"),
        ("option2", "Ann ", "option1 and option2 are both 'Ann'"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named_by_line(
    field: str, value: str, message: str, tmp_path: Path
) -> None:  # fmt: skip
    good = {"sentence": "Ann met Bea and _ waved.", "option1": "Ann", "option2": "Bea", "answer": "1"}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, field: value}) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=rf"questions\.jsonl, line 2: {message}"):
        load_examples(str(path))
    path.write_text(json.dumps(good) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 2: not valid JSON"):
        load_examples(str(path))
