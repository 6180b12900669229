"""L_is: which states are compared, how far they are, and what a training makes of it."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.distillation.loop import LoopSettings, Milestone, train
from minitron_search.distillation.objective import Objective
from minitron_search.distillation.teacher import live_teacher
from minitron_search.losses.intermediate import intermediate_loss, recorded, state_map
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import decoder_layers, family_of, whole
from minitron_search.planning.forecast import intermediate_advice
from minitron_search.pruning.trimming import trim
from minitron_search.trials.runner import run_trial
from minitron_search.trials.settings import distillation_settings
from tests import tiny
from tests.materials import materials, trial

LENGTH, VOCAB = 16, 61
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (20, LENGTH)).astype(np.int32)
SETTINGS = LoopSettings(
    total_tokens=12 * 64, batch_tokens=64, learning_rate=3e-3, warmup_steps=3, log_steps=5, threads=1, intermediate=1.0
)
KINDS: list[Any] = ["mse", "cosine"]


def cut(model_type: str, folder: Path, seed: int) -> tuple[PreTrainedModel, PreTrainedModel, tuple[int, ...]]:
    """(teacher, a student that is any part of it, the layers it kept)."""
    shape = tiny.random_config(seed, model_type=model_type, num_hidden_layers=5)
    teacher = tiny.model(shape, seed)
    teacher.save_pretrained(folder)
    architecture = tiny.random_architecture(shape, seed)
    return teacher, trim(folder, architecture), architecture.layers


def hugging_face_states(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    """`output_hidden_states` of the model without its final norm, which the last of them is behind."""
    model = copy.deepcopy(model)
    model.set_submodule(family_of(model.config).final_norm, nn.Identity())
    return model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states


def written_out(
    kind: str, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], compared: Mapping[int, int]
) -> Tensor:
    """L_is of states, token by token."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for own, other in compared.items():
        for s, t in zip(student[own].flatten(0, 1), teacher[other].flatten(0, 1), strict=True):
            t = t[: len(s)]
            far = 1 - (s @ t) / (s.norm() * t.norm()) if kind == "cosine" else ((s - t) ** 2).sum() / (t**2).sum()
            total, count = total + far, count + 1
    return total / count


@tiny.over(
    [
        ((0, 1, 2, 3, 4, 5), {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6}),
        ((2, 3, 4, 5), {0: 0, 1: 3, 2: 4, 3: 5, 4: 6}),  # the first layer kept does the block's work
        ((0, 1, 4, 5), {0: 0, 1: 1, 2: 4, 3: 5, 4: 6}),  # layer 1 stands in for 2 and 3: it feeds layer 4
        ((0, 1, 2, 3), {0: 0, 1: 1, 2: 2, 3: 3, 4: 6}),  # layer 3 feeds the final norm
        ((3,), {0: 0, 1: 6}),
    ]
)
def test_a_student_state_is_compared_with_what_its_next_layer_read_in_the_teacher(
    kept: tuple[int, ...], expected: dict[int, int]
) -> None:
    assert state_map(kept, 6, "all", embedding=True) == expected
    outputs = {own: other for own, other in expected.items() if own}
    assert state_map(kept, 6, "all", embedding=False) == outputs
    for last in range(1, 8):
        chosen = state_map(kept, 6, last, embedding=False)
        assert chosen == dict(list(outputs.items())[-last:]) and len(chosen) == min(last, len(kept))
        assert state_map(kept, 6, last, embedding=True) == {0: 0, **chosen}


@tiny.over(tiny.family_seeds(3))
def test_recorded_states_are_those_of_hugging_face_but_for_the_last_norm(model_type: str, seed: int) -> None:
    model = tiny.model(tiny.random_config(seed, model_type=model_type), seed)
    ids = tiny.tokens(model.config, seed=seed)
    states = hugging_face_states(model, ids)
    with recorded(model, range(len(states))) as found:
        whole_pass = model.base_model(ids, output_hidden_states=True, use_cache=False)
    for number, state in enumerate(states):
        assert torch.equal(found[number], state), number
    assert not torch.equal(found[len(states) - 1], whole_pass.hidden_states[-1])  # which is behind the norm
    found.clear()
    model(ids)
    assert not found  # the hooks are gone


