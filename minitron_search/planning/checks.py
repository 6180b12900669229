"""Check a configuration against the run directory, the disk, the compiler and the teacher, before anything is spent."""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.config.types import Precision
from minitron_search.data.corpus import Corpus
from minitron_search.distillation.teacher_cache import Request, cache_bytes, free_bytes
from minitron_search.models import device
from minitron_search.models.families import sizes
from minitron_search.records.bucket import mirror_of
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import cache_folder, working_folder
from minitron_search.search.schedule import retrained, search_phases
from minitron_search.search.space import SearchSpace
from minitron_search.trials.settings import correction_tokens

# what a continued run may change
PLACEMENT = (
    "stages", "search.concurrency", "depth.workers", "depth.weights", "output", "resources.launcher",
    "resources.workers_per_trial", "resources.strategy", "distillation.gradient_checkpointing", "distillation.compile",
    "resources.mfu", "resources.flops_per_second", "resources.price_per_hour", "evaluation.tasks",
    "evaluation.references", "evaluation.limit", "trackers",
)  # fmt: skip


# float32 master, two moments: what one checkpoint holds for every parameter
CHECKPOINT_BYTES = 12


def importance_seed(config: Config) -> int:
    return config.seed if config.importance.seed is None else config.importance.seed


def train_request(
    config: Config, teacher: PretrainedConfig, corpus: Corpus, computed_in: Precision, key: str = ""
) -> Request:
    """What is asked of the teacher (whose content is `key`) for every train window, once."""
    dims, asked = sizes(teacher), config.distillation
    k = asked.topk if asked.teacher_cache == "topk" else None
    return Request(key, f"{corpus.id} train", corpus.train, computed_in, dims["hidden"], dims["vocab"], k)


def check_output(run: RunDirectory, config: Config, resume: bool) -> None:
    if mirror := mirror_of(config.output, run):
        if resume:
            mirror.pull()
        elif mirror.exists():
            raise ValueError(f"output: {config.output} is not empty; valid: another address, or --resume to continue "
                             "the run that it holds")  # fmt: skip
    root = run.root.absolute()
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"output: {existing} is no folder that can be written to; valid: a new folder")
    if not run.root.exists() or not any(run.root.iterdir()):
        if resume:
            raise ValueError(f"output: {config.output} holds no run to continue; "
                             "valid: the same command without --resume")  # fmt: skip
        return
    if not run.config.exists():
        raise ValueError(f"output: {config.output} is not empty and holds no run; valid: a new folder")
    if not resume:
        raise ValueError(f"output: {config.output} holds a run; valid: another folder, or --resume to continue it")
    asked, there = config.dump(), run.read_config()
    changed = [
        line for line in loading.differences(there, asked)
        if not line.startswith(tuple(f"{key}:" for key in PLACEMENT))
    ]  # fmt: skip
    if changed:
        raise ValueError(f"output: {config.output} holds a run of another configuration; " + "; ".join(changed)
                         + "; valid: the same values, or another folder")  # fmt: skip


def check_stages(run: RunDirectory, config: Config) -> None:
    stages = config.stages
    if "search" in stages and "importance" not in stages and not run.importance.exists():
        raise ValueError(f"stages: {', '.join(stages)}: search needs importance, which {config.output} does not hold; "
                         "valid: importance,search")  # fmt: skip
    block = config.space.axes.drop_block
    seeded = block is not None and block.seeds == "sweep" and "search" in stages
    if seeded and "depth" not in stages and not run.depth_recommendation.exists():
        raise ValueError(f"space.axes.drop_block.seeds: sweep needs the depth stage, which {config.output} "
                         "does not hold; valid: stages importance,depth,search, or seeds none")  # fmt: skip
    if "retrain" in stages and "search" not in stages:
        promoted = any(row["status"] == "promoted" for row in run.read_trials())
        if not promoted:
            raise ValueError(f"stages: {', '.join(stages)}: retrain needs a search, which {config.output} does not "
                             "hold; valid: importance,search,retrain")  # fmt: skip


