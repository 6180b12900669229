"""What distillation promises, measured side by side: speed, memory, exactness, and what the teacher is paid.

    python -m benchmarks.distillation_speed [--model FOLDER] [--threads 2] [--rounds 6] [--precision bfloat16]
                                            [--topk 64] [--parts speed memory exact once]

speed    Tokens per second of a training step: plain cross-entropy (a stock Hugging Face step with full logits), KD with
         the teacher live, with its cached hidden states, with its cached most probable tokens. Each arm is a process of
         its own that takes one step at a time, in turn with the others, so that whatever else the machine does falls on
         all alike. The student has random weights and about half the teacher's parameters.
memory   Peak memory of a KD step against the plain step: of the arms above, and of a small body with heads of several
         vocabularies. Peaks are those of whole processes.
exact    KL and its gradients against float64 on full logits, over random shapes, chunk sizes and temperatures.
once     Tokens that go through the teacher when two processes want one cache at the same time, and then train with it.

Exits 1 where a bar is missed; speed has to hold by the clock and by processor time, both medians over the rounds.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from minitron_search.config.types import Precision
from minitron_search.distillation.loop import Milestone, train
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher import TeacherSource, cached_teacher, live_teacher
from minitron_search.distillation.teacher_cache import DTYPES, Request, ensure, in_this_process
from minitron_search.losses.output_loss import output_loss
from minitron_search.models.device import autocast
from minitron_search.models.families import sizes
from minitron_search.models.output_head import OutputHead
from minitron_search.teachers.sources import teacher_folder

ARMS = {"ce": "plain CE, full logits", "live": "KD, live teacher", "hidden": "KD, cached hidden states",
        "topk": "KD, cached top k"}  # fmt: skip
SPEED_BARS = [("hidden", "live", 1.35), ("hidden", "ce", 0.75), ("topk", "ce", 0.85)]
KL_BAR, GRADIENT_BAR, CASES = 1e-5, 1e-4, 60
VOCABULARIES = (4_096, 131_072)
LENGTH, BATCH = 256, 8
SPAWN = multiprocessing.get_context("spawn")


class Arm(NamedTuple):
    """What a process that takes steps needs. The teacher is a folder, or made from a configuration at random."""

    name: str
    student: PretrainedConfig
    teacher: str | PretrainedConfig
    request: Request
    threads: int


class Step(NamedTuple):
    """Seconds of one step, by the clock and of the arm's processor time."""

    wall: float
    processor: float


