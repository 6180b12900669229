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
    """A section of the configuration: frozen, and a key that it does not know is an error.

    The text under a key is its description, which `--help`, docs/configuration.md and search_spaces/template.yaml show
    (`python -m tests.project.configuration` writes them).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class CorrectionConfig(Section):
    """Light fine-tuning of the model that teaches, on the text of the distillation, with the LM loss (arXiv:2408.11796,
    section 3)."""

    method: Literal["none", "full", "lora", "norms"] = "none"
    """Weights that are trained: full is all of them, lora low-rank additions, norms the weights of norms."""
    tokens: AutoTokens = "auto"
    """Tokens that it is trained on. auto: retraining.tokens."""
    learning_rate: Literal["auto"] | LearningRate = "auto"
    """Peak learning rate. auto: a fifth of retraining.learning_rate."""
    warmup_steps: Literal["auto"] | Steps = "auto"
    """Steps of warm-up. auto: the paper's 120, or a tenth of all steps where that is fewer."""
    seed: Seed | None = None
    """Seed of the order of the text and of LoRA's first weights. null: the run's own."""
    parallel: bool = False
    """true: correct while students distil, a step for each of theirs, instead of before."""


class TeacherConfig(Section):
    """The model that is pruned."""

    model: Place = "smollm2-135m"
    """The model to prune: smollm2-135m (embedded), a folder here or in storage, or a Hub name."""
    correction: CorrectionConfig = CorrectionConfig()
    prune: Literal["auto", "original", "corrected"] = "auto"
    """Which weights students are cut from. auto: the corrected ones, if the pruned model is corrected before
    distillation, else the original ones."""


class CorpusConfig(Section):
    """The text that calibrates, trains and validates."""

    train: Named = "docstrings"
    """Training text: docstrings (embedded), a .txt, .jsonl or .parquet file or glob, or a Hub data set."""
    validation: Named = "docstrings"
    """Validation text, given in the same ways. It is disjoint from train even where the source is the same."""
    calibration: Named | None = None
    """Text whose windows importance is measured on. null: that of train. random: uniform random tokens."""
    sequence_length: Annotated[int, BeforeValidator(as_number), Field(ge=8, le=MOST_WINDOW)] = 256
    """Tokens of a window."""
    calibration_samples: Many = 64
    """How many windows importance is measured on."""
    validation_samples: Annotated[Many, Field(ge=2)] = 32
    """How many windows every score is measured on."""


class WinograndeConfig(Section):
    """The Winogrande questions that students are scored on."""

    source: Named = "embedded"
    """Where the questions come from: embedded, a .jsonl file, or allenai/winogrande."""
    limit: Annotated[Many, Field(ge=2)] | None = None
    """How many questions are used. null: all."""
    shots: Annotated[int, BeforeValidator(as_number), Field(ge=0, le=1_000)] = 0
    """Worked examples before each question."""


class ImportanceConfig(Section):
    """How width elements are ranked: the order in which they are kept."""

    method: Text = "activation"  # a name in `importance.methods.METHODS`, of which this package knows nothing
    """Ranking method: activation, random, magnitude, taylor, wanda or pca."""
    batch: Literal["l1", "l2", "mean", "variance"] = "l2"
    """How activations are aggregated over samples."""
    sequence: Literal["mean", "l2", "variance"] = "mean"
    """How activations are aggregated over positions; mean is of absolute values."""
    seed: Seed | None = None
    """Seed of the calibration windows and of method random. null: the run's own."""
    rounds: Few = 1
    """Rankings in all: 1 ranks the teacher once; each further one follows a trim towards the smallest candidate."""
    samples: Many | None = None
    """How many of the calibration windows are read. null: all. If it is given, importance.seed draws them, and the
    run's own seed draws the windows that they are drawn from: neither changes the text that students are distilled
    on."""


class DepthConfig(Section):
    """The sweep over contiguous blocks of layers, which runs where stages has depth."""

    lengths: Annotated[
        Annotated[Literal["auto"], Tag("auto")] | Annotated[tuple[LayersOrFraction, ...], Tag("list")],
        LIST_OR_AUTO, BeforeValidator(auto_or_list), Field(min_length=1),
    ] = "auto"  # fmt: skip
    """Lengths of the blocks: layers, or, below 1, a share of the depth. auto: 1, 2, a quarter and a half of the
    teacher's layers."""
    metrics: Annotated[
        tuple[Literal["lm_loss", "winogrande", "bi", "angular", "taylor"], ...],
        BeforeValidator(as_list), Field(min_length=1),
    ] = ("lm_loss", "winogrande", "bi")  # fmt: skip
    """Metrics of every block."""
    workers: AutoProcesses = "auto"
    """Processes that share the sweep. auto: as many as the whole cluster holds."""
    weights: Literal["auto", "resident", "streamed"] = "auto"
    """How a process holds the teacher: resident, all of it, or streamed, one layer in memory at a time. auto: streamed
    where the weights need over half of a worker's memory."""

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