@tiny.over(tiny.FAMILIES)
def test_what_comes_before_a_dropped_block_is_no_distance_away(model_type: str, tmp_path: Path) -> None:
    """Of two layers in four, at the start, in the middle and at the end. The trimmed student has the teacher's own
    layers, so its states are the teacher's up to the block, and differ behind it."""
    shape = tiny.config(model_type, num_hidden_layers=4)
    teacher = tiny.model(shape)
    teacher.save_pretrained(tmp_path)
    ids = tiny.tokens(shape)
    of_teacher = hugging_face_states(teacher, ids)
    for start in range(3):
        kept = tuple(layer for layer in range(4) if not start <= layer < start + 2)
        student = trim(tmp_path, dataclasses.replace(whole(shape), layers=kept))
        states, compared = hugging_face_states(student, ids), state_map(kept, 4, "all", embedding=True)
        for kind in KINDS:
            far = [
                intermediate_loss(kind, {own: states[own]}, {own: of_teacher[other]}).item()
                for own, other in compared.items()
            ]
            # up to the embedding, or the layer that feeds the one before the block
            assert far[: max(1, start)] == pytest.approx([0.0] * max(1, start), abs=1e-6), (start, kind)
            assert min(far[max(1, start) :]) > 1e-3, (start, kind)


