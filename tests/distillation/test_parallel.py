"""Two processes train as one does: replicas or shards, and from each other's checkpoints."""

import dataclasses
import itertools
import multiprocessing
import queue
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from minitron_search.config.types import Strategy
from minitron_search.distillation import parallel
from minitron_search.distillation.checkpoints import CheckpointFolder, load_weights
from minitron_search.distillation.loop import LoopSettings, Milestone, train
from minitron_search.distillation.parallel import Processes
from minitron_search.distillation.teacher import live_teacher
from minitron_search.distillation.training_log import DivergedError
from minitron_search.models.output_head import output_head
from tests import tiny
from tests.distillation import test_correction
from tests.distillation.test_correction import DISTIL
from tests.losses import test_intermediate
from tests.losses.test_intermediate import SETTINGS as INTERMEDIATE

LENGTH = 16
WINDOWS = np.random.default_rng(0).integers(0, 61, (20, LENGTH)).astype(np.int32)
# 4 windows a batch, of which each of two processes has two, one after another
SETTINGS = LoopSettings(
    total_tokens=8 * 64, batch_tokens=64, learning_rate=1e-3, warmup_steps=3, log_steps=5, threads=1, loss="clm+kld",
    micro_batch_tokens=LENGTH, milestones=(4 * 64,),
)  # fmt: skip
STUDENTS: dict[str, dict[str, Any]] = {
    "llama-tied": {"model_type": "llama"},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
    "gpt2": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},  # Conv1D
    "gpt_neox": {"model_type": "gpt_neox", "use_parallel_residual": True, "tie_word_embeddings": False},
}
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2")
# Sums are split otherwise, and Adam makes a sign of what is nearly zero.
SAME = {"rel": 1e-5}


def student(name: str, seed: int = 1) -> PreTrainedModel:
    return tiny.model(tiny.config(**STUDENTS[name]), seed)


def teacher() -> PreTrainedModel:
    return tiny.model(tiny.config("llama", hidden_size=32), seed=5)


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    model: PreTrainedModel


def trained(model: PreTrainedModel, settings: LoopSettings = SETTINGS, **given: Any) -> Trained:
    records: list[dict[str, float]] = []
    asked = given.pop("teacher", None) or live_teacher(teacher(), settings.precision)
    result = train(model, WINDOWS, settings, asked, log=records.append, **given)
    return Trained([line["loss"] for line in records], [line["gradient_norm"] for line in records], result.student)


def plain(model: PreTrainedModel) -> list[np.ndarray]:
    return [parallel.gathered(parameter.detach()).clone().numpy() for parameter in model.parameters()]


def placed(strategy: Strategy, rank: int) -> dict[str, Any]:
    return {"settings": dataclasses.replace(SETTINGS, strategy=strategy), "processes": Processes(2, rank)}


