"""Teacher outputs computed once, and never used for the wrong tokens."""

import itertools
import json
import multiprocessing
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minitron_search.distillation import teacher_cache
from minitron_search.distillation.teacher_cache import (
    MAX_BYTES,
    Built,
    CacheReader,
    Request,
    budget_bytes,
    cache_bytes,
    cache_path,
    ensure,
    in_this_process,
    resolve_mode,
)
from minitron_search.models.families import final_hidden
from minitron_search.models.output_head import output_head
from minitron_search.records import cache
from tests.sparse import top_k
from tests.tiny import over

WINDOWS = np.random.default_rng(0).integers(0, 50, (70, 32)).astype(np.int32)
HIDDEN = Request("teacher", "data", WINDOWS, "float32", hidden_size=16, vocab_size=50)
TOPK = HIDDEN._replace(k=7)
EITHER = over([(HIDDEN,), (TOPK,)])  # a request is a tuple itself


def tiny_teacher(vocab_size: int = 50) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )).eval()  # fmt: skip


def made(request: Request, load: Any = tiny_teacher) -> Built:
    return ensure(request, in_this_process(request, load))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path))
    return tmp_path


def full_log_probabilities(windows: np.ndarray, teacher: LlamaForCausalLM) -> torch.Tensor:
    """(n, length, vocab) float64."""
    with torch.no_grad():
        return teacher(torch.from_numpy(windows.astype(np.int64))).logits.double().log_softmax(-1)


@over(["float32", "bfloat16"])
def test_rows_are_the_teachers_hidden_states(precision: teacher_cache.Precision) -> None:
    built = made(HIDDEN._replace(precision=precision))
    indices = np.array([3, 69, 0])
    hidden = CacheReader(built.path).hidden(indices, WINDOWS[indices])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        expected = final_hidden(tiny_teacher(), torch.from_numpy(WINDOWS[indices].astype(np.int64)))
    assert hidden.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
    assert hidden.shape == (3, 32, 16) and built.lost is None
    assert torch.allclose(hidden.float(), expected.float(), atol=1e-5 if precision == "float32" else 0.05)


@over([(1, 2**16), (7, 2**16), (7, 2**16 + 2), (49, 2**16 + 2)])  # indices of two bytes and of four
def test_rows_are_the_teachers_most_probable_tokens(k: int, vocab_size: int) -> None:
    windows = WINDOWS[:9] * (vocab_size // 50)
    asked = Request(f"of {vocab_size} tokens", "data", windows, "float32", 16, vocab_size, k)
    indices = np.array([3, 8, 0])
    teacher = tiny_teacher(vocab_size)
    kept = CacheReader(made(asked, lambda: teacher).path).topk(indices, windows[indices])
    with torch.no_grad():
        hidden = final_hidden(teacher, torch.from_numpy(windows[indices].astype(np.int64))).flatten(0, 1)
        expected = top_k(hidden, output_head(teacher), k)
    assert kept.indices.shape == kept.log_probabilities.shape == (3, 32, k) and kept.rest.shape == (3, 32)
    assert kept.indices.dtype == torch.int64
    assert torch.equal(kept.indices.flatten(0, 1), expected.indices)
    # float16 rounds a log-probability of up to 16 nats by at most 2 ** -8
    assert torch.allclose(kept.log_probabilities.flatten(0, 1), expected.log_probabilities, atol=5e-3)
    assert torch.allclose(kept.rest.flatten(), expected.rest, atol=5e-3)
    mass = kept.log_probabilities.double().exp().sum(-1) + kept.rest.double().exp()
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-6)


@over([1, 7, 40])
def test_what_is_lost_is_that_of_full_distributions(k: int) -> None:
    """By the definition: KL of the full distribution from the one in which all other tokens share the rest evenly."""
    log_p = full_log_probabilities(WINDOWS, tiny_teacher())
    others = log_p.exp()
    kept = torch.zeros_like(log_p).scatter_(2, log_p.topk(k).indices, 1.0)
    rest = (others * (1 - kept)).sum(-1, keepdim=True)
    coarse = torch.where(kept > 0, log_p, (rest / (50 - k)).log())
    lost = made(HIDDEN._replace(k=k)).lost
    assert lost is not None
    assert lost.rest_mass == pytest.approx(rest.mean().item(), rel=1e-5)
    assert lost.kl == pytest.approx((others * (log_p - coarse)).sum(-1).mean().item(), rel=1e-4)
    assert made(HIDDEN._replace(k=k)).lost == lost  # of a cache that is there, as it was written


def test_more_tokens_lose_less() -> None:
    losses = [made(HIDDEN._replace(k=k)).lost for k in (1, 5, 20, 49)]
    masses, divergences = zip(*(lost for lost in losses if lost is not None), strict=True)
    assert list(masses) == sorted(masses, reverse=True) and list(divergences) == sorted(divergences, reverse=True)
    assert divergences[-1] == pytest.approx(0, abs=1e-6)  # one other token: nothing to spread


