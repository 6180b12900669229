"""Text -> windows: the packing, what is disjoint from what, and what is refused."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minitron_search.data import tokens
from minitron_search.data.corpus import Corpus, load_corpus
from minitron_search.data.text_sources import check_source, text_source

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext2_valid.txt"
WORDS = np.array("the quick brown fox jumps over a lazy dog and runs away, far away; then 12 wolves sleep.".split())
LENGTH = 16
USERS_CACHE = os.environ.get("MINITRON_SEARCH_CACHE")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def prose(words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE like SmolLM2's: eos ends a turn, <|endoftext|> ends a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<bos>", "<turn_end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([prose(2000, seed=99)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<turn_end>")
    fast.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    return fast


def load(train: Any, validation: Any, tokenizer: Any, **asked: int) -> Corpus:
    sizes = {"calibration_samples": 3, "validation_samples": 4, "train_tokens": 5 * LENGTH, "seed": 0} | asked
    return load_corpus(str(train), str(validation), tokenizer, sequence_length=LENGTH, **sizes)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows(*parts: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(row) for part in parts for row in part.tolist()}


def test_a_txt_file_is_one_document_tokenised_whole(tokenizer, tmp_path):
    text = "  " + prose(900, 1) + "\n\n\n" + prose(300, 2) + "\n"
    (tmp_path / "a.txt").write_text(text)
    whole = np.array(ids(tokenizer, text))
    loaded = load("a.txt", "a.txt", tokenizer)
    assert loaded.validation.dtype == np.int32
    assert (loaded.validation.ravel() == whole[: 4 * LENGTH]).all()
    pool = whole[4 * LENGTH : 12 * LENGTH].reshape(8, LENGTH)
    assert rows(loaded.train, loaded.calibration) == rows(pool)
    assert len(loaded.train) == 5 and len(loaded.calibration) == 3


@pytest.mark.parametrize("windows", [1, 40, 400, 900])
def test_the_beginning_of_a_long_text_is_that_of_the_text_tokenised_whole(tokenizer, tmp_path, windows):
    """Only a beginning is tokenised when that is enough: the ids may not show it."""
    text = prose(6000, 3).replace(" dog", " dog\n\n   \n") + " " * 300 + prose(6000, 4)
    (tmp_path / "long.txt").write_text(text)
    write_jsonl(tmp_path / "other.jsonl", [prose(400, 5)])
    loaded = load("other.jsonl", "long.txt", tokenizer, validation_samples=windows)
    assert (loaded.validation.ravel() == ids(tokenizer, text)[: windows * LENGTH]).all()


def test_documents_are_joined_by_the_end_of_text_token_and_by_nothing_else(tokenizer, tmp_path):
    texts = [prose(40 + seed, seed) for seed in range(20)]
    write_jsonl(tmp_path / "a.jsonl", texts[:9] + ["", "  \n"] + texts[9:])
    stream: list[int] = []
    for text in texts:
        stream += [tokenizer.convert_tokens_to_ids("<|endoftext|>")] * bool(stream) + ids(tokenizer, text)
    loaded = load("a.jsonl", "a.jsonl", tokenizer, validation_samples=40)
    assert (loaded.validation.ravel() == stream[: 40 * LENGTH]).all()


def test_without_an_end_of_text_token_eos_joins(tokenizer, tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    write_jsonl(tmp_path / "a.jsonl", ["a a a"] * 100)
    with pytest.raises(ValueError, match="teacher.model: .*eos_token"):
        load("a.jsonl", "a.jsonl", plain)
    plain.eos_token = "<eos>"
    assert load("a.jsonl", "a.jsonl", plain).validation.ravel()[:5].tolist() == [2, 2, 2, 1, 2]


def test_a_tokenizer_that_puts_bos_first_gets_it_in_every_window(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(prose(900, 1))
    bos = tokenizer.bos_token_id
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    gemma = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<turn_end>")
    loaded = load("a.txt", "a.txt", gemma)
    plain = np.array(ids(tokenizer, prose(900, 1)))
    for part in (loaded.validation, loaded.train, loaded.calibration):
        assert part.shape[1] == LENGTH and (part[:, 0] == bos).all() and not (part[:, 1:] == bos).any()
    assert (loaded.validation[:, 1:].ravel() == plain[: 4 * (LENGTH - 1)]).all()
    assert not (load("a.txt", "a.txt", tokenizer).validation == bos).any()


def test_the_three_parts_are_disjoint_and_windows_do_not_overlap(tokenizer, tmp_path):
    numbers = " ".join(str(number) for number in range(100_000, 101_000))  # every window is unlike the others
    (tmp_path / "a.txt").write_text(numbers)
    loaded = load("a.txt", "a.txt", tokenizer, train_tokens=10 * LENGTH - 3)
    parts = loaded.calibration, loaded.train, loaded.validation
    assert [len(part) for part in parts] == [3, 10, 4]
    assert len(rows(*parts)) == 17
    stream = ids(tokenizer, numbers)
    assert rows(*parts) == rows(np.array(stream[: 17 * LENGTH]).reshape(17, LENGTH))


def test_train_leaves_out_the_documents_that_validation_holds(tokenizer, tmp_path):
    texts = [f"{seed} " + prose(60, seed) for seed in range(40)]
    write_jsonl(tmp_path / "validation.jsonl", texts[:6])
    reformatted = [text.replace(" ", "\n", 3) for text in texts[:2]]
    write_jsonl(tmp_path / "train.jsonl", texts[10:12] + reformatted + texts[12:])
    write_jsonl(tmp_path / "clean.jsonl", texts[10:])
    mixed = load("train.jsonl", "validation.jsonl", tokenizer, validation_samples=3)
    clean = load("clean.jsonl", "validation.jsonl", tokenizer, validation_samples=3)
    assert mixed.id == clean.id


def test_the_same_text_under_two_names_is_the_same_source(tokenizer, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose(900, 1))
    assert load("a.txt", "b.txt", tokenizer).id == load("a.txt", "./a.txt", tokenizer).id


def test_the_seed_draws_the_calibration_windows_and_nothing_else(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(prose(900, 1))
    first, again, other = (load("a.txt", "a.txt", tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.id == again.id != other.id
    assert (first.validation == other.validation).all()
    assert rows(first.calibration) != rows(other.calibration)
    assert rows(first.calibration, first.train) == rows(other.calibration, other.train)


def test_every_file_format_gives_the_same_windows(tokenizer, tmp_path):
    texts = [prose(200, seed) for seed in range(6)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    pq.write_table(pa.table({"text": [*texts[:3], None, *texts[3:]], "n": range(7)}), tmp_path / "a.parquet")
    for number, text in enumerate(texts):
        (tmp_path / f"part-{number}.txt").write_text(text)
    found = {load(name, name, tokenizer).id for name in ("a.jsonl", "a.parquet", "part-*.txt")}
    assert len(found) == 1


def test_the_second_start_reads_the_cache_and_a_changed_file_does_not(tokenizer, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [prose(300, seed) for seed in range(9)])
    first = load("a.jsonl", "a.jsonl", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_tokenised", None)
        assert load("a.jsonl", "a.jsonl", tokenizer).id == first.id
        # fewer tokens than are cached: a beginning of them
        assert (load("a.jsonl", "a.jsonl", tokenizer, train_tokens=1).validation == first.validation).all()
    write_jsonl(tmp_path / "a.jsonl", [prose(300, seed + 50) for seed in range(9)])
    assert load("a.jsonl", "a.jsonl", tokenizer).id != first.id


def test_what_the_cache_holds_does_not_change_the_result(tokenizer, tmp_path, cache):
    """A longer run before this one leaves more of the validation source in the cache than this one asks."""
    texts = [f"{seed} " + prose(60, seed) for seed in range(40)]
    write_jsonl(tmp_path / "validation.jsonl", texts[:20])
    write_jsonl(tmp_path / "train.jsonl", texts[1:])
    alone = load("train.jsonl", "validation.jsonl", tokenizer, validation_samples=2)
    assert not list(cache.glob("tokens/.*"))
    load("validation.jsonl", "validation.jsonl", tokenizer, train_tokens=40 * LENGTH)
    assert load("train.jsonl", "validation.jsonl", tokenizer, validation_samples=2).id == alone.id


def test_a_huge_source_is_read_only_as_far_as_needed(tokenizer, monkeypatch):
    read = 0

    def stream(*_: Any, **__: Any) -> Any:
        nonlocal read
        for seed in range(10**9):
            read += 1
            yield {"text": prose(50, seed)}

    builder = SimpleNamespace(hash="commit")
    monkeypatch.setattr("datasets.load_dataset_builder", lambda path, config: builder)
    monkeypatch.setattr("datasets.load_dataset", stream)
    assert len(load("owner/name", "owner/name", tokenizer).train) == 5
    assert read < 100
    assert load("owner/name:train", "owner/name", tokenizer).id == load("owner/name", "owner/name", tokenizer).id


def test_a_hub_name_is_read_as_owner_name_config_split(tokenizer, monkeypatch):
    asked = []

    def stream(path: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((path, config, split))
        return ({"text": prose(50, seed)} for seed in range(50))

    monkeypatch.setattr("datasets.load_dataset_builder", lambda path, config: SimpleNamespace(hash="commit"))
    monkeypatch.setattr("datasets.load_dataset", stream)
    loaded = load("owner/name", "owner/name/wikitext-2:validation", tokenizer)
    assert not rows(loaded.validation) & rows(loaded.train, loaded.calibration)
    assert asked == [("owner/name", "wikitext-2", "validation"), ("owner/name", None, "train")]


def test_a_hub_data_set_without_text_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda path, config: SimpleNamespace(hash="commit"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter([{"content": "a"}]))
    with pytest.raises(ValueError, match="corpus.validation: 'owner/name' .*column `text`"):
        load("owner/name", "owner/name", tokenizer)


def test_too_short_a_source_says_how_many_windows_there_are_and_were_asked(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(prose(900, 1))
    count = len(ids(tokenizer, prose(900, 1))) // LENGTH
    with pytest.raises(ValueError, match=f"corpus.validation: 'a.txt' has {count} windows .* 5000 were asked"):
        load("a.txt", "a.txt", tokenizer, validation_samples=5000)
    with pytest.raises(ValueError, match=f"corpus.train: 'a.txt' has, outside validation, {count - 4} .*5003 were"):
        load("a.txt", "a.txt", tokenizer, train_tokens=5000 * LENGTH)


REFUSED = {
    "missing.txt": "does not exist, near it: misssing.txt",
    "empty*.txt": "matches no file",
    "table.csv": "'table.csv' is none of .txt, .jsonl, .parquet",
    "folder": "is a folder; valid: .*folder/\\*.txt",
    "docstring": "is not a file here.*valid: 'docstrings'",
    "owner/never-downloaded": "the Hub did not give it",
    "latin.txt": "is not UTF-8 at byte 3",
    "bad.jsonl": "'bad.jsonl', line 3: .*valid: {\"text\"",
    "broken.jsonl": "'broken.jsonl', line 2",
    "number.jsonl": "'number.jsonl', line 1",
    "no_text.parquet": "column `text` .*it has the columns content",
    "no.parquet": "is not a parquet file",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_read_is_refused_by_field_and_name(tokenizer, tmp_path, name):
    (tmp_path / "misssing.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.csv").write_text("text\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1") * 2)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"content": "b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "no_text.parquet")
    (tmp_path / "no.parquet").write_text("not parquet")
    (tmp_path / "good.txt").write_text(prose(900, 1))
    with pytest.raises(ValueError, match=f"corpus.train: .*{REFUSED[name]}"):
        load(name, "good.txt", tokenizer)
    with pytest.raises(ValueError, match=f"corpus.validation: .*{REFUSED[name]}"):
        load("good.txt", name, tokenizer)


def test_a_source_that_is_not_there_is_found_before_any_text_is_read(tmp_path):
    (tmp_path / "good.txt").write_text("a")
    check_source("corpus.train", "good.txt")
    check_source("corpus.train", "owner/name")
    for name in ("missing.txt", "empty*.txt", "docstring"):
        with pytest.raises(ValueError, match="corpus.train: .*; valid: "):
            check_source("corpus.train", name)


def test_a_line_without_end_is_refused_before_the_file_is_hashed(tmp_path):
    with open(tmp_path / "huge.jsonl", "wb") as file:
        file.truncate(2**40)  # of zeros, and no byte of them on the disk
    with pytest.raises(ValueError, match="corpus.train: 'huge.jsonl', line 1 is longer than .*; valid: "):
        text_source("corpus.train", "huge.jsonl")


def test_what_pyarrow_says_in_several_lines_is_one(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()

    def refused(path):
        raise OSError("thrift:\n\x0f\n")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", refused)
    with pytest.raises(ValueError, match="corpus.validation: .*thrift") as error:
        load("a.parquet", "a.parquet", tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.exists(), reason="needs the reference text")
def test_the_teachers_loss_on_wikitext_is_the_reference_one(monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from minitron_search.teachers.sources import load_tokenizer, teacher_folder

    if USERS_CACHE is None:  # the teacher that other slow tests made
        monkeypatch.delenv("MINITRON_SEARCH_CACHE")
    else:
        monkeypatch.setenv("MINITRON_SEARCH_CACHE", USERS_CACHE)
    sizes = {"sequence_length": 256, "calibration_samples": 1, "validation_samples": 8}
    loaded = load_corpus(
        str(WIKITEXT), str(WIKITEXT), load_tokenizer("smollm2-135m"), **sizes, train_tokens=256, seed=0
    )
    tokens = torch.tensor(loaded.validation, dtype=torch.long)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(teacher_folder("smollm2-135m"))(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(3.214261, abs=2e-5)


def test_another_calibration_text_changes_no_window_that_is_trained_on_or_scored(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [prose(40, seed) for seed in range(20)])
    # validation holds the beginning of the first
    write_jsonl(tmp_path / "b.jsonl", [prose(40, 0), *(prose(40, seed) for seed in range(50, 60))])
    plain = load("a.jsonl", "a.jsonl", tokenizer)
    other, noise, again = (
        load("a.jsonl", "a.jsonl", tokenizer, calibration=source) for source in ("b.jsonl", "random", "random")
    )
    for changed in (other, noise):
        assert (changed.train == plain.train).all() and (changed.validation == plain.validation).all()
        assert changed.calibration.shape == plain.calibration.shape and changed.calibration.dtype == np.int32
        assert not rows(changed.calibration) & rows(plain.calibration) and changed.id != plain.id
    text = tokenizer.decode(other.calibration.ravel()[:20])
    assert text.strip() in prose(40, 50), "validation's own text is left out"
    assert (noise.calibration == again.calibration).all() and noise.id == again.id
    write_jsonl(tmp_path / "short.jsonl", [prose(9, 70)])
    with pytest.raises(ValueError, match="corpus.calibration: 'short.jsonl' has, outside validation, .* 3 were asked"):
        load("a.jsonl", "a.jsonl", tokenizer, calibration="short.jsonl")
