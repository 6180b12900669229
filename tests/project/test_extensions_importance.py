"""What a user adds without editing a file of ours: an importance method, a reader of text files. One entry each."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minitron_search.config.inputs import ImportanceConfig
from minitron_search.config.loading import parse_config
from minitron_search.data import text_sources
from minitron_search.data.corpus import load_corpus
from minitron_search.importance import methods
from minitron_search.importance.activations import ActivationImportance
from minitron_search.importance.importance import combined, importance_sums, measure
from minitron_search.importance.methods import Measured, Method
from minitron_search.importance.weights import Scores
from minitron_search.models.families import whole
from minitron_search.planning.checks import check_importance
from minitron_search.pruning.trimming import permute_teacher, trim
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))


class LastTokenSquares:
    """Sums over windows of the squared final hidden state at the last position."""

    def __init__(self, teacher: PreTrainedModel):
        self.totals = {"last": torch.zeros(teacher.config.hidden_size)}

    def watching(self, teacher: PreTrainedModel):  # type: ignore[no-untyped-def]
        return torch.no_grad()  # no hook is needed

    def end_of_rows(self, final: torch.Tensor) -> None:
        self.totals["last"] += final[:, -1].float().square().sum(0)


def last_token(measured: Measured) -> Scores:
    found: ActivationImportance = measured.activations
    return Scores(measured.sums["last"] / measured.samples, found.mlp, found.heads)


def test_an_importance_method_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "last_token", Method(last_token, sums=LastTokenSquares))
    config = parse_config({"importance": {"method": "last_token", "rounds": 2}}).importance
    check_importance(config)

    shape = tiny.random_config(0)
    model, windows = tiny.model(shape, 0), tiny.tokens(shape, rows=6, length=10).numpy()
    found = measure(model, windows, config)
    with torch.no_grad():
        final = model.base_model(torch.from_numpy(windows)).last_hidden_state
    torch.testing.assert_close(found.hidden, final[:, -1].square().mean(0))
    parts = [importance_sums(model, rows, config, "float32") for rows in np.split(windows, 2)]
    torch.testing.assert_close(combined(parts, config, 0, lambda: model).hidden, found.hidden)

    model.save_pretrained(tmp_path / "teacher")
    full = whole(shape)
    permuted = permute_teacher(tmp_path / "teacher", found.rankings(full.num_key_value_heads), tmp_path / "permuted")
    trim(permuted, full)


def test_an_unknown_method_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "last_token", Method(last_token, sums=LastTokenSquares))
    with pytest.raises(ValueError, match="method: 'first_token' is not valid; valid: activation.*last_token"):
        check_importance(ImportanceConfig(method="first_token"))


def lines(field: str, path: Path) -> Iterator[str]:
    yield from path.read_text().splitlines()


def test_a_reader_of_text_files_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Tokenizer(models.WordLevel({"[end]": 0, "?": 1} | {str(n): n + 2 for n in range(40)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[end]")
    texts = [" ".join(str((first + n) % 40) for n in range(30)) for first in range(20)]
    (tmp_path / "a.lines").write_text("\n".join(texts))
    (tmp_path / "b.lines").write_text("\n".join(f"{text} 7" for text in texts))

    def load():  # type: ignore[no-untyped-def]
        return load_corpus(
            str(tmp_path / "a.lines"), str(tmp_path / "b.lines"), tokenizer, sequence_length=16, calibration_samples=2,
            validation_samples=4, train_tokens=80, seed=0,
        )  # fmt: skip

    with pytest.raises(ValueError, match="corpus.validation: .*is none of .txt, .jsonl, .parquet; valid: "):
        load()
    monkeypatch.setitem(text_sources.READERS, ".lines", lines)
    corpus = load()
    assert corpus.train.shape == (5, 16) and corpus.validation.shape == (4, 16)
    assert corpus.validation[0, :5].tolist() == [2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="valid: 'docstrings', a .txt, .jsonl, .parquet or .lines file or glob"):
        text_sources.text_source("corpus.train", "nowhere.txt")
