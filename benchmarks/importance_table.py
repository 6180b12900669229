"""Importance criteria against each other at one parameter budget: MLP and hidden channels only, no training.

    python -m benchmarks.importance_table [--model smollm2-135m] [--kept 0.67] [--seeds 0 1 2] [--samples 64]
                                          [--windows 32] [--text docstrings] [--precision auto]
                                          [--output docs/results.md]

Every criterion ranks the teacher on each seed's calibration windows, the teacher is trimmed by that ranking, and the
student is scored as it is: LM loss in float32 on the same validation windows. One table goes between two marker
comments of `--output`, in place of the one that is there.

`pca` unties a tied output head. Its student has the budget's parameters, head included, and so a smaller shape than
the others'; a second row gives it the others' shape and more parameters.
"""

import argparse
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.document import replaced
from minitron_search.config.inputs import ImportanceConfig
from minitron_search.data.corpus import load_corpus
from minitron_search.evaluation.statistics import mean_and_error, paired
from minitron_search.importance.importance import Importance, measure
from minitron_search.importance.pca import rotated, rotated_config
from minitron_search.losses.output_loss import token_losses
from minitron_search.models import device
from minitron_search.models.architecture import Architecture, parameter_count
from minitron_search.models.device import on_device
from minitron_search.models.families import (
    final_hidden,
    is_expressible,
    sizes,
    sizes_of,
    student_config,
    weights,
    whole,
)
from minitron_search.models.loading import student_of
from minitron_search.models.output_head import output_head
from minitron_search.pruning.trimming import trimmed_weights
from minitron_search.teachers.sources import load_tokenizer, teacher_folder

METHODS = ("activation", "random", "magnitude", "taylor", "wanda", "pca")
NAMES = {
    "activation": "activations (default: batch L2, sequence mean)",
    "random": "random",
    "magnitude": "weight magnitude (L2)",
    "taylor": "first-order Taylor (LLM-Pruner)",
    "wanda": "weight x activation norm (Wanda-style)",
    "pca": "PCA of the hidden axis (SliceGPT)",
    "pca, same shape": "PCA, the others' shape",
}
TOLERANCE = 0.01  # of the budget: shapes on the grid come this near to it
GRID = 48  # steps of each axis
ROWS = 8


class Arm(NamedTuple):
    """losses: (seeds, windows), nats per token."""

    name: str
    architecture: Architecture
    params: int
    losses: np.ndarray


def shape_within(config: PretrainedConfig, budget: float) -> Architecture:
    """Of the shapes within `TOLERANCE` of `budget` parameters, with the teacher's heads and depth, the one whose hidden
    and MLP widths keep nearest to their proportion in the teacher. Raises ValueError where there is none."""
    teacher, listed = whole(config), weights(config)
    grids = [
        range(full // 4, full + 1, max(1, full // GRID)) for full in (teacher.hidden_size, teacher.intermediate_size)
    ]
    found = []
    for hidden, neurons in itertools.product(*grids):
        shape = replace(teacher, hidden_size=hidden, intermediate_size=neurons)
        off = parameter_count(listed, sizes_of(config, shape)) / budget - 1
        if abs(off) <= TOLERANCE and is_expressible(config, shape):
            skew = abs(math.log(hidden / teacher.hidden_size) - math.log(neurons / teacher.intermediate_size))
            found.append((round(skew, 2), abs(off), hidden, neurons))
    if not found:
        raise ValueError(f"--kept: no shape has {budget:,.0f} parameters +- {TOLERANCE:.0%}; valid: a larger share")
    _, _, hidden, neurons = min(found)
    return replace(teacher, hidden_size=hidden, intermediate_size=neurons)


def trimmed(teacher: PreTrainedModel, found: Importance, shape: Architecture) -> PreTrainedModel:
    """The student of `shape`, cut from `teacher`, which is the rotated one where `found` is of its channels."""
    state = {name: parameter.detach().cpu() for name, parameter in teacher.named_parameters()}
    rankings = found.rankings(whole(teacher.config).num_key_value_heads)
    kept = trimmed_weights(state.__getitem__, teacher.config, shape, rankings)
    own = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in kept.items()}
    return on_device(student_of(student_config(teacher.config, shape), own))


def lm_loss(model: PreTrainedModel, windows: np.ndarray) -> np.ndarray:
    """(windows,) float64, nats per token."""
    losses = []
    with torch.inference_mode():
        for first in range(0, len(windows), ROWS):
            ids = torch.from_numpy(windows[first : first + ROWS].astype(np.int64)).to(model.device)
            hidden = final_hidden(model, ids)[:, :-1].flatten(0, 1)
            ce = token_losses(hidden, output_head(model), ids[:, 1:].flatten()).ce
            losses.append(ce.view(len(ids), -1).double().mean(1).cpu().numpy())
    return np.concatenate(losses)


