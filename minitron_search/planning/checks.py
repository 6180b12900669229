"""Check a configuration against the run directory, the disk, the compiler and the teacher, before anything is spent."""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from minitron_search.config import loading
from minitron_search.config.inputs import ImportanceConfig
from minitron_search.config.schema import Config
from minitron_search.config.types import Precision
from minitron_search.data.corpus import Corpus
from minitron_search.distillation.teacher_cache import Request, cache_bytes, free_bytes
from minitron_search.importance.methods import method_of
from minitron_search.losses.divergences import DIVERGENCES, divergence_of, loss_names
from minitron_search.models import device
from minitron_search.models.families import sizes
from minitron_search.ownership.owner import check_writable, holds_anything
from minitron_search.planning import disk
from minitron_search.planning.defaults import completed
from minitron_search.planning.workload import Costs
from minitron_search.records.bucket import bucket_copy
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import cache_folder
from minitron_search.trials.settings import RATES

# what a continued run may change
PLACEMENT = (
    "stages", "search.concurrency", "depth.workers", "depth.weights", "output", "resources",
    "distillation.gradient_checkpointing", "distillation.compile", "evaluation", "trackers",
)  # fmt: skip


# Keys that runs begun before they existed lack -> the value by which such a run did what it did
ADDED = {"retraining.dtype": "float32"}


def is_placement(key: str) -> bool:
    """Return whether a continued run may change a key, or a section."""
    return any(key == placed or key.startswith(f"{placed}.") for placed in PLACEMENT)


def importance_seed(config: Config) -> int:
    """Return the seed of importance: `importance.seed`, else the run's."""
    return config.seed if config.importance.seed is None else config.importance.seed


def train_request(
    config: Config, teacher: PretrainedConfig, corpus: Corpus, computed_in: Precision, key: str = ""
) -> Request:
    """Return the request for the teacher's outputs (`key` is its content id) for every train window."""
    dims, settings = sizes(teacher), config.distillation
    k = settings.topk if settings.teacher_cache == "topk" else None
    return Request(key, f"{corpus.id} train", corpus.train, computed_in, dims["hidden"], dims["vocab"], k)


def check_importance(config: ImportanceConfig) -> None:
    """Raise ValueError for an unknown method, and for several rounds of one that rotates the teacher."""
    if method_of(config.method).rotates and config.rounds > 1:
        raise ValueError(f"importance.rounds: {config.rounds} with method {config.method}, whose rounds rotate "
                         "each other's channels, so that no single order comes of them; valid: 1")  # fmt: skip


def check_output(run_dir: RunDirectory, config: Config, resume: bool) -> None:
    """Raise ValueError if the run cannot be written to `output`, or does not continue what is there."""
    if bucket := bucket_copy(config.output, run_dir):
        if resume:
            bucket.pull()
        elif bucket.exists():
            raise ValueError(f"output: {config.output} is not empty; valid: another address, or --resume to continue "
                             "the run that it holds")  # fmt: skip
    for parent in (*run_dir.root.parents, *run_dir.root.resolve().parents):
        other = RunDirectory(parent)
        if other.config.is_file() and other.events_log.is_file():
            raise ValueError(f"output: {config.output} is inside the run {parent}; valid: a folder outside it")
    check_writable(run_dir.root)
    if not holds_anything(run_dir.root):
        if resume:
            raise ValueError(f"output: {config.output} holds no run to continue; "
                             "valid: the same command without --resume")  # fmt: skip
        return
    if not run_dir.config.exists():
        raise ValueError(f"output: {config.output} is not empty and holds no run; valid: a new folder")
    if not resume:
        raise ValueError(f"output: {config.output} holds a run; valid: another folder, or --resume to continue it")
    begun_as = as_begun(run_dir, loading.parse_config(run_dir.read_config()))  # what it lacks is as it was
    begun_with = completed(begun_as, None)[0].dump()
    changed = [
        line for line in loading.differences(begun_with, as_begun(run_dir, config).dump())
        if not is_placement(line.partition(":")[0])
    ]  # fmt: skip
    if changed:
        raise ValueError(f"output: {config.output} holds a run of another configuration; " + "; ".join(changed)
                         + "; valid: the same values, or another folder")  # fmt: skip


def as_begun(run_dir: RunDirectory, config: Config) -> Config:
    """Return the configuration with the values of `ADDED` for the keys that the run in `run_dir` lacks, and with its
    learning rates, if they are not given others."""
    if not run_dir.config.exists():
        return config
    there, values = run_dir.read_config(), config.dump()
    default = loading.parse_config({}).dump()
    for key, value in ADDED.items():
        section, name = key.split(".")
        if name not in (there.get(section) or {}) and values[section][name] == default[section][name]:
            values[section][name] = value
    for section in RATES:  # a run begun with a number, before `auto` was the default, or given one, goes on with it
        if values[section]["learning_rate"] == "auto" and "learning_rate" in (there.get(section) or {}):
            values[section]["learning_rate"] = there[section]["learning_rate"]
    return loading.parse_config(values)


