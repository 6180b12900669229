"""The models of a run, and whether one that teaches has something to say of every token of the one that is pruned."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from minitron_search.config.schema import Config
from minitron_search.messages.failures import reading
from minitron_search.models.families import family_of, whole
from minitron_search.teachers.sources import checked_fingerprint, load_tokenizer, teacher_config, teacher_folder

MODEL_ADVICE = "a folder whose files are as save_pretrained of transformers 5 writes them"


@dataclass(frozen=True)
class Model:
    """A model of the run: its stock folder, its configuration, and the content id of both."""

    folder: Path
    config: PretrainedConfig
    fingerprint: str


def lines_up(one: PretrainedConfig, other: PretrainedConfig) -> bool:
    """Return whether two models have every axis alike, so that one order of elements permutes both."""
    return one.model_type == other.model_type and whole(one) == whole(other)


def distillation_teacher_config(config: Config, pruned: PretrainedConfig) -> PretrainedConfig | None:
    """Return the configuration of `distillation.teacher`, None unless one is given.

    Raises ValueError if that model cannot teach students of the pruned one.
    """
    name = config.distillation.teacher
    if name is None:
        return None
    with blaming("distillation.teacher"):
        other = teacher_config(name)
        family_of(other)
    if other.vocab_size < pruned.vocab_size:
        raise ValueError(f"distillation.teacher: {name!r} has a vocabulary of {other.vocab_size:,} and teacher.model "
                         f"{config.teacher.model!r} one of {pruned.vocab_size:,}, of which it would say nothing of the "
                         "last; valid: a model with the same tokenizer and at least as many rows, such as the one that "
                         "teacher.model was pruned from")  # fmt: skip
    if config.distillation.intermediate and not lines_up(pruned, other):
        raise ValueError(f"distillation.intermediate: {config.distillation.intermediate} compares states channel by "
                         f"channel, and distillation.teacher {name!r} has another shape than teacher.model "
                         f"{config.teacher.model!r}; valid: 0, or a teacher of the same shape")  # fmt: skip
    return other


def distillation_teacher(config: Config, tokenizer: PreTrainedTokenizerBase, rows: int) -> Model | None:
    """Return the model of `distillation.teacher`, None unless one is given.

    Raises ValueError if its tokenizer gives the pruned model's token ids to other words, or if the rows that it has
    beyond the `rows` of the pruned model are more than padding.
    """
    name = config.distillation.teacher
    if name is None:
        return None
    with blaming("distillation.teacher"):
        folder, own = teacher_folder(name).absolute(), load_tokenizer(name).get_vocab()
        content = checked_fingerprint(name, folder)
    ours = tokenizer.get_vocab()
    if own != ours:
        token = min(word for word in own.keys() | ours.keys() if own.get(word) != ours.get(word))
        raise ValueError(f"distillation.teacher: {name!r} has another vocabulary than teacher.model "
                         f"{config.teacher.model!r}: {token!r} is its token {own.get(token)} and the other's "
                         f"{ours.get(token)}; valid: a model with the same tokenizer, such as the one that "
                         "teacher.model was pruned from")  # fmt: skip
    beyond = [token for token, number in ours.items() if number >= rows]
    teacher = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if beyond and teacher.vocab_size > rows:
        raise ValueError(f"distillation.teacher: {name!r} has {teacher.vocab_size:,} rows and teacher.model "
                         f"{config.teacher.model!r} {rows:,}, and {min(beyond)!r} is a token of the rows between; "
                         "valid: a model whose other rows are padding alone")  # fmt: skip
    return Model(folder, teacher, content)


@contextmanager
def blaming(key: str) -> Iterator[None]:
    """While the block runs, let errors about a model name `key`, which holds it here, instead of teacher.model."""
    try:
        with reading(key, MODEL_ADVICE):
            yield
    except ValueError as error:
        raise ValueError(str(error).replace("teacher.model", key)) from error