def arms(
    teacher: PreTrainedModel, method: str, calibrations: list[np.ndarray], seeds: list[int], validation: np.ndarray,
    budget: float, resolved: str,
) -> Iterator[Arm]:  # fmt: skip
    """One for a method; for pca of a tied teacher, two."""
    config = teacher.config
    shape = shape_within(config, budget)
    cut = config if method != "pca" else rotated_config(config)
    shapes = {method: shape_within(cut, budget)}
    if shapes[method] != shape:
        shapes[f"{method}, same shape"] = shape
    losses: dict[str, list[np.ndarray]] = {name: [] for name in shapes}
    for seed, calibration in zip(seeds, calibrations, strict=True):
        found = measure(teacher, calibration, ImportanceConfig(method=method), seed=seed, precision=resolved)  # type: ignore[arg-type]
        model = teacher if found.rotation is None else rotated(teacher, found.rotation)
        for name, of_name in shapes.items():
            losses[name].append(lm_loss(trimmed(model, found, of_name), validation))
            print(f"  {name}, seed {seed}: {losses[name][-1].mean():.4f}", flush=True)
    for name, of_name in shapes.items():
        yield Arm(name, of_name, parameter_count(weights(cut), sizes_of(cut, of_name)), np.stack(losses[name]))


def table(made: list[Arm], teacher_losses: np.ndarray, teacher_params: int, description: str) -> str:
    """Markdown. A loss's errors are over windows, of the mean over seeds, and over seeds, of the mean over windows; a
    difference is paired by window, with Fisher's randomisation p."""
    default = made[0].losses.mean(0)
    lines = [
        description,
        "",
        "| criterion | parameters | hidden, MLP | LM loss +- error over windows | error over seeds "
        "| minus the default | p |",
        "|---|---|---|---|---|---|---|",
        f"| the teacher, untrimmed | {teacher_params / 1e6:.1f}M | | {_plus_minus(teacher_losses)} | | | |",
    ]
    for arm in made:
        of_windows, of_seeds = arm.losses.mean(0), arm.losses.mean(1)
        _, between, _ = mean_and_error(of_seeds)
        versus, p = "", ""
        if arm is not made[0]:
            test = paired(default, of_windows)
            versus, p = f"{test['difference']:+.3f} +- {test['stderr']:.3f}", f"{test['p']:.2g}"
        shape = f"{arm.architecture.hidden_size}, {arm.architecture.intermediate_size}"
        lines.append(f"| {NAMES[arm.name]} | {arm.params / 1e6:.1f}M | {shape} | {_plus_minus(of_windows)} "
                     f"| {between:.3f} | {versus} | {p} |")  # fmt: skip
    return "\n".join(lines)


def _plus_minus(values: np.ndarray) -> str:
    mean, stderr, _ = mean_and_error(values)
    return f"{mean:.3f} +- {stderr:.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kept", type=float, default=0.67, help="share of the teacher's parameters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=32, help="validation windows")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--pool", type=int, default=1024, help="windows that calibration is drawn from")
    parser.add_argument("--text", default="docstrings")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="of measuring")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    chosen = parser.parse_args(arguments)
    methods = ["activation", *(method for method in chosen.methods if method != "activation")]
    resolved = device.resolve(chosen.precision)
    tokenizer = load_tokenizer(chosen.model)
    corpora = [
        load_corpus(
            chosen.text, chosen.text, tokenizer, sequence_length=chosen.length, calibration_samples=chosen.samples,
            validation_samples=chosen.windows, train_tokens=(chosen.pool - chosen.samples) * chosen.length, seed=seed,
        )
        for seed in chosen.seeds
    ]  # fmt: skip
    calibrations, validation = [corpus.calibration for corpus in corpora], corpora[0].validation
    loaded = AutoModelForCausalLM.from_pretrained(teacher_folder(chosen.model), dtype=torch.float32)
    teacher = on_device(loaded).eval()
    params = parameter_count(weights(teacher.config), sizes(teacher.config))
    made: list[Arm] = []
    for method in methods:
        print(method, flush=True)
        made += arms(teacher, method, calibrations, chosen.seeds, validation, chosen.kept * params, resolved)
    description = (
        f"`python -m benchmarks.importance_table`: {chosen.model}, {1 - chosen.kept:.0%} smaller, MLP and hidden "
        f"channels only, no training. {chosen.samples} calibration windows of {chosen.length} tokens drawn with each "
        f"of {len(chosen.seeds)} seeds, measured in {resolved}; LM loss (nats per token, float32) on {chosen.windows} "
        f"validation windows of `{chosen.text}`. p: paired by window, against the default."
    )
    section = table(made, lm_loss(teacher, validation), params, description)
    print(section)
    text = chosen.output.read_text() if chosen.output.exists() else "# Results\n"
    chosen.output.write_text(replaced(text, section, "importance_table", "Importance criteria"))


if __name__ == "__main__":
    main()
