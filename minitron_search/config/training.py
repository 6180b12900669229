"""The sections that say how candidates are searched, distilled, retrained, evaluated and placed."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from minitron_search.config.inputs import Section
from minitron_search.config.types import (
    AutoCount,
    AutoProcesses,
    AutoTokens,
    Few,
    LearningRate,
    Loss,
    Many,
    Named,
    Place,
    Positive,
    Processes,
    Real,
    Steps,
    Text,
    Tokens,
    TokensOrZero,
    as_list,
    as_number,
    off_for_false,
    one_or_several,
)
from minitron_search.records.metrics import objectives, ranking_objectives

AUTO_RATE = 3e-4  # what `learning_rate: auto` is for the embedded teacher


class SearchConfig(Section):
    """How candidates are proposed, compared and promoted."""

    trials: Many = 12
    """How many architectures are tried; as many as the space has, or more: all of them."""
    sampler: Text = "tpe"  # a key of `architecture_search.samplers.SAMPLERS`, to which the checks of a run hold it
    """Sampler that proposes them: tpe, random, grid or gp; with several objectives also nsga2 or nsga3."""
    objective: Annotated[Text | tuple[Text, ...], BeforeValidator(one_or_several)] = "lm_loss"
    """Objective: lm_loss, kl or winogrande_margin, all in nats. Of several, as in [lm_loss,
    params], rungs rank by the first; the others, which may also be params, non_embedding_params or memory_bytes, are
    for the sampler and the Pareto front."""
    rungs: Annotated[tuple[TokensOrZero, ...], BeforeValidator(as_list), Field(min_length=1, max_length=100)] = (
        0,
        4_000,
        12_000,
    )
    """Tokens at which trials are compared, ascending. 0: the trims as they are, before any is trained."""
    reduction_factor: Annotated[int, BeforeValidator(as_number), Field(ge=2, le=1_000)] = 3
    """One trial in so many goes on from a rung."""
    scheduler: Literal["halving", "asha", "hyperband"] = "halving"
    """Which trials may train past a rung, and when. halving: the best 1 / reduction_factor of those at the rung, once
    all have reached it. asha (Ray Tune's): decides about each trial as it arrives, so that it waits for none and passes
    the first. hyperband (Ray Tune's): the same with a bracket for every rung, some of which decide later."""
    tokens: AutoTokens = "auto"
    """Tokens that all proposals may train on together. auto: what successive halving of search.trials takes; it bounds
    only how long stopped trials are continued."""
    concurrency: AutoProcesses = "auto"
    """Trials that run at once. auto: what the cluster holds."""
    promote: Literal["not_worse"] | Many = 1
    """How many architectures are retrained. not_worse: all that no paired test tells from the best of the last rung."""
    seeds: Few = 1
    """Seeds of every architecture."""
    finalist_seeds: Few = 1
    """Seeds, in all, of the best of the last rung: reduction_factor of them for each one that is promoted."""
    controls: bool = True
    """Whether the winner's shape is also pruned at random and started from random weights, up to the last rung."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Return all objectives; rungs rank by the first."""
        return (self.objective,) if isinstance(self.objective, str) else self.objective

    @property
    def ranks_by(self) -> str:
        """Return the objective that rungs rank by."""
        return self.objectives[0]

    @model_validator(mode="after")
    def _objectives_are_known(self) -> "SearchConfig":
        names = self.objectives
        listed, every = ",".join(names), objectives()
        if unknown := [name for name in names if name not in every]:
            raise ValueError(f"search.objective: {unknown[0]!r} is not an objective; valid: {', '.join(every)}")
        if len(set(names)) < len(names):
            raise ValueError(f"search.objective: {listed} names one twice; valid: {','.join(dict.fromkeys(names))}")
        if not names or names[0] not in ranking_objectives():
            valid = ",".join(dict.fromkeys(("lm_loss", *names)))
            raise ValueError(f"search.objective: {listed or 'empty'}: rungs rank by the first, one of "
                             f"{', '.join(ranking_objectives())}; valid: {valid}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _ordered(self) -> "SearchConfig":
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"search.rungs: {list(self.rungs)} do not rise; valid: [8K, 32K]")
        if self.rungs == (0,):
            raise ValueError("search.rungs: [0] distils no candidate before it is ranked; valid: [0, 8K]")
        if self.promote != "not_worse" and self.promote > self.trials:
            raise ValueError(f"search.promote: {self.promote} of {self.trials} trials; valid: at most {self.trials}")
        return self


class DistillationConfig(Section):
    """Lightweight retraining of every candidate: L = L_CLM + L_logits + intermediate * L_is."""

    loss: Loss = "kld"
    """Loss of the logits, L_logits: kld, reverse_kld, js, tv, mse or cosine. ce is the LM loss alone; clm+kld, clm+js
    and so on add the LM loss to it."""
    temperature: Annotated[Positive, Field(ge=1e-3, le=1e3)] = 1.0
    """Temperature of both softmaxes."""
    intermediate: Literal["auto"] | Annotated[Real, Field(ge=0, le=1e6)] = 0.0
    """Weight (alpha) of L_is, the loss of intermediate states. 0: logits only (best practice 7). auto: L_logits / L_is
    of every micro-batch, which balances the two."""
    intermediate_loss: Literal["mse", "cosine"] = "mse"
    """Distance by which L_is compares states."""
    intermediate_layers: Literal["all"] | Annotated[int, BeforeValidator(as_number), Field(ge=1, le=10**4)] = "all"
    """How many of the student's layers L_is compares the outputs of, from the last; more than a student has are all of
    its."""
    embedding: bool = False
    """Whether L_is compares the embedding's output too."""
    learning_rate: Literal["auto"] | LearningRate = "auto"
    """Peak learning rate. auto: known for the embedded teacher; for others what a probe finds best, or a rule by
    size."""
    batch_tokens: Annotated[int, BeforeValidator(as_number), Field(ge=1, le=10**9)] = 1_000
    """Tokens of a step, over all workers."""
    teacher_cache: Annotated[Literal["auto", "hidden", "topk", "off"], BeforeValidator(off_for_false)] = "auto"
    """What is kept of the teacher, asked once for all trials. hidden: its final hidden states, exact. topk: its most
    probable tokens, smaller and approximate. off: nothing, every batch asks it live. auto: hidden if it fits into
    teacher_cache_bytes, else off."""
    teacher_cache_bytes: AutoCount = "auto"
    """Bytes that the teacher's cache may take. auto: a quarter of the free disk, at most 16 GiB."""
    topk: Annotated[int, BeforeValidator(as_number), Field(ge=1, le=10**7)] = 64
    """Tokens that are kept of each distribution, with teacher_cache topk."""
    teacher: Place | None = None
    """Another model that teaches, with the same tokenizer, named as in teacher.model. null: the one that is pruned."""
    initialization: Literal["pruned", "random", "random_pruned", "merged"] = "pruned"
    """The students' first weights: the trim's, random ones, those of random elements (random_pruned), or merged: the
    layers that LaCo keeps with those that it merges into them, in the teacher's own order of elements; every other
    student has its layers as they are."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the decoder layers with torch.compile."""

    @model_validator(mode="after")
    def _states_come_from_a_live_teacher_lined_up(self) -> "DistillationConfig":
        setting = f"distillation.intermediate {self.intermediate}"
        if not self.intermediate:
            if self.embedding:
                raise ValueError("distillation.embedding: true is part of the intermediate loss, whose weight is 0; "
                                 "valid: distillation.intermediate auto, or embedding false")  # fmt: skip
            return self
        if self.teacher_cache not in ("auto", "off"):
            raise ValueError(f"distillation.teacher_cache: {self.teacher_cache} holds no intermediate states, which "
                             f"{setting} needs of the teacher itself; valid: off or auto, or "
                             "intermediate 0")  # fmt: skip
        if self.loss == "ce" and self.intermediate == "auto":
            raise ValueError("distillation.intermediate: auto balances against the loss of the logits, which loss ce "
                             "lacks; valid: a number such as 1.0, or loss clm+kld")  # fmt: skip
        if self.initialization == "random_pruned":
            raise ValueError(f"distillation.initialization: random_pruned keeps channels that are not the teacher's "
                             f"leading ones, with which {setting} compares them; valid: pruned or random, or "
                             "intermediate 0")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _topk_knows_the_forward_kl_at_temperature_1(self) -> "DistillationConfig":
        if self.teacher_cache == "topk" and (self.loss not in ("kld", "clm+kld") or self.temperature != 1):
            raise ValueError(f"distillation.teacher_cache: topk with loss {self.loss} at temperature "
                             f"{self.temperature:g}, which needs more of the teacher than its most probable tokens; "
                             "valid: teacher_cache hidden, or loss kld or clm+kld at temperature 1")  # fmt: skip
        return self


class RetrainingConfig(Section):
    """The full retraining of what the search promotes, from its trim."""

    tokens: Tokens = 32_000
    """Tokens that a student is trained on."""
    learning_rate: Literal["auto"] | LearningRate = "auto"
    """Peak learning rate. auto: known for the embedded teacher; for others what a probe finds best, or a rule by
    size."""
    min_learning_rate: Annotated[Real, Field(ge=0, le=10)] = 1e-5
    """Learning rate at the end of the cosine schedule."""
    warmup_steps: Steps = 4
    """Steps of warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the student is written in; its weights are rounded to it before they are scored. auto: the dtype that the
    teacher is stored in."""

    @model_validator(mode="after")
    def _rates_fall(self) -> "RetrainingConfig":
        auto = self.learning_rate == "auto"
        peak = AUTO_RATE if auto else float(self.learning_rate)
        if self.schedule == "cosine" and self.min_learning_rate > peak:
            raise ValueError(f"retraining.min_learning_rate: {self.min_learning_rate:g} is above "
                             f"retraining.learning_rate {f'auto, {peak:g}' if auto else f'{peak:g}'}, from which it "
                             f"falls; valid: at most {peak:g}")  # fmt: skip
        return self


class EvaluationConfig(Section):
    """Benchmarks of the teacher and of the students that are retrained, by lm-eval."""

    tasks: Annotated[tuple[Named, ...], BeforeValidator(as_list)] = ()
    """Tasks of lm-eval, or YAML files of one's own, each as it is or with its shots, as winogrande:5. table_1 and
    table_2 are what lm-eval has of the papers' tables (arXiv:2408.11796); a task of theirs has their shots unless it is
    given others."""
    references: Annotated[tuple[Place, ...], BeforeValidator(as_list)] = ()
    """Models that are evaluated beside the teacher and every student, named as in teacher.model."""
    limit: Annotated[int, BeforeValidator(as_number), Field(ge=1, le=10**9)] | None = None
    """How many questions of each task are asked, the first ones. null: all."""

    @model_validator(mode="after")
    def _references_have_names_of_their_own(self) -> "EvaluationConfig":
        for name in self.references:
            if name == "teacher" or re.fullmatch(r"best(-\d+)?", name):
                raise ValueError(f"evaluation.references: {name} is what a run calls a model of its own; valid: "
                                 f"./{name} for a folder of that name")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _references_are_evaluated(self) -> "EvaluationConfig":
        if self.references and not self.tasks:
            raise ValueError(f"evaluation.references: {','.join(self.references)} with no evaluation.tasks; "
                             "valid: evaluation.tasks table_1, or references []")  # fmt: skip
        return self


class ResourcesConfig(Section):
    """Where trials run, and what a run is forecast by."""

    launcher: Literal["train", "inline"] = "train"
    """How a trial trains: train, in Ray Train's workers, or inline, inside the Tune trial, one worker."""
    workers_per_trial: Processes = 1
    """Processes that share a trial's batches."""
    cpus_per_worker: Processes = 1
    """CPUs of a worker, and its threads."""
    gpus_per_worker: Annotated[Real, Field(ge=0, le=1_000)] = 0.0
    """GPUs of a worker: whole ones, or a share of one."""
    accelerator_type: Text | None = None
    """Kind of GPU that trials run on, by Ray's name for it (H100, L40S), where nodes have several: trials on different
    kinds round otherwise, and their tokens per second cannot be compared. null: any."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """How the workers of a trial hold its student: ddp, whole each, or fsdp2, a share each."""
    mfu: Annotated[float, BeforeValidator(as_number), Field(gt=0, le=1)] | None = None
    """Share of flops_per_second that training is to reach, for the forecast. null for both: measured on this
    machine."""
    flops_per_second: Annotated[Positive, Field(ge=1, le=1e24)] | None = None
    """Peak of one worker's device, for the forecast: an H100's bfloat16 is 989T. It is given with mfu, or neither
    is."""
    price_per_hour: Annotated[Real, Field(ge=0, le=1e12)] | None = None
    """Price, in whatever money, of one GPU where gpus_per_worker is not 0, else of one machine; for the forecast."""
    _memory: int = PrivateAttr(default=0)  # bytes of a worker, which no configuration gives; 0: not counted

    def with_memory(self, per_worker: int) -> "ResourcesConfig":
        """Return these resources, of which a worker asks for `per_worker` bytes of memory besides."""
        sized = self.model_copy()
        sized._memory = per_worker
        return sized

    def of_worker(self) -> dict[str, float]:
        """Return what one worker asks of Ray, by Ray's names of resources."""
        resources = {"CPU": float(self.cpus_per_worker)}
        if self._memory:
            resources["memory"] = float(self._memory)
        if self.gpus_per_worker:
            resources["GPU"] = float(self.gpus_per_worker)
        if self.accelerator_type is not None:
            resources[f"accelerator_type:{self.accelerator_type}"] = 0.001  # each node that has the kind has 1 of it
        return resources

    @model_validator(mode="after")
    def _gpus_are_whole_or_a_share(self) -> "ResourcesConfig":
        gpus = self.gpus_per_worker
        if (gpus > 1 and gpus != int(gpus)) or 0 < gpus < 1e-4:  # as Ray counts them
            raise ValueError(f"resources.gpus_per_worker: {gpus:g} is neither whole GPUs nor a share of one; valid: "
                             f"{max(1, int(gpus))}, or a share from 0.0001 to 1")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _accelerators_are_gpus(self) -> "ResourcesConfig":
        if self.accelerator_type is not None and not self.gpus_per_worker:
            raise ValueError(f"resources.accelerator_type: {self.accelerator_type} is of GPUs, and gpus_per_worker is "
                             "0; valid: gpus_per_worker 1, or null")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _mfu_is_of_a_peak(self) -> "ResourcesConfig":
        if (self.mfu is None) != (self.flops_per_second is None):
            given, other = ("flops_per_second", "mfu") if self.mfu is None else ("mfu", "flops_per_second")
            raise ValueError(f"resources.{given}: {getattr(self, given):g} without resources.{other}; valid: both, as "
                             "in mfu 0.4 and flops_per_second 989T, or neither")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _inline_is_one_worker(self) -> "ResourcesConfig":
        if self.launcher == "inline" and self.workers_per_trial > 1:
            raise ValueError(f"resources.launcher: inline runs one worker, not {self.workers_per_trial}; "
                             "valid: resources.launcher train, or resources.workers_per_trial 1")  # fmt: skip
        if self.launcher == "inline" and self.strategy == "fsdp2":
            raise ValueError("resources.strategy: fsdp2 with launcher inline, whose one worker has nobody to share "
                             "with; valid: resources.launcher train, or resources.strategy ddp")  # fmt: skip
        return self
