"""Winogrande by lm-eval and by this project, on the same file and model: same numbers, less time.

    python benchmarks/winogrande_vs_lm_eval.py --model FOLDER --examples FILE [--limit N] [--shots 0 5]

Both run in float32 on the CPU (or the GPU where there is one). lm-eval runs its own shipped `winogrande`
task, its data set replaced by the local file, at each of `--batch-sizes` on a part of the examples first and
then in full at the fastest. Seconds cover tokenisation and scoring, not loading. Exits 1 when the two
disagree.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from minitron_search.data import winogrande_packing
from minitron_search.evaluation import winogrande as evaluation_winogrande

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local

import numpy as np
import torch
import yaml
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.winogrande import preprocess_winogrande
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minitron_search.data import winogrande

TIE = 1e-3  # nats: options closer than this may be decided by rounding


def lm_eval_task(examples: Path, cache: str) -> ConfigurableTask:
    """lm-eval's shipped task with `examples` as its validation split and no train split."""
    shipped = Path(preprocess_winogrande.__file__).with_name("default.yaml")
    config = yaml.load(shipped.read_text().replace("!function ", ""), yaml.SafeLoader)
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        config[key] = getattr(preprocess_winogrande, config[key].rpartition(".")[2])
    del config["training_split"], config["dataset_name"]
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": {"validation": str(examples)}, "cache_dir": cache}
    return ConfigurableTask(config=config)


def run_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Path, shots: int, batch_size: int
) -> tuple[np.ndarray, dict[str, Any], float]:
    """(log-likelihoods (n, 2), lm-eval's results, seconds)."""
    with tempfile.TemporaryDirectory() as cache:
        task = lm_eval_task(examples, cache)
        task.set_config("num_fewshot", shots)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        start = time.perf_counter()
        output = evaluator.simple_evaluate(model=harness, tasks=[task], num_fewshot=shots, bootstrap_iters=1)
        seconds = time.perf_counter() - start
    assert output is not None
    samples = sorted(output["samples"]["winogrande"], key=lambda sample: sample["doc_id"])
    values = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    return np.array(values), output["results"]["winogrande"], seconds


def run_ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, shots: int
) -> tuple[evaluation_winogrande.WinograndeScore, winogrande_packing.PackedOptions, float]:
    examples = winogrande.load_examples(str(path))
    start = time.perf_counter()
    row_length = 256 if shots == 0 else 512
    packed = winogrande_packing.pack(examples, tokenizer, shots, row_length, model.config.max_position_embeddings)
    score = evaluation_winogrande.evaluate(model, packed)
    return score, packed, time.perf_counter() - start


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    shots: int,
    batch_sizes: list[int],
    folder: Path,
) -> bool:
    """Prints one comparison; True when log-likelihoods agree to rounding and decisions but for near-ties."""
    lines = path.read_text().splitlines()
    part = folder / "part.jsonl"
    part.write_text("\n".join(lines[:64]) + "\n")
    trial_seconds = {size: run_lm_eval(model, tokenizer, part, shots, size)[2] for size in batch_sizes}
    batch_size = min(trial_seconds, key=lambda size: trial_seconds[size])
    run_ours(model, tokenizer, part, shots)  # warm-up, as lm-eval had
    score, packed, our_seconds = run_ours(model, tokenizer, path, shots)
    theirs, results, their_seconds = run_lm_eval(model, tokenizer, path, shots, batch_size)

    difference = np.abs(score.log_likelihoods - theirs).max()
    differing = np.flatnonzero(score.log_likelihoods.argmax(1) != theirs.argmax(1))
    gaps = np.abs(theirs[differing, 0] - theirs[differing, 1])
    print(f"{shots}-shot, {len(lines)} examples, float32, {torch.get_num_threads()} threads")
    print(f"  largest difference in log-likelihood  {difference:.2e} nats")
    print(f"  decisions that differ                 {len(differing)}")
    for index, gap in zip(differing, gaps, strict=True):
        print(f"    example {index}: options {gap:.1e} nats apart: {lines[index]}")
    print(f"  accuracy   lm-eval {results['acc,none']:.6f} +- {results['acc_stderr,none']:.6f}")
    print(f"             ours    {score.accuracy:.6f} +- {score.accuracy_stderr:.6f}")
    print(f"  margin     {score.margin:.4f} +- {score.margin_stderr:.4f} nats")
    tried = ", ".join(f"{size}: {seconds:.1f} s" for size, seconds in trial_seconds.items())
    print(f"  seconds    lm-eval {their_seconds:.1f} (batch size {batch_size}; on 64 examples {tried})")
    tokens, rows = packed.row_lengths.sum(), len(packed.row_lengths)
    print(f"             ours    {our_seconds:.1f} ({tokens} tokens in {rows} rows)")
    print(f"  ratio      {their_seconds / our_seconds:.2f} times faster", flush=True)
    return bool(difference < TIE and (gaps < TIE).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--examples", type=Path, required=True, help="questions in Winogrande's own format, JSON lines")
    parser.add_argument("--limit", type=int, help="the first N examples only")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32], help="tried for lm-eval")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    lines = [json.loads(line) for line in arguments.examples.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        # Shots are drawn from the same examples that are scored, so a limit makes a smaller file.
        path = Path(folder) / "examples.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines[: arguments.limit]))
        agreed = [
            compare(model, tokenizer, path, shots, arguments.batch_sizes, Path(folder)) for shots in arguments.shots
        ]
    raise SystemExit(0 if all(agreed) else 1)


if __name__ == "__main__":
    main()
