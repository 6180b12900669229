"""Figure 10 of 2408.11796: how fast teacher, width student and depth student of equal parameters answer requests.

    python -m benchmarks.throughput [--model smollm2-135m] [--params 88.5M] [--lengths 64/32 128/64] [--batch-sizes 1 4]
        [--engine torch] [--repeats 3] [--precision auto] [--output runs/throughput]

--lengths are input/output tokens of a request. For every one of them and every batch size: seconds of the prefill (the
prompt, to its first new token) and of the decoding after it, apart; requests and new tokens per second of both
together. Engine `torch` is transformers' generate, greedy, with its key-value cache; `vllm` (where it is installed) is
vLLM on the same configurations. The end of a text ends no request. Weights are random: no speed depends on them, and no
model is downloaded; the width student is as an ablation's rule picks it (hidden_size and MLP shrunk alike), the depth
student has the last layers left out, which is as fast as any others.

Every setting is warmed up once and timed `--repeats` times; the table gives the median, the parquet file every time.
All models are timed in turns, so that what else the machine does falls on all of them alike.
"""

import argparse
import gc
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow as pa
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from minitron_search.ablation.shapes import shaped
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.config.schema import Config
from minitron_search.messages.console import console, say
from minitron_search.models import device as precision
from minitron_search.models.architecture import Architecture, parameter_count
from minitron_search.models.families import sizes_of, student_config, weights, whole
from minitron_search.records.directory import write_table
from minitron_search.teachers.sources import teacher_config

SCHEMA = pa.schema([
    ("model", pa.string()), ("params", pa.int64()), ("engine", pa.string()), ("on", pa.string()),
    ("precision", pa.string()), ("input_tokens", pa.int64()), ("output_tokens", pa.int64()),
    ("batch_size", pa.int64()), ("repeat", pa.int64()),
    ("prefill_seconds", pa.float64()),  # of the whole batch, to the first new token of each
    ("decode_seconds", pa.float64()),  # of the new tokens after the first
])  # fmt: skip


class Request(NamedTuple):
    """A batch of them: tokens in, tokens out, how many at once."""

    inputs: int
    outputs: int
    batch_size: int


# (request, new tokens) -> seconds
Timed = Callable[[Request, int], float]


def architectures(config: Config) -> dict[str, tuple[Architecture, int]]:
    """Teacher, width and depth student, each with its parameters."""
    teacher = teacher_config(config.teacher.model)
    found = {"teacher": whole(teacher)}
    for rule in ("width", "depth_bi"):
        asked = {**config.dump()["space"], **shaped(rule, config)}
        space = SearchSpace(parse_config({"space": asked}).space, teacher)
        # of the depth's points, the block that ends the model
        found[rule.partition("_")[0]] = space.architecture(space.points[-1].tolist())
    listed = weights(teacher)
    return {name: (shape, parameter_count(listed, sizes_of(teacher, shape))) for name, shape in found.items()}


def through_torch(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Timed:
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def seconds(asked: Request, new: int) -> float:
        prompt = torch.randint(config.vocab_size, (asked.batch_size, asked.inputs), device=device)
        _wait(device)
        began = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            use_cache=True, pad_token_id=0,
        )  # fmt: skip
        _wait(device)
        return time.perf_counter() - began

    return seconds


def through_vllm(config: PretrainedConfig, dtype: torch.dtype, longest: int) -> Timed:
    from vllm import LLM, SamplingParams, TokensPrompt

    folder = tempfile.mkdtemp(prefix="throughput-")
    config.save_pretrained(folder)
    engine = LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype=dtype, max_model_len=longest,
                 enable_prefix_caching=False)  # fmt: skip

    def seconds(asked: Request, new: int) -> float:
        rows = torch.randint(config.vocab_size, (asked.batch_size, asked.inputs)).tolist()
        how = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0, detokenize=False)
        began = time.perf_counter()
        engine.generate([TokensPrompt(prompt_token_ids=row) for row in rows], how, use_tqdm=False)
        return time.perf_counter() - began

    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(timed: Timed, asked: Request) -> tuple[float, float]:
    """(seconds of the prefill, seconds of the rest): a request for one token, and one for all of them."""
    first = timed(asked, 1)
    return first, max(timed(asked, asked.outputs) - first, 0.0) if asked.outputs > 1 else 0.0


