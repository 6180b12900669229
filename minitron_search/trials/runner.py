"""One trial, from trim to its last rung: written once, and placed by `cluster.launchers`."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from minitron_search.checkpoints.safe_reading import DamagedError
from minitron_search.depth.layer_choice import merges_of
from minitron_search.distillation import loop, parallel
from minitron_search.distillation.batches import batch_plan
from minitron_search.distillation.checkpoints import CheckpointFolder
from minitron_search.distillation.correction import correcting_teacher, float32_of, trainable
from minitron_search.distillation.loop import Milestone
from minitron_search.distillation.parallel import Processes
from minitron_search.distillation.settings import CorrectionSettings, LoopSettings, method_of
from minitron_search.distillation.teacher import TeacherSource, cached_teacher, live_teacher
from minitron_search.distillation.teacher_cache import CacheReader
from minitron_search.distillation.training_log import DivergedError
from minitron_search.evaluation.scoring import Scored, score
from minitron_search.losses.intermediate import state_map
from minitron_search.models.device import device, on_device
from minitron_search.models.loading import load_teacher, random_student, reader
from minitron_search.models.output_head import OutputHead, output_head
from minitron_search.pruning.laco import merged_model
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import as_views, trim
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.trial import Trial


def run_trial(
    inputs: TrialInputs, trial: Trial, *, decided: bool = True, processes: Processes = parallel.ALONE
) -> PreTrainedModel:
    """Trim, distil to each milestone, where the student is scored and its row logged; return the student.

    With `decided` the search says at every rung but the last whether to go on. A trial that was cut off goes on
    from its last checkpoint; a rung that is already in its log is not computed again. A rung at 0 tokens comes before
    the teacher and the optimizer: most trials end there. Called by every one of `processes`.

    Raises ValueError and DivergedError as `loop.train` does.
    """
    assert trial.settings.threads is not None
    # for scoring too: how sums are split over threads decides their rounding
    torch.set_num_threads(trial.settings.threads)
    run = _TrialRun(inputs, trial, decided, processes)
    if run.begins_untrained:
        student = on_device(initial_student(inputs, trial, trains=False)).eval()
        goes_on = run.reach(Milestone(0, 0, 0, student, lambda folder: None))
        if not goes_on or trial.settings.total_tokens == 0:
            return student
        del student
    return run.distil()


class _TrialRun:
    """One trial in one process: what it has logged, where its checkpoints are, and the steps between rungs."""

    def __init__(self, inputs: TrialInputs, trial: Trial, decided: bool, processes: Processes) -> None:
        self.inputs, self.trial, self.decided, self.processes = inputs, trial, decided, processes
        self.run_dir = inputs.run_dir
        run_dir = self.run_dir
        self.checkpoints = CheckpointFolder(run_dir.checkpoint(trial.id), run_dir.transfer, run_dir.files)
        self.logged = {row["rung"] for row in self.run_dir.metrics(trial.id) if row["kind"] == "rung"}
        if processes.world_size > 1:
            self.logged = parallel.agreed(self.logged)
        self.resume = self._latest()
        self.began = time.monotonic()  # this rung's seconds

    def _latest(self) -> Path | None:
        """Return the newest checkpoint, the same in every process, and on this node."""
        latest = self.checkpoints.latest()
        if self.processes.world_size > 1:
            latest = parallel.agreed(latest)
            if latest is not None and self.run_dir.transfer is not None:
                self.run_dir.transfer.fetch(latest)
        return latest

    @property
    def begins_untrained(self) -> bool:
        """Return whether a rung at 0 tokens comes first, of a student and not of a teacher that is corrected."""
        corrects = method_of(self.trial.initialization) is not None
        return self.trial.settings.milestones[0] == 0 and self.resume is None and not corrects

    def distil(self) -> PreTrainedModel:
        """Train from the trim or the last checkpoint to the last rung, or to where the search stops the trial.

        A checkpoint that is damaged is set aside for the one before, and if there is none for the trim: what is trained
        again gives the same numbers, and a rung that was logged is not logged again.
        """
        while True:
            try:
                return self._train()
            except DamagedError as error:
                assert self.resume is not None
                self._give_up(self.resume, error)

    def _give_up(self, damaged: Path, error: DamagedError) -> None:
        """Set a checkpoint aside, and say so in an event."""
        self.checkpoints.set_aside(damaged, self.processes.rank)
        if self.processes.world_size > 1:
            parallel.agreed(None)  # no process looks for the one before until it is gone
        self.resume = self._latest()
        if self.processes.rank == 0:
            goes_on = self.resume.name if self.resume is not None else "the trim"
            self.run_dir.event("checkpoint_damaged", trial=self.trial.id, message=f"{error}; goes on from {goes_on}")

    def _train(self) -> PreTrainedModel:
        inputs, trial = self.inputs, self.trial
        student = initial_student(inputs, trial)
        if not trial.settings.shards(self.processes.world_size):  # else its layers move one by one
            student = on_device(student)
        loop.train(
            student,
            inputs.train,
            trial.settings,
            teacher_of(inputs, trial, self.processes.world_size),
            on_milestone=self.reach,
            log=lambda record: self.run_dir.log_step(trial.id, **record),
            checkpoints=self.checkpoints,
            resume=self.resume,
            processes=self.processes,
        )
        return student.eval()

    def reach(self, milestone: Milestone) -> bool:
        """Score the student and log its rung, unless that was done before; return whether to train on."""
        rung = self.trial.settings.milestones.index(milestone.tokens)
        if rung not in self.logged:
            self._finish_rung(rung, milestone)
        elif not self.decided and milestone.step > 0:  # freed when its student was written, which is lost since
            milestone.save(self.checkpoints.at(milestone.step))
        last = rung == len(self.trial.settings.milestones) - 1
        goes_on = last or not self.decided or wait_for_decision(self.run_dir, self.trial.id, rung)
        self.began = time.monotonic()
        return goes_on

    def _finish_rung(self, rung: int, milestone: Milestone) -> None:
        with ThreadPoolExecutor(1) as writer:  # a checkpoint is written while the student is scored
            if milestone.step > 0:
                saving = writer.submit(milestone.save, self.checkpoints.at(milestone.step))
            if self.processes.rank == 0:
                assert milestone.student is not None
                if self.trial.stored != "float32" and rung == len(self.trial.settings.milestones) - 1:
                    if milestone.step > 0:
                        saving.result()  # the checkpoint keeps every bit
                    round_weights(milestone.student, self.trial.stored)
                scored = score_student(self.inputs, milestone.student, self.trial)
                columns = columns_of(self.inputs, self.trial, scored)
            if milestone.step > 0:
                saving.result()
        if self.processes.rank == 0:
            self._log_rung(rung, milestone.tokens_seen, scored, columns)
        self.checkpoints.keep_newest(self.processes.rank)
        self.logged.add(rung)

    def _log_rung(self, rung: int, tokens: int, scored: Scored, columns: dict[str, Any]) -> None:
        row = {
            **self.trial.columns(),
            **columns,
            "rung": rung,
            "tokens": tokens,
            "seconds": time.monotonic() - self.began,
        }
        self.run_dir.log_scores(
            self.trial.id, rung, lm_loss=scored.by_window.tolist(), kl=scored.kl_by_window.tolist(),
            winogrande_correct=scored.correct.tolist(), winogrande_margin=scored.margin.tolist(),
            winogrande_twin=self.inputs.packed.twin.tolist(),
        )  # fmt: skip
        self.run_dir.log_rung(self.trial.id, row)


@torch.no_grad()
def round_weights(student: PreTrainedModel, dtype: str) -> None:
    """Round the weights of a student, in place, to what is left of them in another dtype."""
    for parameter in student.parameters():
        parameter.copy_(parameter.to(getattr(torch, dtype)))


def run_to_end(inputs: TrialInputs, trial: Trial, *, decided: bool = True, rank: int = 0, world_size: int = 1) -> None:
    """Run a trial; where its loss diverges, record that it has failed. It is not started again: it would only repeat
    itself."""
    try:
        run_trial(inputs, trial, decided=decided, processes=Processes(world_size, rank))
    except DivergedError as error:
        if rank == 0:
            inputs.run_dir.event("trial_failed", trial=trial.id, message=str(error))


def score_now(inputs: TrialInputs, trial: Trial) -> None:
    """Score a trial that does not train, in this process, unless it has been scored."""
    if not any(row["kind"] == "rung" for row in inputs.run_dir.metrics(trial.id)):
        run_trial(inputs, trial, decided=False)


def wait_for_decision(run_dir: RunDirectory, trial: str, rung: int) -> bool:
    """Return whether the search lets `trial` train past `rung`. Blocks until it has said so: a trial that the search
    stops has then trained exactly as far as its last row, whatever the timing."""
    began = time.monotonic()
    while rung not in run_dir.decisions(trial):
        time.sleep(run_dir.files.poll_s(time.monotonic() - began))
    return run_dir.decisions(trial)[rung]["decision"] == "continue"


def initial_student(inputs: TrialInputs, trial: Trial, *, trains: bool = True) -> PreTrainedModel:
    """Return the student that a trial starts with, in host memory; unless it `trains` it must not be written to.

    Pruned by importance, pruned at random, or random weights (2408.11796, Figure 6); or its layers merged by LaCo. A
    trial that corrects the teacher starts with the teacher itself.
    """
    folder = inputs.teacher_folder
    if method := method_of(trial.initialization):
        return trainable(float32_of(folder), method, trial.seed)
    if trial.initialization == "random":
        return random_student(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), trial.architecture, trial.seed
        )
    if trial.initialization == "merged":
        merged, config = (
            merges_of(inputs.merges, trial.architecture.layers),
            AutoConfig.from_pretrained(folder, trust_remote_code=False),
        )
        return merged_model(reader(folder), config, trial.architecture, merged)
    rankings = None
    if trial.initialization == "random_pruned":
        rankings = Rankings.random(AutoConfig.from_pretrained(folder, trust_remote_code=False), trial.seed)
    elif not trains and is_float32(folder):
        return as_views(folder, trial.architecture)
    return trim(folder, trial.architecture, rankings)


def is_float32(folder: Path) -> bool:
    """Return whether a model is stored in the dtype of students, float32 whatever the dtype of the products: the norms
    and the residual stream of a bfloat16 model round where a student's do not."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype == torch.float32


