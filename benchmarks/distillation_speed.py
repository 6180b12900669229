"""Tokens per second and peak memory of a training step: plain CE, KD with a live and with a cached teacher.

    python -m benchmarks.distillation_speed [--model FOLDER] [--threads 2] [--rounds 8] [--precision bfloat16]

Each arm is a process of its own (its peak memory is its own), which takes one step at a time, in turn with
the others, so that whatever else the machine does falls on all alike. The student has random weights and
about half the teacher's parameters. Plain CE is a stock Hugging Face step with full logits.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from minitron_search.distillation import LoopSettings, Milestone, train
from minitron_search.distillation_loss import OutputHead
from minitron_search.precision import autocast
from minitron_search.teacher import teacher_folder
from minitron_search.teacher_cache import Precision, ensure
from minitron_search.teacher_source import cached_teacher, live_teacher

ARMS = {"ce": "plain CE, full logits", "live": "KD, live teacher", "cached": "KD, cached teacher"}
LENGTH, BATCH = 256, 8


def student_config(teacher: PretrainedConfig) -> PretrainedConfig:
    """Two thirds of every width: of SmolLM2-135M, 384 hidden channels, 6 heads and 67M parameters."""
    student = type(teacher).from_dict(teacher.to_dict())
    heads, groups = teacher.num_attention_heads, teacher.num_key_value_heads
    student.head_dim = getattr(teacher, "head_dim", None) or teacher.hidden_size // heads
    student.num_attention_heads = max(heads * 2 // 3 // groups * groups, groups)
    student.hidden_size = teacher.hidden_size * 2 // 3
    student.intermediate_size = teacher.intermediate_size * 2 // 3
    return student


def load_teacher(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def head_alone(folder: str) -> OutputHead:
    """What a trial with a cached teacher reads of it."""
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        names = file.keys()
        name = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
        return OutputHead(file.get_tensor(name))


def arm(
    name: str,
    folder: str,
    cache: str,
    windows: np.ndarray,
    precision: Precision,
    threads: int,
    orders: Connection,
) -> None:
    """A step per order; answers its seconds. At the end of orders, the peak memory in bytes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    about = student_config(AutoConfig.from_pretrained(folder))
    student = AutoModelForCausalLM.from_config(about, dtype=torch.float32)
    began = [time.perf_counter()]

    def next_order(milestone: Milestone | None = None) -> bool:
        orders.send(time.perf_counter() - began[0])
        more = orders.recv()
        began[0] = time.perf_counter()
        return more

    if name == "ce":
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, fused=True)
        ids = torch.from_numpy(windows.astype(np.int64)).split(BATCH)
        for step in range(10**6):
            batch = ids[step % len(ids)]
            with autocast(precision, batch.device):
                loss = student(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if not next_order():
                break
    else:
        if name == "live":
            teacher = live_teacher(load_teacher(folder), precision)
        else:
            teacher = cached_teacher(Path(cache), head_alone(folder), precision)
        tokens = BATCH * LENGTH
        settings = LoopSettings(
            total_tokens=999 * tokens, batch_tokens=tokens, milestones=tuple(range(tokens, 999 * tokens, tokens)),
            precision=precision, threads=threads,
        )  # fmt: skip
        train(student, windows, settings, teacher, on_milestone=next_order)
    orders.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--model", default="smollm2-135m", help="the embedded teacher's name, or a folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    folder = str(teacher_folder(arguments.model))
    vocab = AutoConfig.from_pretrained(folder).vocab_size
    windows = np.random.default_rng(0).integers(0, vocab, (2 * BATCH, LENGTH)).astype(np.int32)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MINITRON_SEARCH_CACHE"] = scratch
        torch.set_num_threads(arguments.threads)
        cache = str(ensure(lambda: load_teacher(folder), folder, "random", windows, arguments.precision).path)
        seconds: dict[str, list[float]] = {name: [] for name in ARMS}
        peak: dict[str, int] = {}
        orders: dict[str, Connection] = {}
        for name in ARMS:
            orders[name], theirs = context.Pipe()
            rest = (name, folder, cache, windows, arguments.precision, arguments.threads, theirs)
            context.Process(target=arm, args=rest, daemon=True).start()
            orders[name].recv()  # the first step is warm-up
        for _ in range(arguments.rounds):
            for name, order in orders.items():
                order.send(True)
                seconds[name].append(order.recv())
        for name, order in orders.items():
            order.send(False)
            peak[name] = order.recv()
    report(seconds, peak, arguments)


def report(seconds: dict[str, list[float]], peak: dict[str, int], arguments: argparse.Namespace) -> None:
    tokens = BATCH * LENGTH
    print(f"{arguments.precision}, {arguments.threads} threads, {BATCH} x {LENGTH} tokens a step, "
          f"median and best of {arguments.rounds} interleaved steps")  # fmt: skip
    for name, title in ARMS.items():
        median, best = tokens / statistics.median(seconds[name]), tokens / min(seconds[name])
        print(f"{title:24} {median:7.0f} tokens/s (best {best:.0f})   peak {peak[name] / 2**20:6.0f} MiB")
    for top, bottom in (("cached", "live"), ("cached", "ce")):
        rounds = [b / t for t, b in zip(seconds[top], seconds[bottom], strict=True)]
        best = min(seconds[bottom]) / min(seconds[top])
        print(f"{ARMS[top]} / {ARMS[bottom]}: {statistics.median(rounds):.2f} (of the best steps {best:.2f})")


if __name__ == "__main__":
    main()
