"""The sections that say what is read: teacher, corpus, Winogrande, importance, depth."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag, model_validator

from minitron_search.config.types import (
    LIST_OR_AUTO,
    MOST_WINDOW,
    AutoProcesses,
    AutoTokens,
    Few,
    LayersOrFraction,
    LearningRate,
    Many,
    Named,
    Place,
    Seed,
    Steps,
    Text,
    as_list,
    as_number,
    auto_or_list,
)


class Section(BaseModel):
    """A section of the configuration: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CorrectionConfig(Section):
    """Light fine-tuning of the teaching model on the distillation's text with the LM loss (2408.11796, section 3).

    learning_rate: auto is a fifth of retraining.learning_rate. tokens: auto is retraining.tokens.
    warmup_steps: auto is the paper's 120, and a tenth of all steps where that is fewer.
    seed: of the order of the text and of LoRA's first weights; null for the run's own.
    parallel: while students distil, a step for each of theirs, instead of before.
    """

    method: Literal["none", "full", "lora", "norms"] = "none"
    tokens: AutoTokens = "auto"
    learning_rate: Literal["auto"] | LearningRate = "auto"
    warmup_steps: Literal["auto"] | Steps = "auto"
    seed: Seed | None = None
    parallel: bool = False


class TeacherConfig(Section):
    """The model that is pruned.

    model: the embedded default's name, a folder (here or in storage), or a Hub name. prune: which weights students are
        cut from; auto is the corrected ones, if the pruned model is corrected before distillation.
    """

    model: Place = "smollm2-135m"
    correction: CorrectionConfig = CorrectionConfig()
    prune: Literal["auto", "original", "corrected"] = "auto"


class CorpusConfig(Section):
    """The text that calibrates, trains and validates.

    calibration: the source that importance is measured on; null is the train source, `random` uniform random tokens.
    """

    train: Named = "docstrings"
    validation: Named = "docstrings"
    calibration: Named | None = None
    sequence_length: Annotated[int, BeforeValidator(as_number), Field(ge=8, le=MOST_WINDOW)] = 256
    calibration_samples: Many = 64
    validation_samples: Annotated[Many, Field(ge=2)] = 32


class WinograndeConfig(Section):
    """The Winogrande questions, and how many worked examples precede each (`shots`)."""

    source: Named = "embedded"
    limit: Annotated[Many, Field(ge=2)] | None = None
    shots: Annotated[int, BeforeValidator(as_number), Field(ge=0, le=1_000)] = 0


class ImportanceConfig(Section):
    """How width elements are ranked. `batch` and `sequence` say how activations are aggregated.

    method: a name in `importance.methods.METHODS`, which this package does not import; `planning` checks it.
    seed: of the calibration windows and of method `random`; null for the run's own.
    rounds: 1 ranks the teacher once; k ranks, trims towards the smallest candidate and ranks again, k times in all.
    samples: how many of the calibration windows are read; null is all. Where it is given, `seed` draws them, and the
        run's own seed draws the windows: then neither changes the text that students are distilled on.
    """

    method: Text = "activation"
    batch: Literal["l1", "l2", "mean", "variance"] = "l2"
    sequence: Literal["mean", "l2", "variance"] = "mean"
    seed: Seed | None = None
    rounds: Few = 1
    samples: Many | None = None


class DepthConfig(Section):
    """The sweep over contiguous blocks: their lengths (layers, or a fraction of the depth) and metrics.

    lengths: auto is one, two, a quarter and a half of the teacher's layers.
    """

    lengths: Annotated[
        Annotated[Literal["auto"], Tag("auto")] | Annotated[tuple[LayersOrFraction, ...], Tag("list")],
        LIST_OR_AUTO, BeforeValidator(auto_or_list), Field(min_length=1),
    ] = "auto"  # fmt: skip
    metrics: Annotated[
        tuple[Literal["lm_loss", "winogrande", "bi", "angular", "taylor"], ...],
        BeforeValidator(as_list), Field(min_length=1),
    ] = ("lm_loss", "winogrande", "bi")  # fmt: skip
    workers: AutoProcesses = "auto"
    weights: Literal["auto", "resident", "streamed"] = "auto"  # streamed: one layer in memory at a time

    @model_validator(mode="after")
    def _gradients_need_all_weights(self) -> "DepthConfig":
        if "taylor" in self.metrics and self.weights == "streamed":
            raise ValueError("depth.weights: streamed with metric taylor, whose backward pass holds the whole teacher; "
                             "valid: resident or auto, or metrics without taylor")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _lengths_are_layers_or_fractions(self) -> "DepthConfig":
        for length in () if self.lengths == "auto" else self.lengths:
            if length >= 1 and length != int(length):
                raise ValueError(f"depth.lengths: {length:g} is neither a whole number of layers nor a fraction "
                                 f"of the depth below 1; valid: {int(length)} or 0.5")  # fmt: skip
        return self
