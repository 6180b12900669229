"""Find everything that can be wrong, before Ray starts and before anything is written, and load a run's inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from minitron_search.config.schema import Config
from minitron_search.config.space import Axes, Budget, SpaceConfig, Target
from minitron_search.config.types import Precision
from minitron_search.data.corpus import Corpus, load_corpus
from minitron_search.data.winogrande import HUB, load_examples
from minitron_search.data.winogrande_packing import PackedOptions, pack
from minitron_search.depth.sweep import in_layers
from minitron_search.distillation.correction import norm_weights
from minitron_search.evaluation.lm_eval_tasks import check_data, parse_tasks
from minitron_search.evaluation.winogrande import check_window
from minitron_search.importance.methods import trimmed_config
from minitron_search.models.architecture import parameter_count
from minitron_search.models.device import resolve
from minitron_search.models.families import family_of, sizes, weights, whole
from minitron_search.planning.checks import (
    check_compiler,
    check_disk,
    check_importance,
    check_loss,
    check_output,
    check_stages,
    check_teacher_cache,
    check_topk,
    importance_seed,
)
from minitron_search.records.bucket import bucket_copy
from minitron_search.records.directory import RunDirectory
from minitron_search.search.samplers import check_sampler
from minitron_search.search.space import SearchSpace
from minitron_search.teachers.sources import checked_fingerprint, load_tokenizer, teacher_config, teacher_folder
from minitron_search.tracking.trackers import check_installed, log_in
from minitron_search.trials.settings import correction_tokens


@dataclass(frozen=True)
class Model:
    """A model of the run: its stock folder, its configuration, and the content id of both."""

    folder: Path
    config: PretrainedConfig
    fingerprint: str


@dataclass(frozen=True)
class Prepared:
    """A run's checked inputs.

    `precision`: of the products, as this machine resolves `auto` until the run is on its cluster. `pruned`: the model
    that students are cut from. `distillation_teacher`: the one that they are distilled from, None if it is the same.
    `corrected`: the folder of the corrected model that has taken the place of one of them, or of both.
    """

    config: Config
    run_dir: RunDirectory
    precision: Precision
    pruned: Model
    tokenizer: PreTrainedTokenizerBase
    space: SearchSpace
    corpus: Corpus
    packed: PackedOptions
    distillation_teacher: Model | None = None
    corrected: Path | None = None

    @property
    def teacher(self) -> Model:
        """The model that students are distilled from."""
        return self.distillation_teacher or self.pruned


def check_names(config: Config) -> None:
    """Do the checks that need the configuration alone: of the method, the sampler and the loss that it names.

    Raises ValueError for one that there is not, and for one that other values rule out.
    """
    check_importance(config.importance)
    check_sampler(config.search.sampler, config.search.objectives)
    check_loss(config)


def check(config: Config, resume: bool) -> tuple[PretrainedConfig, SearchSpace]:
    """Do the quick checks, which read neither weights nor text; return the pruned model's configuration and the space.

    Raises ValueError with the field, its value and a valid alternative.
    """
    check_names(config)
    run_dir = RunDirectory(config.output)
    check_output(run_dir, config, resume)
    check_stages(run_dir, config)
    pruned = _pruned_config(config)
    space = _space(config, pruned)
    if "depth" in config.stages:
        in_layers(config.depth.lengths, pruned.num_hidden_layers)
    _check_teachers(config, pruned, _distillation_teacher_config(config, pruned))
    _check_evaluation(config)
    check_installed(config.trackers)
    check_topk(config, pruned)
    if config.distillation.compile:
        check_compiler()
    if config.winogrande.source != HUB:
        load_examples(config.winogrande.source, config.winogrande.limit)
    return pruned, space


def prepare(config: Config, resume: bool) -> Prepared:
    """Do all checks and load all inputs. Raises ValueError as `check` does, and if text or disk space is too short."""
    pruned, space = check(config, resume)
    run_dir = RunDirectory(config.output)
    if bucket := bucket_copy(config.output, run_dir):
        bucket.check_writable()
    log_in(config.trackers)
    check_disk(config, space)
    folder = teacher_folder(config.teacher.model).absolute()
    tokenizer = load_tokenizer(config.teacher.model)
    packed = _packed_questions(config, pruned, tokenizer)
    corpus = _corpus(config, tokenizer)
    check_teacher_cache(config, pruned, corpus)
    if "retrain" in config.stages:
        _fetch_evaluation(config)
    prepared = Prepared(
        config=config,
        run_dir=run_dir,
        precision=resolve(config.precision),
        pruned=Model(folder, pruned, checked_fingerprint(config.teacher.model, folder)),
        tokenizer=tokenizer,
        space=space,
        corpus=corpus,
        packed=packed,
        distillation_teacher=_distillation_teacher(config, tokenizer),
    )
    _check_same_models(prepared)
    return prepared


def _check_same_models(prepared: Prepared) -> None:
    """Raise ValueError where a run would go on with another model than it began with, under the same name."""
    began = prepared.run_dir.read_environment()
    if began.get("corrected_teacher"):  # the models of a corrected run are others than the named ones
        return
    for field, was, model in (
        ("teacher.model", began.get("teacher"), prepared.pruned),
        ("distillation.teacher", began.get("distillation_teacher"), prepared.teacher),
    ):
        if was and was["fingerprint"] != model.fingerprint:
            raise ValueError(f"{field}: {model.folder} is not the model that {prepared.config.output} began with: its "
                             f"fingerprint is {model.fingerprint} and was {was['fingerprint']}; valid: that model, or "
                             "another output")  # fmt: skip


def _pruned_config(config: Config) -> PretrainedConfig:
    pruned = teacher_config(config.teacher.model)
    family_of(pruned)
    return trimmed_config(config.importance.method, pruned)  # candidates are cut from it, and counted as it is


def _check_teachers(config: Config, pruned: PretrainedConfig, distillation_teacher: PretrainedConfig | None) -> None:
    """Raise ValueError if a model has too few positions for the windows, or cannot be corrected as configured."""
    for model in (pruned, distillation_teacher or pruned):
        limit = getattr(model, "max_position_embeddings", None)
        if limit and config.corpus.sequence_length > limit:
            raise ValueError(f"corpus.sequence_length: {config.corpus.sequence_length} is above the teacher's {limit} "
                             f"positions; valid: at most {limit}")  # fmt: skip
    if config.teacher.correction.method == "norms":
        with torch.device("meta"):
            norm_weights(AutoModelForCausalLM.from_config(distillation_teacher or pruned))


def _check_evaluation(config: Config) -> None:
    parse_tasks(config.evaluation.tasks)
    for reference in config.evaluation.references:
        with _blaming("evaluation.references"):
            teacher_config(reference)


def _fetch_evaluation(config: Config) -> None:
    """Load the evaluation's data and reference models now: what is missing is found before the run begins."""
    for reference in config.evaluation.references:
        with _blaming("evaluation.references"):
            checked_fingerprint(reference, teacher_folder(reference))
    check_data(parse_tasks(config.evaluation.tasks))


