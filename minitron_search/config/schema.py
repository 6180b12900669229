"""The one configuration: YAML + dotted overrides, validated, dumped resolved.

Numbers may be written as people write them: `8K`, `90M`, `4.5B` (decimal suffixes), `1e-4`. Every error names
the key, the value given and what would have been valid.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from minitron_search.distillation.settings import Loss
from minitron_search.records.paths import SCHEMES

# what a search can minimise (the margin: maximise): what is measured, and what is known from an architecture's shape
MEASURED = ("lm_loss", "kl", "winogrande_margin")
OF_SHAPE = ("params", "non_embedding_params", "memory_bytes")
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def _number(value: Any) -> Any:
    """`4.5B`, `8K`, `1e-4` -> number; anything else is left for the field's own type to refuse."""
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers; valid: 16, 8K, 4.5B or 1e-4")
    match = re.fullmatch(r"\s*([+-]?[\d_]*\.?\d+(?:e[+-]?\d+)?)\s*([kmbt]?)\s*", str(value), re.IGNORECASE)
    if not match:
        return value
    number = float(match[1].replace("_", "")) * SUFFIXES.get(match[2].lower(), 1)
    if math.isinf(number):
        return value
    # 1.1M * 10**6 is 1100000.0000000001 in floating point
    return round(number) if abs(number - round(number)) < 1e-6 * max(1, abs(number)) and abs(number) >= 1 else number


