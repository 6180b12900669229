"""The depth sweep against one full forward per cut, and against lm-eval once per cut; peak memory by windows.

    python -m benchmarks.depth_speed [--model FOLDER] [--precision bfloat16] [--threads 1] [--windows 2]
                                     [--lengths 1 2 8 15] [--winogrande FILE] [--examples 64]

1. LM loss: every cut by the sweep, and by a full forward pass through its layers and the head, on the same
   modules in the same dtype; the two take turns by length. Numbers must agree to the last bit.
2. Winogrande: the blocks of half the depth by the sweep and by lm-eval's own task, both in float32.
3. Peak resident memory of a sweep of 64 and of 512 windows, each in a process of its own.
Exits 1 where numbers disagree.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_search.data import winogrande_packing
from minitron_search.evaluation import winogrande as evaluation_winogrande

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import PreTrainedModel

from minitron_search.data import winogrande
from minitron_search.depth import sweep as depth
from minitron_search.depth.sweep import TEACHER, Cut
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, weights, whole
from minitron_search.models.layerwise import LayerwiseModel
from minitron_search.pruning.trimming import trim
from minitron_search.teachers.sources import load_tokenizer, teacher_folder

ROOT = Path(__file__).resolve().parents[1]
MEMORY_WINDOW = 16  # tokens; memory is bounded by tokens in a chunk, whatever their windows


class Clock:
    """Wall and processor seconds by name; processor seconds do not count what other processes take."""

    def __init__(self) -> None:
        self.wall: Counter[str] = Counter()
        self.processor: Counter[str] = Counter()

    def time(self, name: str, function: Callable[[], Any]) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = function()
        self.wall[name] += time.perf_counter() - wall  # type: ignore[assignment]
        self.processor[name] += time.process_time() - processor  # type: ignore[assignment]
        return result

    def ratio(self, slow: Sequence[str], fast: Sequence[str]) -> str:
        wall, processor = (sum(by[n] for n in slow) / sum(by[n] for n in fast) for by in (self.wall, self.processor))
        return f"{wall:.2f}x (wall), {processor:.2f}x (processor time)"


def lm_loss(folder: Path, precision: str, lengths: list[int], count: int) -> bool:
    walk = LayerwiseModel(folder, precision)
    layers, clock = len(walk.layers), Clock()
    draw = np.random.default_rng(0)
    windows = draw.integers(0, walk.config.vocab_size, (count, 256)).astype(np.int32)
    ids = torch.from_numpy(windows.astype(np.int64))
    differing = 0
    everything = depth.blocks(lengths, layers)
    depth.text_values(walk, windows[:1], [TEACHER])  # warm-up
    with walk.computing():
        inputs = walk.begin(ids)
        for length in lengths:
            # TEACHER once: the sweep's one walk up the whole teacher, charged to the sweep
            cuts = [*([TEACHER] if length == lengths[0] else []), *depth.blocks([length], layers)]
            shared = clock.time("sweep body", lambda cuts=cuts: depth.without(walk, inputs, cuts))
            for cut in cuts:
                alone = clock.time("full body", lambda cut=cut: depth.without(walk, inputs, [cut]))[cut]
                differing += not torch.equal(alone, shared[cut])
                # both sides pay the head for every cut: timed once, counted for both
                clock.time("head", lambda stream=alone: head(walk, stream, ids))
    calls = sum(layers - len(cut) for cut in [TEACHER, *everything])
    ours = layers + sum(layers - 1 - cut[-1] for cut in everything)
    weight_list, dims = weights(walk.config), sizes(walk.config)
    a_layer = parameter_count(weight_list, dims, embeddings=False) / layers
    head_layers = dims["vocab"] * dims["hidden"] / a_layer
    heads = head_layers * (len(everything) + 1)
    print(f"LM loss, {len(everything)} cuts of {', '.join(map(str, lengths))} layers and the teacher, {count} windows "
          f"of 256, {precision}, {torch.get_num_threads()} threads")  # fmt: skip
    for name in ("sweep body", "full body", "head"):
        print(f"  {name:11} {clock.wall[name]:7.1f} s wall, {clock.processor[name]:7.1f} s processor")
    print(f"  all         {clock.ratio(['full body', 'head'], ['sweep body', 'head'])}; by arithmetic "
          f"{(calls + heads) / (ours + heads):.2f}x")  # fmt: skip
    print(f"  body alone  {clock.ratio(['full body'], ['sweep body'])}; by arithmetic {calls / ours:.2f}x "
          f"({calls} against {ours} layer passes)")  # fmt: skip
    print(f"  the rest: every cut has its own logits, and this head is {head_layers:.1f} layers' work")
    print(f"  cuts whose numbers differ: {differing}", flush=True)
    return differing == 0


def head(walk: LayerwiseModel, stream: torch.Tensor, ids: torch.Tensor) -> None:
    with walk.head() as output:
        hidden = walk.final_norm(stream[:, :-1]).flatten(0, 1)
        depth.token_losses(hidden, output, ids[:, 1:].flatten())


def against_lm_eval(folder: Path, file: Path, count: int, tokenizer: Any) -> bool:
    from benchmarks.winogrande_vs_lm_eval import run_lm_eval

    walk, clock = LayerwiseModel(folder, "float32"), Clock()
    layers = len(walk.layers)
    cuts = depth.blocks([layers // 2], layers)
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary) / "examples.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()[:count]]
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        few = Path(temporary) / "few.jsonl"
        few.write_text("".join(json.dumps(line) + "\n" for line in lines[:16]))
        shape = whole(walk.config)

        def without(cut: Cut) -> PreTrainedModel:
            kept = tuple(layer for layer in shape.layers if layer not in cut)
            return trim(folder, replace(shape, layers=kept))

        tried = {size: run_lm_eval(without(cuts[0]), tokenizer, few, 0, size)[2] for size in (4, 8, 16)}
        batch_size = min(tried, key=lambda size: tried[size])

        def sweep() -> dict[Cut, np.ndarray]:
            packed = winogrande_packing.pack(winogrande.load_examples(str(part)), tokenizer)
            found = {cut: np.zeros(2 * len(packed.answers)) for cut in cuts}
            for rows in depth.winogrande_chunks(packed, walk.device):
                for cut, values in depth.winogrande_values(walk, packed, rows, cuts).items():
                    found[cut] += values
            return found

        ours = clock.time("sweep", sweep)
        worst, wrong = 0.0, 0
        for cut in cuts:
            model = without(cut)
            theirs, results, _ = clock.time(
                "lm-eval", lambda model=model: run_lm_eval(model, tokenizer, part, 0, batch_size)
            )
            packed_answers = np.array([int(line["answer"]) for line in lines])
            accuracy = evaluation_winogrande.by_example(ours[cut].reshape(-1, 2), packed_answers)[0].mean()
            worst = max(worst, float(np.abs(ours[cut].reshape(-1, 2) - theirs).max()))
            wrong += abs(accuracy - results["acc,none"]) > 1e-9
    print(f"Winogrande, {len(cuts)} blocks of {layers // 2} layers, {len(lines)} examples, float32, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"  lm-eval once per cut {clock.wall['lm-eval']:.1f} s (batch size {batch_size}), sweep "
          f"{clock.wall['sweep']:.1f} s: {clock.ratio(['lm-eval'], ['sweep'])}")  # fmt: skip
    print(
        f"  largest difference of a log-likelihood {worst:.1e} nats; cuts whose accuracy differs: {wrong}", flush=True
    )
    return wrong == 0


def peak_memory(folder: Path, precision: str, windows: int, threads: int) -> int:
    """Bytes, of a process that sweeps the blocks of half the depth over `windows` windows."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (folder, precision, windows, threads))