@over(itertools.product([None, 1, 7], ["float32", "bfloat16"]))
def test_a_cache_takes_the_bytes_it_was_said_to(k: int | None, precision: teacher_cache.Precision) -> None:
    asked = HIDDEN._replace(k=k, precision=precision)
    stored = sum(file.stat().st_size for file in made(asked).path.glob("*.bin"))
    hidden = 16 * (4 if precision == "float32" else 2)
    assert stored == cache_bytes(asked) == 70 * 32 * (hidden if k is None else 4 * k + 4)


@EITHER
def test_the_teacher_is_paid_once(asked: Request) -> None:
    assert made(asked).teacher_tokens == 70 * 32

    def never() -> LlamaForCausalLM:
        raise AssertionError("the teacher was loaded for a cache that is there")

    assert made(asked, never).teacher_tokens == 0


def test_the_key_is_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    other = WINDOWS.copy()
    other[5, 5] += 1
    changes: list[dict[str, Any]] = [
        {}, {"teacher": "corrected"}, {"data": "other data"}, {"precision": "bfloat16"}, {"windows": other},
        {"windows": WINDOWS.reshape(35, 64)}, {"k": 7}, {"k": 8},
    ]  # fmt: skip
    paths = {cache_path(HIDDEN._replace(**change)) for change in changes}
    assert cache_path(HIDDEN._replace(windows=WINDOWS.astype(np.int64))) in paths
    monkeypatch.setitem(cache.FORMULA, "teacher_cache", cache.FORMULA["teacher_cache"] + 1)
    paths.add(cache_path(HIDDEN))
    assert len(paths) == len(changes) + 1


@EITHER
def test_a_row_is_never_used_for_other_tokens(asked: Request) -> None:
    reader = CacheReader(made(asked).path)
    read = reader.hidden if asked.k is None else reader.topk
    for index, tokens in ((3, WINDOWS[4]), (3, WINDOWS[3] + 1), (70, WINDOWS[3])):
        with pytest.raises(ValueError, match=f"row {index} was computed from other tokens"):
            read(np.array([0, index]), np.stack([WINDOWS[0], tokens]))
    with pytest.raises(ValueError, match="row 3"):
        read(np.array([3]), WINDOWS[3:4, :16])


@EITHER
def test_a_build_that_dies_leaves_no_cache(asked: Request) -> None:
    def dies() -> LlamaForCausalLM:
        teacher = tiny_teacher()
        whole, calls = teacher.model.norm.forward, [0]

        def norm(hidden: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > 1:  # the first part is written by then
                raise ZeroDivisionError
            return whole(hidden)

        teacher.model.norm.forward = norm  # type: ignore[method-assign]
        return teacher

    with pytest.raises(ZeroDivisionError):
        made(asked, dies)
    path = cache_path(asked)
    assert not [left for left in path.parent.iterdir() if path.name in left.name]
    assert made(asked).teacher_tokens == 70 * 32
    assert [left for left in path.parent.iterdir() if path.name in left.name] == [path]
    assert json.loads((path / "cache.json").read_text())["teacher"] == "teacher"


def _ensured(start: Any) -> list[tuple[int, list[float]]]:
    """Of both requests, each begun when the other process does: the tokens that it cost, and what was read."""
    answers = []
    for asked in (HIDDEN, TOPK):
        start.wait(90)
        built = made(asked)
        reader = CacheReader(built.path)
        said = (reader.hidden if asked.k is None else reader.topk)(np.arange(70), WINDOWS)
        answers.append((built.teacher_tokens, [float(part.double().sum()) for part in said]))
    return answers


def _ensure_and_tell(folder: str, start: Any, told: "multiprocessing.Queue") -> None:
    os.environ["MINITRON_SEARCH_CACHE"] = folder
    torch.set_num_threads(1)
    told.put(_ensured(start))


def test_two_processes_that_want_one_cache_compute_it_once(cache_folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, told = context.Barrier(2), context.Queue()
    other = context.Process(target=_ensure_and_tell, args=(str(cache_folder), start, told), daemon=True)
    other.start()
    for (here_tokens, here), (there_tokens, there) in zip(_ensured(start), told.get(timeout=900), strict=True):
        assert sorted((here_tokens, there_tokens)) == [0, 70 * 32]
        assert here == there
    other.join(30)


def test_auto_is_hidden_within_the_budget_or_when_it_is_there() -> None:
    needed = cache_bytes(HIDDEN)
    assert resolve_mode("auto", HIDDEN, needed) == "hidden"
    assert resolve_mode("auto", HIDDEN, needed - 1) == "off"  # never another loss than was asked for
    assert [resolve_mode(mode, HIDDEN, 0) for mode in ("hidden", "topk", "off")] == ["hidden", "topk", "off"]
    made(HIDDEN)
    assert resolve_mode("auto", HIDDEN, 0) == "hidden"


def test_the_budget_is_a_quarter_of_the_free_disk_unless_given(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [400]
    disk = namedtuple("disk", ["free"])
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda folder: disk(free[0] if folder.exists() else 0))
    assert budget_bytes("auto", cache_folder / "not" / "there" / "yet") == 100
    assert budget_bytes(7, cache_folder) == 7
    free[0] = 10 * MAX_BYTES
    assert budget_bytes("auto", cache_folder) == MAX_BYTES
