"""Find everything that can be wrong, before Ray starts and before anything is written, and load a run's inputs."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from minitron_search.architecture_search.deployable import verdicts
from minitron_search.architecture_search.samplers import check_sampler
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.config.space import Axes, Budget, SpaceConfig, Target
from minitron_search.config.types import Precision
from minitron_search.data.corpus import RANDOM, Corpus, load_corpus
from minitron_search.data.text_sources import check_source
from minitron_search.data.winogrande import HUB, load_examples
from minitron_search.data.winogrande_packing import PackedOptions, pack
from minitron_search.depth.sweep import in_layers
from minitron_search.distillation.correction import norm_weights
from minitron_search.evaluation.lm_eval_tasks import check_data, parse_tasks
from minitron_search.evaluation.winogrande import check_window
from minitron_search.export.model_card import Origin, check_card, origin_of, taught_by
from minitron_search.export.teacher_files import check_tokenizer, stored_dtype
from minitron_search.messages.console import say
from minitron_search.messages.failures import reading
from minitron_search.models.architecture import parameter_count
from minitron_search.models.device import resolve
from minitron_search.models.engines import engines_of
from minitron_search.models.families import sizes, weights, whole
from minitron_search.planning.checks import (
    as_begun,
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
from minitron_search.planning.defaults import completed, pruned_config
from minitron_search.planning.forecast import teaching_config, this_machine, trials_at_once
from minitron_search.planning.models import (
    MODEL_ADVICE,
    Model,
    blaming,
    distillation_teacher,
    distillation_teacher_config,
)
from minitron_search.planning.token_ids import check_special_tokens, check_windows
from minitron_search.planning.workload import Costs
from minitron_search.records.bucket import bucket_copy, stored_text
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import is_uri
from minitron_search.teachers.sources import checked_fingerprint, load_tokenizer, teacher_config, teacher_folder
from minitron_search.tracking.trackers import check_installed, log_in
from minitron_search.trials.settings import correction_tokens

QUESTION_ADVICE = "embedded, or a .jsonl file of questions in Winogrande's format"
TASK_ADVICE = "tasks of lm-eval, as winogrande:5, or YAML files like theirs (docs/evaluation.md)"


@dataclass(frozen=True)
class Prepared:
    """A run's checked inputs.

    `precision`: of the products, as this machine resolves `auto` until the run is on its cluster. `pruned`: the model
    that students are cut from. `distillation_teacher`: the one that they are distilled from, None if it is the same.
    `corrected`: the folder of the corrected model that has taken the place of one of them, or of both. `origin`: what
    the card of a student says, and all that goes beside its weights. `stored`: the dtype that students are written in.
    """

    config: Config
    run_dir: RunDirectory
    precision: Precision
    pruned: Model
    tokenizer: PreTrainedTokenizerBase
    space: SearchSpace
    corpus: Corpus
    packed: PackedOptions
    origin: Origin
    stored: str
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
    wrong = []
    for one in (
        partial(check_importance, config.importance),
        partial(check_sampler, config.search.sampler, config.search.objectives),
        partial(engines_of, config.space.deployable),
        partial(check_loss, config),
    ):
        try:
            one()
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))


def complete(config: Config, resume: bool) -> tuple[Config, list[str]]:
    """Return the configuration with nothing left to the teacher, and a line for each value that was derived from it.

    What a run that goes on left to its teacher is what it began with. Raises ValueError as `check` does.
    """
    check_names(config)
    with reading(f"output: {config.output}", "a run directory whose files are whole, or another folder"):
        begun = _begun(config.output) if resume else None
    with reading(f"teacher.model: {config.teacher.model!r}", MODEL_ADVICE):
        return completed(config, begun)


def _begun(output: str) -> Config | None:
    """Return the configuration of the run that is in `output`, here or in storage; None if there is none."""
    file = RunDirectory(output).config
    if is_uri(output):
        text = stored_text(output, file.name)
    else:
        text = file.read_text(encoding="utf-8") if file.is_file() else None
    return loading.parse_config(loading.yaml_values(text, f"output: {file}")) if text is not None else None


def check(config: Config, resume: bool) -> tuple[PretrainedConfig, SearchSpace]:
    """Do the quick checks, which read neither weights nor text; return the pruned model's configuration and the space.

    Raises ValueError with the field, its value and a valid alternative.
    """
    return check_completed(complete(config, resume)[0], resume)


def check_completed(config: Config, resume: bool) -> tuple[PretrainedConfig, SearchSpace]:
    """Do as `check` does, of a configuration that leaves nothing to the teacher."""
    run_dir = RunDirectory(config.output)
    with reading(f"output: {config.output}", "a run directory whose files are whole, or another folder"):
        check_output(run_dir, config, resume)
        check_stages(run_dir, config)
    with reading(f"teacher.model: {config.teacher.model!r}", MODEL_ADVICE):
        pruned = pruned_config(config)
        whole(pruned)
        parameter_count(weights(pruned), sizes(pruned))
    with reading("space", "axes and a budget within the teacher's shape"):
        space = _space(config, pruned)
    if "depth" in config.stages:
        in_layers(config.depth.lengths, pruned.num_hidden_layers)
    _check_teachers(config, pruned, distillation_teacher_config(config, pruned))
    _check_evaluation(config)
    check_installed(config.trackers)
    check_topk(config, pruned)
    if config.distillation.compile:
        check_compiler()
    if config.winogrande.source != HUB:
        with reading(f"winogrande.source: {config.winogrande.source!r}", QUESTION_ADVICE):
            load_examples(config.winogrande.source, config.winogrande.limit)
    return pruned, space


def check_texts(config: Config) -> None:
    """Raise ValueError for a text that is not there or not of a kind that is read. A plan needs none of them."""
    corpus = config.corpus
    for field, source in (
        ("train", corpus.train),
        ("validation", corpus.validation),
        ("calibration", corpus.calibration),
    ):
        if source is not None and (field, source) != ("calibration", RANDOM):
            with reading(f"corpus.{field}: {source[:200]!r}", "text that can be read"):
                check_source(f"corpus.{field}", source)


def prepare(config: Config, resume: bool) -> Prepared:
    """Do all checks and load all inputs. Raises ValueError as `check` does, and if text or disk space is too short."""
    config, derived = complete(config, resume)
    for line in derived:
        say(f"derived: {line}")
    pruned, space = check_completed(config, resume)
    check_texts(config)
    run_dir = RunDirectory(config.output)
    config = as_begun(run_dir, config)
    if bucket := bucket_copy(config.output, run_dir):
        bucket.check_writable()
    log_in(config.trackers)
    costs = Costs(config, space, teaching_config(config, space), resolve(config.precision), 0)
    check_disk(costs, trials_at_once(costs, this_machine()))
    for verdict in verdicts(pruned, space.points) if "search" in config.stages else ():
        if not verdict.taken.all():
            say(str(verdict))
    with reading(f"teacher.model: {config.teacher.model!r}", MODEL_ADVICE):
        folder = teacher_folder(config.teacher.model).absolute()
        tokenizer = load_tokenizer(config.teacher.model)
        origin = _origin(config, folder, tokenizer)
        check_special_tokens(config, tokenizer, pruned)
    with reading(f"winogrande.source: {config.winogrande.source!r}", QUESTION_ADVICE):
        packed = _packed_questions(config, pruned, tokenizer)
    with reading(f"corpus: {config.corpus.train!r}, {config.corpus.validation!r}", "text that the tokenizer reads"):
        corpus = _corpus(config, tokenizer, pruned.vocab_size)
    check_windows(config, corpus, tokenizer, pruned.vocab_size)
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
        origin=origin,
        stored=stored_dtype(folder, pruned) if config.retraining.dtype == "auto" else config.retraining.dtype,
        distillation_teacher=distillation_teacher(config, tokenizer, pruned.vocab_size),
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


def _check_teachers(config: Config, pruned: PretrainedConfig, distillation_teacher: PretrainedConfig | None) -> None:
    """Raise ValueError if a model has too few positions for the windows, or cannot be corrected as configured."""
    for model in (pruned, distillation_teacher or pruned):
        limit = getattr(model, "max_position_embeddings", None)
        if limit and config.corpus.sequence_length > limit:
            raise ValueError(f"corpus.sequence_length: {config.corpus.sequence_length} is above the teacher's {limit} "
                             f"positions; valid: at most {limit}")  # fmt: skip
    if config.teacher.correction.method == "norms":
        with torch.device("meta"):
            norm_weights(AutoModelForCausalLM.from_config(distillation_teacher or pruned, trust_remote_code=False))


def _check_evaluation(config: Config) -> None:
    with reading(f"evaluation.tasks: {', '.join(config.evaluation.tasks)}", TASK_ADVICE):
        parse_tasks(config.evaluation.tasks)
    for reference in config.evaluation.references:
        with blaming("evaluation.references"):
            teacher_config(reference)


def _fetch_evaluation(config: Config) -> None:
    """Load the evaluation's data and reference models now: what is missing is found before the run begins."""
    for reference in config.evaluation.references:
        with blaming("evaluation.references"):
            checked_fingerprint(reference, teacher_folder(reference))
    check_data(parse_tasks(config.evaluation.tasks))


