"""Windows hold what their tokenizer makes of a text: what it puts first, and nothing that it would lose in silence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitron_search.data.corpus import load_corpus, prefix
from minitron_search.data.coverage import coverage
from minitron_search.data.text_sources import text_source
from tests import tiny
from tests.data.tokenizers import KINDS, of_bytes, of_words, without_spaces

LENGTH = 16


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(tiny.prose(600))
    return tmp_path


def windows(tokenizer: Any, text: str = "text.txt", **given: Any) -> np.ndarray:
    sizes = {"calibration_samples": 3, "validation_samples": 4, "train_tokens": 4 * LENGTH, "seed": 0}
    corpus = load_corpus(text, text, tokenizer, **{"sequence_length": LENGTH, **sizes, **given})
    return np.concatenate([corpus.validation, corpus.train, corpus.calibration])


@pytest.mark.parametrize(
    ("adds", "first"),
    [(None, []), ("$A </s>", []), ("<s> $A </s>", [0]), ("<en> $A </s>", [2]), ("<s> <en> $A", [0, 2])],
)
def test_a_window_begins_as_the_tokenizer_begins_a_text_and_does_not_end_so(adds: str | None, first: list[int]) -> None:
    tokenizer = of_bytes(adds=adds)
    assert prefix(tokenizer) == first
    made = windows(tokenizer)
    assert (made[:, : len(first)] == first).all() and (made[:, len(first) :] > 2).all()
    stream = tokenizer(tiny.prose(600), add_special_tokens=False)["input_ids"]
    step = LENGTH - len(first)
    assert made[:4, len(first) :].ravel().tolist() == stream[: 4 * step]


def test_an_unknown_token_that_is_also_bos_is_not_put_first() -> None:
    tokenizer = of_words("the", "dog")
    tokenizer.bos_token = "<unk>"  # of "a" it makes <unk>, by itself it adds nothing
    assert tokenizer("a")["input_ids"] == [tokenizer.bos_token_id] and prefix(tokenizer) == []


def test_a_window_without_room_for_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"corpus\.sequence_length: 3 leaves no text after the 2 tokens .*at least 4"):
        windows(of_bytes(adds="<s> <en> $A"), sequence_length=3)


def test_random_windows_are_drawn_from_the_rows_that_there_are() -> None:
    made = windows(of_bytes(), calibration="random", vocab_size=9)[-3:]
    assert made.max() < 9 and len(np.unique(made)) > 5
    plain = windows(of_bytes(), calibration="random")[-3:]
    assert (plain == windows(of_bytes(), calibration="random", vocab_size=10_000)[-3:]).all() and plain.max() > 9


def test_the_share_that_a_tokenizer_loses_is_said_and_all_of_it_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows(of_bytes())
    assert "loses" not in capsys.readouterr().out
    half = of_words("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")
    for _ in range(2):  # the second time from the cache
        windows(half)
        assert "corpus.validation: of its first 20,000 characters" in capsys.readouterr().out
    (here / "foreign.txt").write_text("Всё смешалось в доме Облонских, " * 400)
    for tokenizer in (of_words("the"), KINDS["no token for a space"]):
        with pytest.raises(
            ValueError, match=r"corpus\.validation: .*100.0% of them '<unk>'.*valid: a text in the lang"
        ):
            windows(tokenizer, "foreign.txt")


def test_lost_characters_are_counted_without_an_unknown_token() -> None:
    tokenizer = without_spaces()
    tokenizer.backend_tokenizer.model.unk_token = None
    tokenizer.unk_token = None
    found = coverage(["abc ÄÖ", "", "x 1"], tokenizer)
    assert found is not None and found.unknown == 0 and found.lost == pytest.approx(3 / 7)
    assert coverage([], tokenizer) is None and coverage(["naïve 日本 🙂"], of_bytes()).lost == 0


def documents(name: str) -> list[str]:
    return list(text_source("corpus.train", name).documents())


@pytest.mark.parametrize(
    "bad", ['{"text": "half \\ud83d"}', '{"text": "a\\udc00b"}', "[" * 100_000, '{"text": 3}', '{"tex', "null"]
)
def test_a_bad_line_is_named_by_file_and_number(bad: str, here: Path) -> None:
    good = json.dumps({"text": "whole \U0001f600"}, ensure_ascii=True)  # a pair of surrogates is one character
    (here / "a.jsonl").write_text(good + "\n")
    assert documents("a.jsonl") == ["whole \U0001f600"]
    (here / "a.jsonl").write_text("\n".join([good, "", bad, good]))
    with pytest.raises(ValueError, match=r"corpus\.train: 'a\.jsonl', line 3: .*valid: ") as error:
        documents("a.jsonl")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_named_by_line_or_row(here: Path) -> None:
    (here / "a.txt").write_bytes(b"one\ntwo\nthr\xffee")
    with pytest.raises(ValueError, match=r"'a\.txt', line 3, is not UTF-8 at byte 11 of the file"):
        documents("a.txt")
    column = pa.array([b"one", b"t\xedwo", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), here / "a.parquet")
    with pytest.raises(ValueError, match=r"corpus\.train: 'a\.parquet' .*row 2: "):
        documents("a.parquet")