@tiny.over((name, seed, KINDS[place % 2]) for place, (name, seed) in enumerate(tiny.family_seeds(3)))
def test_loss_and_gradients_equal_those_written_out_in_float64(
    model_type: str, seed: int, kind: Any, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, intermediate=0.7, intermediate_loss=kind, embedding=True)
    teacher, student, kept = cut(model_type, tmp_path, seed)
    compared = state_map(kept, 5, "all", embedding=True)
    source = live_teacher(teacher, "float32", compared)
    ids = tiny.tokens(teacher.config, seed=seed)
    objective = Objective(student, settings, source.head)
    loss, means = objective(ids, source.ask(np.arange(2), ids.numpy()))
    loss.backward()

    exact, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    exact.zero_grad()
    with torch.no_grad():
        targets, log_p = hugging_face_states(exact_teacher, ids), exact_teacher(ids).logits.log_softmax(-1)
    states = _states_with_gradient(exact, ids)
    kl = (log_p.exp() * (log_p - exact(ids).logits.log_softmax(-1))).sum(-1).mean()
    difference = written_out(kind, states, targets, compared)
    expected = kl + 0.7 * difference
    expected.backward()
    assert float(means[3]) == pytest.approx(difference.item(), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(expected.item(), rel=1e-4)
    for (name, ours), theirs in zip(student.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(
            ours.grad, theirs.grad.float(), rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()) + 1e-7
        )


def _states_with_gradient(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    """`hugging_face_states` of the model itself: its own final norm put aside and back."""
    name = family_of(model.config).final_norm
    norm = model.get_submodule(name)
    model.set_submodule(name, nn.Identity())
    states = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states
    model.set_submodule(name, norm)
    return states


@tiny.over(KINDS)
def test_gradients_are_those_of_finite_differences(kind: Any) -> None:
    torch.manual_seed(0)
    teacher = {number: torch.randn(2, 3, 6, dtype=torch.float64) * 10**number for number in range(3)}
    student = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in teacher]
    assert torch.autograd.gradcheck(
        lambda *states: intermediate_loss(kind, dict(enumerate(states)), teacher), student
    )  # fmt: skip


@tiny.over(itertools.product(KINDS, [1.0, "auto"], ["float32", "bfloat16"]))
def test_a_model_is_no_distance_from_itself(kind: Any, alpha: Any, precision: Any) -> None:
    model = tiny.model(tiny.config())
    every = {number: number for number in range(4)}
    settings = dataclasses.replace(SETTINGS, intermediate=alpha, intermediate_loss=kind, precision=precision)
    source = live_teacher(model, precision, every)
    ids = tiny.tokens(model.config)
    loss, means = Objective(model, settings, source.head)(ids, source.ask(np.arange(2), ids.numpy()))
    loss.backward()
    assert torch.isfinite(loss) and abs(float(means[3])) < (1e-6 if precision == "float32" else 1e-4)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@tiny.over(itertools.product(["kld", "clm+kld"], [1.0, 2.0]))
def test_auto_weighs_the_states_as_much_as_the_logits(loss: Any, temperature: float, tmp_path: Path) -> None:
    teacher, student, kept = cut("llama", tmp_path, 3)
    ids = tiny.tokens(teacher.config)
    source = live_teacher(teacher, "float32", state_map(kept, 5, "all", embedding=True))
    said = source.ask(np.arange(2), ids.numpy())

    def gradient(alpha: Any) -> tuple[Tensor, Tensor]:
        settings = dataclasses.replace(SETTINGS, intermediate=alpha, loss=loss, temperature=temperature)
        total, means = Objective(student, settings, source.head)(ids, said)
        student.zero_grad()
        total.backward()
        assert float(total.detach()) == float(means[0])
        return means, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    (plain, without), (means, auto), (_, once) = gradient(0.0), gradient("auto"), gradient(1.0)
    logits = temperature**2 * float(plain[2])
    assert float(means[0]) == pytest.approx(float(plain[0]) + logits, rel=1e-5)
    assert torch.equal(means[1:], plain[1:])  # what is logged beside the loss is without weights
    torch.testing.assert_close(auto - without, (once - without) * logits / float(means[3]), rtol=1e-3, atol=1e-5)


def students() -> tuple[PreTrainedModel, PreTrainedModel, dict[int, int]]:
    """A teacher of six layers, itself without layers 2 to 4, and the map of the two."""
    teacher, student = tiny.model(tiny.config(num_hidden_layers=6)), tiny.model(tiny.config(num_hidden_layers=3))
    kept = (0, 1, 5)
    student.get_input_embeddings().load_state_dict(teacher.get_input_embeddings().state_dict())
    for layer, own in zip(kept, decoder_layers(student), strict=True):
        own.load_state_dict(decoder_layers(teacher)[layer].state_dict())
    return teacher, student, state_map(kept, 6, "all", embedding=True)


def run(settings: LoopSettings, **given: Any) -> tuple[list[dict[str, float]], list[Tensor]]:
    """(records, weights at the end)."""
    teacher, student, compared = students()
    source = live_teacher(teacher, settings.precision, compared if settings.intermediate else None)
    records: list[dict[str, float]] = []
    train(student, WINDOWS, settings, source, log=records.append, **given)
    return records, [parameter.detach().clone() for parameter in student.parameters()]


@tiny.over([
    ("kld", 1.0, "float32"), ("kld", "auto", "bfloat16"), ("clm+kld", "auto", "float32"), ("ce", 1.0, "bfloat16"),
])  # fmt: skip
def test_training_brings_the_states_nearer_than_logits_alone_do(loss: Any, alpha: Any, precision: Any) -> None:
    def distances(alpha: Any) -> list[float]:
        settings = dataclasses.replace(
            SETTINGS, loss=loss, intermediate=alpha, precision=precision, total_tokens=60 * 64, learning_rate=1e-2
        )
        return [record["intermediate"] for record in run(settings)[0]]

    without, far = distances(1e-9), distances(alpha)
    assert len(far) == 60 and far[0] == without[0]
    assert np.mean(far[-5:]) < 0.8 * np.mean(without[-5:])
    assert (
        loss != "kld" or np.mean(far[-5:]) < 0.8 * far[0]
    )  # the text is random: next tokens pull away from the teacher


def test_a_teacher_that_gives_no_states_is_not_taken_for_one_that_agrees() -> None:
    teacher, student, _ = students()
    with pytest.raises(AssertionError, match="without the states"):
        train(student, WINDOWS, SETTINGS, live_teacher(teacher, "float32"))


def test_the_log_has_the_distance_only_where_it_is_asked_for() -> None:
    assert "intermediate" not in run(dataclasses.replace(SETTINGS, intermediate=0.0))[0][0]
    record = run(SETTINGS)[0][0]
    assert record["loss"] == pytest.approx(record["kl"] + record["intermediate"], rel=1e-5)


def test_micro_batches_change_nothing_but_rounding_where_alpha_is_fixed() -> None:
    at_once, parts = run(SETTINGS)[0], run(dataclasses.replace(SETTINGS, micro_batch_tokens=LENGTH))[0]
    for key in ("loss", "intermediate"):
        assert [r[key] for r in parts] == pytest.approx([r[key] for r in at_once], rel=1e-4)


def test_a_continued_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, intermediate="auto", milestones=(5 * 64,))

    def save(milestone: Milestone) -> None:
        milestone.save(tmp_path / "at-5")

    unbroken, weights = run(settings, on_milestone=save)
    continued, same = run(settings, resume=tmp_path / "at-5")
    assert [r["loss"] for r in continued] == [r["loss"] for r in unbroken][5:]
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    for changed in ({"intermediate": 1.0}, {"intermediate_loss": "cosine"}, {"embedding": True}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))}: .*but the checkpoint"):
            run(dataclasses.replace(settings, **changed), resume=tmp_path / "at-5")