def check_compiler() -> None:
    """torch.compile writes C++ and builds it (on a GPU too, to launch its kernels)."""
    compiler, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"))
    missing = []
    if shutil.which(compiler) is None:
        missing.append(f"a C++ compiler, and there is no {compiler} on this PATH")
    if not (headers / "Python.h").exists():
        missing.append(f"Python's headers, and {headers} has no Python.h")
    if missing:
        raise ValueError(f"distillation.compile: true needs {'; and '.join(missing)}; valid: false, or CXX naming a "
                         "compiler and the headers installed (Debian: g++ and python3-dev)")  # fmt: skip


def check_disk(config: Config, space: SearchSpace) -> None:
    largest = max(space.measures(architecture).params for architecture in space.smallest_and_largest())
    phases, rungs = search_phases(config, config.search.trials), len(config.search.rungs)
    first = next(phase for phase in phases if phase.tokens)  # at 0 tokens none has a checkpoint
    # those beyond the rungs are new trials; the later rungs' are of the first
    trials = first.trials + sum(phase.trials for phase in phases[rungs:]) if "search" in config.stages else 0
    students = 2 * retrained(config) if "retrain" in config.stages else 0  # their newest checkpoint and best/
    needed = CHECKPOINT_BYTES * largest * (trials + students)
    teacher_bytes = CHECKPOINT_BYTES * space.measures(space.teacher).params
    if config.teacher.correction.parallel:  # the teacher is in every checkpoint of a student
        needed += teacher_bytes * (trials + students)
    corrected = teacher_bytes if correction_tokens(config) else 0  # its checkpoint while it is made, then itself
    for name, folder, bytes_needed in (
        ("output", working_folder(config.output), needed),
        (
            "MINITRON_SEARCH_CACHE",
            cache_folder(),
            (12 if config.importance.method == "pca" else 8) * space.measures(space.teacher).params + corrected,
        ),
    ):
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < bytes_needed:
            raise ValueError(f"{name}: {existing} has {free / 1e9:.1f} GB free and the run needs about "
                             f"{bytes_needed / 1e9:.1f} GB; valid: a folder on a larger disk, or fewer "
                             "search.trials")  # fmt: skip


def check_topk(config: Config, teacher: PretrainedConfig) -> None:
    vocab = sizes(teacher)["vocab"]
    if config.distillation.teacher_cache == "topk" and config.distillation.topk >= vocab:
        raise ValueError(f"distillation.topk: {config.distillation.topk} leaves nothing of the teacher's vocabulary of "
                         f"{vocab} tokens; valid: at most {vocab - 1}, or teacher_cache hidden")  # fmt: skip


def check_teacher_cache(config: Config, teacher: PretrainedConfig, corpus: Corpus) -> None:
    """`auto` keeps within its budget by itself; what was asked for by name has to fit."""
    asked, folder = config.distillation, cache_folder() / "teacher_cache"
    used = set(config.stages) & {"search", "retrain"} and asked.loss != "ce"
    if asked.teacher_cache not in ("hidden", "topk") or not used:
        return
    needed = cache_bytes(train_request(config, teacher, corpus, device.resolve(config.precision)))
    limits: list[tuple[str, Any, int]] = [("MINITRON_SEARCH_CACHE", folder, free_bytes(folder))]
    if any(event["event"] == "teacher_asked" for event in RunDirectory(config.output).events()):
        limits = []  # a run that goes on has its cache already
    if asked.teacher_cache_bytes != "auto":
        limits.append(("distillation.teacher_cache_bytes", asked.teacher_cache_bytes, asked.teacher_cache_bytes))
    for name, value, limit in limits:
        if needed > limit:
            raise ValueError(f"distillation.teacher_cache: {asked.teacher_cache} needs {needed:,} bytes, and {name} "
                             f"({value}) allows {limit:,}; valid: auto, off, or that much there")  # fmt: skip
