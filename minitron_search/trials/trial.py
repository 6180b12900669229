"""A trial: (architecture, training settings, arm, seed). Search, controls and retraining are all trials."""

from dataclasses import asdict, dataclass
from typing import Any

from minitron_search.config.types import Precision
from minitron_search.distillation.settings import LoopSettings
from minitron_search.models.architecture import Architecture
from minitron_search.records.cache import content_id
from minitron_search.records.directory import TRIALS_SCHEMA


@dataclass(frozen=True)
class Trial:
    """One student and how it is trained and scored.

    score_precision: may differ from the run's: what users reload is scored in float32.
    stored: the dtype that the trained student is written in; its weights are rounded to it before they are scored.
    counts: the columns of the table that depend on the architecture alone.
    """

    architecture: Architecture
    arm: str
    seed: int
    proposal: int
    initialization: str
    settings: LoopSettings
    score_precision: Precision
    counts: dict[str, int | None]
    stored: str = "float32"

    @property
    def id(self) -> str:
        """Return the name of the trial's folder: arm and a digest of architecture, seed and initialization."""
        return f"{self.arm}-{content_id([self.architecture.to_dict(), self.seed, self.initialization])}"

    def describe(self) -> dict[str, Any]:
        """Return what `architecture.json` holds: from it a killed search is rebuilt."""
        return {
            "trial": self.id,
            "architecture": self.architecture.id,
            "arm": self.arm,
            "seed": self.seed,
            "proposal": self.proposal,
            "initialization": self.initialization,
            "score_precision": self.score_precision,
            **self.counts,
            "layers": list(self.architecture.layers),
            "settings": asdict(self.settings),
        }

    def columns(self) -> dict[str, Any]:
        """Return the columns of `TRIALS_SCHEMA` that are known before it runs."""
        return {name: value for name, value in self.describe().items() if name in TRIALS_SCHEMA.names}
