"""The notebook's steps on a tiny model: each is what the pipeline's own part computes, and says what is wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import minitron_search as ms
from minitron_search.api import Model
from minitron_search.data.corpus import Corpus
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, `model`, and a text."""
    made = tmp_path_factory.mktemp("notebook")
    config = tiny.config(vocab_size=258, hidden_size=48, intermediate_size=96, num_hidden_layers=5,
                         num_attention_heads=6, num_key_value_heads=3, head_dim=8,
                         max_position_embeddings=256)  # fmt: skip
    tiny.model(config).save_pretrained(made / "model")
    tiny.tokenizer().save_pretrained(made / "model")
    (made / "text.txt").write_text(tiny.prose(6_000))
    return made


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Model:
    return ms.load(folder / "model")


@pytest.fixture(scope="module")
def text(folder: Path, teacher: Model) -> Corpus:
    return ms.corpus(folder / "text.txt", teacher, length=32, calibration=6, validation=6, tokens="2K")


def plain_loss(model: torch.nn.Module, windows: np.ndarray) -> float:
    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_the_ten_lines(teacher: Model, text: Corpus, tmp_path: Path) -> None:
    importance = ms.measure_importance(teacher, text.calibration, method="activation", precision="float32")
    sweep = ms.sweep_depth(teacher, text.validation, lengths=(1, 2), precision="float32")
    shape = teacher.shape.smaller(intermediate_size=64, drop=sweep.best(2))
    student = ms.trim(teacher, shape, importance)
    before = ms.score(student, text.validation, teacher, precision="float32")
    result = ms.distill(student, teacher, text.train, tokens="2K", learning_rate=3e-3, batch_tokens=128,
                        precision="float32")  # fmt: skip
    after = ms.score(student, text.validation, teacher, precision="float32")
    assert after["kl"] < before["kl"] and result.tokens == 2_048 and len(result.steps) == 16
    assert "-" in after.against(before) and str(len(text.validation)) in after.against(before)

    saved = AutoModelForCausalLM.from_pretrained(student.save(tmp_path / "student"))
    assert saved.num_parameters() == shape.params == student.shape.params
    assert plain_loss(saved, text.validation) == pytest.approx(after["lm_loss"], abs=1e-5)
    for shown in (teacher, shape, importance, sweep, student, result, after):
        assert "object at 0x" not in repr(shown) and len(repr(shown)) < 2_000, type(shown)
    for drawn in (teacher, shape, sweep, result, after):
        assert drawn._repr_html_().startswith(("<table>", "<p>"))


def test_the_sweep_is_a_plain_forward_without_the_block(teacher: Model, text: Corpus) -> None:
    sweep = ms.sweep_depth(teacher, text.validation, lengths=(2,), precision="float32")
    found = sweep.table[sweep.table["kind"] == "contiguous"].set_index("start")["value"]
    for start in found.index:
        student = ms.trim(teacher, teacher.shape.smaller(drop=(start, start + 1)))
        assert plain_loss(student.model, text.validation) == pytest.approx(found[start], abs=1e-4)
    assert sweep.best(2)[0] == found.idxmin()


def test_every_way_to_name_a_model_is_the_same_model(folder: Path, text: Corpus) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    importance = ms.measure_importance(folder / "model", text.calibration)
    losses = set()
    for way in (str(folder / "model"), folder / "model", loaded, ms.load(loaded, tiny.tokenizer())):
        shape = ms.load(way).shape.smaller(hidden_size=36)
        assert torch.equal(ms.measure_importance(way, text.calibration).hidden, importance.hidden)
        student = ms.trim(way, shape, importance)
        losses.add(ms.score(student, text.validation)["lm_loss"])
        assert ms.sweep_depth(way, text.validation, lengths=(1,)).best(1)
    assert len(losses) == 1
    own = ms.trim(loaded, ms.load(loaded).shape)
    with torch.no_grad():
        own.model.get_input_embeddings().weight.zero_()
    assert loaded.get_input_embeddings().weight.abs().sum() > 0, "a student has weights of its own"