def _listed(value: Any) -> Any:
    """`a,b` on the command line is the list [a, b], and a single value a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int | float) else value


def _one_or_several(value: Any) -> Any:
    """`a,b` is the list [a, b], and a list of one is its name."""
    listed = _listed(value) if value and not isinstance(value, Mapping) else value
    return listed[0] if isinstance(listed, list | tuple) and len(listed) == 1 else listed


def _same_in_every_layer(value: Any) -> Any:
    if isinstance(value, list | tuple) and any(isinstance(each, list | tuple) for each in value):
        raise ValueError("a size for every layer is no axis: a stock configuration of these families holds one for all "
                         "layers; valid: choices: [768, 1024]")  # fmt: skip
    return value


def _off(value: Any) -> Any:
    """YAML 1.1 reads `off` as false."""
    return "off" if value is False else value


Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
LayersOrFraction = Annotated[int | float, BeforeValidator(_number), Field(gt=0)]
AutoCount = Literal["auto"] | Count


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Correction(Section):
    """Light fine-tuning of the model that teaches, on the distillation's text, plain LM loss (2408.11796, section 3).

    learning_rate: auto is a fifth of retraining.learning_rate. tokens: auto is retraining.tokens.
    warmup_steps: auto is the paper's 120, and a tenth of all steps where that is fewer.
    seed: of the order of the text and of LoRA's first weights; null for the run's own.
    parallel: while students distil, a step for each of theirs, instead of before.
    """

    method: Literal["none", "full", "lora", "norms"] = "none"
    tokens: AutoCount = "auto"
    learning_rate: Literal["auto"] | Positive = "auto"
    warmup_steps: Literal["auto"] | CountOrZero = "auto"
    seed: CountOrZero | None = None
    parallel: bool = False


class Teacher(Section):
    """prune: which weights students are cut from; auto is corrected where the pruned model is corrected before."""

    model: str = "smollm2-135m"
    correction: Correction = Correction()
    prune: Literal["auto", "original", "corrected"] = "auto"


class CorpusConfig(Section):
    """calibration: what importance is measured on; null is the train source. random: uniform random tokens."""

    train: str = "docstrings"
    validation: str = "docstrings"
    calibration: str | None = None
    sequence_length: Annotated[Count, Field(ge=8)] = 256
    calibration_samples: Count = 64
    validation_samples: Annotated[Count, Field(ge=2)] = 32


class WinograndeConfig(Section):
    source: str = "embedded"
    limit: Annotated[Count, Field(ge=2)] | None = None
    shots: CountOrZero = 0


class ImportanceConfig(Section):
    """How width elements are ranked; `batch` and `sequence` aggregate activations.

    seed: of the calibration windows and of method `random`; null for the run's own.
    rounds: 1 ranks the teacher once; k ranks, trims towards the smallest candidate and ranks again, k times in all.
    samples: how many of the calibration windows are read; null is all. Where it is given, `seed` draws them, and the
        run's own seed draws the windows: then neither changes the text that students are distilled on.
    """

    method: Literal["activation", "random", "magnitude", "taylor", "wanda", "pca"] = "activation"
    batch: Literal["l1", "l2", "mean", "variance"] = "l2"
    sequence: Literal["mean", "l2", "variance"] = "mean"
    seed: CountOrZero | None = None
    rounds: Count = 1
    samples: Count | None = None

    @model_validator(mode="after")
    def _a_rotation_is_no_order(self) -> "ImportanceConfig":
        if self.method == "pca" and self.rounds > 1:
            raise ValueError(f"importance.rounds: {self.rounds} with method pca, whose rounds are rotations of each "
                             "other's channels and make no one order of them; valid: 1")  # fmt: skip
        return self


class DepthConfig(Section):
    lengths: Annotated[tuple[LayersOrFraction, ...], BeforeValidator(_listed), Field(min_length=1)] = (
        1,
        2,
        8,
        15,
    )
    metrics: Annotated[
        tuple[Literal["lm_loss", "winogrande", "bi", "angular", "taylor"], ...],
        BeforeValidator(_listed), Field(min_length=1),
    ] = ("lm_loss", "winogrande", "bi")  # fmt: skip
    workers: AutoCount = "auto"
    weights: Literal["auto", "resident", "streamed"] = "auto"  # streamed: one layer in memory at a time

    @model_validator(mode="after")
    def _gradients_need_all_weights(self) -> "DepthConfig":
        if "taylor" in self.metrics and self.weights == "streamed":
            raise ValueError("depth.weights: streamed with metric taylor, whose backward pass holds the whole teacher; "
                             "valid: resident or auto, or metrics without taylor")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _lengths_are_layers_or_fractions(self) -> "DepthConfig":
        for length in self.lengths:
            if length >= 1 and length != int(length):
                raise ValueError(f"depth.lengths: {length:g} is neither a whole number of layers nor a fraction "
                                 f"of the depth below 1; valid: {int(length)} or 0.5")  # fmt: skip
        return self


class Target(Section):
    target: Positive
    tolerance: Share = 0.05


class MemoryTarget(Target):
    """Weights plus key-value cache, bytes, at two bytes an element."""

    batch_size: Count = 1
    context_length: Count = 2048


class SpeedTarget(Target):
    """Of one forward pass of body and head over batch_size x context_length tokens (prefill), as a one-layer model of
    every width takes it where trials run."""

    batch_size: Count = 1
    context_length: Count = 2048


class Budget(Section):
    """Several are ANDed. latency_ms: wall milliseconds of a pass; tokens_per_second: its tokens by its time."""

    params: Target | None = None
    non_embedding_params: Target | None = None
    memory_bytes: MemoryTarget | None = None
    latency_ms: SpeedTarget | None = None
    tokens_per_second: SpeedTarget | None = None

    @model_validator(mode="after")
    def _something_is_asked(self) -> "Budget":
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError("space.budget: empty; valid: params: {target: 90M, tolerance: 0.05}")
        return self


class Axis(Section):
    """`low`, `high` and either `step` (low, low + step, ... up to high) or `divisor` (its multiples from low to high);
    or `choices`."""

    low: Count | None = None
    high: Count | None = None
    step: Count | None = None
    divisor: Count | None = None
    choices: Annotated[
        tuple[Count, ...], BeforeValidator(_listed), BeforeValidator(_same_in_every_layer)
    ] | None = None  # fmt: skip

    @model_validator(mode="after")
    def _range_or_choices(self) -> "Axis":
        ranged = (self.low, self.high, self.step, self.divisor)
        if self.choices is not None:
            if any(part is not None for part in ranged) or not self.choices:
                raise ValueError("give `choices: [6, 9]` or `low`, `high` and `step`, not both and not neither")
        elif self.low is None or self.high is None or (self.step is None) == (self.divisor is None):
            raise ValueError("give `low`, `high` and one of `step` and `divisor`, as in "
                             "{low: 384, high: 576, step: 64} or {low: 400, high: 576, divisor: 64}")  # fmt: skip
        elif self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; valid: low at most {self.high}")
        elif self.divisor is not None and not self.values():
            raise ValueError(f"no multiple of divisor {self.divisor} lies from low {self.low} to high {self.high}; "
                             f"valid: high at least {math.ceil(self.low / self.divisor) * self.divisor}")  # fmt: skip
        return self

    def values(self) -> tuple[int, ...]:
        if self.choices is not None:
            return tuple(sorted(set(self.choices)))
        assert self.low and self.high
        if self.divisor:
            first = math.ceil(self.low / self.divisor) * self.divisor
            return tuple(range(first, self.high + 1, self.divisor))
        assert self.step
        return tuple(range(self.low, self.high + 1, self.step))


class DropBlock(Section):
    """A contiguous block of layers to drop: its length; where it starts is free.

    seeds: what the search first proposes for every length. sweep: the best block that the depth sweep found. bi: the
        block of least BI. one_by_one: the layers of least BI each, which need not lie together (ShortGPT,
        arXiv:2403.03853). laco: all but the layers that LaCo merges the others into (`layer_merge.py`).
    """

    lengths: Annotated[tuple[CountOrZero, ...], BeforeValidator(_listed), Field(min_length=1)] = (0,)
    seeds: Literal["none", "sweep", "bi", "one_by_one", "laco"] = "none"


class Axes(Section):
    """An axis left out keeps the teacher's value, or follows the axis that decides it.

    num_attention_heads alone drops heads inside every group (whole groups where a group is one head);
    num_key_value_heads alone drops whole groups. Where a family's heads make up hidden_size, either gives the other.
    """

    hidden_size: Axis | None = None
    intermediate_size: Axis | None = None
    num_attention_heads: Axis | None = None
    num_key_value_heads: Axis | None = None
    drop_block: DropBlock | None = None


class Anchor(Section):
    """An architecture that is always evaluated; what is left out keeps the teacher's value."""

    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    drop_block: tuple[CountOrZero, CountOrZero] | None = None  # start, length


