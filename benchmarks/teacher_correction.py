"""The corrected against the original teacher: one student architecture, the same tokens, several seeds.

    python -m benchmarks.teacher_correction --train FILE
        [--validation FILE] [--model smollm2-135m] [--arms original corrected taught parallel] [--seeds 0 1 2]
        [--tokens 24K] [--correction-tokens 32K] [--method full] [--at-once 2] [--output docs/results.md]
        [--work runs/teacher_correction]

Arms: `original`, pruned from and taught by the original teacher; `corrected`, pruned from and taught by the corrected
one (2408.11796, Figure 4); `taught`, the student of `original`, bit for bit, taught by the corrected one; `parallel`,
that same student again, its teacher corrected meanwhile (Figure 5). A seed is an order of the training windows.

What is finished is kept in the folder `--work` and not repeated; it takes a new one to begin anew. There
`teacher_correction.parquet` has a row per arm, seed and milestone, and `teacher_correction.html` the curves; one table
goes between two marker comments of `--output`.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from analysis.page import palette
from benchmarks.document import replaced
from benchmarks.importance_table import lm_loss, shape_within
from minitron_search.config.inputs import ImportanceConfig
from minitron_search.config.loading import parse_config
from minitron_search.config.schema import Config
from minitron_search.config.types import Precision
from minitron_search.data.corpus import load_corpus
from minitron_search.distillation.checkpoints import CheckpointFolder
from minitron_search.distillation.correction import correcting_teacher, float32_of, merged, trainable
from minitron_search.distillation.loop import Milestone, train
from minitron_search.distillation.teacher import cached_teacher, live_teacher
from minitron_search.distillation.teacher_cache import Request, ensure, in_this_process
from minitron_search.evaluation.statistics import mean_and_error, paired
from minitron_search.export.student_folder import write_folder
from minitron_search.export.teacher_files import teacher_files
from minitron_search.importance.importance import measure
from minitron_search.models import device
from minitron_search.models.architecture import parameter_count
from minitron_search.models.device import autocast, on_device, release_memory
from minitron_search.models.families import sizes, sizes_of, weights, whole
from minitron_search.models.loading import load_teacher
from minitron_search.models.output_head import output_head
from minitron_search.pruning.trimming import permute_teacher, trim
from minitron_search.records.cache import content_id
from minitron_search.records.directory import replace_text, write_table
from minitron_search.teachers.sources import fingerprint, load_tokenizer, teacher_folder
from minitron_search.trials.settings import correction, correction_settings, retraining_settings


class Kind(NamedTuple):
    """From which teacher an arm's student is cut, and which one teaches it."""

    title: str
    pruned: str
    taught: str
    colour: str


