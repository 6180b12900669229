"""What trials read, made from a tiny teacher without Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_search.config.types import Precision
from minitron_search.data.winogrande import load_examples
from minitron_search.data.winogrande_packing import pack
from minitron_search.distillation.settings import LoopSettings
from minitron_search.distillation.teacher_cache import Request, ensure, in_this_process
from minitron_search.models.architecture import Architecture
from minitron_search.models.families import whole
from minitron_search.models.loading import load_teacher
from minitron_search.pruning.rankings import Rankings
from minitron_search.pruning.trimming import permute_teacher
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.inputs import TrialInputs
from minitron_search.trials.trial import Trial
from tests import tiny

LENGTH = 16


def materials(folder: Path, precision: Precision = "float32", stored: str = "float32", **given: Any) -> TrialInputs:
    """Of a random teacher in a random order, stored in dtype `stored`; its shape as `tiny.config`. Teacher caches are
    written where the environment says."""
    teacher = tiny.teacher_folder(folder / "teacher", **given)
    if stored != "float32":
        AutoModelForCausalLM.from_pretrained(teacher, dtype=stored).save_pretrained(teacher)
    config = AutoConfig.from_pretrained(teacher)
    rankings, depth = Rankings.random(config, 0), whole(config).num_hidden_layers
    computing = permute_teacher(teacher, rankings, folder / precision, precision)
    draw = np.random.default_rng(0)
    train, validation = (draw.integers(0, config.vocab_size, (rows, LENGTH)).astype(np.int32) for rows in (20, 4))
    questions = load_examples(str(tiny.winogrande_file(folder / "questions.jsonl")))
    asked = Request(str(folder), "validation", validation, precision, config.hidden_size, config.vocab_size)
    return TrialInputs(
        run_dir=RunDirectory(str(folder / "run")),
        teacher_folder=permute_teacher(teacher, rankings, folder / "stored"),
        compute_folder=computing,
        train=train,
        validation=validation,
        packed=pack(questions, tiny.tokenizer()),
        train_cache=None,
        validation_cache=ensure(asked, in_this_process(asked, lambda: load_teacher(computing))).path,
        block_bi=torch.rand(depth + 1, depth + 1).numpy(),
        precision=precision,
    )


def trial(architecture: Architecture, settings: LoopSettings, initialization: str = "pruned") -> Trial:
    return Trial(
        architecture=architecture,
        arm="retrained",
        seed=0,
        proposal=-1,
        initialization=initialization,
        settings=settings,
        score_precision="float32",
        counts={},
    )