class Space(Section):
    budget: Budget = Budget(params=Target(target=90e6, tolerance=0.05))
    axes: Axes = Axes(
        hidden_size=Axis(low=384, high=576, step=64),
        intermediate_size=Axis(low=768, high=1536, step=128),
        num_attention_heads=Axis(choices=(6, 9)),
        drop_block=DropBlock(lengths=(0, 2, 4, 8)),
    )
    anchors: tuple[Anchor, ...] = ()


class Search(Section):
    """objective: a name or several; rungs rank by the first, the others are for the sampler and the Pareto front.
    rungs: tokens at which trials are compared; the first may be 0, the trim as it is: a score, and no training.
    scheduler: who may train past a rung, and when. halving: the best 1 / reduction_factor of all that came to it, once
        all have. asha: Ray Tune's, which decides at once and for good, and so waits for nobody and passes the first to
        come. hyperband: the same with a bracket a rung, of which some decide later.
    tokens: what all proposals may train on together; auto is what successive halving of `trials` takes, which bounds
        only how long stopped trials are continued.
    promote: how many are retrained; not_worse is every one that no paired test tells from the best at the last rung.
    finalist_seeds: seeds, in all, of the best at the last rung (reduction_factor of them for each that is promoted).
    controls: whether the winner's shape is also trained pruned at random and from random weights, to the last rung.
    """

    trials: Count = 12
    sampler: Literal["tpe", "random", "grid", "nsga2", "nsga3", "gp"] = "tpe"
    objective: Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)] = "lm_loss"
    rungs: Annotated[tuple[CountOrZero, ...], BeforeValidator(_listed), Field(min_length=1)] = (0, 4_000, 12_000)
    reduction_factor: Annotated[int, BeforeValidator(_number), Field(ge=2)] = 3
    scheduler: Literal["halving", "asha", "hyperband"] = "halving"
    tokens: AutoCount = "auto"
    concurrency: AutoCount = "auto"
    promote: Literal["not_worse"] | Count = 1
    seeds: Count = 1
    finalist_seeds: Count = 1
    controls: bool = True

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.objective,) if isinstance(self.objective, str) else self.objective

    @property
    def ranks_by(self) -> str:
        """The objective that rungs rank by."""
        return self.objectives[0]

    @model_validator(mode="after")
    def _objectives_are_known(self) -> "Search":
        asked = self.objectives
        listed, every = ",".join(asked), (*MEASURED, *OF_SHAPE)
        if unknown := [name for name in asked if name not in every]:
            raise ValueError(f"search.objective: {unknown[0]!r} is no objective; valid: {', '.join(every)}")
        if len(set(asked)) < len(asked):
            raise ValueError(f"search.objective: {listed} names one twice; valid: {','.join(dict.fromkeys(asked))}")
        if not asked or asked[0] not in MEASURED:
            valid = ",".join(dict.fromkeys(("lm_loss", *asked)))
            raise ValueError(f"search.objective: {listed or 'empty'}: rungs rank by the first, one of "
                             f"{', '.join(MEASURED)}; valid: {valid}")  # fmt: skip
        if self.sampler in ("nsga2", "nsga3") and len(asked) == 1:
            raise ValueError(f"search.sampler: {self.sampler} with the one objective {listed}, whose Pareto front is "
                             f"one architecture; valid: tpe, or search.objective {listed},params")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _ordered(self) -> "Search":
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"search.rungs: {list(self.rungs)} do not rise; valid: [8K, 32K]")
        if self.rungs == (0,):
            raise ValueError("search.rungs: [0] distils no candidate before it is ranked; valid: [0, 8K]")
        if self.promote != "not_worse" and self.promote > self.trials:
            raise ValueError(f"search.promote: {self.promote} of {self.trials} trials; valid: at most {self.trials}")
        return self