def teacher_of(inputs: TrialInputs, trial: Trial, world_size: int = 1) -> TeacherSource | None:
    """Return what the trial's student is distilled from: the cache, the teacher itself, or one that is corrected
    meanwhile; None for the loss `ce`."""
    settings, states = trial.settings, None
    if not settings.asks_teacher:
        return None
    if settings.intermediate:
        depth = len(inputs.block_bi) - 1
        states = state_map(trial.architecture.layers, depth, settings.intermediate_layers, settings.embedding)
    if inputs.parallel is not None:
        return corrected_meanwhile(inputs, inputs.parallel, settings, states, world_size)
    if inputs.train_cache is None and settings.shards(world_size):
        sharded = parallel.sharded_teacher(load_teacher(inputs.compute_folder))
        return live_teacher(sharded, settings.precision, states)
    if inputs.train_cache is None:
        return live_teacher(on_device(load_teacher(inputs.compute_folder)), settings.precision, states)
    return cached_teacher(inputs.train_cache, teacher_head(inputs), settings.precision)


def corrected_meanwhile(
    inputs: TrialInputs, correction: CorrectionSettings, settings: LoopSettings, states: Mapping[int, int] | None,
    world_size: int,
) -> TeacherSource:  # fmt: skip
    """Return a live teacher that takes a step of its own on every batch (2408.11796, Figure 5)."""
    assert inputs.parallel_folder is not None
    model = trainable(on_device(float32_of(inputs.parallel_folder)), correction.method, correction.seed)
    plan = batch_plan(settings, inputs.train.shape[1], world_size)
    return correcting_teacher(
        live_teacher(model, settings.precision, states),
        model,
        correction.loop_settings(settings),
        share=plan.share,
        steps=plan.steps,
        world_size=world_size,
    )


def teacher_head(inputs: TrialInputs) -> OutputHead:
    """Load the head of the model that teaches, on the device of the run."""
    head = output_head(inputs.compute_folder)
    return head._replace(weight=head.weight.to(device()))


def score_student(inputs: TrialInputs, student: PreTrainedModel, trial: Trial) -> Scored:
    """Score the student on the validation windows and on Winogrande, in the trial's score precision."""
    student.eval()
    cache = CacheReader(inputs.validation_cache)
    return score(
        student,
        inputs.validation,
        cache.hidden(np.arange(len(inputs.validation)), inputs.validation),
        teacher_head(inputs),
        inputs.packed,
        trial.score_precision,
    )


def columns_of(inputs: TrialInputs, trial: Trial, scored: Scored) -> dict[str, Any]:
    """Return the columns of `Score` and `bi`.

    bi: the teacher's block importance of the block that this architecture drops; None where it drops no block.
    """
    block = trial.architecture.dropped_block(len(inputs.block_bi) - 1)
    return {
        **asdict(scored.score),
        "bi": None if block is None else float(inputs.block_bi[block[0], sum(block)]),
    }
