"""The learning rate that `auto` chooses, against a sweep of rates: how much worse it is than the best, and its cost.

    python -m benchmarks.learning_rates --work FOLDER [--teachers smollm2-135m FOLDER ...] [--kept 0.67 0.5]
        [--rates 1e-5 3e-5 6e-5 1.2e-4 3e-4 6e-4 1.2e-3] [--seeds 0 1 2] [--tokens 8192] [--run-tokens 300000]
        [--report-only] [--output docs/results.md]

For each teacher and each share of its parameters one shape is trimmed by importance, and distilled at every rate with
every seed (a seed is an order of the training windows), from the same trim, on the embedded text, with the settings of
a search's candidate. Beside these stand the rule by size and the probe of a run that trains on `--run-tokens`,
with the same candidate and once a seed: each is distilled at its rate as well. What ends is kept in `--work`, a file a
training, and not repeated: a run that was stopped goes on where it was. A table of what is there, which says what is
missing, is printed, and goes between two marker comments of `--output`, if one is given.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.document import replaced
from benchmarks.importance_table import lm_loss, shape_within
from minitron_search.architecture_search.state import make_trial
from minitron_search.config.inputs import ImportanceConfig
from minitron_search.config.loading import parse_config
from minitron_search.data.corpus import Corpus, load_corpus
from minitron_search.distillation.loop import Milestone, train
from minitron_search.distillation.teacher import TeacherSource, cached_teacher
from minitron_search.distillation.teacher_cache import Request, ensure, in_this_process
from minitron_search.distillation.training_log import DivergedError
from minitron_search.evaluation.statistics import interval
from minitron_search.importance.importance import measure
from minitron_search.models.architecture import Architecture, parameter_count
from minitron_search.models.device import autocast, on_device, release_memory, resolve
from minitron_search.models.families import sizes, weights, whole
from minitron_search.models.loading import load_teacher
from minitron_search.models.output_head import output_head
from minitron_search.pruning.trimming import permute_teacher, trim
from minitron_search.records.directory import replace_text
from minitron_search.teachers.sources import fingerprint, load_tokenizer, teacher_folder
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.learning_rate import chosen, probe_of, probed
from minitron_search.trials.settings import distillation_settings, rule_rate

RATES = (1e-5, 3e-5, 6e-5, 1.2e-4, 3e-4, 6e-4, 1.2e-3)
JUDGED = 8  # calibration windows whose loss is taken on the way
THREADS = 1


class Text(NamedTuple):
    """One teacher with all that its students read."""

    model: str  # as teacher.model names it
    name: str
    folder: Path  # permuted by importance
    corpus: Corpus
    cache: Path
    teacher: TeacherSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.67, 0.5])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--run-tokens", type=int, default=300_000)
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    for model in [] if options.report_only else options.teachers:
        text = read(model, options.work, options.tokens)
        for seed, kept in itertools.product(options.seeds, options.kept):
            probe = options.work / "probes" / f"{text.name}-{kept:g}-{seed}.json"
            if not probe.exists():
                replace_text(probe, json.dumps(probe_of_one(text, kept, seed, options.run_tokens)))
            found = as_chosen(json.loads(probe.read_text()))
            for rate in dict.fromkeys([found["rate"], found["rule"], *middle_first(options.rates)]):
                file = row_file(options.work, text.name, kept, rate, seed)
                if not file.exists():
                    replace_text(file, json.dumps(distilled(text, kept, rate, seed, options.tokens)))
    found = table(options.work, options.rates, options.seeds)
    print(found)
    if options.output:
        document = replaced(options.output.read_text(), found, "learning_rates", "Learning rates")
        options.output.write_text(document)


def as_chosen(probe: dict[str, Any]) -> dict[str, Any]:
    """A probe with the rate that is chosen today from the losses it found: those stay what they are."""
    losses = {row["rate"]: math.inf if row["lm_loss"] is None else row["lm_loss"] for row in probe["rates"]}
    windows = -(-parse_config({}).distillation.batch_tokens // probe["length"])
    return {**probe, "rate": chosen(losses, windows / probe["batch"]) if probe["helped"] else min(losses)}


def middle_first(rates: Sequence[float]) -> list[float]:
    """The rates from the middle outwards: what is there of a sweep that was stopped says the most."""
    middle = len(rates) // 2
    return sorted(rates, key=lambda rate: (abs(rates.index(rate) - middle), rate))


def row_file(work: Path, name: str, kept: float, rate: float, seed: int) -> Path:
    return work / "rows" / f"{name}-{kept:g}-{rate:g}-{seed}.json"


def read(model: str, work: Path, tokens: int) -> Text:
    """Make what all students of a teacher read, unless it is there."""
    folder, precision = teacher_folder(model), resolve("auto")
    name = folder.name if model != "smollm2-135m" else model
    corpus = load_corpus("docstrings", "docstrings", load_tokenizer(model), sequence_length=256,
                         calibration_samples=64, validation_samples=32, train_tokens=tokens, seed=0)  # fmt: skip
    permuted = work / "permuted" / name
    if not permuted.exists():
        print(f"{name}: importance", flush=True)
        whole_teacher = on_device(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")).eval()
        found = measure(whole_teacher, corpus.calibration, ImportanceConfig(), precision=precision)
        permute_teacher(folder, found.rankings(whole(whole_teacher.config).num_key_value_heads), permuted)
        del whole_teacher
    dims = sizes(AutoConfig.from_pretrained(permuted))
    asked = Request(fingerprint(permuted), f"{corpus.id} train", corpus.train, precision, dims["hidden"], dims["vocab"])
    print(f"{name}: the teacher's outputs for {corpus.train.size:,} tokens", flush=True)
    cached = ensure(asked, in_this_process(asked, lambda: on_device(load_teacher(permuted)))).path
    release_memory()
    return Text(model, name, permuted, corpus, cached, cached_teacher(cached, output_head(permuted), precision))


def shape_of(folder: Path, kept: float) -> Architecture:
    config = AutoConfig.from_pretrained(folder)
    return shape_within(config, kept * parameter_count(weights(config), sizes(config)))


def distilled(text: Text, kept: float, rate: float, seed: int, tokens: int) -> dict[str, Any]:
    """Distil one student; its validation loss by window, untrained and at the end, and on the way that of the
    calibration windows, by tokens."""
    precision, began = resolve("auto"), time.process_time()
    settings = distillation_settings(parse_config({}), precision)
    steps = [tokens // 2**halvings for halvings in range(4)]
    settings = replace(settings, total_tokens=tokens, milestones=(0, *sorted(steps)), learning_rate=rate, seed=seed,
                       threads=THREADS)  # fmt: skip
    shape = shape_of(text.folder, kept)
    row: dict[str, Any] = {"teacher": text.name, "kept": kept, "rate": rate, "seed": seed, "tokens": tokens,
                           "shape": shape.to_dict(), "judged": {}, "validation": {}}  # fmt: skip

    def judge(milestone: Milestone) -> None:
        with autocast(precision, milestone.student.device):
            student = milestone.student.eval()
            row["judged"][milestone.tokens_seen] = lm_loss(student, text.corpus.calibration[:JUDGED]).tolist()
            if milestone.tokens in (0, tokens):
                row["validation"][milestone.tokens_seen] = lm_loss(student, text.corpus.validation).tolist()

    try:
        train(on_device(trim(text.folder, shape)), text.corpus.train, settings, text.teacher, on_milestone=judge)
    except DivergedError as error:
        row["diverged"] = str(error)
    row["cpu_seconds"] = time.process_time() - began
    ended = {at: round(float(np.mean(losses)), 4) for at, losses in row["validation"].items()}
    print(f"{text.name}, {kept:g} kept, rate {rate:g}, seed {seed}: {ended}, {row['cpu_seconds']:.0f} s", flush=True)
    return row


def probe_of_one(text: Text, kept: float, seed: int, run_tokens: int) -> dict[str, Any]:
    """What the probe of a run chooses for one candidate; `rule` is the rate that it begins with."""
    precision = resolve("auto")
    config = parse_config({"teacher": {"model": text.model}})
    probe = probe_of(config, run_tokens)
    if probe is None:
        raise SystemExit(f"--run-tokens: {run_tokens} are too few for a probe; valid: 300000")
    nothing: Any = None  # of what a run's trials read, a probe needs no more than this
    inputs = TrialInputs(
        run_dir=nothing, teacher_folder=text.folder, compute_folder=text.folder, train=text.corpus.train,
        validation=nothing, packed=nothing, train_cache=text.cache, validation_cache=nothing, block_bi=nothing,
        precision=precision,
    )  # fmt: skip
    settings = replace(distillation_settings(config, precision), threads=THREADS)
    shape, rule = shape_of(text.folder, kept), rule_rate(text.model)
    trial = make_trial(None, shape, "probe", settings, seed=seed, initialization="pruned")
    found = probed(inputs, trial, probe, rule, text.corpus.calibration)
    print(f"{text.name}, {kept:g} kept, seed {seed}: {found}", flush=True)
    return {**found, "teacher": text.name, "kept": kept, "seed": seed, "rule": rule, "run_tokens": run_tokens}


# What it shows


def table(work: Path, rates: Sequence[float], seeds: Sequence[int]) -> str:
    """Markdown of what is there: the mean LM loss at every rate, and how far each choice is above the best of them."""
    rows = [json.loads(file.read_text()) for file in sorted((work / "rows").glob("*.json"))]
    probes = [as_chosen(json.loads(file.read_text())) for file in sorted((work / "probes").glob("*.json"))]
    lines = ["| teacher | kept | untrained | rate | LM loss | seeds |", "|---|---|---|---|---|---|"]
    choices = ["| teacher | kept | choice | rate | above the best rate | 95% over windows | seeds | of the run |",
               "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    missing = 0
    for teacher, kept in sorted({(row["teacher"], row["kept"]) for row in rows}):
        mine = [row for row in rows if (row["teacher"], row["kept"]) == (teacher, kept)]
        ended = {(row["rate"], row["seed"]): _last(row) for row in mine if _last(row) is not None}
        untrained = np.mean(mine[0]["validation"]["0"])
        for rate in sorted({row["rate"] for row in mine}):
            losses = [np.mean(ended[rate, seed]) for seed in seeds if (rate, seed) in ended]
            said = f"{np.mean(losses):.3f}" if losses else "diverged"
            lines.append(f"| {teacher} | {kept:g} | {untrained:.3f} | {rate:g} | {said} | {len(losses)} |")
        missing += sum((rate, seed) not in {(row["rate"], row["seed"]) for row in mine}
                       for rate in rates for seed in seeds)  # fmt: skip
        found = [probe for probe in probes if (probe["teacher"], probe["kept"]) == (teacher, kept)]
        choices += _choices(teacher, kept, ended, found, rates)
    tried = ["| probe of | kept | seed | untrained | LM loss by rate | steps | tokens trained, scored |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for probe in probes:
        losses = ", ".join(f"{row['rate']:.2g}: " + ("diverged" if row["lm_loss"] is None else f"{row['lm_loss']:.3f}")
                           for row in probe["rates"])  # fmt: skip
        cells = (probe["teacher"], f"{probe['kept']:g}", probe["seed"], f"{probe['untrained']:.3f}", losses,
                 probe["steps"], f"{probe['trained_tokens']:,}, {probe['scored_tokens']:,}")  # fmt: skip
        tried.append(f"| {' | '.join(map(str, cells))} |")
    note = (
        f"{missing} trainings of these shapes are missing." if missing else "Every training of these shapes is there."
    )
    return "\n".join([*choices, "", *tried, "", *lines, "", note])


def _last(row: dict[str, Any]) -> np.ndarray | None:
    losses = row["validation"].get(str(row["tokens"]))
    return None if losses is None else np.array(losses)


def _choices(
    teacher: str, kept: float, ended: dict[tuple[float, int], np.ndarray], probes: list[dict[str, Any]],
    rates: Sequence[float],
) -> Iterator[str]:  # fmt: skip
    """A line for the rule and one for the probe: paired with the best rate of the sweep, over the seeds that have all
    its rates."""
    whole_seeds = [probe for probe in probes if all((rate, probe["seed"]) in ended for rate in rates)]
    if not whole_seeds:
        yield f"| {teacher} | {kept:g} | | | the sweep is not whole for any seed | | 0 | |"
        return
    seeds = [probe["seed"] for probe in whole_seeds]
    best = min(rates, key=lambda rate: np.mean([ended[rate, seed].mean() for seed in seeds]))
    for choice, key in (("rule", "rule"), ("probe", "rate")):
        if any((probe[key], probe["seed"]) not in ended for probe in whole_seeds):
            continue
        differences = np.mean(
            [ended[probe[key], probe["seed"]] - ended[best, probe["seed"]] for probe in whole_seeds], axis=0
        )
        low, high = interval(differences)
        cost = np.mean([(probe["trained_tokens"] + probe["scored_tokens"] / 3) / probe["run_tokens"]
                        for probe in whole_seeds]) if choice == "probe" else 0.0  # fmt: skip
        chosen = ", ".join(sorted({f"{probe[key]:.2g}" for probe in whole_seeds}))
        yield (f"| {teacher} | {kept:g} | {choice} | {chosen} | {differences.mean():+.4f} over {best:g} "
               f"| {low:.4f} to {high:.4f} | {len(seeds)} | {cost:.1%} |")  # fmt: skip


if __name__ == "__main__":
    main()
