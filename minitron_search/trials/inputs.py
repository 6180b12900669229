"""The inputs that all trials of a run share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_search.config.types import Precision
from minitron_search.data.winogrande_packing import PackedOptions
from minitron_search.distillation.settings import CorrectionSettings
from minitron_search.pruning.laco import Merged
from minitron_search.records.directory import RunDirectory


@dataclass(frozen=True)
class TrialInputs:
    """Everything that a run's trials read, made once and shared through Ray's object store and memory-mapped files.

    `teacher_folder` holds the permuted teacher as it is stored, which students are cut from; `compute_folder` the
    same in the dtype of the products, so that no trial converts it. `train_cache` and `validation_cache`
    are teacher caches of the windows beside them; None for a train cache means that the teacher is asked live.
    Where another model teaches than the one that is pruned, or the same one corrected, `compute_folder` and the caches
    are that model's. `parallel`: how it is corrected meanwhile, from the weights in `parallel_folder`. `merges`: LaCo's
    stacks of layers, which students of initialization `merged` start with.
    """

    run_dir: RunDirectory
    teacher_folder: Path
    compute_folder: Path
    train: np.ndarray
    validation: np.ndarray
    packed: PackedOptions
    train_cache: Path | None
    validation_cache: Path
    block_bi: np.ndarray
    precision: Precision
    parallel: CorrectionSettings | None = None
    parallel_folder: Path | None = None
    merges: Sequence[Merged] = ()

    def here(self) -> "TrialInputs":
        """Return the inputs themselves, once all of their folders are on this node."""
        if self.run_dir.transfer is not None:
            for folder in self.folders():
                self.run_dir.transfer.fetch(folder)
        return self

    def folders(self) -> list[Path]:
        """Return every folder that a trial reads, each once."""
        folders = (
            self.teacher_folder,
            self.compute_folder,
            self.train_cache,
            self.validation_cache,
            self.parallel_folder,
        )
        return [folder for folder in dict.fromkeys(folders) if folder is not None]
