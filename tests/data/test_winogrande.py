"""Packing changes nothing: every score equals that of separate sequences, and lm-eval's."""

import importlib.util
import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minitron_search.data import winogrande, winogrande_packing
from minitron_search.data.winogrande import Example
from minitron_search.evaluation import winogrande as evaluation_winogrande
from tests import tiny

ROOT = Path(__file__).parents[2]
VALIDATION = Path(__file__).parents[3] / "shared" / "data" / "winogrande_validation.jsonl"
RECORD = {"sentence": "Ann met Bea and _ waved.", "option1": "Ann", "option2": "Bea", "answer": "1"}


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that every text has tokens and an option has several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_model(seed: int, tokenizer: PreTrainedTokenizerFast, max_length: int = 2048) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.3,  # far from uniform, so that a wrong mask or position shows
        tie_word_embeddings=seed % 2 == 0,
    )
    return LlamaForCausalLM(config).eval()


def random_examples(seed: int, n: int) -> list[Example]:
    """Short random sentences; every second one is the twin of the one before."""
    rng = random.Random(seed)
    words = ["cat", "oak", "the", "dim", "red", "ran", "Io", "so"]
    examples: list[Example] = []
    for index in range(n):
        if index % 2:
            twin = examples[-1]
            examples.append(Example(twin.sentence + " end", twin.option1, twin.option2, 3 - twin.answer))
        else:
            text = rng.choices(words, k=rng.randint(2, 9))
            text[rng.randrange(len(text) - 1)] = "_"
            options = rng.sample(["Ann", "Anna", "Bob", "the lid"], 2)
            examples.append(Example(" ".join(text), options[0], options[1], rng.randint(1, 2)))
    return examples


def separate_log_likelihoods(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    shots: int,
    max_length: int,
) -> np.ndarray:
    """One unpacked forward pass per option: the definition."""
    values = []
    for example, shot in zip(examples, winogrande_packing.shot_texts(examples, shots), strict=True):
        for beginning in example.beginnings:
            context = tokenizer.encode((shot + beginning).rstrip())
            whole = tokenizer.encode(shot + beginning + " " + example.ending)
            kept = whole[-(max_length + 1) :]
            with torch.no_grad():
                scores = model(torch.tensor([kept[:-1]])).logits[0].double().log_softmax(-1)
            n = len(whole) - len(context)
            targets = torch.tensor(kept[-n:])
            values.append(scores[-n:].gather(1, targets[:, None]).sum().item())
    return np.array(values).reshape(-1, 2)


