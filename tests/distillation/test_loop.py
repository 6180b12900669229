"""The training loop: its data order, determinism, resumption, processes and failures."""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from minitron_search.distillation import checkpoints
from minitron_search.distillation.batches import stream
from minitron_search.distillation.checkpoints import CheckpointFolder
from minitron_search.distillation.loop import LoopSettings, Milestone, TrainResult, train
from minitron_search.distillation.parallel import Processes
from minitron_search.distillation.prefetch import ahead
from minitron_search.distillation.teacher import TeacherBatch, TeacherSource, cached_teacher, live_teacher
from minitron_search.distillation.teacher_cache import Request, ensure, in_this_process
from minitron_search.distillation.training_log import DivergedError
from minitron_search.models.output_head import output_head
from tests.tiny import over

LENGTH, VOCAB = 16, 61
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (20, LENGTH)).astype(np.int32)
# 4 windows a batch, 12 batches: more than two epochs
SETTINGS = LoopSettings(
    total_tokens=12 * 64, batch_tokens=64, learning_rate=3e-3, warmup_steps=3, log_steps=5, threads=1
)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))


def tiny(seed: int, hidden: int = 16, tied: bool = True, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, attention_dropout=dropout,
        initializer_range=0.3,
    ))  # fmt: skip


def run(settings: LoopSettings = SETTINGS, **given: Any) -> tuple[list[dict[str, float]], TrainResult]:
    records: list[dict[str, float]] = []
    student = given.pop("student", None) or tiny(1)
    teacher = given.pop("teacher", None) or live_teacher(tiny(0, 24), settings.precision)
    return records, train(student, WINDOWS, settings, teacher, log=records.append, **given)


def cached(precision: Any) -> TeacherSource:
    """`tiny(0, 24)`, asked once."""
    asked = Request("teacher", "data", WINDOWS, precision, hidden_size=24, vocab_size=VOCAB)
    built = ensure(asked, in_this_process(asked, lambda: tiny(0, 24)))
    return cached_teacher(built.path, output_head(tiny(0, 24)), precision)


def losses(records: list[dict[str, float]]) -> list[float]:
    return [record["loss"] for record in records]


def weights(result: TrainResult) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in result.student.parameters()]


@over(itertools.product(["kld", "ce", "clm+kld"], ["float32", "bfloat16"]))
def test_training_lowers_the_loss_and_logs_every_step(loss: Any, precision: Any) -> None:
    settings = dataclasses.replace(SETTINGS, loss=loss, precision=precision, total_tokens=60 * 64)
    records, result = run(settings)
    assert [record["step"] for record in records] == list(range(1, 61))
    assert records[-1]["tokens"] == result.tokens == 60 * 64
    assert np.mean(losses(records)[-5:]) < 0.8 * losses(records)[0]
    assert ("kl" in records[0]) == (loss != "ce")
    assert all(parameter.dtype == torch.float32 for parameter in result.student.parameters())
    assert result.teacher_tokens == (0 if loss == "ce" else 60 * 64)