class Distillation(Section):
    """L = L_CLM + L_logits + intermediate * L_is.

    intermediate: a weight, or auto for L_logits / L_is, the balance of the two in every micro-batch.
    intermediate_layers: how many of the student's layers L_is compares the outputs of, from the last; more than a
        student has are all of its.
    embedding: whether it compares the embedding's output too.
    initialization: merged gives the layers that LaCo keeps what it merges into them, in the teacher's own order of
        elements, and every other student its layers as they are.
    teacher_cache: what is kept of the teacher, asked once for all trials. hidden: its final hidden states, exact;
        topk: its `topk` most probable tokens, smaller and approximate; off: nothing, every batch asks it live; auto:
        hidden if that takes at most teacher_cache_bytes (auto: a quarter of the free disk, and at most 16 GiB), else
        off.
    """

    loss: Loss = "kld"
    temperature: Positive = 1.0
    intermediate: Literal["auto"] | Annotated[Real, Field(ge=0)] = 0.0  # alpha; 0: logits only (best practice 7)
    intermediate_loss: Literal["mse", "cosine"] = "mse"
    intermediate_layers: Literal["all"] | Count = "all"
    embedding: bool = False
    learning_rate: Positive = 3e-4
    batch_tokens: Count = 1_000
    teacher_cache: Annotated[Literal["auto", "hidden", "topk", "off"], BeforeValidator(_off)] = "auto"
    teacher_cache_bytes: AutoCount = "auto"
    topk: Count = 64
    teacher: str | None = None  # another model that teaches, as teacher.model names one; null for the pruned model
    initialization: Literal["pruned", "random", "random_pruned", "merged"] = "pruned"
    gradient_checkpointing: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _states_come_from_a_live_teacher_lined_up(self) -> "Distillation":
        asked = f"distillation.intermediate {self.intermediate}"
        if not self.intermediate:
            if self.embedding:
                raise ValueError("distillation.embedding: true is part of the intermediate loss, whose weight is 0; "
                                 "valid: distillation.intermediate auto, or embedding false")  # fmt: skip
            return self
        if self.teacher_cache not in ("auto", "off"):
            raise ValueError(f"distillation.teacher_cache: {self.teacher_cache} holds no intermediate states, which "
                             f"{asked} needs of the teacher itself; valid: off or auto, or intermediate 0")  # fmt: skip
        if self.loss == "ce" and self.intermediate == "auto":
            raise ValueError("distillation.intermediate: auto balances against the loss of the logits, which loss ce "
                             "has not; valid: a number such as 1.0, or loss clm+kld")  # fmt: skip
        if self.initialization == "random_pruned":
            raise ValueError(f"distillation.initialization: random_pruned keeps channels that are not the teacher's "
                             f"leading ones, with which {asked} compares them; valid: pruned or random, or "
                             "intermediate 0")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _topk_knows_the_forward_kl_at_temperature_1(self) -> "Distillation":
        if self.teacher_cache == "topk" and (self.loss not in ("kld", "clm+kld") or self.temperature != 1):
            raise ValueError(f"distillation.teacher_cache: topk with loss {self.loss} at temperature "
                             f"{self.temperature:g}, which needs more of the teacher than its most probable tokens; "
                             "valid: teacher_cache hidden, or loss kld or clm+kld at temperature 1")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _logits_have_no_temperature(self) -> "Distillation":
        if self.temperature != 1 and self.loss.removeprefix("clm+") in ("mse", "cosine"):
            raise ValueError(f"distillation.temperature: {self.temperature:g} with loss {self.loss}, which compares "
                             "logits, not probabilities; valid: 1, or distillation.loss kld, reverse_kld, js or tv "
                             "(also as clm+kld, ...)")  # fmt: skip
        return self