def student_config(teacher: PretrainedConfig) -> PretrainedConfig:
    """Two thirds of every width: of SmolLM2-135M, 384 hidden channels, 6 heads and 67M parameters."""
    student = type(teacher).from_dict(teacher.to_dict())
    heads, groups = teacher.num_attention_heads, teacher.num_key_value_heads
    student.head_dim = getattr(teacher, "head_dim", None) or teacher.hidden_size // heads
    student.num_attention_heads = max(heads * 2 // 3 // groups * groups, groups)
    student.hidden_size = teacher.hidden_size * 2 // 3
    student.intermediate_size = teacher.intermediate_size * 2 // 3
    return student


def load_teacher(arm: Arm) -> PreTrainedModel:
    """In the dtype of the products, as a run's trials have it."""
    dtype = DTYPES[arm.request.precision]
    if isinstance(arm.teacher, str):
        return AutoModelForCausalLM.from_pretrained(arm.teacher, dtype=dtype)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(arm.teacher, dtype=dtype)


def head_alone(arm: Arm) -> OutputHead:
    """What a trial with a cached teacher reads of it."""
    if not isinstance(arm.teacher, str):
        generator = torch.Generator().manual_seed(1)
        return OutputHead(torch.randn(arm.request.vocab_size, arm.request.hidden_size, generator=generator))
    with safe_open(Path(arm.teacher) / "model.safetensors", "pt") as file:
        names = file.keys()
        name = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
        return OutputHead(file.get_tensor(name))


def source(arm: Arm) -> TeacherSource:
    if arm.name == "live":
        return live_teacher(load_teacher(arm), arm.request.precision)
    return cached_teacher(cache(arm), head_alone(arm), arm.request.precision)


def cache(arm: Arm) -> Path:
    return ensure(arm.request, in_this_process(arm.request, lambda: load_teacher(arm))).path


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def take_steps(arm: Arm, orders: Connection) -> None:
    """A step per order; answers its `Step`. At the end of orders, the peak memory in bytes."""
    torch.set_num_threads(arm.threads)
    torch.manual_seed(0)
    windows, precision = arm.request.windows, arm.request.precision
    student = AutoModelForCausalLM.from_config(arm.student, dtype=torch.float32)
    teacher = None if arm.name == "ce" else source(arm)
    began = [time.perf_counter(), time.process_time()]

    def next_order(milestone: Milestone | None = None) -> bool:
        orders.send(Step(time.perf_counter() - began[0], time.process_time() - began[1]))
        more = orders.recv()
        began[:] = time.perf_counter(), time.process_time()
        return more

    if teacher is None:
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, fused=True)
        ids = torch.from_numpy(windows.astype(np.int64)).split(BATCH)
        more, step = True, 0
        while more:
            batch = ids[step % len(ids)]
            with autocast(precision, batch.device):
                loss = student(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            more, step = next_order(), step + 1
    else:
        tokens = BATCH * LENGTH
        settings = LoopSettings(
            total_tokens=999 * tokens, batch_tokens=tokens, milestones=tuple(range(tokens, 999 * tokens, tokens)),
            precision=precision, threads=arm.threads,
        )  # fmt: skip
        train(student, windows, settings, teacher, on_milestone=next_order)
    orders.send(peak_bytes())


def in_turn(arms: Iterable[Arm], rounds: int) -> tuple[dict[str, list[Step]], dict[str, int]]:
    """Steps, after one that warms up, and peak bytes of every arm."""
    orders: dict[str, Connection] = {}
    for arm in arms:
        if arm.name in ("hidden", "topk"):
            with SPAWN.Pool(1) as pool:  # the memory of making a cache is not that of a step
                pool.apply(cache, (arm,))
        orders[arm.name], theirs = SPAWN.Pipe()
        SPAWN.Process(target=take_steps, args=(arm, theirs), daemon=True).start()
        orders[arm.name].recv()
    steps: dict[str, list[Step]] = {name: [] for name in orders}
    for _ in range(rounds):
        for name, order in orders.items():
            order.send(True)
            steps[name].append(order.recv())
    for order in orders.values():
        order.send(False)
    return steps, {name: order.recv() for name, order in orders.items()}


def random_windows(vocab: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (count, LENGTH)).astype(np.int32)


def arms_of(
    teacher: str | PretrainedConfig, about: PretrainedConfig, names: Iterable[str], precision: Precision, k: int,
    threads: int,
) -> list[Arm]:  # fmt: skip
    dims = sizes(about)
    asked = Request(str(teacher), "random", random_windows(dims["vocab"], 2 * BATCH), precision, dims["hidden"],
                    dims["vocab"])  # fmt: skip
    student = student_config(about)
    return [
        Arm(name, student, teacher, asked._replace(k=k if name == "topk" else None), threads) for name in names
    ]  # fmt: skip


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"


def speed(folder: str, precision: Precision, k: int, threads: int, rounds: int) -> bool:
    """And the peak memory of its arms."""
    arms = arms_of(folder, AutoConfig.from_pretrained(folder), ARMS, precision, k, threads)
    steps, peak = in_turn(arms, rounds)
    tokens = BATCH * LENGTH
    print(f"speed: {precision}, {threads} threads, {BATCH} x {LENGTH} tokens a step, medians of {rounds} interleaved "
          f"steps, k = {k}; tokens per second and per processor second")  # fmt: skip
    for name, title in ARMS.items():
        wall, processor = (tokens / statistics.median(seconds) for seconds in zip(*steps[name], strict=True))
        print(f"  {title:26} {wall:7.0f} {processor:7.0f}   peak {peak[name] / 2**20:6.0f} MiB")
    held = True
    for fast, slow, bar in SPEED_BARS:
        rounds_of_both = list(zip(steps[fast], steps[slow], strict=True))
        wall = statistics.median(theirs.wall / ours.wall for ours, theirs in rounds_of_both)
        processor = statistics.median(theirs.processor / ours.processor for ours, theirs in rounds_of_both)
        holds = min(wall, processor) >= bar
        held &= holds
        print(f"  {ARMS[fast]} / {ARMS[slow]}: {wall:.2f} (wall), {processor:.2f} (processor time); "
              f"bar {bar}: {verdict(holds)}")  # fmt: skip
    return memory_holds(peak) and held


def memory_holds(peak: dict[str, int]) -> bool:
    worst = max(bytes_ for name, bytes_ in peak.items() if name != "ce") / peak["ce"]
    print(f"  largest peak of a KD step / plain CE: {worst:.2f}; bar 1: {verdict(worst <= 1)}", flush=True)
    return worst <= 1


def memory(precision: Precision, k: int, threads: int) -> bool:
    """A teacher of two layers and 288 channels and its student, whatever the vocabulary."""
    held = True
    for vocab in VOCABULARIES:
        about = LlamaConfig(
            vocab_size=vocab, hidden_size=288, intermediate_size=576, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=3, head_dim=48, tie_word_embeddings=True,
        )  # fmt: skip
        peak = {}
        for arm in arms_of(about, about, ("ce", "hidden", "topk"), precision, k, threads):
            peak.update(in_turn([arm], 1)[1])
        print(f"memory: a vocabulary of {vocab:,}, " + ", ".join(
            f"{ARMS[name]} {bytes_ / 2**20:.0f} MiB" for name, bytes_ in peak.items()))  # fmt: skip
        held &= memory_holds(peak)
    return held


def exact() -> bool:
    """Largest relative error of the KL, and of its gradients (the norm of the difference over the norm)."""
    draw, worst = np.random.default_rng(0), [0.0, 0.0]
    for case in range(CASES):
        random = torch.Generator().manual_seed(case)
        tokens, student, teacher = (int(draw.integers(1, high)) for high in (70, 40, 40))
        vocab = int(np.exp(draw.uniform(np.log(2), np.log(20_000))))
        temperature, chunk = float(draw.choice([0.5, 1.0, 2.0, 4.0])), int(draw.integers(1, 80))
        hidden, of_teacher = (torch.randn(tokens, size, generator=random) for size in (student, teacher))
        weight, teacher_weight = (torch.randn(vocab, size, generator=random) for size in (student, teacher))
        targets = torch.randint(vocab, (tokens,), generator=random)
        found = differentiated(
            lambda h, w, t=targets, o=of_teacher, v=teacher_weight, tau=temperature, c=chunk: output_loss(
                "kld", h, OutputHead(w), t, o, OutputHead(v), temperature=tau, chunk_tokens=c
            ).loss, hidden, weight,
        )  # fmt: skip
        log_p = (of_teacher.double() @ teacher_weight.double().t() / temperature).log_softmax(-1)
        expected = differentiated(
            lambda h, w, p=log_p, tau=temperature: tau**2
            * (p.exp() * (p - (h @ w.t() / tau).log_softmax(-1))).sum(1).mean(), hidden.double(), weight.double(),
        )  # fmt: skip
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        worst = [max(worst[0], errors[0]), max(worst[1], *errors[1:])]
    for name, error, bar in (("KL", worst[0], KL_BAR), ("gradients", worst[1], GRADIENT_BAR)):
        print(f"exact: {name} against float64 on full logits, {CASES} random shapes: largest relative error "
              f"{error:.1e}; bar {bar:.0e}: {verdict(error <= bar)}", flush=True)  # fmt: skip
    return worst[0] <= KL_BAR and worst[1] <= GRADIENT_BAR


def differentiated(loss: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The loss and its gradients to `inputs`."""
    leaves = [part.clone().requires_grad_() for part in inputs]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


def once(precision: Precision) -> bool:
    """Counted where they go through a teacher of two layers."""
    about = LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, head_dim=16,
    )  # fmt: skip
    (arm,) = arms_of(about, about, ["hidden"], precision, 1, 1)
    start, told = SPAWN.Barrier(2), SPAWN.Queue()
    readers = [SPAWN.Process(target=read, args=(arm, start, told), daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()
    counts = [told.get(timeout=300) for _ in readers]
    forward, trained = (sum(part) for part in zip(*counts, strict=True))
    holds = forward == arm.request.windows.size
    print(f"once: two processes trained on {trained:,} tokens with one cache of {arm.request.windows.size:,}; "
          f"{forward:,} went through the teacher: {verdict(holds)}", flush=True)  # fmt: skip
    return holds


def read(arm: Arm, start: Any, told: Any) -> None:
    torch.set_num_threads(1)
    counted = [0]

    def counting() -> PreTrainedModel:
        teacher = load_teacher(arm)

        def count(_: Any, __: Any, output: Any) -> None:
            counted[0] += output.last_hidden_state.shape[:2].numel()

        teacher.base_model.register_forward_hook(count)
        return teacher

    start.wait(240)
    path = ensure(arm.request, in_this_process(arm.request, counting)).path
    tokens = 4 * BATCH * LENGTH
    settings = LoopSettings(total_tokens=tokens, batch_tokens=BATCH * LENGTH, precision=arm.request.precision)
    student = AutoModelForCausalLM.from_config(arm.student, dtype=torch.float32)
    result = train(student, arm.request.windows, settings, cached_teacher(path, head_alone(arm), arm.request.precision))
    told.put((counted[0] + result.teacher_tokens, result.tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded teacher's name, or a folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--topk", type=int, default=64)
    parser.add_argument("--parts", nargs="+", choices=["speed", "memory", "exact", "once"],
                        default=["speed", "memory", "exact", "once"])  # fmt: skip
    asked = parser.parse_args()
    folder = str(teacher_folder(asked.model)) if "speed" in asked.parts else ""
    torch.set_num_threads(asked.threads)
    parts = {
        "speed": lambda: speed(folder, asked.precision, asked.topk, asked.threads, asked.rounds),
        "memory": lambda: memory(asked.precision, asked.topk, asked.threads),
        "exact": exact,
        "once": lambda: once(asked.precision),
    }
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MINITRON_SEARCH_CACHE"] = scratch
        held = [parts[name]() for name in asked.parts]
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
