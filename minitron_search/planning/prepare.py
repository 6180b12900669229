"""Everything that can be wrong is found here, before Ray starts and before anything is written."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from minitron_search import __version__
from minitron_search.config import schema as configuration
from minitron_search.config.schema import Axes, Budget, Config, Space, Target
from minitron_search.data.corpus import Corpus, load_corpus
from minitron_search.data.winogrande import HUB, PackedOptions, check_window, load_examples, pack
from minitron_search.depth.sweep import in_layers
from minitron_search.distillation.correction import norm_weights
from minitron_search.distillation.settings import Precision
from minitron_search.distillation.teacher_cache import Request, cache_bytes, free_bytes
from minitron_search.evaluation.lm_eval_tasks import check_data, parse_tasks
from minitron_search.importance.pca import rotated_config
from minitron_search.models import device
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import family_of, sizes, weights, whole
from minitron_search.models.sources import fingerprint, load_tokenizer, teacher_config, teacher_folder
from minitron_search.planning.workload import retrained, search_phases
from minitron_search.records.bucket import mirror_of
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import cache_folder, working_folder
from minitron_search.search.space import SearchSpace
from minitron_search.tracking.trackers import check_installed, log_in
from minitron_search.trials.settings import correction_tokens

VERSIONS = ("torch", "transformers", "ray", "optuna", "numpy", "datasets", "lm_eval")
# what a continued run may change
PLACEMENT = (
    "stages", "search.concurrency", "depth.workers", "depth.weights", "output", "resources.launcher",
    "resources.workers_per_trial", "resources.strategy", "distillation.gradient_checkpointing", "distillation.compile",
    "resources.mfu", "resources.flops_per_second", "resources.price_per_hour", "evaluation.tasks",
    "evaluation.references", "evaluation.limit", "trackers",
)  # fmt: skip
# float32 master, two moments: what one checkpoint holds for every parameter
CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class Model:
    folder: Path
    config: PretrainedConfig
    fingerprint: str


@dataclass(frozen=True)
class Prepared:
    """A run's checked inputs. `teacher_*`: the model that is pruned; `other`: the one that teaches, where it is not the
    same. `corrected`: the artifact that is in the place of one of them."""

    config: Config
    run: RunDirectory
    teacher_folder: Path
    teacher_config: PretrainedConfig
    teacher_fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    space: SearchSpace
    corpus: Corpus
    packed: PackedOptions
    other: Model | None = None
    corrected: Path | None = None

    @property
    def teaching(self) -> Model:
        """The model that students are distilled from."""
        return self.other or Model(self.teacher_folder, self.teacher_config, self.teacher_fingerprint)


def check(config: Config, resume: bool) -> tuple[PretrainedConfig, SearchSpace]:
    """The quick checks, without weights or text. Raises ValueError with the field, the value and an alternative."""
    run = RunDirectory(config.output)
    _check_output(run, config, resume)
    _check_stages(run, config)
    teacher = teacher_config(config.teacher.model)
    family_of(teacher)
    if config.importance.method == "pca":
        teacher = rotated_config(teacher)  # candidates are cut from it, and counted as it is
    space = _space(config, teacher)
    if "depth" in config.stages:
        in_layers(config.depth.lengths, teacher.num_hidden_layers)
    other = _other_config(config, teacher)
    for taught in (teacher, other or teacher):
        limit = getattr(taught, "max_position_embeddings", None)
        if limit and config.corpus.sequence_length > limit:
            raise ValueError(f"corpus.sequence_length: {config.corpus.sequence_length} is above the teacher's {limit} "
                             f"positions; valid: at most {limit}")  # fmt: skip
    if config.teacher.correction.method == "norms":
        with torch.device("meta"):
            norm_weights(AutoModelForCausalLM.from_config(other or teacher))
    parse_tasks(config.evaluation.tasks)
    for reference in config.evaluation.references:
        with _named_as("evaluation.references"):
            teacher_config(reference)
    check_installed(config.trackers)
    _check_topk(config, teacher)
    if config.distillation.compile:
        _check_compiler()
    if config.winogrande.source != HUB:
        load_examples(config.winogrande.source, config.winogrande.limit)
    return teacher, space


def prepare(config: Config, resume: bool) -> Prepared:
    """All checks and all inputs. Raises ValueError as `check` does, and where text or disk space is too short."""
    teacher, space = check(config, resume)
    if mirror := mirror_of(config.output, RunDirectory(config.output)):
        mirror.check_writable()
    log_in(config.trackers)
    examples = load_examples(config.winogrande.source, config.winogrande.limit)
    _check_disk(config, space)
    folder = teacher_folder(config.teacher.model).absolute()
    tokenizer = load_tokenizer(config.teacher.model)
    longest = getattr(teacher, "max_position_embeddings", 2048)
    packed = pack(examples, tokenizer, config.winogrande.shots, max_length=longest)
    check_window(teacher, packed)
    # the same text whatever stages run now: the corrected teacher is of that text
    corrected = correction_tokens(config) if set(config.stages) != {"report"} else 0
    trains = corrected or set(config.stages) & {"importance", "search", "retrain"}
    corpus = load_corpus(
        config.corpus.train,
        config.corpus.validation,
        tokenizer,
        sequence_length=config.corpus.sequence_length,
        calibration_samples=config.corpus.calibration_samples,
        validation_samples=config.corpus.validation_samples,
        train_tokens=max(config.search.rungs[-1], config.retraining.tokens, corrected) if trains else 0,
        seed=config.seed if config.importance.samples else importance_seed(config),
        calibration=config.corpus.calibration,
    )
    _check_teacher_cache(config, teacher, corpus)
    if "retrain" in config.stages:
        check_data(parse_tasks(config.evaluation.tasks))
        for reference in config.evaluation.references:
            with _named_as("evaluation.references"):
                teacher_folder(reference)
    return Prepared(
        config=config,
        run=RunDirectory(config.output),
        teacher_folder=folder,
        teacher_config=teacher,
        teacher_fingerprint=fingerprint(folder),
        tokenizer=tokenizer,
        space=space,
        corpus=corpus,
        packed=packed,
        other=_other_model(config, tokenizer),
    )


def lines_up(one: PretrainedConfig, other: PretrainedConfig) -> bool:
    """Whether two models have every axis alike, so that one order of elements permutes both."""
    return one.model_type == other.model_type and whole(one) == whole(other)


def importance_seed(config: Config) -> int:
    return config.seed if config.importance.seed is None else config.importance.seed


def train_request(
    config: Config, teacher: PretrainedConfig, corpus: Corpus, computed_in: Precision, key: str = ""
) -> Request:
    """What is asked of the teacher (whose content is `key`) for every train window, once."""
    dims, asked = sizes(teacher), config.distillation
    k = asked.topk if asked.teacher_cache == "topk" else None
    return Request(key, f"{corpus.id} train", corpus.train, computed_in, dims["hidden"], dims["vocab"], k)


def environment(prepared: Prepared) -> dict[str, Any]:
    """Versions, git, hardware, seeds and data ids: what would have to be the same for the same numbers."""
    return {
        "python": platform.python_version(),
        "versions": {"minitron_search": __version__, **{name: version(name) for name in VERSIONS}},
        "git": _git(),
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_bytes": _memory(),
        },
        "seed": prepared.config.seed,
        "teacher": {"folder": str(prepared.teacher_folder), "fingerprint": prepared.teacher_fingerprint},
        "distillation_teacher": {"folder": str(prepared.teaching.folder), "fingerprint": prepared.teaching.fingerprint},
        "corrected_teacher": prepared.corrected and {"id": prepared.corrected.name, "folder": str(prepared.corrected)},
        "corpus": prepared.corpus.id,
        "winogrande_examples": len(prepared.packed.answers),
        "command": sys.argv,
    }


def _other_config(config: Config, teacher: PretrainedConfig) -> PretrainedConfig | None:
    """Of the model that teaches where it is not the one that is pruned. Raises ValueError where it cannot."""
    name = config.distillation.teacher
    if name is None:
        return None
    with _named_as("distillation.teacher"):
        other = teacher_config(name)
        family_of(other)
    if other.vocab_size != teacher.vocab_size:
        raise ValueError(f"distillation.teacher: {name!r} has a vocabulary of {other.vocab_size:,} and teacher.model "
                         f"{config.teacher.model!r} one of {teacher.vocab_size:,}; valid: a model with the same "
                         "tokenizer, such as the one that teacher.model was pruned from")  # fmt: skip
    if config.distillation.intermediate and not lines_up(teacher, other):
        raise ValueError(f"distillation.intermediate: {config.distillation.intermediate} compares states channel by "
                         f"channel, and distillation.teacher {name!r} has another shape than teacher.model "
                         f"{config.teacher.model!r}; valid: 0, or a teacher of the same shape")  # fmt: skip
    return other


def _other_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> Model | None:
    """Raises ValueError for a model that means other words by the same token ids."""
    name = config.distillation.teacher
    if name is None:
        return None
    with _named_as("distillation.teacher"):
        folder, own = teacher_folder(name).absolute(), load_tokenizer(name).get_vocab()
    ours = tokenizer.get_vocab()
    if own != ours:
        token = min(word for word in own.keys() | ours.keys() if own.get(word) != ours.get(word))
        raise ValueError(f"distillation.teacher: {name!r} has another vocabulary than teacher.model "
                         f"{config.teacher.model!r}: {token!r} is its token {own.get(token)} and the other's "
                         f"{ours.get(token)}; valid: a model with the same tokenizer, such as the one that "
                         "teacher.model was pruned from")  # fmt: skip
    return Model(folder, AutoConfig.from_pretrained(folder), fingerprint(folder))


@contextmanager
def _named_as(key: str) -> Iterator[None]:
    """What is wrong with a model is said of the key that names it here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("teacher.model", key)) from error


