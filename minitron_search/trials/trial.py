"""What a trial is: (architecture, training settings, arm, seed). Search, controls and retraining are all trials."""

from dataclasses import asdict, dataclass
from typing import Any

from minitron_search.config.types import Precision
from minitron_search.distillation.settings import LoopSettings
from minitron_search.models.architecture import Architecture, digest
from minitron_search.records.directory import TRIALS_SCHEMA


@dataclass(frozen=True)
class Trial:
    """`score_precision` may differ from the run's: what users reload is scored in float32.

    `counts` are the columns of the table that depend on the architecture alone.
    """

    architecture: Architecture
    arm: str
    seed: int
    proposal: int
    initialization: str
    settings: LoopSettings
    score_precision: Precision
    counts: dict[str, int | None]

    @property
    def id(self) -> str:
        return f"{self.arm}-{digest([self.architecture.to_dict(), self.seed, self.initialization])}"

    def describe(self) -> dict[str, Any]:
        """What `architecture.json` holds: with it a killed search is rebuilt."""
        made = {"trial": self.id, "architecture": self.architecture.id, "arm": self.arm, "seed": self.seed}
        return {
            **made,
            "proposal": self.proposal,
            "initialization": self.initialization,
            "score_precision": self.score_precision,
            **self.counts,
            "layers": list(self.architecture.layers),
            "settings": asdict(self.settings),
        }

    def columns(self) -> dict[str, Any]:
        """Those of `TRIALS_SCHEMA` that are known before it runs."""
        return {name: value for name, value in self.describe().items() if name in TRIALS_SCHEMA.names}