# The configuration


def refused(**distillation: Any) -> str:
    with pytest.raises(ValueError) as error:
        loading.parse_config({"distillation": distillation})
    return str(error.value)


def test_what_cannot_be_is_refused_with_what_can() -> None:
    said = refused(intermediate=1.0, teacher_cache="hidden")
    assert "distillation.teacher_cache: hidden" in said and "valid: off or auto, or intermediate 0" in said
    said = refused(intermediate="auto", initialization="random_pruned")
    assert "distillation.initialization: random_pruned" in said and "valid: pruned or random" in said
    said = refused(intermediate="auto", loss="ce")
    assert "distillation.intermediate: auto" in said and "valid: a number such as 1.0, or loss clm+kld" in said
    said = refused(embedding=True)
    assert "distillation.embedding: true" in said and "valid: distillation.intermediate auto" in said
    for key, value in [("intermediate", -1), ("intermediate", "much"), ("intermediate_loss", "l1"),
                       ("intermediate_layers", 0), ("embedding", "0.5")]:  # fmt: skip
        assert f"distillation.{key}" in refused(**{"intermediate": 1.0, key: value})


@tiny.over([
    {"intermediate": "auto", "embedding": True, "intermediate_layers": 2},
    {"intermediate": 0.5, "loss": "ce", "teacher_cache": "off", "intermediate_loss": "cosine"},
    {"intermediate": 1e-1, "initialization": "random"},
])  # fmt: skip
def test_what_can_be_reaches_the_training(given: dict[str, Any]) -> None:
    config = loading.parse_config({"distillation": given})
    settings = distillation_settings(config, "float32")
    assert loading.parse_config(json.loads(json.dumps(config.dump()))) == config
    asked = {key: value for key, value in given.items() if key in dataclasses.asdict(settings)}
    assert asked.items() <= dataclasses.asdict(settings).items()
    assert settings.asks_teacher


def test_the_default_is_logits_only() -> None:
    settings = distillation_settings(Config(), "float32")
    assert settings.intermediate == 0 and not settings.embedding
    assert not dataclasses.replace(settings, loss="ce").asks_teacher


@tiny.over([(2, False), (3, True)])
def test_states_are_advised_where_less_than_two_thirds_of_the_depth_may_be_left(dropped: int, advised: bool) -> None:
    def said(**distillation: Any) -> str | None:
        config = loading.parse_config({
            "space": {"budget": {"params": {"target": 10_000, "tolerance": 0.9}},
                      "axes": {"drop_block": {"lengths": [0, dropped]}}},
            "distillation": distillation,
        })  # fmt: skip
        return intermediate_advice(config, SearchSpace(config.space, tiny.config(num_hidden_layers=6)))

    advice = said()
    assert (advice is not None) == advised
    if advice:
        assert f"as few as {6 - dropped} of the teacher's 6 layers" in advice
        flags = advice.partition("logits: ")[2].split()
        assert said(**loading.load_config(None, flags).dump()["distillation"]) is None


@tiny.over(["float32", "bfloat16"])
def test_a_trial_compares_its_layers_with_the_permuted_teachers(
    precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranks did not line up, the first state would be as far away as that of a student in another order."""
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    made = materials(tmp_path, precision)
    settings = dataclasses.replace(
        SETTINGS, total_tokens=64, milestones=(64,), embedding=True, intermediate_layers=1, intermediate="auto",
        precision=precision,
    )  # fmt: skip

    def far(architecture: Architecture, initialization: str) -> float:
        asked = trial(architecture, settings, initialization)
        run_trial(made, asked, decided=False)
        return next(row["intermediate"] for row in made.run_dir.metrics(asked.id) if row["kind"] == "step")

    assert far(Architecture(24, 20, 4, 2, (0, 1, 2, 3)), "pruned") < 1e-3
    narrow = Architecture(12, 13, 4, 2, (0, 3))
    assert far(narrow, "pruned") < 0.75 * far(narrow, "random_pruned")