def _space(config: Config, teacher: PretrainedConfig) -> SearchSpace:
    """What is searched; where nothing is, the teacher alone: no budget has to fit it."""
    if set(config.stages) & {"search", "retrain"}:
        return SearchSpace(config.space, teacher)
    params = parameter_count(weights(teacher), sizes(teacher))
    return SearchSpace(Space(budget=Budget(params=Target(target=params)), axes=Axes()), teacher)


def _check_output(run: RunDirectory, config: Config, resume: bool) -> None:
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
        line for line in configuration.differences(there, asked)
        if not line.startswith(tuple(f"{key}:" for key in PLACEMENT))
    ]  # fmt: skip
    if changed:
        raise ValueError(f"output: {config.output} holds a run of another configuration; " + "; ".join(changed)
                         + "; valid: the same values, or another folder")  # fmt: skip


def _check_stages(run: RunDirectory, config: Config) -> None:
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


def _check_compiler() -> None:
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


def _check_disk(config: Config, space: SearchSpace) -> None:
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


def _check_topk(config: Config, teacher: PretrainedConfig) -> None:
    vocab = sizes(teacher)["vocab"]
    if config.distillation.teacher_cache == "topk" and config.distillation.topk >= vocab:
        raise ValueError(f"distillation.topk: {config.distillation.topk} leaves nothing of the teacher's vocabulary of "
                         f"{vocab} tokens; valid: at most {vocab - 1}, or teacher_cache hidden")  # fmt: skip


def _check_teacher_cache(config: Config, teacher: PretrainedConfig, corpus: Corpus) -> None:
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


def _git() -> str | None:
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