def rows_of(
    models: dict[str, tuple[Timed, int]], requests: Sequence[Request], repeats: int, about: dict[str, Any]
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of `SCHEMA`. models: by name, what times it, and its parameters."""
    found = []
    for asked in requests:
        for repeat in range(-1, repeats):  # the first time is a warm-up
            for name, (timed, params) in models.items():
                prefill, decode = measured(timed, asked)
                if repeat >= 0:
                    found.append({"model": name, "params": params, "input_tokens": asked.inputs,
                                  "output_tokens": asked.outputs, "batch_size": asked.batch_size, "repeat": repeat,
                                  "prefill_seconds": prefill, "decode_seconds": decode, **about})  # fmt: skip
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="medians; in brackets times the teacher's; requests: prefill and decode together",
                  box=SIMPLE_HEAD)  # fmt: skip
    for name in ("", "in/out", "batch", "prefill tokens/s", "decode tokens/s", "requests/s"):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    speeds = summary(rows)
    for (inputs, outputs, batch, name), speed in speeds.items():
        teacher = speeds[inputs, outputs, batch, "teacher"]
        cells = [f"{value:,.4g} ({value / one:.2f})" if one else "" for value, one in zip(speed, teacher, strict=True)]
        shown.add_row(name, f"{inputs}/{outputs}", str(batch), *cells)
    return shown


def summary(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int, int, str], tuple[float, float, float]]:
    """(input, output, batch, model) -> prompt tokens, new tokens after the first, and requests per second."""
    groups: dict[tuple[int, int, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = row["input_tokens"], row["output_tokens"], row["batch_size"], row["model"]
        groups.setdefault(key, []).append(row)
    found = {}
    for (inputs, outputs, batch, name), of in groups.items():
        prefill, decode = (statistics.median(row[f"{part}_seconds"] for row in of) for part in ("prefill", "decode"))
        both = statistics.median(row["prefill_seconds"] + row["decode_seconds"] for row in of)
        new = batch * (outputs - 1)
        found[inputs, outputs, batch, name] = (batch * inputs / prefill, new / decode if new else 0.0, batch / both)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="an embedded name, a folder, or a Hub name")
    parser.add_argument("--params", default="88.5M", help="of both students")
    parser.add_argument("--tolerance", type=float, default=0.03, help="a share of --params")
    parser.add_argument("--lengths", nargs="+", default=["64/32", "256/64", "512/128"], help="input/output tokens")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--engine", default="torch", choices=["torch", "vllm"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=Path("runs/throughput"))
    chosen = parser.parse_args(arguments)
    if chosen.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        parser.error("--engine: vllm is not installed; valid: torch")
    try:
        lengths = [tuple(map(int, text.split("/"))) for text in chosen.lengths]
        requests = [Request(*pair, size) for pair in lengths for size in chosen.batch_sizes]
    except (ValueError, TypeError):
        parser.error(f"--lengths: {' '.join(chosen.lengths)}; valid: input/output tokens, as in 128/64")
    budget = {"params": {"target": chosen.params, "tolerance": chosen.tolerance}}
    config = parse_config({"teacher": {"model": chosen.model}, "space": {"budget": budget, "axes": {}}})
    resolved, device = precision.resolve(chosen.precision), precision.device()
    dtype, teacher = getattr(torch, resolved), teacher_config(chosen.model)
    about = {"engine": chosen.engine, "precision": resolved, "on": _place(device)}
    shapes = architectures(config)
    for name, (shape, params) in shapes.items():
        say(f"{name}: {shape}, {params:,} parameters")
    longest = max(asked.inputs + asked.outputs for asked in requests)
    rows: list[dict[str, Any]] = []
    if chosen.engine == "torch":
        models = {
            name: (through_torch(student_config(teacher, shape), dtype, device), params)
            for name, (shape, params) in shapes.items()
        }
        rows = rows_of(models, requests, chosen.repeats, about)
    else:  # which takes all of the memory for one model
        for name, (shape, params) in shapes.items():
            timed = through_vllm(student_config(teacher, shape), dtype, longest)
            rows += rows_of({name: (timed, params)}, requests, chosen.repeats, about)
            del timed
            gc.collect()
    write_table(chosen.output / "throughput.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    console.print(table(rows))
    say(f"{chosen.engine}, {resolved}, {about['on']}: {chosen.output / 'throughput.parquet'}")


def _place(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