def test_a_step_equals_one_written_out_with_full_logits() -> None:
    settings = dataclasses.replace(SETTINGS, total_tokens=1, warmup_steps=0, loss="clm+kld", temperature=2.0)
    records, result = run(settings)
    student, teacher = tiny(1), tiny(0, 24)
    ids = torch.from_numpy(WINDOWS[stream(0, 20, 0, 4)].astype(np.int64))
    logits, log_p = student(ids).logits, torch.log_softmax(teacher(ids).logits.detach() / 2, -1)
    kl = (log_p.exp() * (log_p - torch.log_softmax(logits / 2, -1))).sum(-1).mean()
    loss = 4 * kl + student(ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    assert records[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert records[0]["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert records[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    decay = [p for p in student.parameters() if p.dim() > 1]
    other = [p for p in student.parameters() if p.dim() == 1]
    torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
                      lr=3e-3, betas=(0.9, 0.95)).step()  # fmt: skip
    # Adam's first step is the sign of the gradient: where that is rounding, only its size agrees
    pairs = zip(weights(result), student.parameters(), strict=True)
    close = [torch.isclose(a, b, atol=1e-4).float().flatten() for a, b in pairs]
    assert torch.cat(close).mean() > 0.995


def test_same_inputs_give_the_same_numbers_bit_for_bit() -> None:
    first, second = run(), run()
    assert losses(first[0]) == losses(second[0])
    assert all(torch.equal(a, b) for a, b in zip(weights(first[1]), weights(second[1]), strict=True))
    assert losses(run(dataclasses.replace(SETTINGS, seed=1))[0]) != losses(first[0])


def test_micro_batches_change_nothing_but_rounding() -> None:
    whole, parts = run()[0], run(dataclasses.replace(SETTINGS, micro_batch_tokens=48))[0]
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


@over(["float32", "bfloat16"])
def test_a_cached_teacher_trains_as_the_live_one(precision: Any) -> None:
    settings = dataclasses.replace(SETTINGS, precision=precision)
    records, result = run(settings, teacher=cached(precision))
    assert losses(records) == pytest.approx(losses(run(settings)[0]), rel=1e-4)
    assert result.teacher_tokens == 0


@over(itertools.product([True, False], ["constant", "cosine"]))
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(tied: bool, schedule: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, milestones=(5 * 64 - 7,), schedule=schedule)
    unbroken, whole = run(settings, student=tiny(1, tied=tied, dropout=0.2))

    def stop(milestone: Milestone) -> bool:
        assert (milestone.step, milestone.tokens, milestone.tokens_seen) == (5, 5 * 64 - 7, 5 * 64)
        milestone.student.eval()
        milestone.save(tmp_path / "at-5")
        return False

    before, stopped = run(settings, student=tiny(1, tied=tied, dropout=0.2), on_milestone=stop)
    assert stopped.stopped and stopped.step == 5
    after, continued = run(settings, student=tiny(7, tied=tied, dropout=0.2), resume=tmp_path / "at-5")
    assert losses(before) + losses(after) == losses(unbroken)
    assert all(torch.equal(a, b) for a, b in zip(weights(continued), weights(whole), strict=True))
    if schedule == "cosine":
        with pytest.raises(ValueError, match="total_tokens: 64, but the checkpoint"):
            run(dataclasses.replace(settings, total_tokens=64), resume=tmp_path / "at-5")
    with pytest.raises(ValueError, match="learning_rate: 0.1, but the checkpoint"):
        run(dataclasses.replace(settings, learning_rate=0.1), resume=tmp_path / "at-5")


def test_checkpoints_are_whole_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, checkpoint_tokens=3 * 64, total_tokens=7 * 64)
    unbroken, _ = run(settings, checkpoints=CheckpointFolder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]
    (tmp_path / ".step-00000007.partial").mkdir()  # as a killed process leaves it
    newest = CheckpointFolder(tmp_path).latest()
    assert newest == tmp_path / "step-00000006"
    assert losses(run(settings, resume=newest)[0]) == losses(unbroken)[6:]
    assert CheckpointFolder(tmp_path / "none").latest() is None


def test_a_finished_checkpoint_has_nothing_left_to_train(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, milestones=(SETTINGS.total_tokens,))
    _, result = run(settings, on_milestone=lambda milestone: milestone.save(tmp_path / "end"))
    assert not result.stopped
    records, again = run(settings, resume=tmp_path / "end")
    assert records == [] and again.step == 12 and again.last_loss == result.last_loss


def test_every_epoch_reads_every_window_once_in_another_order() -> None:
    places = stream(3, 20, 0, 60)
    epochs = [list(places[at : at + 20]) for at in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(stream(3, 20, 13, 21)) == list(places[13:34])
    assert list(stream(4, 20, 0, 20)) != epochs[0]


def test_batches_are_rounded_up_to_windows_and_totals_to_batches() -> None:
    settings = dataclasses.replace(SETTINGS, batch_tokens=50, total_tokens=65, milestones=(1, 65))
    reached: list[int] = []
    _, result = run(settings, on_milestone=lambda milestone: reached.append(milestone.tokens_seen))
    assert reached == [64, 128] and result.tokens == 128


def test_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    settings = dataclasses.replace(SETTINGS, schedule="cosine", min_learning_rate=1e-5)
    rates = [record["learning_rate"] for record in run(settings)[0]]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] == pytest.approx(1e-5)
    assert [record["learning_rate"] for record in run()[0]][2:] == pytest.approx([3e-3] * 10)


def _broken(at: int, value: float) -> TeacherSource:
    """A teacher whose hidden states of batch `at` and later are `value` times too large."""
    teacher, calls = live_teacher(tiny(0, 24), "float32"), [0]

    def ask(indices: np.ndarray, tokens: np.ndarray) -> TeacherBatch:
        calls[0] += 1
        return TeacherBatch(teacher.ask(indices, tokens).hidden * (value if calls[0] >= at else 1.0))

    return teacher._replace(ask=ask)


def test_divergence_is_an_error_that_names_the_step_and_keeps_no_checkpoint(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, checkpoint_tokens=64 * 4, total_tokens=64 * 20)
    with pytest.raises(DivergedError, match="step 7: loss nan") as not_finite:
        run(settings, teacher=_broken(7, float("nan")), checkpoints=CheckpointFolder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    with pytest.raises(DivergedError) as too_high:
        run(settings, teacher=_broken(14, -100.0), student=tiny(0, 24))
    assert too_high.value.step == 14 and too_high.value.value > too_high.value.limit >= 3.0
    copy = pickle.loads(pickle.dumps(not_finite.value))
    assert copy.step == 7 and str(copy) == str(not_finite.value)


def test_a_batch_that_processes_cannot_share_equally_is_refused() -> None:
    with pytest.raises(ValueError, match="64 is 4 windows of 16 tokens, which 3 processes.*valid: 96"):
        run(processes=Processes(3))


def test_recomputed_layers_change_no_bit() -> None:
    settings = dataclasses.replace(SETTINGS, gradient_checkpointing=True)
    forwards = [0]

    def student() -> LlamaForCausalLM:
        model = tiny(1, dropout=0.2)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
        return model

    kept, result = run(student=student())
    assert forwards == [12]
    recomputed, again = run(settings, student=student())
    assert forwards == [12 + 24], "a layer is to run in the forward and in the backward pass"
    assert losses(recomputed) == losses(kept)
    assert [record["gradient_norm"] for record in recomputed] == [record["gradient_norm"] for record in kept]
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(result), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds C++")
def test_compiled_layers_train_alike_and_are_scored_as_they_are() -> None:
    torch._dynamo.reset()
    settings = dataclasses.replace(SETTINGS, compile=True, milestones=(6 * 64,))
    compiled = []

    def score(milestone: Milestone) -> None:
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert milestone.student is not None
        milestone.student.eval()(torch.arange(7)[None])
        compiled.append((before, torch._dynamo.utils.counters["stats"]["unique_graphs"]))

    records, _ = run(settings, on_milestone=score)
    assert losses(records) == pytest.approx(losses(run()[0]), rel=1e-4)
    [(before, after)] = compiled
    assert before >= 1 and after == before, "scoring in another shape is to compile nothing"


class _Reads(TorchDispatchMode):
    """Where a number of a tensor was read: on a GPU, waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.places.append("".join(traceback.format_stack()))
        return func(*args, **(kwargs or {}))


@over(["kld", "ce", "clm+kld"])
def test_no_step_waits_for_the_device(loss: Any) -> None:
    settings = dataclasses.replace(SETTINGS, loss=loss, micro_batch_tokens=LENGTH, precision="bfloat16")
    teacher = cached("bfloat16")
    with _Reads() as reads:
        run(settings, teacher=teacher)
    assert not reads.places, reads.places[0]
    with reads:
        torch.ones(1).item()
    assert len(reads.places) == 1, "this test sees reads"


def test_the_next_item_is_loaded_while_one_is_used_and_none_after_it() -> None:
    loaded: list[int] = []
    second = threading.Event()

    def load(item: int) -> int:
        loaded.append(item)
        if item == 1:
            second.set()
        return 10 * item

    items = ahead(load, iter(range(4)))
    assert next(items) == 0
    assert second.wait(10) and loaded == [0, 1]
    assert list(items) == [10, 20, 30] and loaded == [0, 1, 2, 3]
    assert list(ahead(load, iter(()))) == []


def test_what_reading_ahead_raises_is_raised_by_the_training(tmp_path: Path) -> None:
    teacher = cached("float32")
    with pytest.raises(ValueError, match="was computed from other tokens"):
        train(tiny(1), WINDOWS[::-1].copy(), SETTINGS, teacher)


def test_a_live_teacher_is_asked_in_its_turn_by_the_thread_that_trains() -> None:
    alone, threads = live_teacher(tiny(0, 24), "float32"), set()

    def ask(indices: np.ndarray, tokens: np.ndarray) -> TeacherBatch:
        threads.add(threading.current_thread())
        return alone.ask(indices, tokens)

    run(teacher=alone._replace(ask=ask))
    assert threads == {threading.current_thread()}


def test_a_checkpoint_that_is_there_is_left(tmp_path: Path) -> None:
    """Between its end and the end of its successor a killed process would leave none."""
    settings = dataclasses.replace(SETTINGS, checkpoint_tokens=6 * 64, milestones=(12 * 64,))
    inode: list[int] = []

    def reached(milestone: Milestone) -> None:
        inode.append((tmp_path / "step-00000012").stat().st_ino)
        milestone.save(tmp_path / "step-00000012")

    run(settings, checkpoints=CheckpointFolder(tmp_path), on_milestone=reached)
    assert inode == [(tmp_path / "step-00000012").stat().st_ino]


@over(["tensors", "state", "rename"])
def test_a_process_killed_while_it_writes_a_checkpoint_leaves_the_one_before(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    settings = dataclasses.replace(SETTINGS, checkpoint_tokens=4 * 64)
    unbroken = losses(run(settings)[0])
    where = {"tensors": (checkpoints.dcp, "save"), "state": (json, "dumps"), "rename": (os, "rename")}
    module, name = where[cut]
    real = getattr(module, name)

    def killing(*args: Any, **given: Any) -> Any:
        second = (tmp_path / ".step-00000008.partial").exists()
        if second and (cut != "rename" or Path(args[1]).parent == tmp_path):
            raise Killed
        return real(*args, **given)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, killing)
        with pytest.raises(Killed):
            run(settings, checkpoints=CheckpointFolder(tmp_path))
    newest = CheckpointFolder(tmp_path).latest()
    assert newest == tmp_path / "step-00000004"
    records, _ = run(settings, checkpoints=CheckpointFolder(tmp_path), resume=newest)
    assert losses(records) == unbroken[4:]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]
