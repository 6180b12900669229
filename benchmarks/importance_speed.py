"""The importance pass against a plain forward pass over the same tokens: the goal is at most 1.15x.

    python -m benchmarks.importance_speed [--model FOLDER] [--precision bfloat16] [--threads 1] [--windows 8]
                                          [--length 256] [--rounds 5] [--methods activation wanda pca taylor]

The two take turns in every round, in one process, on the same model and the same batches; plain is the body's forward
pass, without output head or gradients. Printed for each method: the median over rounds of the ratio of a round's two
times, and the ratio of all processor time, which counts nothing that other processes take. `--profile` prints where
the time of an importance pass goes. Exits 1 where the default method's median processor-time ratio is above the goal.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minitron_search.config.inputs import ImportanceConfig
from minitron_search.importance.importance import importance_sums
from minitron_search.models.device import autocast, on_device
from minitron_search.models.families import final_hidden
from minitron_search.teachers.sources import teacher_folder

GOAL = 1.15
ROWS = 4  # windows at once, on both sides


def plain(model: PreTrainedModel, windows: np.ndarray, precision: str) -> None:
    with torch.no_grad():
        for first in range(0, len(windows), ROWS):
            rows = torch.from_numpy(windows[first : first + ROWS].astype(np.int64)).to(model.device)
            with autocast(precision, model.device):
                final_hidden(model, rows)


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="the importance stage gives every task one")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["activation"])
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    folder = teacher_folder(chosen.model)
    model = on_device(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    draw = np.random.default_rng(0)
    windows = draw.integers(0, model.config.vocab_size, (chosen.windows, chosen.length)).astype(np.int32)
    print(f"{chosen.windows} windows of {chosen.length} tokens, {chosen.precision}, {chosen.threads} threads, "
          f"{model.num_parameters():,} parameters, {chosen.rounds} rounds after one that warms up")  # fmt: skip
    within = True
    for method in chosen.methods:
        asked = ImportanceConfig(method=method)

        def importance(asked: ImportanceConfig = asked) -> None:
            importance_sums(model, windows, asked, chosen.precision, ROWS)

        sides = (importance, lambda: plain(model, windows, chosen.precision))
        rounds = []
        for index in range(chosen.rounds + 1):
            order = (0, 1) if index % 2 else (1, 0)
            taken = {side: timed(sides[side]) for side in order}
            rounds.append((taken[0], taken[1]))
        ratios = [[ours[clock] / other[clock] for ours, other in rounds[1:]] for clock in (0, 1)]
        wall, processor = (statistics.median(of_clock) for of_clock in ratios)
        print(f"  {method:10} {wall:.3f}x wall, {processor:.3f}x processor time (rounds "
              f"{', '.join(f'{ratio:.3f}' for ratio in ratios[1])}); plain "
              f"{statistics.median(other[0] for _, other in rounds[1:]):.2f} s", flush=True)  # fmt: skip
        within &= method != "activation" or processor <= GOAL
        if chosen.profile:
            with torch.profiler.profile() as profile:
                importance()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40))
    raise SystemExit(0 if within else 1)


if __name__ == "__main__":
    main()
