"""One trial, from trim to its last rung: written once, and placed by `launchers`."""

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from minitron_search.depth.layer_choice import merges_of
from minitron_search.distillation import checkpoints, loop, parallel
from minitron_search.distillation.correction import correcting_teacher, float32_of, trainable
from minitron_search.distillation.loop import Milestone
from minitron_search.distillation.settings import Correction, LoopSettings, method_of
from minitron_search.distillation.teacher import Teacher, cached_teacher, live_teacher
from minitron_search.distillation.teacher_cache import CacheReader
from minitron_search.distillation.training_log import DivergedError
from minitron_search.evaluation.scoring import Scored, score, throughput
from minitron_search.losses.intermediate import state_map
from minitron_search.models.device import device, on_device
from minitron_search.models.loading import load_teacher, random_student, reader
from minitron_search.models.output_head import OutputHead, load_head
from minitron_search.pruning.laco import merged_model
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import as_views, trim
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.trial import Trial


def run_trial(
    materials: TrialInputs,
    trial: Trial,
    *,
    decided: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> PreTrainedModel:
    """Trim, distil to each milestone; there score and log the row. Returns the student.

    With `decided` the search says at every rung but the last whether to go on. A trial that was cut off goes on
    from its last checkpoint; a rung that is already in its log is not computed again. A rung at 0 tokens comes before
    the teacher and the optimizer: most trials end there.
    """
    run, settings = materials.run, trial.settings
    assert settings.threads is not None
    torch.set_num_threads(settings.threads)  # scoring too: how sums are split over threads decides their rounding
    logged = {row["rung"] for row in run.metrics(trial.id) if row["kind"] == "rung"}
    folder = run.checkpoint(trial.id)
    resume = checkpoints.latest_checkpoint(folder, run.depot)
    if world_size > 1:
        logged, resume = parallel.agreed((logged, resume))
        if resume is not None and run.depot is not None:
            run.depot.fetch(resume)
    began = time.monotonic()

    def reached(milestone: Milestone) -> bool:
        nonlocal began
        rung = settings.milestones.index(milestone.tokens)
        if rung not in logged:
            with ThreadPoolExecutor(1) as writer:  # a checkpoint is written while the student is scored
                if milestone.step > 0:
                    saving = writer.submit(milestone.save, folder / f"step-{milestone.step:08d}")
                if rank == 0:
                    assert milestone.student is not None
                    scored = score_student(materials, milestone.student, trial)
                    columns = columns_of(materials, milestone.student, trial, scored)
                if milestone.step > 0:
                    saving.result()
            if rank == 0:
                row = {
                    **trial.columns(),
                    **columns,
                    "rung": rung,
                    "tokens": milestone.tokens_seen,
                    "seconds": time.monotonic() - began,
                }
                run.log_scores(
                    trial.id, rung, lm_loss=scored.by_window.tolist(), kl=scored.kl_by_window.tolist(),
                    winogrande_correct=scored.correct.tolist(), winogrande_margin=scored.margin.tolist(),
                    winogrande_twin=materials.packed.twin.tolist(),
                )  # fmt: skip
                run.log_rung(trial.id, row)
            if rank == 0 or (run.depot is not None and parallel.leads_node()):
                checkpoints.keep_newest(folder, run.depot if rank == 0 else None)
            logged.add(rung)
        last = rung == len(settings.milestones) - 1
        go_on = last or not decided or wait_for_decision(run, trial.id, rung)
        began = time.monotonic()
        return go_on

    if settings.milestones[0] == 0 and resume is None and not method_of(trial.initialization):
        as_it_is = on_device(initial_student(materials, trial, trains=False)).eval()
        if not reached(Milestone(0, 0, 0, as_it_is, lambda folder: None)) or settings.total_tokens == 0:
            return as_it_is
        del as_it_is
    student, shards = initial_student(materials, trial), settings.shards(world_size)
    if not shards:  # else its layers move one by one
        student = on_device(student)
    loop.train(
        student,
        materials.train,
        settings,
        teacher_of(materials, trial, world_size),
        on_milestone=reached,
        log=lambda record: run.log_step(trial.id, **record),
        checkpoint_folder=folder,
        depot=run.depot,
        resume=resume,
        world_size=world_size,
        rank=rank,
    )
    return student.eval()


def run_to_end(
    materials: TrialInputs, trial: Trial, *, decided: bool = True, rank: int = 0, world_size: int = 1
) -> None:
    """`run_trial`; one whose loss diverges has failed and says so. It is not started again: it would only repeat it."""
    try:
        run_trial(materials, trial, decided=decided, rank=rank, world_size=world_size)
    except DivergedError as error:
        if rank == 0:
            materials.run.event("trial_failed", trial=trial.id, message=str(error))


def wait_for_decision(run: RunDirectory, trial: str, rung: int) -> bool:
    """Whether the search lets `trial` train past `rung`. Blocks until it has said so: a trial that the search
    stops has then trained exactly as far as its last row, whatever the timing."""
    began = time.monotonic()
    while rung not in run.decisions(trial):
        time.sleep(run.files.poll_s(time.monotonic() - began))
    return run.decisions(trial)[rung]["decision"] == "continue"


def initial_student(materials: TrialInputs, trial: Trial, *, trains: bool = True) -> PreTrainedModel:
    """Figure 6's starting points: pruned by importance, pruned at random, or random weights; or layers merged by LaCo.
    A trial that corrects the teacher starts with the teacher itself. One that does not train is not to be written
    to."""
    folder = materials.teacher_folder
    if method := method_of(trial.initialization):
        return trainable(float32_of(folder), method, trial.seed)
    if trial.initialization == "random":
        return random_student(AutoConfig.from_pretrained(folder), trial.architecture, trial.seed)
    if trial.initialization == "merged":
        merged, config = merges_of(materials.merges, trial.architecture.layers), AutoConfig.from_pretrained(folder)
        return merged_model(reader(folder), config, trial.architecture, merged)
    rankings = None
    if trial.initialization == "random_pruned":
        rankings = Rankings.random(AutoConfig.from_pretrained(folder), trial.seed)
    elif not trains and is_float32(folder):
        return as_views(folder, trial.architecture)
    return trim(folder, trial.architecture, rankings)


def is_float32(folder: Path) -> bool:
    """Whether a model is stored in the dtype of students, float32 whatever the dtype of the products: the norms and the
    residual stream of a bfloat16 model round where a student's do not."""
    return AutoConfig.from_pretrained(folder).dtype == torch.float32


def teacher_of(materials: TrialInputs, trial: Trial, world_size: int = 1) -> Teacher | None:
    settings, states = trial.settings, None
    if not settings.asks_teacher:
        return None
    if settings.intermediate:
        depth = len(materials.block_bi) - 1
        states = state_map(trial.architecture.layers, depth, settings.intermediate_layers, settings.embedding)
    if materials.parallel is not None:
        return corrected_meanwhile(materials, materials.parallel, settings, states, world_size)
    if materials.train_cache is None and settings.shards(world_size):
        sharded = parallel.sharded_teacher(load_teacher(materials.compute_folder))
        return live_teacher(sharded, settings.precision, states)
    if materials.train_cache is None:
        return live_teacher(on_device(load_teacher(materials.compute_folder)), settings.precision, states)
    return cached_teacher(materials.train_cache, teacher_head(materials), settings.precision)


def corrected_meanwhile(
    materials: TrialInputs, correction: Correction, settings: LoopSettings, states: Mapping[int, int] | None,
    world_size: int,
) -> Teacher:  # fmt: skip
    assert materials.parallel_folder is not None
    model = trainable(on_device(float32_of(materials.parallel_folder)), correction.method, correction.seed)
    length = materials.train.shape[1]
    batch = math.ceil(settings.batch_tokens / length)
    return correcting_teacher(
        live_teacher(model, settings.precision, states),
        model,
        correction.settings(settings),
        share=batch // world_size,
        steps=math.ceil(settings.total_tokens / (batch * length)),
        world_size=world_size,
    )


def teacher_head(materials: TrialInputs) -> OutputHead:
    head = load_head(materials.compute_folder)
    return head._replace(weight=head.weight.to(device()))


def score_student(materials: TrialInputs, student: PreTrainedModel, trial: Trial) -> Scored:
    student.eval()
    reader = CacheReader(materials.validation_cache)
    everything = np.arange(len(materials.validation))
    return score(
        student,
        materials.validation,
        reader.hidden(everything, materials.validation),
        teacher_head(materials),
        materials.packed,
        trial.score_precision,
    )


def columns_of(materials: TrialInputs, student: PreTrainedModel, trial: Trial, scored: Scored) -> dict[str, Any]:
    """The columns of `Score`, `bi` (the teacher's block importance of the block this architecture drops, None where
    what it drops is no block) and `tokens_per_second` of a forward pass in the run's own precision, whatever the
    score's."""
    block = trial.architecture.dropped_block(len(materials.block_bi) - 1)
    return {
        **asdict(scored.score),
        "bi": None if block is None else float(materials.block_bi[block[0], sum(block)]),
        "tokens_per_second": throughput(student, materials.validation, materials.precision),
    }
