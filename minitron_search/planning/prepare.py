"""Everything that can be wrong is found here, before Ray starts and before anything is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from minitron_search.config.schema import Config
from minitron_search.config.space import Axes, Budget, SpaceConfig, Target
from minitron_search.data.corpus import Corpus, load_corpus
from minitron_search.data.winogrande import HUB, load_examples
from minitron_search.data.winogrande_packing import PackedOptions, pack
from minitron_search.depth.sweep import in_layers
from minitron_search.distillation.correction import norm_weights
from minitron_search.evaluation.lm_eval_tasks import check_data, parse_tasks
from minitron_search.evaluation.winogrande import check_window
from minitron_search.importance.pca import rotated_config
from minitron_search.models.architecture import parameter_count
from minitron_search.models.families import family_of, sizes, weights, whole
from minitron_search.models.sources import fingerprint, load_tokenizer, teacher_config, teacher_folder
from minitron_search.planning.checks import (
    check_compiler,
    check_disk,
    check_output,
    check_stages,
    check_teacher_cache,
    check_topk,
    importance_seed,
)
from minitron_search.records.bucket import mirror_of
from minitron_search.records.directory import RunDirectory
from minitron_search.search.space import SearchSpace
from minitron_search.tracking.trackers import check_installed, log_in
from minitron_search.trials.settings import correction_tokens


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
    check_output(run, config, resume)
    check_stages(run, config)
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
    check_topk(config, teacher)
    if config.distillation.compile:
        check_compiler()
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
    check_disk(config, space)
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
    check_teacher_cache(config, teacher, corpus)
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
    return SearchSpace(SpaceConfig(budget=Budget(params=Target(target=params)), axes=Axes()), teacher)
