"""Teacher correction: what it trains, that it helps, that it repeats itself; in parallel, step by step."""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_search.checkpoints.safe_reading import DamagedError
from minitron_search.config.loading import parse_config
from minitron_search.distillation.batches import stream
from minitron_search.distillation.correction import correcting_teacher, float32_of, merged, norm_weights, trainable
from minitron_search.distillation.loop import LoopSettings, Milestone, TrainResult, learning_rate_of, train
from minitron_search.distillation.settings import CorrectionSettings, method_of
from minitron_search.distillation.teacher import TeacherSource, live_teacher
from minitron_search.export.student_folder import write_folder
from minitron_search.export.teacher_files import teacher_files
from minitron_search.pipeline.correction import made_from
from minitron_search.trials.settings import correction, correction_settings, retraining_settings
from tests import tiny

LENGTH, VOCAB, BATCH = 16, 61, 4
METHODS: list[Any] = ["full", "lora", "norms"]
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (20, LENGTH)).astype(np.int32)
SETTINGS = LoopSettings(
    total_tokens=6 * BATCH * LENGTH, batch_tokens=BATCH * LENGTH, learning_rate=3e-3, warmup_steps=2, log_steps=1,
    threads=1, loss="ce", schedule="cosine",
)  # fmt: skip


def teacher(seed: int = 0, **given: Any) -> PreTrainedModel:
    return tiny.model(tiny.config(**given), seed)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def following(rows: int, seed: int) -> np.ndarray:
    """Text of one rule: after a token t comes 3t + 1, or, one time in five, any."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, VOCAB, (rows, LENGTH))
    for place in range(1, LENGTH):
        ruled = (3 * tokens[:, place - 1] + 1) % VOCAB
        tokens[:, place] = np.where(draw.random(rows) < 0.8, ruled, tokens[:, place])
    return tokens.astype(np.int32)


def lm_loss(model: PreTrainedModel, windows: np.ndarray) -> float:
    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


# Before distillation


@tiny.over(METHODS)
def test_correction_lowers_the_loss_on_text_it_has_not_seen(method: Any) -> None:
    model = teacher()
    before = lm_loss(model, following(40, 1))
    settings = dataclasses.replace(SETTINGS, total_tokens=100 * BATCH * LENGTH, learning_rate=1e-2)
    train(trainable(model, method, 0), following(60, 0), settings, None)
    assert lm_loss(merged(model).eval(), following(40, 1)) < 0.9 * before


@tiny.over(itertools.product(METHODS, ["llama", "gpt2", "gpt_neox", "phi3", "opt", "gemma2", "stablelm"]))
def test_only_what_the_method_trains_changes_and_plain_weights_come_out(method: Any, name: str, tmp_path: Path) -> None:
    model = teacher(model_type=name)
    ids, named = tiny.tokens(model.config), list(weights(model))
    before, said = weights(model), tiny.logits(model, ids)
    norms = [name for name, p in model.named_parameters() if any(p is norm for norm in norm_weights(model))]
    model = trainable(model, method, 0)
    assert torch.equal(tiny.logits(model, ids), said), "it begins as the teacher itself"
    train(model, WINDOWS, SETTINGS, None)
    corrected = tiny.logits(model.eval(), ids)
    assert not torch.allclose(corrected, said, atol=1e-3)
    model = merged(model)
    assert list(weights(model)) == named and all(p.requires_grad for p in model.parameters())
    assert torch.allclose(tiny.logits(model, ids), corrected, atol=1e-4)  # what peft's own forward gave
    changed = {name for name, now in weights(model).items() if not torch.equal(now, before[name])}
    if method == "norms":
        assert changed == set(norms)
    elif method == "lora":
        embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        assert changed and not changed & {*norms, embedding}
        assert all(before[name].dim() == 2 for name in changed)
    else:
        assert changed == set(named)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    files = {**teacher_files(tmp_path / "tokenizer").contents, "correction.json": b"{}"}
    write_folder(model, files, tmp_path / "corrected")
    assert {path.name for path in (tmp_path / "corrected").iterdir()} >= {"correction.json", "tokenizer.json"}
    with safe_open(tmp_path / "corrected" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lora" in key or "base_layer" in key]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "corrected", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(tiny.logits(again.eval(), ids), tiny.logits(model, ids))


def test_a_model_whose_norms_have_no_weights_is_refused_by_name() -> None:
    bare = teacher(model_type="opt", layer_norm_elementwise_affine=False)
    with pytest.raises(ValueError, match="teacher.correction.method: norms.*valid: full or lora"):
        trainable(bare, "norms", 0)


@tiny.over(METHODS)
def test_a_killed_correction_goes_on_to_the_same_bits(method: Any, tmp_path: Path) -> None:
    def corrected(**given: Any) -> dict[str, torch.Tensor]:
        model = trainable(teacher(), method, 0)
        train(model, WINDOWS, settings, None, **given)
        return weights(merged(model))

    def killed(milestone: Milestone) -> bool:
        milestone.save(tmp_path / "step-00000003")
        raise KeyboardInterrupt

    settings = dataclasses.replace(SETTINGS, milestones=(3 * BATCH * LENGTH,))
    with pytest.raises(KeyboardInterrupt):
        corrected(on_milestone=killed)
    unbroken = corrected()
    assert equal(corrected(resume=tmp_path / "step-00000003"), unbroken)
    assert equal(corrected(), unbroken)


def test_lora_begins_with_the_weights_of_its_seed() -> None:
    made = [weights(trainable(teacher(), "lora", seed)) for seed in (0, 0, 1)]
    assert equal(made[0], made[1]) and not equal(made[0], made[2])


def test_half_a_folder_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = teacher()

    def broken(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(model, "save_pretrained", broken)
        with pytest.raises(OSError, match="no space"):
            write_folder(model, {}, tmp_path / "corrected")
    assert not (tmp_path / "corrected").exists()
    write_folder(model, {}, tmp_path / "corrected")
    assert torch.equal(float32_of(tmp_path / "corrected").lm_head.weight, model.lm_head.weight)


# Settings and ids


def test_the_schedule_is_the_papers() -> None:
    config = parse_config({
        "teacher": {"correction": {"method": "full"}},
        "retraining": {"tokens": "100B", "learning_rate": 1e-4, "min_learning_rate": 1e-6, "schedule": "cosine"},
        "distillation": {"loss": "clm+kld", "batch_tokens": 4096},
    })  # fmt: skip
    asked = correction(config)
    assert asked is not None
    found, student = correction_settings(config, asked, "bfloat16"), retraining_settings(config, "bfloat16")
    assert (found.loss, found.learning_rate, found.warmup_steps) == ("ce", pytest.approx(2e-5), 120)
    same = ("schedule", "batch_tokens", "min_learning_rate", "total_tokens", "weight_decay", "precision", "seed")
    assert all(getattr(found, name) == getattr(student, name) for name in same)
    assert found.milestones == (0, 100_000_000_000)
    assert correction(parse_config({})) is None


def test_a_short_correction_warms_up_for_a_tenth_and_what_is_written_counts() -> None:
    short = parse_config({"teacher": {"correction": {"method": "norms", "tokens": "8K", "seed": 5}}, "seed": 3})
    asked = correction(short)
    assert asked is not None and asked.seed == 5
    settings = correction_settings(short, asked, "float32")
    assert (settings.total_tokens, settings.warmup_steps, settings.seed) == (8_000, 0, 5)
    written = {"method": "lora", "learning_rate": 1e-3, "warmup_steps": 7}
    asked = correction(parse_config({"teacher": {"correction": written}, "seed": 3}))
    assert asked == CorrectionSettings("lora", 1e-3, 1e-5, 7, 3)
    assert method_of(asked.initialization) == "lora" and method_of("pruned") is None


def test_the_id_is_of_everything_that_makes_a_corrected_teacher() -> None:
    asked = CorrectionSettings("full", 1e-4, 1e-5, None, 0)
    base: tuple[Any, ...] = ("abc", WINDOWS, asked, SETTINGS, 1)
    other_text = WINDOWS.copy()
    other_text[-1, -1] += 1
    others = [
        ("abd", *base[1:]),
        (base[0], other_text, *base[2:]),
        (base[0], WINDOWS.reshape(-1, 2 * LENGTH), *base[2:]),
        (*base[:2], dataclasses.replace(asked, method="lora"), *base[3:]),
        (*base[:3], dataclasses.replace(SETTINGS, learning_rate=1e-4), 1),
        (*base[:3], dataclasses.replace(SETTINGS, seed=1), 1),
        (*base[:3], dataclasses.replace(SETTINGS, total_tokens=64), 1),
        (*base[:4], 2),
    ]
    made = [str(made_from(*arguments)) for arguments in (base, *others)]
    assert len(set(made)) == len(made)
    assert str(made_from(*base)) == str(made_from("abc", WINDOWS.astype(np.int64), asked, SETTINGS, 1))


@tiny.over([
    ({"teacher": {"correction": {"parallel": True}}}, "parallel: True with teacher.correction.method none; valid"),
    ({"teacher": {"correction": {"method": "lora"}}, "resources": {"strategy": "fsdp2"}}, "lora with resources"),
    ({"teacher": {"correction": {"method": "lora", "parallel": True, "tokens": 9}}}, "tokens: 9 with .*valid: auto"),
    ({"teacher": {"correction": {"method": "full", "parallel": True}}, "distillation": {"teacher_cache": "hidden"}},
     "distillation.teacher_cache: hidden with teacher.correction.parallel.*valid: auto or off"),
    ({"teacher": {"correction": {"method": "full", "parallel": True}}, "distillation": {"loss": "ce"}},
     "asks no teacher; valid: distillation.loss kld"),
    ({"teacher": {"prune": "corrected"}}, "teacher.prune: corrected, but no correction is asked; valid: original"),
    ({"teacher": {"prune": "corrected", "correction": {"method": "full", "parallel": True}}}, "parallel corrects"),
    ({"teacher": {"prune": "corrected", "correction": {"method": "full"}}, "distillation": {"teacher": "a"}},
     "the correction is of distillation.teacher; valid: original or auto"),
    ({"teacher": {"correction": {"method": "all"}}}, "teacher.correction.method: 'all' is not valid"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(written: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_config(written)


def test_the_corrected_teacher_is_pruned_unless_another_is() -> None:
    def prunes(**given: Any) -> bool:
        return parse_config({"teacher": {"correction": {"method": "norms"}} | given}).prunes_corrected

    assert prunes() and prunes(prune="corrected") and not prunes(prune="original")
    assert not prunes(correction={"method": "norms", "parallel": True}) and not parse_config({}).prunes_corrected


# In parallel


def student() -> PreTrainedModel:
    return teacher(3, hidden_size=12)


def in_parallel(settings: LoopSettings, method: Any = "full", share: int = BATCH, world_size: int = 1) -> TeacherSource:
    model = trainable(teacher(), method, 0)
    own = CorrectionSettings(method, 1e-3, 1e-4, 2, 0).loop_settings(settings)
    live = live_teacher(model, settings.precision)
    return correcting_teacher(live, model, own, share=share, steps=6, world_size=world_size)


def run(settings: LoopSettings, taught: TeacherSource, **given: Any) -> tuple[list[dict[str, float]], TrainResult]:
    records: list[dict[str, float]] = []
    return records, train(student(), WINDOWS, settings, taught, log=records.append, **given)


DISTIL = dataclasses.replace(SETTINGS, loss="kld")


@tiny.over(itertools.product(["float32", "bfloat16"], [True, False]))
def test_in_parallel_the_student_meets_the_teacher_of_its_step(precision: Any, tied: bool) -> None:
    """Three steps written out with full logits: KL from the teacher as it is, then the teacher's own step."""
    settings = dataclasses.replace(DISTIL, precision=precision, micro_batch_tokens=LENGTH)
    model = teacher(tie_word_embeddings=tied)
    own = CorrectionSettings("full", 2e-2, 1e-4, 2, 0).loop_settings(settings)
    taught = correcting_teacher(live_teacher(model, precision), model, own, share=BATCH, steps=6)
    records, _ = run(settings, taught)

    expected, by_hand = [], teacher(tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW([
        {"params": [p for p in by_hand.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in by_hand.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ], betas=(0.9, 0.95))  # fmt: skip
    for step in range(3):
        ids = torch.from_numpy(WINDOWS[stream(0, 20, step * BATCH, BATCH)].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            said = by_hand(ids, labels=ids)
        expected.append(torch.log_softmax(said.logits.detach().float(), -1))
        said.loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(own, step, 6)
        optimizer.step()
        optimizer.zero_grad()
    assert [learning_rate_of(own, step, 6) for step in range(2)] == [1e-2, 2e-2]

    tolerance = 1e-4 if precision == "float32" else 2e-2
    assert [record["kl"] for record in records[:3]] == pytest.approx(_kl_of(expected, settings), rel=tolerance)
    still = live_teacher(teacher(tie_word_embeddings=tied), precision)
    assert [record["kl"] for record in run(settings, still)[0]][1:3] != pytest.approx(
        [record["kl"] for record in records[1:3]], rel=tolerance
    )


def _kl_of(teachers: list[torch.Tensor], settings: LoopSettings) -> list[float]:
    """KL at each step of a student that distils with full logits from these."""
    model, found = student(), []
    optimizer = torch.optim.AdamW([
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ], betas=(0.9, 0.95))  # fmt: skip
    for step, log_p in enumerate(teachers):
        ids = torch.from_numpy(WINDOWS[stream(0, 20, step * BATCH, BATCH)].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16"):
            log_q = torch.log_softmax(model(ids).logits.float(), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        kl.backward()
        found.append(kl.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(settings, step, 6)
        optimizer.step()
        optimizer.zero_grad()
    return found


@tiny.over(itertools.product(METHODS, ["float32", "bfloat16"]))
def test_in_parallel_a_continued_training_is_the_unbroken_one(method: Any, precision: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(DISTIL, milestones=(3 * BATCH * LENGTH,), precision=precision)
    taught = in_parallel(settings, method)
    unbroken, whole = run(settings, taught)
    stopped = {"on_milestone": lambda milestone: bool(milestone.save(tmp_path / "at-3"))}
    before, _ = run(settings, in_parallel(settings, method), **stopped)
    resumed = in_parallel(settings, method)
    after, continued = run(settings, resumed, resume=tmp_path / "at-3")
    assert [r["loss"] for r in before + after] == [r["loss"] for r in unbroken] and len(before) == 3
    assert equal(weights(continued.student), weights(whole.student))
    states = [made.correction.state_dict() for made in (taught, resumed) if made.correction]
    assert states[0]["step"] == states[1]["step"] == 6
    assert states[0]["weights"] and equal(states[0]["weights"], states[1]["weights"])


def test_in_parallel_a_pickle_in_the_place_of_the_teacher_does_not_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    settings = dataclasses.replace(DISTIL, milestones=(3 * BATCH * LENGTH,))
    stopped = {"on_milestone": lambda milestone: bool(milestone.save(tmp_path / "at-3"))}
    run(settings, in_parallel(settings, "norms"), **stopped)
    torch.save({"step": Touch()}, tmp_path / "at-3" / "teacher.pt")
    with pytest.raises(DamagedError, match="is damaged: teacher.pt cannot be read"):
        run(settings, in_parallel(settings, "norms"), resume=tmp_path / "at-3")
    assert not (tmp_path / "ran").exists()


def test_in_parallel_how_a_batch_is_split_changes_nothing_but_rounding() -> None:
    losses = [
        [r["loss"] for r in run(settings, in_parallel(settings))[0]]
        for settings in (DISTIL, dataclasses.replace(DISTIL, micro_batch_tokens=LENGTH))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_in_parallel_the_gradient_is_the_mean_over_all_windows_however_unequal_the_parts() -> None:
    """Read before the optimizer sees it, which would hide its scale."""
    gradients = []
    for parts in ([[0, 1, 2]], [[0, 1], [2]]):
        corrected = in_parallel(DISTIL, share=3).correction
        for indices in map(np.array, parts):
            corrected.ask(indices, WINDOWS[indices])
        gradients.append({name: p.grad for name, p in corrected.model.named_parameters() if p.grad is not None})
    whole, parted = gradients
    assert whole.keys() == parted.keys() and whole
    for name, gradient in whole.items():
        torch.testing.assert_close(parted[name], gradient, rtol=1e-4, atol=1e-6)