ARMS = {
    "original": Kind("original teacher", "original", "original", palette.VERMILLION),
    "corrected": Kind("corrected teacher, pruned and distilled", "corrected", "corrected", palette.BLUE),
    "taught": Kind("corrected teacher, student of the original", "original", "corrected", palette.GREEN),
    "parallel": Kind("corrected in parallel, student of the original", "original", "parallel", palette.PURPLE),
}
# Of a cosine schedule to the last one.
MILESTONES = (0, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1)
SCHEMA = pa.schema([
    ("arm", pa.string()), ("seed", pa.int64()), ("tokens", pa.int64()),
    ("lm_loss", pa.float64()), ("lm_loss_stderr", pa.float64()),  # nats per token; over windows
    ("losses", pa.list_(pa.float64())),  # of every validation window
    ("seconds", pa.float64()),  # of training and scoring since the trial began
])  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All that decides a number; its content id names the folder that resumes."""

    config: dict[str, Any]
    kept: float  # of the teacher's parameters
    tokens: int  # of a student
    precision: Precision

    def read(self) -> Config:
        return parse_config(self.config)


def milestones(tokens: int) -> tuple[int, ...]:
    return tuple(round(share * tokens) for share in MILESTONES)


def losses_of(model: Any, windows: np.ndarray, resolved: Precision) -> np.ndarray:
    with autocast(resolved, model.device):
        return lm_loss(model.eval(), windows)


# Once: the text, the corrected teacher, both permuted, their answers


def prepare(plan: Plan, work: Path, threads: int) -> None:
    """Everything that trials read; each part is made unless it is there."""
    torch.set_num_threads(threads)
    config, model = plan.read(), plan.config["teacher"]["model"]
    original = teacher_folder(model)
    if not (work / "text.npz").exists():
        corpus = load_corpus(
            config.corpus.train, config.corpus.validation, load_tokenizer(model),
            sequence_length=config.corpus.sequence_length, calibration_samples=config.corpus.calibration_samples,
            validation_samples=config.corpus.validation_samples, seed=config.seed,
            train_tokens=max(plan.tokens, config.retraining.tokens),
        )  # fmt: skip
        np.savez(work / ".text.npz", calibration=corpus.calibration, train=corpus.train, validation=corpus.validation)
        os.rename(work / ".text.npz", work / "text.npz")
    text = np.load(work / "text.npz")
    if not (work / "corrected").exists():
        correct(plan, original, text, work, threads)
    for name, source in (("original", original), ("corrected", work / "corrected")):
        permuted = work / "permuted"
        if not (permuted / f"{name}-{name}").exists():
            print(f"importance of the {name} teacher", flush=True)
            teacher = on_device(AutoModelForCausalLM.from_pretrained(source, dtype="auto")).eval()
            found = measure(
                teacher, text["calibration"], ImportanceConfig(), seed=config.seed, precision=plan.precision
            )
            rankings = found.rankings(whole(teacher.config).num_key_value_heads)
            if name == "original":  # with it the corrected teacher lines up with the student of the original
                permute_teacher(work / "corrected", rankings, permuted / "corrected-original")
            permute_teacher(source, rankings, permuted / f"{name}-{name}")
    for arm in ARMS.values():
        if arm.taught != "parallel":
            answers(plan, work, arm)


def correct(plan: Plan, original: Path, text: Any, work: Path, threads: int) -> None:
    """Write `corrected/`, whole or not at all; one that was cut off goes on."""
    config = plan.read()
    asked = correction(config)
    assert asked is not None
    settings = replace(correction_settings(config, asked, plan.precision), milestones=(), threads=threads)
    print(f"correction: {asked.method}, {settings.total_tokens:,} tokens, {asdict(asked)}", flush=True)
    teacher, began = on_device(float32_of(original)), time.monotonic()
    before = losses_of(teacher, text["validation"], plan.precision)
    kept = CheckpointFolder(work / "correction")
    trained = train(
        trainable(teacher, asked.method, asked.seed), text["train"], settings, None,
        log=lambda step: print(f"  {step['tokens']:,.0f} tokens, LM loss {step['lm_loss']:.3f}", flush=True),
        checkpoints=kept, resume=kept.latest(),
    )  # fmt: skip
    teacher = merged(teacher)
    after = losses_of(teacher, text["validation"], plan.precision)
    about = {"before": before.tolist(), "after": after.tolist(), "tokens": trained.tokens,
             "train_seconds": trained.seconds, "seconds": time.monotonic() - began}  # fmt: skip
    files = {**teacher_files(original).contents, "correction.json": json.dumps(about).encode()}
    write_folder(teacher, files, work / "corrected")


def answers(plan: Plan, work: Path, arm: Kind) -> Path:
    """The cache of what the teacher of `arm` says of the training windows."""
    folder, windows = work / "permuted" / f"{arm.taught}-{arm.pruned}", np.load(work / "text.npz")["train"]
    dims = sizes(AutoConfig.from_pretrained(folder))
    asked = Request(fingerprint(folder), "teacher_correction", windows, plan.precision, dims["hidden"], dims["vocab"])
    return ensure(asked, in_this_process(asked, lambda: on_device(load_teacher(folder)))).path


# Every arm and seed: one student


def trial(plan: Plan, work: Path, arm: str, seed: int) -> None:
    """Distil one student and write its rows; in a process of its own, on one thread."""
    config, kind = plan.read(), ARMS[arm]
    text, began = np.load(work / "text.npz"), time.monotonic()
    cut_from = work / "permuted" / f"{kind.pruned}-{kind.pruned}"
    shape = shape_within(AutoConfig.from_pretrained(cut_from), plan.kept * params_of(cut_from))
    settings = replace(
        retraining_settings(config, plan.precision), total_tokens=plan.tokens, milestones=milestones(plan.tokens),
        seed=seed, checkpoint_tokens=None, threads=1,
    )  # fmt: skip
    torch.set_num_threads(1)
    if kind.taught == "parallel":
        asked = correction(config)
        assert asked is not None
        model = trainable(on_device(float32_of(cut_from)), asked.method, asked.seed)
        windows = -(-settings.batch_tokens // text["train"].shape[1])
        steps = -(-settings.total_tokens // (windows * text["train"].shape[1]))
        live = live_teacher(model, plan.precision)
        teacher = correcting_teacher(live, model, asked.loop_settings(settings), share=windows, steps=steps)
    else:
        taught = work / "permuted" / f"{kind.taught}-{kind.pruned}"
        teacher = cached_teacher(answers(plan, work, kind), output_head(taught), plan.precision)
    rows: list[dict[str, Any]] = []

    def score(milestone: Milestone) -> None:
        losses = losses_of(milestone.student, text["validation"], plan.precision)
        mean, stderr, _ = mean_and_error(losses)
        row = {"arm": arm, "seed": seed, "tokens": milestone.tokens_seen, "lm_loss": mean, "lm_loss_stderr": stderr}
        rows.append({**row, "losses": losses.tolist(), "seconds": time.monotonic() - began})
        print(f"{arm}, seed {seed}: {milestone.tokens_seen:,} tokens, LM loss {mean:.4f}", flush=True)

    train(on_device(trim(cut_from, shape)), text["train"], settings, teacher, on_milestone=score)
    replace_text(row_file(work, arm, seed), json.dumps(rows))
    release_memory()


def row_file(work: Path, arm: str, seed: int) -> Path:
    return work / "rows" / f"{arm}-{seed}.json"


def params_of(folder: Path) -> int:
    config = AutoConfig.from_pretrained(folder)
    return parameter_count(weights(config), sizes(config))


# What it shows


class Curve(NamedTuple):
    """tokens: (milestones,). losses: (seeds, milestones, windows), nats per token."""

    tokens: np.ndarray
    losses: np.ndarray

    def over_seeds(self) -> np.ndarray:
        """Standard error, over seeds, of the mean over windows: (milestones,); nan of one seed."""
        return np.array([mean_and_error(of_seed)[1] for of_seed in self.losses.mean(2).T])

    def over_windows(self) -> np.ndarray:
        """Standard error, over windows, of the mean over seeds: (milestones,)."""
        return np.array([mean_and_error(of_window)[1] for of_window in self.losses.mean(0)])


def curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    found = {}
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if mine:
            tokens = sorted({row["tokens"] for row in mine})
            losses = {(row["seed"], row["tokens"]): row["losses"] for row in mine}
            seeds = sorted({row["seed"] for row in mine})
            found[arm] = Curve(np.array(tokens), np.array([[losses[seed, at] for at in tokens] for seed in seeds]))
    return found


def minus(one: Curve, other: Curve) -> Curve:
    """Paired: the same windows, and the same order of the text for every seed."""
    return Curve(one.tokens, one.losses - other.losses)


def figure(found: dict[str, Curve], teachers: dict[str, float]) -> go.Figure:
    """Above, the curves; below, each minus `original`. Bands of one standard error: dark over seeds, light over
    windows."""
    made = palette.new_figure(760)
    made.update_layout(
        grid={"rows": 2, "columns": 1, "subplots": [["xy"], ["xy2"]], "ygap": 0.12},
        xaxis={"title": {"text": "tokens distilled on"}},
        yaxis={"title": {"text": "validation LM loss<br>(nats per token)"}},
        yaxis2={"title": {"text": "minus the original teacher's<br>(nats per token, paired)"}},
    )
    for arm, curve in found.items():
        for axis, shown in (("y", curve), *((("y2", minus(curve, found["original"])),) if arm != "original" else ())):
            mean = shown.losses.mean((0, 2))
            for error, opacity in ((shown.over_windows(), 0.12), (shown.over_seeds(), 0.3)):
                error = np.nan_to_num(error)
                made.add_scatter(
                    x=[*shown.tokens, *shown.tokens[::-1]], y=[*(mean + error), *(mean - error)[::-1]], yaxis=axis,
                    fill="toself", fillcolor=ARMS[arm].colour, opacity=opacity, mode="none", hoverinfo="skip",
                    showlegend=False, legendgroup=arm,
                )  # fmt: skip
            made.add_scatter(
                x=shown.tokens, y=mean, yaxis=axis, mode="lines+markers", line={"color": ARMS[arm].colour, "width": 2},
                name=ARMS[arm].title, legendgroup=arm, showlegend=axis == "y",
                text=[f"± {s:.3f} over {len(shown.losses)} seeds, ± {w:.3f} over {shown.losses.shape[2]} windows"
                      for s, w in zip(shown.over_seeds(), shown.over_windows(), strict=True)],
                hovertemplate="%{x:,} tokens: %{y:.3f}<br>%{text}<extra>" + ARMS[arm].title + "</extra>",
            )  # fmt: skip
    for name, loss in teachers.items():
        made.add_shape(type="line", xref="x domain", x0=0, x1=1, y0=loss, y1=loss,
                       line={"color": palette.INK, "width": 1, "dash": "dot"})  # fmt: skip
        made.add_annotation(xref="x domain", x=1, xanchor="right", y=loss, yanchor="bottom", showarrow=False,
                            text=f"{name} teacher {loss:.3f}", font={"size": 12, "color": palette.INK})  # fmt: skip
    made.add_shape(type="line", xref="x domain", x0=0, x1=1, yref="y2", y0=0, y1=0,
                   line={"color": palette.MUTED, "width": 1, "dash": "dot"})  # fmt: skip
    return made


def table(found: dict[str, Curve], about: dict[str, Any], description: str) -> str:
    """Markdown. A difference is at the last milestone; its first error is over seeds, its second over windows, p is
    Fisher's randomisation over windows."""
    measured = {"original": about["before"], "corrected": about["after"]}
    teachers = {name: mean_and_error(np.array(losses)) for name, losses in measured.items()}
    lines = [
        description,
        "",
        "| | LM loss untrained | LM loss after | error over seeds | over windows | minus the original | p |",
        "|---|---|---|---|---|---|---|",
        *(f"| the {name} teacher | | {mean:.3f} | | {error:.3f} | | |" for name, (mean, error, _) in teachers.items()),
    ]
    for arm, curve in found.items():
        first, last = (curve.losses[:, place].mean() for place in (0, -1))
        versus, p = "", ""
        if arm != "original":
            difference = minus(curve, found["original"])
            versus = (f"{difference.losses[:, -1].mean():+.3f} +- {difference.over_seeds()[-1]:.3f} (seeds) "
                      f"+- {difference.over_windows()[-1]:.3f} (windows)")  # fmt: skip
            p = f"{paired(found['original'].losses[:, -1].mean(0), curve.losses[:, -1].mean(0))['p']:.2g}"
        lines.append(f"| {ARMS[arm].title} | {first:.3f} | {last:.3f} | {curve.over_seeds()[-1]:.3f} "
                     f"| {curve.over_windows()[-1]:.3f} | {versus} | {p} |")  # fmt: skip
    return "\n".join(lines)


