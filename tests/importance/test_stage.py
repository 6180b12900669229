"""The stage: from a configuration to importance.safetensors and the teacher that every candidate is cut from. Tasks
run here, in this process; that they run on Ray is tested end to end."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_search.config import loading
from minitron_search.importance.importance import Importance, measure
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, weights
from minitron_search.pipeline import importance as importance_stage
from minitron_search.pipeline import teacher
from minitron_search.pipeline.importance import PART, calibration_windows, measure_importance
from minitron_search.pipeline.teacher import make_trial_inputs
from minitron_search.planning.prepare import Prepared, prepare
from minitron_search.pruning.trimming import trim
from minitron_search.records.cache import content_id
from minitron_search.records.paths import cache_folder
from tests import tiny

METHODS = ("activation", "random", "magnitude", "taylor", "wanda", "pca")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.input_files(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def prepared(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Prepared]:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    for stage in (importance_stage, teacher):
        monkeypatch.setattr(
            stage, "in_parts", lambda run_dir, function, parts, *arguments, memory=0: function(parts, *arguments)
        )
        monkeypatch.setattr(stage, "on_all_cpus", lambda run_dir, function, *arguments: function(*arguments))
    monkeypatch.setattr(teacher, "on_one_node", lambda run_dir, function, *arguments: function(*arguments))

    def made(name: str = "run", **importance: Any) -> Prepared:
        given = {
            "output": str(tmp_path / name),
            "teacher": {"model": str(inputs / "teacher")},
            "corpus": {
                "train": str(inputs / "text.txt"), "validation": str(inputs / "text.txt"), "sequence_length": 32,
                "calibration_samples": 2 * PART, "validation_samples": 4,
            },
            "winogrande": {"source": str(inputs / "questions.jsonl")},
            "space": {
                "budget": {"params": {"target": "12K", "tolerance": 0.5}},
                "axes": {"hidden_size": {"low": 16, "high": 24, "step": 4}, "num_attention_heads": {"choices": [2, 4]}},
            },
            "search": {"rungs": [64, 128]},
            "distillation": {"batch_tokens": 64},
            "retraining": {"tokens": 256},
            "importance": importance,
            "precision": "float32",
        }  # fmt: skip
        ready = prepare(loading.parse_config(given), resume=False)
        ready.run_dir.root.mkdir(parents=True)
        return ready

    return made


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_from_the_configuration_to_a_trimmed_student(
    method: str, prepared: Callable[..., Prepared]
) -> None:
    ready = prepared(method=method)
    measure_importance(ready)
    found = Importance.load(ready.run_dir.importance)
    model = AutoModelForCausalLM.from_pretrained(ready.pruned.folder).eval()
    expected = measure(model, ready.corpus.calibration, ready.config.importance, seed=ready.config.seed)
    for name in ("hidden", "mlp", "heads", "block_bi"):
        actual, right = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))
    made = make_trial_inputs(ready)
    permuted = AutoModelForCausalLM.from_pretrained(made.teacher_folder).eval()
    tokens = tiny.tokens(model.config)
    torch.testing.assert_close(tiny.logits(permuted, tokens), tiny.logits(model, tokens), rtol=1e-3, atol=1e-3)
    for architecture in (ready.space.teacher, *ready.space.smallest_and_largest()):
        student = trim(made.teacher_folder, architecture)
        assert student.num_parameters() == ready.space.measures(architecture).params


def test_pca_counts_the_head_that_it_unties(prepared: Callable[..., Prepared]) -> None:
    tied, untied = prepared("a"), prepared("b", method="pca")
    extra = tied.pruned.config.vocab_size * tied.pruned.config.hidden_size
    counts = [parameter_count(weights(ready.pruned.config), sizes(ready.pruned.config)) for ready in (tied, untied)]
    assert counts[1] - counts[0] == extra
    assert untied.space.measures(untied.space.teacher).params == counts[1]


def test_importance_is_kept_by_what_it_was_made_from(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    measured = importance_stage._importance
    monkeypatch.setattr(importance_stage, "_importance", lambda *given: passes.append(1) or measured(*given))

    def run(name: str, **importance: Any) -> bytes:
        ready = prepared(name, **importance)
        measure_importance(ready)
        assert [path.name for path in ready.run_dir.root.iterdir() if path.name.startswith(".")] == []
        return ready.run_dir.importance.read_bytes()

    first = run("a")
    assert run("b") == first and len(passes) == 1
    others = [{"batch": "l1"}, {"sequence": "l2"}, {"seed": 5}, {"method": "random"}, {"rounds": 2},
              {"method": "random", "seed": 5}]  # fmt: skip
    different = {run(f"other-{n}", **importance) for n, importance in enumerate(others)}
    assert len(different | {first}) == 1 + len(others)
    assert len(passes) == 1 + len(others) + 1  # two rounds are two passes


def test_the_seed_draws_other_calibration_windows_and_the_same_validation(prepared: Callable[..., Prepared]) -> None:
    one, same, other = prepared("a"), prepared("b", seed=0), prepared("c", seed=1)
    assert (one.corpus.calibration == same.corpus.calibration).all()
    assert (one.corpus.calibration != other.corpus.calibration).any()
    assert (one.corpus.validation == other.corpus.validation).all()


def test_rounds_compose_an_order_of_the_searched_axes(prepared: Callable[..., Prepared]) -> None:
    ready = prepared(rounds=3)
    measure_importance(ready)
    found = Importance.load(ready.run_dir.importance)
    assert found.order is not None and sorted(found.order.hidden.tolist()) == list(range(24))
    cache = cache_folder() / "importance"
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]  # the trims in between are gone
    made = make_trial_inputs(ready)
    trim(made.teacher_folder, ready.space.smallest_and_largest()[0])


def test_samples_are_drawn_by_seed_and_leave_the_text_as_it_is(prepared: Callable[..., Prepared]) -> None:
    whole, one, other = (prepared(str(n), **asked) for n, asked in enumerate(
        ({}, {"samples": 5, "seed": 1}, {"samples": 5, "seed": 2})))  # fmt: skip
    assert calibration_windows(whole) is whole.corpus.calibration
    assert whole.corpus.id == one.corpus.id == other.corpus.id
    drawn = [{tuple(row) for row in calibration_windows(ready).tolist()} for ready in (one, other)]
    assert len(drawn[0]) == len(drawn[1]) == 5 and drawn[0] != drawn[1]
    assert all(rows <= {tuple(row) for row in whole.corpus.calibration.tolist()} for rows in drawn)
    with pytest.raises(ValueError, match="importance.samples: 99 of corpus.calibration_samples 16; valid: at most 16"):
        prepared("more", samples=99)


@pytest.mark.parametrize("listed", [True, False])
def test_whatever_is_torn_in_the_cache_is_made_again(
    listed: bool, prepared: Callable[..., Prepared], capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut short, each kind; `listed`: by this version, which keeps a list of what an entry holds."""

    def run(name: str) -> dict[str, Any]:
        ready = prepared(name)
        measure_importance(ready)
        made = make_trial_inputs(ready)
        assert made.train_cache is not None
        outputs = [path for kept in (made.train_cache, made.validation_cache) for path in sorted(kept.glob("*.bin"))]
        return {
            "tokens": ready.corpus.train.tolist(),
            "importance": Importance.load(ready.run_dir.importance).hidden.tolist(),
            "permuted": load_file(made.teacher_folder / "model.safetensors")["model.norm.weight"].tolist(),
            "teacher_cache": [path.read_bytes() for path in outputs],
        }

    whole = run("whole")
    for kind in whole:
        if not listed:
            shutil.rmtree(cache_folder() / "contents", ignore_errors=True)
        files = sorted(path for path in (cache_folder() / kind).rglob("*") if path.is_file())
        torn = max(files, key=lambda path: path.stat().st_size)
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
        capsys.readouterr()
        assert run(f"after {kind}") == whole, kind
        assert "is made again: " in capsys.readouterr().out, kind


def test_the_order_of_a_permuted_teacher_goes_by_the_tensors(prepared: Callable[..., Prepared]) -> None:
    """The metadata of a safetensors file may be written in any order."""
    ready = prepared()
    measure_importance(ready)
    folder = make_trial_inputs(ready).teacher_folder
    file = ready.run_dir.importance
    save_file(load_file(file), file, {"another": "1", "order": "2"})
    assert make_trial_inputs(ready).teacher_folder == folder


def test_what_an_earlier_version_permuted_is_used_again(prepared: Callable[..., Prepared]) -> None:
    """It went by an id of the bytes of importance.safetensors."""
    ready = prepared()
    measure_importance(ready)
    folder = make_trial_inputs(ready).teacher_folder
    of_bytes = content_id(ready.run_dir.importance.read_bytes().hex())
    earlier = folder.parent.with_name(content_id([ready.pruned.fingerprint, of_bytes]))
    folder.parent.rename(earlier)
    assert make_trial_inputs(ready).teacher_folder == earlier / folder.name