def test_one_call_returns_the_best_of_what_it_tried(folder: Path) -> None:
    student = ms.prune(folder / "model", params="80%", text=folder / "text.txt", trials=5, length=32, calibration=4,
                       judged=6)  # fmt: skip
    tried = student.candidates
    assert tried is not None and len(tried) == 5 and tried["lm_loss"].is_monotonic_increasing
    assert student.shape.params == tried["params"].iloc[0]
    assert abs(student.shape.params / ms.load(folder / "model").shape.params - 0.8) <= 0.05 * 0.8 + 0.001
    # over the last of them again, with the same seed
    text = ms.corpus(folder / "text.txt", student, length=32, calibration=4, tokens=6 * 32)
    assert ms.score(student, text.train)["lm_loss"] == pytest.approx(tried["lm_loss"].iloc[0], rel=1e-6)


def test_winogrande_is_scored_where_it_is_asked_for(teacher: Model, text: Corpus, tmp_path: Path) -> None:
    questions = tiny.winogrande_file(tmp_path / "questions.jsonl", examples=6)
    scores = ms.score(teacher, text.validation, winogrande=questions)
    assert scores.means["winogrande_acc"][2] == 6 and 0 <= scores["winogrande_acc"] <= 1
    with pytest.raises(KeyError, match="kl: not scored; scored: lm_loss, winogrande_acc"):
        scores["kl"]


def test_what_is_wrong_is_said_with_what_would_do(teacher: Model, text: Corpus, folder: Path, tmp_path: Path) -> None:
    shape, importance = teacher.shape, ms.measure_importance(teacher, text.calibration)
    other = ms.load(tiny.model(tiny.config(hidden_size=24)))
    sweep = ms.sweep_depth(teacher, text.validation, lengths=(1,))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    wrong = [
        (lambda: shape.smaller(hidden_size=96), "hidden_size: 96 is not a width inside this shape; valid: 1 to 48"),
        (lambda: shape.smaller(num_attention_heads=4), "no multiple of num_key_value_heads 3; valid: 3"),
        (lambda: shape.smaller(drop=(7,)), "layer 7 is not among those kept; valid: some of the layers 0 to 4"),
        (lambda: shape.smaller(drop=range(5)), "no layer is left"),
        (lambda: ms.trim(teacher, shape.smaller(hidden_size=36)), "importance: none given, and hidden_size shrinks"),
        (lambda: ms.trim(other, shape, importance), "one inside another model"),
        (lambda: ms.trim(other, other.shape.smaller(hidden_size=12), importance), "measured on a model of hidden_size"),
        (lambda: ms.measure_importance(teacher, text.calibration, "activations"), "valid: activation, random"),
        (lambda: ms.distill(ms.trim(teacher, shape), teacher, text.train, loss="kl"), "valid: kld"),
        (lambda: ms.distill(ms.trim(teacher, shape), other, text.train), "vocabulary"),
        (lambda: ms.distill(ms.trim(teacher, shape), teacher, text.train, tokens="many"), "no number of tokens"),
        (lambda: sweep.best(3), "length: 3 was not swept; valid: 1"),
        (lambda: ms.sweep_depth(teacher, text.validation, lengths=(5,)), "valid: at most 4"),
        (lambda: ms.load(folder / "nothing"), "is not a folder"),
        (lambda: ms.load(3), "int is no model"),
        (lambda: ms.corpus(folder / "text.txt", other), "has no tokenizer; valid: load"),
        (lambda: ms.corpus(folder / "missing.txt", teacher), "missing.txt"),
        (lambda: teacher.save(tmp_path / "full"), "is there already"),
        (lambda: ms.open_run(tmp_path), "holds no run"),
        (lambda: ms.prune(teacher, params="101%", text=folder / "text.txt", length=32), "valid"),
    ]  # fmt: skip
    for number, (asked, told) in enumerate(wrong):
        with pytest.raises(ValueError, match="valid") as error:
            asked()
        assert told in str(error.value), (number, str(error.value))


def test_a_version_is_read_without_torch_and_a_name_that_is_not_there_is_told() -> None:
    script = (
        "import sys, minitron_search as ms; ms.__version__; assert 'trim' in dir(ms)\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
        "ms.trim; assert 'torch' in sys.modules and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'prunes'; it has corpus, distill"):
        ms.prunes  # noqa: B018