def _origin(config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Origin:
    """Read now what is written beside a student's weights, and see that a card and a tokenizer come of it."""
    sources = config.corpus.train, config.corpus.validation, config.winogrande.source
    origin = origin_of(config.teacher.model, taught_by(config), *sources)
    if "retrain" in config.stages:
        check_tokenizer(config.teacher.model, folder, origin.files, tokenizer)
        check_card(origin)
        for sentence in origin.files.left:
            say(f"teacher.model: {config.teacher.model}: {sentence}; students go without it")
    return origin


def _packed_questions(config: Config, pruned: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PackedOptions:
    examples = load_examples(config.winogrande.source, config.winogrande.limit)
    longest = getattr(pruned, "max_position_embeddings", 2048)
    packed = pack(examples, tokenizer, config.winogrande.shots, max_length=longest, vocab_size=pruned.vocab_size)
    check_window(pruned, packed)
    return packed


def _corpus(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Corpus:
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
        vocab_size=vocab_size,
    )


def _space(config: Config, teacher: PretrainedConfig) -> SearchSpace:
    """Return the space to search; if the run searches nothing, the teacher alone, which no budget has to fit."""
    if set(config.stages) & {"search", "retrain"}:
        return SearchSpace(config.space, teacher)
    params = parameter_count(weights(teacher), sizes(teacher))
    return SearchSpace(SpaceConfig(budget=Budget(params=Target(target=params)), axes=Axes()), teacher)