def test_packed_scores_equal_separate_forward_passes() -> None:
    for seed in range(6):
        tokenizer = tiny_tokenizer(bos=seed % 3 == 0)
        model, examples = tiny_model(seed, tokenizer), random_examples(seed, 17)
        shots = (0, 1, 5)[seed % 3]
        expected = separate_log_likelihoods(model, tokenizer, examples, shots, 2048)
        for row_length in ((8, 200), (64, 1000))[seed // 3]:
            packed = winogrande_packing.pack(examples, tokenizer, shots, row_length)
            score = evaluation_winogrande.evaluate(model, packed, batch_tokens=(1, 500, 10**6)[(seed + seed // 3) % 3])
            np.testing.assert_allclose(score.log_likelihoods, expected, 1e-5, 2e-4, err_msg=f"{seed}, {row_length}")


@pytest.mark.parametrize("max_length", [12, 30])
def test_long_examples_are_cut_on_the_left(max_length: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(1, tokenizer, max_length)
    examples = [
        Example("_ met Ann and Bob today by the lake and left.", "Eve", "Eva Maria", 1),
        Example("Ann met Bob and _ left.", "Ann", "Bobby", 2),
    ]
    examples = examples if max_length > 12 else examples[1:]
    if max_length == 30:
        with pytest.raises(ValueError, match="after the blank exceed max_length 30"):
            winogrande_packing.pack(examples, tokenizer, max_length=max_length)
        examples = examples[1:]
    score = evaluation_winogrande.evaluate(model, winogrande_packing.pack(examples, tokenizer, max_length=max_length))
    expected = separate_log_likelihoods(model, tokenizer, examples, 0, max_length)
    np.testing.assert_allclose(score.log_likelihoods, expected, atol=1e-4)


def test_common_beginnings_are_computed_once_and_rows_are_full() -> None:
    tokenizer = tiny_tokenizer()
    examples = [
        Example("Ann thanked Bea because _ had helped.", "Ann", "Bea", 2),
        Example("Ann thanked Bea because _ was grateful.", "Ann", "Bea", 1),
    ]
    packed = winogrande_packing.pack(examples, tokenizer, row_length=256)
    lines = [beginning + " " + e.ending[:-1] for e in examples for beginning in e.beginnings]
    tree = {line[: end + 1] for line in lines for end in range(len(line))}  # a node is a prefix
    assert packed.row_lengths.tolist() == [len(tree)]
    assert len(packed.target) == sum(len(e.ending) + 1 for e in examples) * 2

    many = winogrande_packing.pack(random_examples(0, 100), tokenizer, row_length=256)
    assert many.row_lengths.max() <= 256 and sorted(many.row_lengths, reverse=True) == many.row_lengths.tolist()
    assert many.row_lengths.sum() > 0.95 * 256 * (len(many.row_lengths) - 1)
    covered = [row for rows in many.batches(600) for row in range(rows.start, rows.stop)]
    assert covered == list(range(len(many.row_lengths)))


def test_halves_serve_any_hidden_states() -> None:
    """A sweep brings its own hidden states: the sums of all batches are evaluate's log-likelihoods."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(2, tokenizer)
    packed = winogrande_packing.pack(random_examples(3, 12), tokenizer, row_length=128)
    sums = np.zeros(24)
    for rows in packed.batches(256):
        input_ids, position_ids, mask = evaluation_winogrande.model_inputs(packed, rows)
        with torch.no_grad():
            hidden = model.model(input_ids, position_ids=position_ids, attention_mask=mask).last_hidden_state
            sums += evaluation_winogrande.option_log_likelihoods(packed, rows, hidden, model.lm_head)
    expected = evaluation_winogrande.evaluate(model, packed)
    np.testing.assert_allclose(sums.reshape(-1, 2), expected.log_likelihoods, atol=1e-5)
    low = evaluation_winogrande.evaluate(model, packed, precision="bfloat16")
    assert 0 < np.abs(low.log_likelihoods - expected.log_likelihoods).max() < 3.0


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vs", ROOT / "benchmarks" / "winogrande_vs_lm_eval.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["vs"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("shots", "bos"), [(0, True), (5, False)])
def test_scores_equal_lm_eval(tmp_path: Path, shots: int, bos: bool) -> None:
    pytest.importorskip("lm_eval")
    tokenizer = tiny_tokenizer(bos)
    model = tiny_model(4, tokenizer)
    lines = winogrande.EMBEDDED.read_text().splitlines()[:20]
    lines[9] = lines[8]  # equal questions are both left out of each other's shots
    path = tmp_path / "part.jsonl"
    path.write_text("\n".join(lines) + "\n")
    theirs, results, _ = benchmark().run_lm_eval(model, tokenizer, path, shots, 8)
    packed = winogrande_packing.pack(winogrande.load_examples(str(path)), tokenizer, shots)
    score = evaluation_winogrande.evaluate(model, packed)
    np.testing.assert_allclose(score.log_likelihoods, theirs, atol=2e-3, rtol=1e-5)
    assert score.accuracy == pytest.approx(results["acc,none"])
    assert score.accuracy_stderr == pytest.approx(results["acc_stderr,none"])


def test_shots_are_other_examples_and_the_same_every_time() -> None:
    examples = random_examples(7, 8)
    texts = winogrande_packing.shot_texts(examples, 3)
    assert texts == winogrande_packing.shot_texts(examples, 3)
    for example, text in zip(examples, texts, strict=True):
        answered = text.split("\n\n")
        assert len(answered) == 4 and answered[-1] == ""
        assert f"{example.beginnings[example.answer - 1]} {example.ending}" not in answered
    with pytest.raises(ValueError, match=r"winogrande.shots: 8 is outside 0\.\.7"):
        winogrande_packing.shot_texts(examples, 8)
    with pytest.raises(ValueError, match="2 is more than the 1 examples that differ"):
        winogrande_packing.shot_texts([examples[0]] * 3 + [examples[2]], 2)


def test_score_against_numpy() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2))
    values[0] = 1.0  # a tie chooses the first option
    answers = np.random.default_rng(1).integers(1, 3, 50)
    answers[0] = 1
    score = evaluation_winogrande.score_from_log_likelihoods(values, answers)
    correct = [float((a >= b) == (answer == 1)) for (a, b), answer in zip(values, answers, strict=True)]
    margins = [(a - b) * (1 if answer == 1 else -1) for (a, b), answer in zip(values, answers, strict=True)]
    assert score.n == 50
    assert score.accuracy == pytest.approx(np.mean(correct))
    assert score.accuracy_stderr == pytest.approx(np.std(correct, ddof=1) / np.sqrt(50))
    assert score.margin == pytest.approx(np.mean(margins))
    assert score.margin_stderr == pytest.approx(np.std(margins, ddof=1) / np.sqrt(50))
    assert np.isnan(evaluation_winogrande.score_from_log_likelihoods(values[:1], answers[:1]).margin_stderr)


def test_sliding_window_shorter_than_an_example_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(0, tokenizer)
    model.config.sliding_window = 16
    packed = winogrande_packing.pack(random_examples(0, 4), tokenizer, shots=2)
    with pytest.raises(ValueError, match="sliding window of 16; use fewer shots"):
        evaluation_winogrande.evaluate(model, packed)
    longest = int(packed.position_ids.max()) + 1  # a token sees as many as the window holds, itself among them
    model.config.sliding_window = longest
    evaluation_winogrande.check_window(model.config, packed)
    model.config.sliding_window = longest - 1
    with pytest.raises(ValueError, match=f"{longest} tokens"):
        evaluation_winogrande.check_window(model.config, packed)


def write(path: Path, *records: object) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({k: v for k, v in RECORD.items() if k != "option2"}, "field 'option2' is missing"),
        ({**RECORD, "answer": 1}, "field 'answer' is missing or not a string"),
        ({**RECORD, "answer": ""}, 'answer is \'\'; valid: "1" or "2"'),
        ({**RECORD, "answer": "3"}, "answer is '3'"),
        ({**RECORD, "sentence": "No blank."}, "sentence has 0 `_`"),
        ({**RECORD, "sentence": "_ or _ left."}, "sentence has 2 `_`"),
        ({**RECORD, "sentence": "Ann saw _"}, "nothing after its `_`"),
        ({**RECORD, "option1": " "}, "option1 is blank"),
        ('{"sentence": ', "not valid JSON"),
        ([1, 2], "not an object"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, bad: object, message: str) -> None:
    source = write(tmp_path / "some.jsonl", RECORD, RECORD, bad)
    with pytest.raises(ValueError, match=r"some\.jsonl, line 3: ") as error:
        winogrande.load_examples(source)
    assert message in str(error.value)


def test_sources_and_limits(tmp_path: Path) -> None:
    source = write(tmp_path / "questions.jsonl", RECORD, {**RECORD, "answer": "2"})
    assert winogrande.load_examples(source) == [
        Example("Ann met Bea and _ waved.", "Ann", "Bea", 1),
        Example("Ann met Bea and _ waved.", "Ann", "Bea", 2),
    ]
    assert len(winogrande.load_examples(source, limit=1)) == 1
    for limit in (0, 3):
        with pytest.raises(ValueError, match=rf"winogrande.limit: {limit} is outside 1\.\.2"):
            winogrande.load_examples(source, limit)
    with pytest.raises(ValueError, match=r"no file .*near it: questions\.jsonl"):
        winogrande.load_examples(str(tmp_path / "question.jsonl"))
    with pytest.raises(ValueError, match=r"'winograd' is not valid; valid: embedded, a \.jsonl file"):
        winogrande.load_examples("winograd")
    with pytest.raises(ValueError, match="holds no examples"):
        winogrande.load_examples(write(tmp_path / "empty.jsonl"))


def test_the_hub_out_of_reach_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"winogrande\.source: allenai/winogrande .*no route.*use embedded"):
        winogrande.load_examples("allenai/winogrande")


def test_the_hub_gives_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
        asked.append((*names, split))
        return [RECORD]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert winogrande.load_examples("allenai/winogrande") == [Example("Ann met Bea and _ waved.", "Ann", "Bea", 1)]
    assert asked == [("allenai/winogrande", "winogrande_xl", "validation")]


def test_embedded_pairs_are_twins() -> None:
    examples = winogrande.load_examples("embedded")
    assert len(examples) >= 400 and len(examples) % 2 == 0
    assert Counter(example.answer for example in examples) == {1: len(examples) // 2, 2: len(examples) // 2}
    assert len({example.sentence for example in examples}) == len(examples)
    first_answers = Counter()
    for first, second in zip(examples[::2], examples[1::2], strict=True):
        assert (first.option1, first.option2) == (second.option1, second.option2)
        assert {first.answer, second.answer} == {1, 2}
        first_answers[first.answer] += 1
        a, b = first.sentence.split(), second.sentence.split()
        shared = len(a) - sum((Counter(a) - Counter(b)).values())
        assert shared >= 0.4 * max(len(a), len(b)), first.sentence  # only the trigger differs
        for example in (first, second):
            text = example.sentence
            assert text == " ".join(text.split()) and text[-1] in ".!?" and text.isascii()
            assert example.option1 != example.option2
    assert min(first_answers.values()) > len(examples) // 6  # the order inside a pair tells nothing
    if VALIDATION.exists():  # written for this project, not copied
        published = {example.sentence for example in winogrande.load_examples(str(VALIDATION))}
        assert not published & {example.sentence for example in examples}


def test_twins_share_a_number_and_all_of_the_embedded_are_twins() -> None:
    examples = winogrande.load_examples("embedded")
    twin = winogrande_packing.pack(examples, tiny.tokenizer()).twin
    assert twin[:6].tolist() == [0, 0, 1, 1, 2, 2] and set(Counter(twin.tolist()).values()) == {2}
    turned = replace(examples[1], option1=examples[1].option2, option2=examples[1].option1)
    assert winogrande_packing.pack([examples[0], examples[2], turned], tiny.tokenizer()).twin.tolist() == [0, 1, 0]