def _packed_questions(config: Config, pruned: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PackedOptions:
    examples = load_examples(config.winogrande.source, config.winogrande.limit)
    longest = getattr(pruned, "max_position_embeddings", 2048)
    packed = pack(examples, tokenizer, config.winogrande.shots, max_length=longest)
    check_window(pruned, packed)
    return packed


def _corpus(config: Config, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    # the same text whatever stages run now: the corrected teacher is of that text
    corrected = correction_tokens(config) if set(config.stages) != {"report"} else 0
    trains = corrected or set(config.stages) & {"importance", "search", "retrain"}
    return load_corpus(
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


def lines_up(one: PretrainedConfig, other: PretrainedConfig) -> bool:
    """Return whether two models have every axis alike, so that one order of elements permutes both."""
    return one.model_type == other.model_type and whole(one) == whole(other)


def _distillation_teacher_config(config: Config, pruned: PretrainedConfig) -> PretrainedConfig | None:
    """Return the configuration of `distillation.teacher`, None unless one is given.

    Raises ValueError if that model cannot teach students of the pruned one.
    """
    name = config.distillation.teacher
    if name is None:
        return None
    with _blaming("distillation.teacher"):
        other = teacher_config(name)
        family_of(other)
    if other.vocab_size != pruned.vocab_size:
        raise ValueError(f"distillation.teacher: {name!r} has a vocabulary of {other.vocab_size:,} and teacher.model "
                         f"{config.teacher.model!r} one of {pruned.vocab_size:,}; valid: a model with the same "
                         "tokenizer, such as the one that teacher.model was pruned from")  # fmt: skip
    if config.distillation.intermediate and not lines_up(pruned, other):
        raise ValueError(f"distillation.intermediate: {config.distillation.intermediate} compares states channel by "
                         f"channel, and distillation.teacher {name!r} has another shape than teacher.model "
                         f"{config.teacher.model!r}; valid: 0, or a teacher of the same shape")  # fmt: skip
    return other


def _distillation_teacher(config: Config, tokenizer: PreTrainedTokenizerBase) -> Model | None:
    """Return the model of `distillation.teacher`, None unless one is given.

    Raises ValueError if its tokenizer gives the pruned model's token ids to other words.
    """
    name = config.distillation.teacher
    if name is None:
        return None
    with _blaming("distillation.teacher"):
        folder, own = teacher_folder(name).absolute(), load_tokenizer(name).get_vocab()
        content = checked_fingerprint(name, folder)
    ours = tokenizer.get_vocab()
    if own != ours:
        token = min(word for word in own.keys() | ours.keys() if own.get(word) != ours.get(word))
        raise ValueError(f"distillation.teacher: {name!r} has another vocabulary than teacher.model "
                         f"{config.teacher.model!r}: {token!r} is its token {own.get(token)} and the other's "
                         f"{ours.get(token)}; valid: a model with the same tokenizer, such as the one that "
                         "teacher.model was pruned from")  # fmt: skip
    return Model(folder, AutoConfig.from_pretrained(folder), content)


@contextmanager
def _blaming(key: str) -> Iterator[None]:
    """While the block runs, let errors about a model name `key`, which holds it here, instead of teacher.model."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("teacher.model", key)) from error


def _space(config: Config, teacher: PretrainedConfig) -> SearchSpace:
    """Return the space to search; if the run searches nothing, the teacher alone, which no budget has to fit."""
    if set(config.stages) & {"search", "retrain"}:
        return SearchSpace(config.space, teacher)
    params = parameter_count(weights(teacher), sizes(teacher))
    return SearchSpace(SpaceConfig(budget=Budget(params=Target(target=params)), axes=Axes()), teacher)