class Retraining(Section):
    tokens: Count = 32_000
    learning_rate: Positive = 3e-4
    min_learning_rate: Annotated[Real, Field(ge=0)] = 1e-5
    warmup_steps: CountOrZero = 4
    schedule: Literal["cosine", "constant"] = "cosine"


class Evaluation(Section):
    """tasks: lm-eval's, or YAML files of one's own, each as it is or with `:shots`; table_1 and table_2 are what
        lm-eval has of those tables (arXiv:2408.11796). A task of theirs has their shots unless it is given others.
    references: models beside teacher and students, as teacher.model names one.
    limit: of each task, only so many questions, the first; null for all.
    """

    tasks: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    references: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    limit: Count | None = None

    @model_validator(mode="after")
    def _references_have_names_of_their_own(self) -> "Evaluation":
        for name in self.references:
            if name == "teacher" or re.fullmatch(r"best(-\d+)?", name):
                raise ValueError(f"evaluation.references: {name} is what a run calls a model of its own; valid for a "
                                 f"folder of that name: ./{name}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _references_are_evaluated(self) -> "Evaluation":
        if self.references and not self.tasks:
            raise ValueError(f"evaluation.references: {','.join(self.references)} with no evaluation.tasks; "
                             "valid: evaluation.tasks table_1, or references []")  # fmt: skip
        return self


class Resources(Section):
    """`strategy` is how the workers of one trial hold its student: `ddp` whole each, `fsdp2` a share each.
    accelerator_type: the kind of GPU that trials run on, by Ray's name for it (H100, L40S), where nodes have several:
    trials on different kinds round otherwise, and their tokens per second cannot be compared.

    What a run is forecast by: mfu, the share of flops_per_second (of one worker's device: an H100's bfloat16 is 989T)
    that it is to reach; null for both measures this machine. price_per_hour: of one GPU, where gpus_per_worker is not
    0, else of one machine; in whatever money.
    """

    launcher: Literal["train", "inline"] = "train"
    workers_per_trial: Count = 1
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[Real, Field(ge=0)] = 0.0
    accelerator_type: str | None = None
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    mfu: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] | None = None
    flops_per_second: Positive | None = None
    price_per_hour: Annotated[Real, Field(ge=0)] | None = None

    def of_worker(self) -> dict[str, float]:
        """What one worker asks of Ray."""
        asked = {"CPU": float(self.cpus_per_worker)}
        if self.gpus_per_worker:
            asked["GPU"] = float(self.gpus_per_worker)
        if self.accelerator_type is not None:
            asked[f"accelerator_type:{self.accelerator_type}"] = 0.001  # each node that has the kind has 1 of it
        return asked

    @model_validator(mode="after")
    def _accelerators_are_gpus(self) -> "Resources":
        if self.accelerator_type is not None and not self.gpus_per_worker:
            raise ValueError(f"resources.accelerator_type: {self.accelerator_type} is of GPUs, and gpus_per_worker is "
                             "0; valid: gpus_per_worker 1, or null")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _mfu_is_of_a_peak(self) -> "Resources":
        if (self.mfu is None) != (self.flops_per_second is None):
            given, other = ("flops_per_second", "mfu") if self.mfu is None else ("mfu", "flops_per_second")
            raise ValueError(f"resources.{given}: {getattr(self, given):g} without resources.{other}; valid: both, as "
                             "in mfu 0.4 and flops_per_second 989T, or neither")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _inline_is_one_worker(self) -> "Resources":
        if self.launcher == "inline" and self.workers_per_trial > 1:
            raise ValueError(f"resources.launcher: inline runs one worker, not {self.workers_per_trial}; "
                             "valid: resources.launcher train, or resources.workers_per_trial 1")  # fmt: skip
        if self.launcher == "inline" and self.strategy == "fsdp2":
            raise ValueError("resources.strategy: fsdp2 with launcher inline, whose one worker has nobody to share "
                             "with; valid: resources.launcher train, or resources.strategy ddp")  # fmt: skip
        return self


