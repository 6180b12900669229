"""The one configuration, and the checks that concern several of its sections.

Numbers may be written as people write them: `8K`, `90M`, `4.5B` (decimal suffixes), `1e-4`. Every error names
the key, the value given and what would have been valid.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from minitron_search.config.inputs import (
    CorpusConfig,
    DepthConfig,
    ImportanceConfig,
    Section,
    TeacherConfig,
    WinograndeConfig,
)
from minitron_search.config.space import SpaceConfig
from minitron_search.config.training import (
    DistillationConfig,
    EvaluationConfig,
    ResourcesConfig,
    RetrainingConfig,
    SearchConfig,
)
from minitron_search.config.types import Seed, Text, as_list, in_one_line
from minitron_search.records.paths import SCHEMES, located

MOST_NAME = 80  # characters of a name that is derived


def name_after(model: str) -> str:
    """Return a run's name for a model: the last part of its Hub name, folder or address, as a file may be called.

    What a run calls its student (`best`) says nothing without the run: `tiny/best` is tiny-best. In the Hub's cache
    the last part is a revision: `models--Qwen--Qwen2.5-0.5B/snapshots/<revision>` is Qwen2.5-0.5B.
    """
    parts = [part for part in re.split(r"[/\\]+", model.partition("?")[0]) if part not in ("", ".", "..")]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    last = cached[-1] if cached else parts[-1] if parts else ""
    if not cached and len(parts) > 1 and re.fullmatch(r"best(-\d+)?", last):
        last = f"{parts[-2]}-{last}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:MOST_NAME].strip("-._") or "teacher"


class Config(Section):
    """Every key of a run, resolved and checked."""

    name: Annotated[Text, Field(coerce_numbers_to_str=True, max_length=200)] = "auto"
    """Name of the run, which output follows. auto: the last part of teacher.model."""
    output: Annotated[str, Field(coerce_numbers_to_str=True, max_length=4096)] = ""
    """Run directory: a folder, or an address in storage, as s3://bucket/run. Empty: runs/<name>."""
    seed: Seed = 0
    """Seed of proposals, of the order of the text, and of what has no seed of its own."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products. auto: bfloat16 where the hardware is faster at it, else float32."""
    stages: Annotated[
        tuple[Literal["importance", "depth", "search", "retrain", "report"], ...],
        BeforeValidator(as_list), Field(min_length=1),
    ] = ("importance", "search", "retrain", "report")  # fmt: skip
    """Which of importance, depth, search, retrain and report are run, always in that order."""
    teacher: TeacherConfig = TeacherConfig()
    corpus: CorpusConfig = CorpusConfig()
    winogrande: WinograndeConfig = WinograndeConfig()
    importance: ImportanceConfig = ImportanceConfig()
    depth: DepthConfig = DepthConfig()
    space: SpaceConfig = SpaceConfig()
    search: SearchConfig = SearchConfig()
    distillation: DistillationConfig = DistillationConfig()
    retraining: RetrainingConfig = RetrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    trackers: Annotated[tuple[Literal["wandb", "mlflow"], ...], BeforeValidator(as_list)] = ()
    """Where a run is tracked beside TensorBoard: wandb, mlflow (docs/tracking.md)."""

    @model_validator(mode="after")
    def _output_follows_name_and_name_the_teacher(self) -> "Config":
        if self.name == "auto":
            object.__setattr__(self, "name", name_after(self.teacher.model))
        if not self.output:
            object.__setattr__(self, "output", f"runs/{self.name}")
        try:
            object.__setattr__(self, "output", located(in_one_line(self.output)))
        except ValueError as error:
            raise ValueError(f"output: {self.output!r}: {error}") from None
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", self.output)
        if scheme and scheme[1] not in ("file", *SCHEMES):
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise ValueError(f"output: {self.output!r}: {scheme[1]} is not a file system that pyarrow knows; valid: a "
                             f"folder, as in runs/{self.name}, or {known}...")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _workers_share_a_batch_equally(self) -> "Config":
        length, workers = self.corpus.sequence_length, self.resources.workers_per_trial
        windows = math.ceil(self.distillation.batch_tokens / length)
        if windows % workers:
            valid = math.ceil(windows / workers) * workers * length
            raise ValueError(f"distillation.batch_tokens: {self.distillation.batch_tokens} is {windows} windows of "
                             f"{length} tokens, which {workers} workers cannot share equally; "
                             f"valid: {valid}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _a_trial_reaches_every_rung(self) -> "Config":
        length, tokens = self.corpus.sequence_length, self.search.tokens
        batch = math.ceil(self.distillation.batch_tokens / length) * length
        reached = [math.ceil(rung / batch) * batch for rung in self.search.rungs]
        if len(set(reached)) < len(reached):
            raise ValueError(f"search.rungs: {list(self.search.rungs)} are {reached} tokens in whole batches of "
                             f"{batch}; valid: {list(dict.fromkeys(reached))}, or a smaller "
                             "distillation.batch_tokens")  # fmt: skip
        least = reached[-1]
        if tokens != "auto" and tokens < least:
            raise ValueError(f"search.tokens: {tokens} for all trials, of which one alone takes {least}, in whole "
                             f"batches, to the last rung; valid: at least {least}, or auto")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "Config":
        """Refuse a warm-up that is longer than its training, if somebody set it: the default may be, of a short one."""
        length, retraining, correction = self.corpus.sequence_length, self.retraining, self.teacher.correction
        batch = math.ceil(self.distillation.batch_tokens / length) * length
        asked: list[tuple[str, int | str, int | str]] = []
        if (
            "retrain" in self.stages
            and retraining.warmup_steps != type(retraining).model_fields["warmup_steps"].default
        ):
            asked.append(("retraining", retraining.tokens, retraining.warmup_steps))
        if correction.method != "none" and not correction.parallel:
            corrected = retraining.tokens if correction.tokens == "auto" else correction.tokens
            asked.append(("teacher.correction", corrected, correction.warmup_steps))
        for section, tokens, warmup in asked:
            steps = math.ceil(int(tokens) / batch)
            if warmup != "auto" and int(warmup) > steps:
                raise ValueError(f"{section}.warmup_steps: {warmup} of the {steps} steps that {section}.tokens "
                                 f"{tokens} are in batches of {batch}; valid: at most {steps}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _correction_fits(self) -> "Config":
        correction, prune = self.teacher.correction, self.teacher.prune
        if correction.parallel and correction.method == "none":
            raise ValueError("teacher.correction.parallel: True with teacher.correction.method none; "
                             "valid: method full, lora or norms")  # fmt: skip
        if correction.parallel and correction.tokens != "auto":
            raise ValueError(f"teacher.correction.tokens: {correction.tokens} with teacher.correction.parallel, which "
                             "lasts as long as a student distils; valid: auto")  # fmt: skip
        if correction.parallel and self.distillation.teacher_cache not in ("auto", "off"):
            raise ValueError(f"distillation.teacher_cache: {self.distillation.teacher_cache} with "
                             "teacher.correction.parallel, whose teacher changes at every step; "
                             "valid: auto or off")  # fmt: skip
        if correction.parallel and self.distillation.loss == "ce" and not self.distillation.intermediate:
            raise ValueError("teacher.correction.parallel: True with distillation.loss ce, which asks no teacher; "
                             "valid: distillation.loss kld")  # fmt: skip
        if correction.method == "lora" and self.resources.strategy == "fsdp2":
            raise ValueError("teacher.correction.method: lora with resources.strategy fsdp2, whose shards are of stock "
                             "layers; valid: full or norms, or resources.strategy ddp")  # fmt: skip
        if prune == "corrected" and not self.prunes_corrected:
            why = ("no correction is asked" if correction.method == "none" else
                   "parallel corrects after pruning" if correction.parallel else
                   "the correction is of distillation.teacher")  # fmt: skip
            raise ValueError(f"teacher.prune: corrected, but {why}; valid: original or auto")
        return self

    @model_validator(mode="after")
    def _merged_layers_are_lacos(self) -> "Config":
        axes = self.space.axes
        if self.distillation.initialization != "merged":
            return self
        if axes.drop_block is None or axes.drop_block.seeds != "laco":
            seeds = axes.drop_block.seeds if axes.drop_block else "none"
            raise ValueError(f"distillation.initialization: merged with space.axes.drop_block.seeds {seeds}; "
                             "valid: space.axes.drop_block.seeds laco, or initialization pruned")  # fmt: skip
        if any(getattr(axes, name) for name in type(axes).model_fields if name != "drop_block"):
            raise ValueError("distillation.initialization: merged adds layers up element by element, in the teacher's "
                             "own order, and space.axes ranks widths; valid: drop_block alone, or initialization "
                             "pruned")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _samples_are_of_the_calibration(self) -> "Config":
        samples, most = self.importance.samples, self.corpus.calibration_samples
        if samples is not None and samples > most:
            raise ValueError(f"importance.samples: {samples} of corpus.calibration_samples {most}; "
                             f"valid: at most {most}")  # fmt: skip
        return self

    @property
    def is_open(self) -> bool:
        """Whether anything is left to the teacher's configuration (`planning/defaults.py`)."""
        return self.space.open or self.depth.lengths == "auto"

    @property
    def prunes_corrected(self) -> bool:
        """Tell whether students are cut from the corrected teacher, rather than only taught by it."""
        before = self.teacher.correction.method != "none" and not self.teacher.correction.parallel
        return before and self.distillation.teacher is None and self.teacher.prune != "original"

    def dump(self) -> dict[str, Any]:
        """Return plain values, as written to the run directory's config.yaml."""
        return self.model_dump(mode="json")