def check_stages(run_dir: RunDirectory, config: Config) -> None:
    """Raise ValueError if a stage lacks another one, which neither runs now nor has left its result."""
    stages = config.stages
    if "search" in stages and "importance" not in stages and not run_dir.importance.exists():
        raise ValueError(f"stages: {', '.join(stages)}: search needs importance, which {config.output} does not hold; "
                         "valid: importance,search")  # fmt: skip
    block = config.space.axes.drop_block
    seeded = block is not None and block.seeds == "sweep" and "search" in stages
    if seeded and "depth" not in stages and not run_dir.depth_recommendation.exists():
        raise ValueError(f"space.axes.drop_block.seeds: sweep needs the depth stage, which {config.output} "
                         "does not hold; valid: stages importance,depth,search, or seeds none")  # fmt: skip
    if "retrain" in stages and "search" not in stages:
        promoted = any(event["event"] == "promoted" for event in run_dir.events())  # the table may be damaged
        promoted = promoted or any(row["status"] == "promoted" for row in run_dir.read_trials())
        if not promoted:
            raise ValueError(f"stages: {', '.join(stages)}: retrain needs a search, which {config.output} does not "
                             "hold; valid: importance,search,retrain")  # fmt: skip


def check_compiler() -> None:
    """Raise ValueError if torch.compile cannot build the C++ it writes (on a GPU too, to launch its kernels)."""
    compiler, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"))
    missing = []
    if shutil.which(compiler) is None:
        missing.append(f"a C++ compiler, and there is no {compiler} on this PATH")
    if not (headers / "Python.h").exists():
        missing.append(f"Python's headers, and {headers} has no Python.h")
    if missing:
        raise ValueError(f"distillation.compile: true needs {'; and '.join(missing)}; valid: false, or CXX naming a "
                         "compiler and the headers installed (Debian: g++ and python3-dev)")  # fmt: skip


def check_loss(config: Config) -> None:
    """Raise ValueError for a loss that no divergence is named by, and for one of logits with a temperature."""
    settings, names = config.distillation, loss_names()
    if settings.loss not in names:
        raise ValueError(f"distillation.loss: {settings.loss!r} is not a loss; valid: {', '.join(names)}")
    divergence = divergence_of(settings.loss)
    if settings.temperature != 1 and divergence is not None and DIVERGENCES[divergence].tau_power == 0:
        valid = ", ".join(name for name, other in DIVERGENCES.items() if other.tau_power)
        raise ValueError(f"distillation.temperature: {settings.temperature:g} with loss {settings.loss}, which "
                         f"compares logits, not probabilities; valid: 1, or distillation.loss {valid} "
                         "(also as clm+kld, ...)")  # fmt: skip


def check_disk(costs: Costs, at_once: int) -> None:
    """Raise ValueError if the disks of the run and of the cache have too little space; `at_once`: trials."""
    run, caches = disk.places(costs.config)
    there = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())  # of a run that goes on
    needed = {run: sum(disk.run_bytes(costs, at_once).values()) - there, caches: sum(disk.cached(costs).values())}
    shared = len({disk.existing(place.folder).stat().st_dev for place in needed}) == 1
    for place, size in ({run: sum(needed.values())} if shared else needed).items():
        folder = disk.existing(place.folder)
        if (free := shutil.disk_usage(folder).free) < size:
            raise ValueError(f"{place.name}: {folder} has {free / 1e9:.1f} GB free and the run needs about "
                             f"{size / 1e9:.1f} GB; valid: a folder on a larger disk, or fewer "
                             "search.trials")  # fmt: skip


def check_topk(config: Config, teacher: PretrainedConfig) -> None:
    """Raise ValueError if `distillation.topk` is not smaller than the vocabulary."""
    vocab = sizes(teacher)["vocab"]
    if config.distillation.teacher_cache == "topk" and config.distillation.topk >= vocab:
        raise ValueError(f"distillation.topk: {config.distillation.topk} leaves nothing of the teacher's vocabulary of "
                         f"{vocab} tokens; valid: at most {vocab - 1}, or teacher_cache hidden")  # fmt: skip


def check_teacher_cache(config: Config, teacher: PretrainedConfig, corpus: Corpus) -> None:
    """Raise ValueError if a teacher cache that is configured by name does not fit; `auto` keeps within its budget."""
    settings, folder = config.distillation, cache_folder() / "teacher_cache"
    used = set(config.stages) & {"search", "retrain"} and settings.loss != "ce"
    if settings.teacher_cache not in ("hidden", "topk") or not used:
        return
    needed = cache_bytes(train_request(config, teacher, corpus, device.resolve(config.precision)))
    limits: list[tuple[str, Any, int]] = [("MINITRON_SEARCH_CACHE", folder, free_bytes(folder))]
    if any(event["event"] == "teacher_asked" for event in RunDirectory(config.output).events()):
        limits = []  # a run that goes on has its cache already
    if settings.teacher_cache_bytes != "auto":
        limits.append(("distillation.teacher_cache_bytes", settings.teacher_cache_bytes, settings.teacher_cache_bytes))
    for name, value, limit in limits:
        if needed > limit:
            raise ValueError(f"distillation.teacher_cache: {settings.teacher_cache} needs {needed:,} bytes, and {name} "
                             f"({value}) allows {limit:,}; valid: auto, off, or that much there")  # fmt: skip