def both(rank: int, folder: str, told: Any) -> None:
    """All that two processes are asked, in one start of them: {question: answer}."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    answers: dict[str, Any] = {}
    for name in STUDENTS:
        for strategy in STRATEGIES:
            answers[f"{name} {strategy}"] = _one(name, strategy, rank, Path(folder))
    answers["rank 0's weights"] = plain(trained(student("llama-tied", seed=rank), **placed("ddp", rank)).model)
    answers["teacher"] = _sharded_teacher()
    for strategy in STRATEGIES:
        answers[f"continued {strategy}"] = {
            before: trained(student("llama-tied", 9), resume=Path(folder) / before, **placed(strategy, rank)).losses
            for before in ("one", "llama-tied ddp", "llama-tied fsdp2")
        }
        answers[f"diverged {strategy}"] = _diverged(strategy, rank, Path(folder))
    answers["checkpointed"] = trained(
        student("llama-tied"), **(placed("fsdp2", rank) | {"settings": dataclasses.replace(
            SETTINGS, strategy="fsdp2", gradient_checkpointing=True)}),
    ).losses  # fmt: skip
    answers["intermediate"] = [
        [(line["loss"], line["intermediate"]) for line in test_intermediate.run(of, processes=Processes(2, rank))[0]]
        for of in (dataclasses.replace(INTERMEDIATE, intermediate=alpha, micro_batch_tokens=LENGTH)
                   for alpha in (1.0, "auto"))
    ]  # fmt: skip
    answers["corrected"] = _corrected(rank)
    told.put((rank, answers))
    dist.destroy_process_group()


def _one(name: str, strategy: Strategy, rank: int, folder: Path) -> dict[str, Any]:
    model, seen = student(name), {}

    def reached(milestone: Milestone) -> None:
        milestone.save(folder / f"{name} {strategy}")
        seen["whole"] = milestone.student is not None
        if rank == 0:  # the other one is not there to help
            assert milestone.student is not None
            seen["logits"] = tiny.logits(milestone.student.eval(), torch.arange(12)[None]).numpy()
            seen["weights"] = {key: value.detach().clone().numpy() for key, value in
                               milestone.student.named_parameters()}  # fmt: skip

    result = trained(model, on_milestone=reached, **placed(strategy, rank))
    shards = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    return {
        **seen, "losses": result.losses, "norms": result.norms, "end": plain(result.model), "held": sum(shards),
        "params": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def _sharded_teacher() -> dict[str, Any]:
    whole, shared = teacher(), parallel.sharded_teacher(teacher())
    ids, asked = WINDOWS[:4], live_teacher(shared, "float32")
    said = asked.ask(np.arange(4), ids).hidden
    alone = live_teacher(whole, "float32")
    body = list(shared.base_model.parameters())
    return {
        "equal": torch.equal(said, alone.ask(np.arange(4), ids).hidden),
        "head": torch.equal(asked.head.weight, alone.head.weight),
        "held": sum(p.to_local().numel() for p in body) / sum(p.numel() for p in body),  # after it has been asked
        "logits": torch.equal(output_head(shared).logits(said), output_head(whole).logits(said)),
    }


def _corrected(rank: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of a student, and the teacher's weights, which are trained beside it on two windows a process."""
    taught = test_correction.in_parallel(DISTIL, share=2, world_size=2)
    records, _ = test_correction.run(DISTIL, taught, processes=Processes(2, rank))
    assert taught.correction is not None
    trained = taught.correction.state_dict()["weights"]
    return [line["loss"] for line in records], {name: weight.numpy() for name, weight in trained.items()}