class Config(Section):
    name: Annotated[str, Field(coerce_numbers_to_str=True, min_length=1)] = "smollm2-135m"
    output: Annotated[str, Field(coerce_numbers_to_str=True)] = ""
    seed: CountOrZero = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    stages: Annotated[
        tuple[Literal["importance", "depth", "search", "retrain", "report"], ...],
        BeforeValidator(_listed), Field(min_length=1),
    ] = ("importance", "search", "retrain", "report")  # fmt: skip
    teacher: Teacher = Teacher()
    corpus: CorpusConfig = CorpusConfig()
    winogrande: WinograndeConfig = WinograndeConfig()
    importance: ImportanceConfig = ImportanceConfig()
    depth: DepthConfig = DepthConfig()
    space: Space = Space()
    search: Search = Search()
    distillation: Distillation = Distillation()
    retraining: Retraining = Retraining()
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()
    trackers: Annotated[tuple[Literal["wandb", "mlflow"], ...], BeforeValidator(_listed)] = ()  # beside TensorBoard

    @model_validator(mode="after")
    def _output_follows_name(self) -> "Config":
        if not self.output:
            object.__setattr__(self, "output", f"runs/{self.name}")
        scheme = re.match(r"([a-z0-9]+)://", self.output)
        if scheme and scheme[1] not in ("file", *SCHEMES):
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise ValueError(f"output: {self.output!r}: {scheme[1]} is no file system of pyarrow's; valid: a folder, "
                             f"as in runs/{self.name}, or {known}...")  # fmt: skip
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
        length, asked = self.corpus.sequence_length, self.search.tokens
        batch = math.ceil(self.distillation.batch_tokens / length) * length
        reached = [math.ceil(rung / batch) * batch for rung in self.search.rungs]
        if len(set(reached)) < len(reached):
            raise ValueError(f"search.rungs: {list(self.search.rungs)} are {reached} tokens in whole batches of "
                             f"{batch}; valid: {list(dict.fromkeys(reached))}, or a smaller "
                             "distillation.batch_tokens")  # fmt: skip
        least = reached[-1]
        if asked != "auto" and asked < least:
            raise ValueError(f"search.tokens: {asked} for all trials, of which one alone takes {least}, in whole "
                             f"batches, to the last rung; valid: at least {least}, or auto")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _correction_fits(self) -> "Config":
        asked, prune = self.teacher.correction, self.teacher.prune
        if asked.parallel and asked.method == "none":
            raise ValueError("teacher.correction.parallel: True with teacher.correction.method none; "
                             "valid: method full, lora or norms")  # fmt: skip
        if asked.parallel and asked.tokens != "auto":
            raise ValueError(f"teacher.correction.tokens: {asked.tokens} with teacher.correction.parallel, which lasts "
                             "as long as a student distils; valid: auto")  # fmt: skip
        if asked.parallel and self.distillation.teacher_cache not in ("auto", "off"):
            raise ValueError(f"distillation.teacher_cache: {self.distillation.teacher_cache} with "
                             "teacher.correction.parallel, whose teacher changes at every step; "
                             "valid: auto or off")  # fmt: skip
        if asked.parallel and self.distillation.loss == "ce" and not self.distillation.intermediate:
            raise ValueError("teacher.correction.parallel: True with distillation.loss ce, which asks no teacher; "
                             "valid: distillation.loss kld")  # fmt: skip
        if asked.method == "lora" and self.resources.strategy == "fsdp2":
            raise ValueError("teacher.correction.method: lora with resources.strategy fsdp2, whose shards are of stock "
                             "layers; valid: full or norms, or resources.strategy ddp")  # fmt: skip
        if prune == "corrected" and not self.prunes_corrected:
            why = ("no correction is asked" if asked.method == "none" else
                   "parallel corrects after pruning" if asked.parallel else
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
        asked, most = self.importance.samples, self.corpus.calibration_samples
        if asked is not None and asked > most:
            raise ValueError(f"importance.samples: {asked} of corpus.calibration_samples {most}; "
                             f"valid: at most {most}")  # fmt: skip
        return self

    @property
    def prunes_corrected(self) -> bool:
        """Whether students are cut from the corrected teacher, rather than only taught by it."""
        before = self.teacher.correction.method != "none" and not self.teacher.correction.parallel
        return before and self.distillation.teacher is None and self.teacher.prune != "original"

    def dump(self) -> dict[str, Any]:
        """Plain values, as written to the run directory's config.yaml."""
        return self.model_dump(mode="json")


def load(file: str | None, overrides: list[str]) -> Config:
    """The configuration of a YAML file (or the embedded default) with dotted overrides on top.

    Raises ValueError with one message that names every wrong key, its value and a valid alternative.
    """
    resolved = parse(read_yaml(file) if file else {}).dump()
    given = dict(_pairs(overrides))
    if "name" in given and "output" not in given and resolved["output"] == f"runs/{resolved['name']}":
        resolved["output"] = ""  # the folder follows the name
    override(resolved, overrides)
    return parse(resolved)


def override(values: dict[str, Any], overrides: list[str]) -> None:
    """Set `--KEY.SUBKEY VALUE` in `values`. Raises ValueError for what is no option, or has no value."""
    for key, text in dict(_pairs(overrides)).items():
        _set(values, key, _value(text))


def parse(values: Mapping[str, Any]) -> Config:
    """Raises ValueError as `load` does."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(dict.fromkeys(_messages(error)))) from None


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key: left value, right value` for every leaf in which two dumped configurations differ."""
    for key in [*left, *(key for key in right if key not in left)]:
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} there, {b!r} asked now"


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its default: what a misspelt key is compared with."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.default
        if section := _section(field.annotation):
            yield from keys(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def read_yaml(file: str) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(near)}" if near else ""
        raise ValueError(f"--config: no file {file!r}{hint}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {file} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"--config: {file} holds a {type(values).__name__}; valid: a mapping such as `seed: 0`")
    return values


def _pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """`--a.b VALUE` and `--a.b=VALUE`, in order."""
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag!r} is not an option; valid: --search.trials 16")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key}: no value given; {_suggest(key) or f'valid: --{key} VALUE'}")
            text = rest.pop(0)
        yield key.replace("-", "_"), text


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # `*.txt` is an alias to YAML and a glob to a user
        return text


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if values.get(parent) is None:  # not there, or an optional section that was left out
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise ValueError(f"{key}: {parent} is {values[parent]!r}, not a section; {_suggest(key)}")
        values = values[parent]
    values[leaf] = value