def _peak(folder: Path, precision: str, count: int, threads: int) -> int:
    torch.set_num_threads(threads)
    walk = LayerwiseModel(folder, precision)
    draw = np.random.default_rng(0)
    windows = draw.integers(0, walk.config.vocab_size, (count, MEMORY_WINDOW)).astype(np.int32)
    cuts = depth.blocks([len(walk.layers) // 2], len(walk.layers))
    for rows in depth.text_chunks(windows, walk.device):
        depth.text_values(walk, windows[rows], [TEACHER, *cuts], cuts)
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="the sweep gives every piece one")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 8, 15])
    parser.add_argument("--winogrande", type=Path, default=winogrande.EMBEDDED)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--parts", nargs="+", default=["lm_loss", "winogrande", "memory"])
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    folder, agreed = teacher_folder(chosen.model), True
    if "lm_loss" in chosen.parts:
        agreed &= lm_loss(folder, chosen.precision, chosen.lengths, chosen.windows)
    if "winogrande" in chosen.parts:
        agreed &= against_lm_eval(folder, chosen.winogrande, chosen.examples, load_tokenizer(chosen.model))
    if "memory" in chosen.parts:
        for windows in (64, 512):
            peak = peak_memory(folder, chosen.precision, windows, chosen.threads)
            print(f"peak memory of a sweep of {windows:3} windows of {MEMORY_WINDOW} tokens: {peak / 2**20:.0f} MiB",
                  flush=True)  # fmt: skip
    raise SystemExit(0 if agreed else 1)


if __name__ == "__main__":
    main()