def _diverged(strategy: Strategy, rank: int, folder: Path) -> tuple[str, list[str]]:
    """A loss that is nan in the second process alone ends both, alike."""
    good, calls = live_teacher(teacher(), "float32"), [0]

    def ask(indices: np.ndarray, tokens: np.ndarray) -> Any:
        calls[0] += 1
        said = good.ask(indices, tokens)
        return said._replace(hidden=said.hidden * float("nan")) if rank == 1 and calls[0] > 12 else said

    where = placed(strategy, rank)
    where["settings"] = dataclasses.replace(where["settings"], checkpoint_tokens=3 * 64, milestones=())
    kept = folder / f"diverged {strategy}"
    try:
        trained(student("llama-tied"), teacher=good._replace(ask=ask), checkpoints=CheckpointFolder(kept), **where)
    except DivergedError as error:
        dist.barrier()
        return str(error), sorted(path.name for path in kept.iterdir())
    return "trained to the end", []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Trained]:
    """One process; of the first student also a checkpoint."""
    ends = {name: trained(student(name)) for name in list(STUDENTS)[1:]}
    first = trained(student("llama-tied"), on_milestone=lambda milestone: milestone.save(folder / "one"))
    return {**ends, "llama-tied": first}


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Trained]) -> list[dict[str, Any]]:
    """What both processes answered."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [context.Process(target=both, args=(rank, str(folder), told), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    answers: dict[int, dict[str, Any]] = {}
    while len(answers) < len(processes):
        try:
            rank, answer = told.get(timeout=1)
        except queue.Empty:
            ended = [process.exitcode for process in processes if process.exitcode]
            assert not ended, f"a process ended with status {ended}"
        else:
            answers[rank] = answer
    for process in processes:
        process.join(30)
    return [answers[0], answers[1]]


@tiny.over(itertools.product(STUDENTS, STRATEGIES))
def test_two_processes_train_as_one(name: str, strategy: Strategy, one: Any, two: Any) -> None:
    first, second = (answer[f"{name} {strategy}"] for answer in two)
    assert first["losses"] == pytest.approx(one[name].losses, **SAME)
    assert first["norms"] == pytest.approx(one[name].norms, rel=1e-4)
    assert len(first["losses"]) == 8 and second["losses"] == []
    assert all(np.array_equal(a, b) for a, b in zip(first["end"], second["end"], strict=True))


@tiny.over(STUDENTS)
def test_shards_are_halves_and_the_first_process_gets_a_whole_student(name: str, two: Any) -> None:
    first, second = (answer[f"{name} fsdp2"] for answer in two)
    assert first["held"] + second["held"] == first["params"]
    assert abs(first["held"] - second["held"]) < 0.1 * first["params"]
    assert first["whole"] and not second["whole"]
    replica = two[0][f"{name} ddp"]
    assert replica["held"] == 0 and replica["weights"].keys() == first["weights"].keys()
    assert first["logits"] == pytest.approx(replica["logits"], abs=2e-3)


@tiny.over(itertools.product(STUDENTS, STRATEGIES))
def test_a_plain_model_reads_the_weights_of_every_checkpoint(
    name: str, strategy: Strategy, two: Any, folder: Path
) -> None:
    model = student(name, seed=3)
    load_weights(folder / f"{name} {strategy}", model)
    expected = two[0][f"{name} {strategy}"]
    assert all(np.array_equal(p.detach().numpy(), expected["weights"][key]) for key, p in model.named_parameters())
    assert np.array_equal(tiny.logits(model, torch.arange(12)[None]).numpy(), expected["logits"])


def test_replicas_start_from_the_weights_of_the_first_process(two: Any) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(*(answer["rank 0's weights"] for answer in two), strict=True))


@tiny.over(["llama-tied ddp", "llama-tied fsdp2"])
def test_one_process_continues_what_two_began(before: str, one: Any, two: Any, folder: Path) -> None:
    after = trained(student("llama-tied", 9), resume=folder / before).losses
    assert len(after) == 4 and after == pytest.approx(one["llama-tied"].losses[4:], **SAME)


@tiny.over(STRATEGIES)
def test_two_processes_continue_what_any_began(strategy: Strategy, one: Any, two: Any) -> None:
    continued = two[0][f"continued {strategy}"]
    assert continued["one"] == pytest.approx(one["llama-tied"].losses[4:], **SAME)
    own = two[0][f"llama-tied {strategy}"]["losses"]
    assert continued.pop(f"llama-tied {strategy}") == own[4:], "bit for bit where it began so"
    assert all(losses == pytest.approx(own[4:], **SAME) for losses in continued.values())


def test_a_teacher_in_shards_says_what_a_whole_one_says(two: Any) -> None:
    for answer in two:
        assert answer["teacher"]["equal"] and answer["teacher"]["head"] and answer["teacher"]["logits"]
        assert answer["teacher"]["held"] < 0.6


@tiny.over(STRATEGIES)
def test_a_loss_that_diverges_in_one_process_ends_both_and_keeps_no_checkpoint(strategy: Strategy, two: Any) -> None:
    first, second = (answer[f"diverged {strategy}"] for answer in two)
    assert first == second
    assert first[0].startswith("diverged at step 7: loss nan") and first[1] == ["step-00000006"]


def test_shards_with_gradient_checkpointing_train_alike(two: Any) -> None:
    assert two[0]["checkpointed"] == two[0]["llama-tied fsdp2"]["losses"]


def test_states_are_compared_in_two_processes_as_in_one(two: Any) -> None:
    (fixed, auto), silent = two[0]["intermediate"], two[1]["intermediate"]
    assert silent == [[], []]
    one = [(line["loss"], line["intermediate"]) for line in test_intermediate.run(INTERMEDIATE)[0]]
    assert np.array(fixed) == pytest.approx(np.array(one), rel=1e-4)
    # auto balances each of four micro-batches by itself there, and all of the batch together here
    together = test_intermediate.run(dataclasses.replace(INTERMEDIATE, intermediate="auto"))[0]
    of_one = [(line["loss"], line["intermediate"]) for line in together]
    assert np.array(auto)[0] == pytest.approx(np.array(of_one[0]), rel=1e-4)
    assert np.array(auto) == pytest.approx(np.array(of_one), rel=0.02)


def test_a_teacher_is_corrected_alike_in_two_processes_and_as_in_one(two: Any) -> None:
    (losses, left), (_, right) = (answer["corrected"] for answer in two)
    assert all(np.array_equal(left[name], right[name]) for name in left)
    alone = test_correction.run(DISTIL, test_correction.in_parallel(DISTIL))[0]
    assert losses == pytest.approx([line["loss"] for line in alone], rel=1e-3)
