"""From the configuration to the trials of a run: the search's, the controls beside it, the retraining."""

from dataclasses import replace

from minitron_search.config.schema import Config
from minitron_search.config.types import Precision
from minitron_search.distillation.settings import LEARNING_RATE, Correction, LoopSettings

# Tokens a process runs through the student at once. On a CPU 512 take 0.2 GiB less than 1,024 and 5% longer (a student
# of 90M, whose step then peaks at 2.9 GiB).
CPU_MICRO_BATCH, GPU_MICRO_BATCH = 512, 4096
WARMUP_STEPS = 4  # of a short distillation, whose first rung may be no more than that
# Arm -> initialization: the winner's shape without importance, or without the teacher's weights (2408.11796, Figure 6)
CONTROLS = {"random_pruned": "random_pruned", "random_init": "random"}
CHECKPOINTS = 8  # during one retraining, besides the last


def retraining_settings(config: Config, precision: Precision) -> LoopSettings:
    asked = config.retraining
    return replace(
        distillation_settings(config, precision),
        total_tokens=asked.tokens,
        milestones=(asked.tokens,),
        learning_rate=asked.learning_rate,
        min_learning_rate=asked.min_learning_rate,
        warmup_steps=asked.warmup_steps,
        schedule=asked.schedule,
        checkpoint_tokens=max(asked.tokens // CHECKPOINTS, config.distillation.batch_tokens),
    )


def correction(config: Config) -> Correction | None:
    """Of the model that teaches, before distillation or in parallel; None where none is asked."""
    asked, peak = config.teacher.correction, config.teacher.correction.learning_rate
    if asked.method == "none":
        return None
    return Correction(
        method=asked.method,
        learning_rate=config.retraining.learning_rate * LEARNING_RATE if peak == "auto" else peak,
        min_learning_rate=config.retraining.min_learning_rate,
        warmup_steps=None if asked.warmup_steps == "auto" else asked.warmup_steps,
        seed=config.seed if asked.seed is None else asked.seed,
    )


def correction_settings(config: Config, asked: Correction, precision: Precision) -> LoopSettings:
    """Of a correction before distillation: the retraining's batches and schedule, scored before and after."""
    tokens = correction_tokens(config)
    training = replace(
        retraining_settings(config, precision),
        total_tokens=tokens,
        milestones=(0, tokens),
        checkpoint_tokens=max(tokens // CHECKPOINTS, config.distillation.batch_tokens),
        seed=asked.seed,
    )
    return asked.settings(training)


def correction_tokens(config: Config) -> int:
    """Of a correction before distillation; 0 where there is none."""
    asked = config.teacher.correction
    if asked.method == "none" or asked.parallel:
        return 0
    return config.retraining.tokens if asked.tokens == "auto" else asked.tokens


def distillation_settings(config: Config, precision: Precision) -> LoopSettings:
    """Of the search's short distillation, to the last rung."""
    asked = config.distillation
    return LoopSettings(
        total_tokens=config.search.rungs[-1],
        milestones=config.search.rungs,
        loss=asked.loss,
        temperature=asked.temperature,
        intermediate=asked.intermediate,
        intermediate_loss=asked.intermediate_loss,
        intermediate_layers=asked.intermediate_layers,
        embedding=asked.embedding,
        learning_rate=asked.learning_rate,
        batch_tokens=asked.batch_tokens,
        micro_batch_tokens=GPU_MICRO_BATCH if config.resources.gpus_per_worker else CPU_MICRO_BATCH,
        warmup_steps=WARMUP_STEPS,
        precision=precision,
        seed=config.seed,
        threads=config.resources.cpus_per_worker,
        strategy=config.resources.strategy,
        gradient_checkpointing=asked.gradient_checkpointing,
        compile=asked.compile,
    )


def untrained(settings: LoopSettings) -> LoopSettings:
    """No training: scored as it is."""
    return replace(settings, total_tokens=0, milestones=(0,))
