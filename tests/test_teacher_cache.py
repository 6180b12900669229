"""Teacher outputs computed once, and never used for the wrong tokens."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minitron_search import teacher_cache
from minitron_search.families import final_hidden
from minitron_search.teacher_cache import CacheReader, cache_bytes, cache_path, ensure, resolve_mode

WINDOWS = np.random.default_rng(0).integers(0, 50, (70, 32)).astype(np.int32)


def tiny_teacher() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )).eval()  # fmt: skip


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_are_the_teachers_hidden_states(precision: teacher_cache.Precision) -> None:
    built = ensure(tiny_teacher, "teacher", "data", WINDOWS, precision)
    indices = np.array([3, 69, 0])
    hidden = CacheReader(built.path).hidden(indices, WINDOWS[indices])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        expected = final_hidden(tiny_teacher(), torch.from_numpy(WINDOWS[indices].astype(np.int64)))
    assert hidden.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
    assert hidden.shape == (3, 32, 16)
    assert torch.allclose(hidden.float(), expected.float(), atol=1e-5 if precision == "float32" else 0.05)
    size = (built.path / "hidden.bin").stat().st_size
    assert size == cache_bytes(WINDOWS, 16, precision) == 70 * 32 * 16 * (4 if precision == "float32" else 2)


def test_the_teacher_is_paid_once() -> None:
    assert ensure(tiny_teacher, "teacher", "data", WINDOWS, "float32").teacher_tokens == 70 * 32

    def never() -> LlamaForCausalLM:
        raise AssertionError("the teacher was loaded for a cache that is there")

    assert ensure(never, "teacher", "data", WINDOWS, "float32").teacher_tokens == 0


def test_the_key_is_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    other = WINDOWS.copy()
    other[5, 5] += 1
    paths = {
        cache_path("teacher", "data", WINDOWS, "float32"),
        cache_path("corrected", "data", WINDOWS, "float32"),
        cache_path("teacher", "other data", WINDOWS, "float32"),
        cache_path("teacher", "data", WINDOWS, "bfloat16"),
        cache_path("teacher", "data", other, "float32"),
        cache_path("teacher", "data", WINDOWS.reshape(35, 64), "float32"),
    }
    assert cache_path("teacher", "data", WINDOWS.astype(np.int64), "float32") in paths
    monkeypatch.setattr(teacher_cache, "FORMULA", teacher_cache.FORMULA + 1)
    paths.add(cache_path("teacher", "data", WINDOWS, "float32"))
    assert len(paths) == 7


def test_a_row_is_never_used_for_other_tokens() -> None:
    reader = CacheReader(ensure(tiny_teacher, "teacher", "data", WINDOWS, "float32").path)
    for index, tokens in ((3, WINDOWS[4]), (3, WINDOWS[3] + 1), (70, WINDOWS[3])):
        with pytest.raises(ValueError, match=f"row {index} was computed from other tokens"):
            reader.hidden(np.array([0, index]), np.stack([WINDOWS[0], tokens]))
    with pytest.raises(ValueError, match="row 3"):
        reader.hidden(np.array([3]), WINDOWS[3:4, :16])


def test_a_build_that_dies_leaves_no_cache(cache_folder: Path) -> None:
    def dies() -> LlamaForCausalLM:
        teacher = tiny_teacher()
        teacher.lm_head = None  # not used
        teacher.model.norm.forward = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
        return teacher

    with pytest.raises(ZeroDivisionError):
        ensure(dies, "teacher", "data", WINDOWS, "float32")
    path = cache_path("teacher", "data", WINDOWS, "float32")
    assert not path.exists()
    assert ensure(tiny_teacher, "teacher", "data", WINDOWS, "float32").teacher_tokens == 70 * 32
    assert not list(path.parent.glob("*.partial"))
    assert json.loads((path / "cache.json").read_text())["teacher"] == "teacher"


def _ensure_and_tell(folder: str, start: "multiprocessing.synchronize.Barrier", told: "multiprocessing.Queue") -> None:
    os.environ["MINITRON_SEARCH_CACHE"] = folder
    torch.set_num_threads(1)
    start.wait(60)
    built = ensure(tiny_teacher, "teacher", "data", WINDOWS, "float32")
    told.put((built.teacher_tokens, float(CacheReader(built.path).hidden(np.arange(70), WINDOWS).sum())))


def test_two_processes_that_want_one_cache_compute_it_once(cache_folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, told = context.Barrier(2), context.Queue()
    arguments = (str(cache_folder), start, told)
    processes = [context.Process(target=_ensure_and_tell, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [told.get(timeout=90) for _ in processes]
    for process in processes:
        process.join(30)
    assert sorted(tokens for tokens, _ in answers) == [0, 70 * 32]
    assert answers[0][1] == answers[1][1]


def test_auto_is_hidden_within_the_budget_or_when_it_is_there() -> None:
    path = cache_path("teacher", "data", WINDOWS, "float32")
    needed = cache_bytes(WINDOWS, 16, "float32")
    assert resolve_mode("auto", path, needed, needed) == "hidden"
    assert resolve_mode("auto", path, needed, needed - 1) == "off"
    assert resolve_mode("hidden", path, needed, 0) == "hidden"
    assert resolve_mode("off", path, needed) == "off"
    assert resolve_mode("auto", path, 17 * 2**30) == "off"
    ensure(tiny_teacher, "teacher", "data", WINDOWS, "float32")
    assert resolve_mode("auto", path, needed, 0) == "hidden"
