"""The training loop: its data order, determinism, resumption, processes and failures."""

import dataclasses
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from minitron_search.checkpoints import latest_checkpoint
from minitron_search.distillation import (
    LoopSettings,
    Milestone,
    TrainResult,
    stream,
    train,
)
from minitron_search.teacher_cache import Request, ensure, in_this_process
from minitron_search.teacher_source import Teacher, TeacherBatch, cached_teacher, live_teacher, output_head
from minitron_search.training_log import DivergedError

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


def losses(records: list[dict[str, float]]) -> list[float]:
    return [record["loss"] for record in records]


def weights(result: TrainResult) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in result.student.parameters()]


@pytest.mark.parametrize("loss", ["kld", "ce", "clm+kld"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cached_teacher_trains_as_the_live_one(precision: Any) -> None:
    settings = dataclasses.replace(SETTINGS, precision=precision)
    asked = Request("teacher", "data", WINDOWS, precision, hidden_size=24, vocab_size=VOCAB)
    built = ensure(asked, in_this_process(asked, lambda: tiny(0, 24)))
    cached = cached_teacher(built.path, output_head(tiny(0, 24)), precision)
    records, result = run(settings, teacher=cached)
    assert losses(records) == pytest.approx(losses(run(settings)[0]), rel=1e-4)
    assert result.teacher_tokens == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path, tied: bool, schedule: Any) -> None:
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
    unbroken, _ = run(settings, checkpoint_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]
    (tmp_path / ".step-00000007.partial").mkdir()  # as a killed process leaves it
    newest = latest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-00000006"
    assert losses(run(settings, resume=newest)[0]) == losses(unbroken)[6:]
    assert latest_checkpoint(tmp_path / "none") is None


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


def _broken(at: int, value: float) -> Teacher:
    """A teacher whose hidden states of batch `at` and later are `value` times too large."""
    teacher, calls = live_teacher(tiny(0, 24), "float32"), [0]

    def ask(indices: np.ndarray, tokens: np.ndarray) -> TeacherBatch:
        calls[0] += 1
        return TeacherBatch(teacher.ask(indices, tokens).hidden * (value if calls[0] >= at else 1.0))

    return teacher._replace(ask=ask)


def test_divergence_is_an_error_that_names_the_step_and_keeps_no_checkpoint(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, checkpoint_tokens=64 * 4, total_tokens=64 * 20)
    with pytest.raises(DivergedError, match="step 7: loss nan") as not_finite:
        run(settings, teacher=_broken(7, float("nan")), checkpoint_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    with pytest.raises(DivergedError) as too_high:
        run(settings, teacher=_broken(14, -100.0), student=tiny(0, 24))
    assert too_high.value.step == 14 and too_high.value.value > too_high.value.limit >= 3.0
    copy = pickle.loads(pickle.dumps(not_finite.value))
    assert copy.step == 7 and str(copy) == str(not_finite.value)


def test_a_batch_that_processes_cannot_share_equally_is_refused() -> None:
    with pytest.raises(ValueError, match="64 is 4 windows of 16 tokens, which 3 processes.*valid: 96"):
        run(world_size=3)


def _worker(rank: int, folder: str, told: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    settings = dataclasses.replace(SETTINGS, micro_batch_tokens=LENGTH, milestones=(6 * 64,), loss="clm+kld")
    records, result = run(
        settings, world_size=2, rank=rank, student=tiny(1 + rank),  # rank 0's weights count
        on_milestone=lambda milestone: None if rank else milestone.save(Path(folder) / "at-6"),
    )  # fmt: skip
    dist.barrier()
    continued, _ = run(settings, world_size=2, rank=rank, resume=Path(folder) / "at-6")
    told.put((rank, losses(records), losses(continued), [w.numpy() for w in weights(result)]))
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=_worker, args=(rank, str(tmp_path), told)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = sorted((told.get(timeout=120) for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join(30)
    (_, two, continued, left), (_, silent, _, right) = answers
    one = losses(run(dataclasses.replace(SETTINGS, loss="clm+kld"))[0])
    assert two == pytest.approx(one, rel=1e-4)  # sums in another order, and Adam on top
    assert continued == two[6:] and silent == []
    assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