def report(plan: Plan, work: Path, rows: list[dict[str, Any]], output: Path) -> None:
    about, found = json.loads((work / "corrected" / "correction.json").read_text()), curves(rows)
    teachers = {"original": float(np.mean(about["before"])), "corrected": float(np.mean(about["after"]))}
    parent, config = work.parent, plan.read()
    write_table(parent / "teacher_correction.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    figure(found, teachers).write_html(parent / "teacher_correction.html", include_plotlyjs=True)
    folder = work / "permuted" / "original-original"
    teacher = AutoConfig.from_pretrained(folder)
    shape = shape_within(teacher, plan.kept * params_of(folder))
    asked, size = correction(config), parameter_count(weights(teacher), sizes_of(teacher, shape))
    assert asked is not None
    seconds = sum(max(row["seconds"] for row in rows if (row["arm"], row["seed"]) == done)
                  for done in {(row["arm"], row["seed"]) for row in rows})  # fmt: skip
    seeds = len(next(iter(found.values())).losses)
    last = next(iter(found.values())).tokens[-1]
    section = table(found, about, (
        f"`python -m benchmarks.teacher_correction`: {config.teacher.model}, a student of {size / 1e6:.1f}M parameters "
        f"(hidden_size {shape.hidden_size}, intermediate_size {shape.intermediate_size}), distilled on {last:,} tokens "
        f"of `{Path(config.corpus.train).name}` with each of {seeds} seeds; the teacher corrected on "
        f"{about['tokens']:,} tokens of the same text ({asked.method}, peak learning rate {asked.learning_rate:g}). "
        f"Validation: {config.corpus.validation_samples} windows of `{Path(config.corpus.validation).name}`, "
        f"{plan.precision}. Cost: the correction {about['seconds'] / 60:.1f} minutes, the students "
        f"{seconds / 60:.0f} minutes of one thread each."
    ))  # fmt: skip
    print(section)
    text = output.read_text() if output.exists() else "# Results\n"
    replace_text(output, replaced(text, section, "teacher_correction", "Teacher correction"))
    print(f"{parent / 'teacher_correction.html'}, {parent / 'teacher_correction.parquet'}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", default="docstrings")
    parser.add_argument("--validation", help="the same text as --train, other windows, unless given")
    parser.add_argument("--arms", nargs="+", default=["original", "corrected", "taught"], choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", default="24K", help="of every student")
    parser.add_argument("--correction-tokens", default="32K")
    parser.add_argument("--correction-learning-rate", default="auto", help="auto: a fifth of --learning-rate")
    parser.add_argument("--method", default="full", choices=["full", "lora", "norms"])
    parser.add_argument("--learning-rate", default="3e-4", help="of the students, at its peak")
    parser.add_argument("--batch-tokens", default="1K")
    parser.add_argument("--kept", type=float, default=0.67, help="share of the teacher's parameters")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=32, help="validation windows")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="students at once, a thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/teacher_correction"))
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    chosen = parser.parse_args(arguments)
    config = parse_config({
        "teacher": {"model": chosen.model, "correction": {
            "method": chosen.method, "tokens": chosen.correction_tokens,
            "learning_rate": chosen.correction_learning_rate}},
        "corpus": {"train": chosen.train, "validation": chosen.validation or chosen.train,
                   "sequence_length": chosen.length, "calibration_samples": chosen.samples,
                   "validation_samples": chosen.windows},
        "distillation": {"batch_tokens": chosen.batch_tokens},
        "retraining": {"tokens": chosen.tokens, "learning_rate": chosen.learning_rate},
    })  # fmt: skip
    plan = Plan(config.dump(), chosen.kept, config.retraining.tokens, device.resolve(chosen.precision))
    work = chosen.work.absolute() / content_id(asdict(plan))
    (work / "rows").mkdir(parents=True, exist_ok=True)
    arms = ["original", *(arm for arm in ARMS if arm in chosen.arms and arm != "original")]
    left = [(arm, seed) for seed in chosen.seeds for arm in arms if not row_file(work, arm, seed).exists()]
    if left:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as once:  # gives its memory back before the students begin
            once.submit(prepare, plan, work, chosen.at_once).result()
        with ProcessPoolExecutor(chosen.at_once, context) as pool:
            for job in [pool.submit(trial, plan, work, arm, seed) for arm, seed in left]:
                job.result()
    rows = [row for arm in arms for seed in chosen.seeds
            for row in json.loads(row_file(work, arm, seed).read_text())]  # fmt: skip
    report(plan, work, rows, chosen.output)


if __name__ == "__main__":
    main()
