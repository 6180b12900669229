"""From the configuration to the settings of trials: the search's, the controls beside it, the retraining's."""

from dataclasses import replace
from functools import cache
from typing import Literal

from minitron_search.config.schema import Config
from minitron_search.config.training import AUTO_RATE
from minitron_search.config.types import Precision
from minitron_search.distillation.settings import LEARNING_RATE, CorrectionSettings, LoopSettings
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import sizes, weights
from minitron_search.teachers import embedded
from minitron_search.teachers.sources import teacher_config

# Tokens a process runs through the student at once. On a CPU 512 take 0.2 GiB less than 1,024 and 5% longer (a student
# of 90M, whose step then peaks at 2.9 GiB).
CPU_MICRO_BATCH, GPU_MICRO_BATCH = 512, 4096
WARMUP_STEPS = 4  # of a short distillation, whose first rung may be no more than that
# Arm -> initialization: the winner's shape without importance, or without the teacher's weights (2408.11796, Figure 6)
CONTROLS = {"random_pruned": "random_pruned", "random_init": "random"}
CHECKPOINTS = 8  # during one retraining, besides the last
# What `learning_rate: auto` is for the embedded teacher, and for any that is no larger; for larger ones the rate falls
# with their parameters, by a power that fits the two that were tried: Gemma 3 270M does best between 5e-5 and 1.5e-4
# (docs/results.md), and one of 630M in Qwen's shape is made worse by 3e-4 and better by 3e-5.
KNOWN_RATE, KNOWN_PARAMETERS, LEAST_RATE = AUTO_RATE, 134_515_008, 1e-5
POWER = 1.5
RATES: tuple[Literal["distillation", "retraining"], ...] = ("distillation", "retraining")  # sections that have one


def rate_of(config: Config, section: Literal["distillation", "retraining"]) -> float:
    """Return the learning rate of a section: its number, or, of `auto`, the rule's."""
    rate = getattr(config, section).learning_rate
    return rule_rate(config.teacher.model) if rate == "auto" else rate


@cache
def rule_rate(model: str) -> float:
    """Return the rate of a teacher by its size: it falls with its parameters, from what is known to the least."""
    if model == embedded.NAME:
        return KNOWN_RATE
    config = teacher_config(model)
    return rate_by_size(parameter_count(weights(config), sizes(config)))


def rate_by_size(params: int) -> float:
    """Return the rule's rate for a teacher of so many parameters, two digits."""
    return float(f"{max(LEAST_RATE, KNOWN_RATE * min(1.0, KNOWN_PARAMETERS / params) ** POWER):.2g}")


def automatic_rates(config: Config) -> tuple[Literal["distillation", "retraining"], ...]:
    """Return the sections whose rate is `auto`, and not yet known, as the embedded teacher's is."""
    if config.teacher.model == embedded.NAME:
        return ()
    return tuple(section for section in RATES if getattr(config, section).learning_rate == "auto")


def with_rate(config: Config, rate: float) -> Config:
    """Return a configuration with a number for every `auto` rate: `rate`, or the embedded teacher's."""
    number = KNOWN_RATE if config.teacher.model == embedded.NAME else rate
    auto = [section for section in RATES if getattr(config, section).learning_rate == "auto"]
    return config.model_copy(update={
        section: getattr(config, section).model_copy(update={"learning_rate": number}) for section in auto
    })  # fmt: skip


def retraining_settings(config: Config, precision: Precision) -> LoopSettings:
    """Return the settings of a full retraining: the distillation's, with tokens and schedule of its own."""
    retraining, rate = config.retraining, rate_of(config, "retraining")
    return replace(
        distillation_settings(config, precision),
        total_tokens=retraining.tokens,
        milestones=(retraining.tokens,),
        learning_rate=rate,
        min_learning_rate=min(retraining.min_learning_rate, rate),
        warmup_steps=retraining.warmup_steps,
        schedule=retraining.schedule,
        checkpoint_tokens=max(retraining.tokens // CHECKPOINTS, config.distillation.batch_tokens),
    )


def correction(config: Config) -> CorrectionSettings | None:
    """Return how the model that teaches is corrected, before distillation or in parallel; None where it is not."""
    section, peak = config.teacher.correction, config.teacher.correction.learning_rate
    if section.method == "none":
        return None
    return CorrectionSettings(
        method=section.method,
        learning_rate=rate_of(config, "retraining") * LEARNING_RATE if peak == "auto" else peak,
        min_learning_rate=config.retraining.min_learning_rate,
        warmup_steps=None if section.warmup_steps == "auto" else section.warmup_steps,
        seed=config.seed if section.seed is None else section.seed,
    )


def correction_settings(config: Config, settings: CorrectionSettings, precision: Precision) -> LoopSettings:
    """Return the settings of a correction before distillation: the retraining's batches and schedule, scored before
    and after."""
    tokens = correction_tokens(config)
    training = replace(
        retraining_settings(config, precision),
        total_tokens=tokens,
        milestones=(0, tokens),
        checkpoint_tokens=max(tokens // CHECKPOINTS, config.distillation.batch_tokens),
        seed=settings.seed,
    )
    return settings.loop_settings(training)


def correction_tokens(config: Config) -> int:
    """Return the tokens of a correction before distillation; 0 where there is none."""
    section = config.teacher.correction
    if section.method == "none" or section.parallel:
        return 0
    return config.retraining.tokens if section.tokens == "auto" else section.tokens


def distillation_settings(config: Config, precision: Precision) -> LoopSettings:
    """Return the settings of the search's short distillation, to the last rung."""
    section = config.distillation
    return LoopSettings(
        total_tokens=config.search.rungs[-1],
        milestones=config.search.rungs,
        loss=section.loss,
        temperature=section.temperature,
        intermediate=section.intermediate,
        intermediate_loss=section.intermediate_loss,
        intermediate_layers=section.intermediate_layers,
        embedding=section.embedding,
        learning_rate=rate_of(config, "distillation"),
        batch_tokens=section.batch_tokens,
        micro_batch_tokens=GPU_MICRO_BATCH if config.resources.gpus_per_worker else CPU_MICRO_BATCH,
        warmup_steps=WARMUP_STEPS,
        precision=precision,
        seed=config.seed,
        threads=config.resources.cpus_per_worker,
        strategy=config.resources.strategy,
        gradient_checkpointing=section.gradient_checkpointing,
        compile=section.compile,
    )


def untrained(settings: LoopSettings) -> LoopSettings:
    """Return `settings` without training: a student is scored at 0 tokens."""
    return replace(settings, total_tokens=0, milestones=(0,))