def _suggest(key: str) -> str:
    # of `distillation.lr` the section `distillation` is no correction
    known = [name for name, default in keys() if not (isinstance(default, BaseModel) and key.startswith(f"{name}."))]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    return f"did you mean {(same_leaf or near)[0]}?" if same_leaf or near else ""


def _messages(error: ValidationError) -> Iterator[str]:
    known = [name for name, _ in keys()]
    problems = error.errors()
    for problem in problems:
        if problem["type"] == "literal_error" and problem["ctx"]["expected"] in ("'auto'", "'not_worse'"):
            continue  # the other half of `auto or a count` says what was wrong
        # the location also names the union's member (`Axis`, `constrained-int`); a user's keys are what is kept
        parts: list[str] = []
        for part in map(str, problem["loc"]):
            named = ".".join(name for name in [*parts, part] if not name.isdigit())
            if problem["type"] == "extra_forbidden" or part.isdigit() or named in known:
                parts.append(part)
        key = ".".join(parts)
        if problem["type"] == "extra_forbidden":
            siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
            hint = _suggest(key) or "valid: " + ", ".join(siblings)
            yield f"{key}: unknown key (value {problem['input']!r}); {hint}"
        elif problem["type"] == "value_error":
            message = str(problem["ctx"]["error"])
            yield (message if re.match(r"[a-z_]+\.[a-z_.]+: ", message) else f"{key}: {problem['input']!r}: {message}")
        else:
            message = problem["msg"].removeprefix("Input should be ").partition(", unable to parse")[0]
            yield f"{key}: {problem['input']!r} is not valid; valid: {message}{_default_of(key)}"


def _default_of(key: str) -> str:
    default = dict(keys()).get(key)
    plain = isinstance(default, int | float | str | tuple) and default != ""
    return f", such as {default}" if plain else ""
