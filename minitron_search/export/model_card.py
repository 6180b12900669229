"""The model card of a student: what was pruned, what it was trained on, how it scores, and its licence.

Its front matter is what the Hub reads. What the teacher's authors wrote, and names of texts, are in it as text only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from minitron_search.config.schema import Config
from minitron_search.data.text_sources import HUB_NAME, READERS
from minitron_search.data.tokenizer_files import is_own
from minitron_search.export.teacher_files import TeacherFiles, teacher_files
from minitron_search.messages.escaping import as_code, in_markdown, one_line
from minitron_search.records.metrics import score_columns
from minitron_search.teachers import embedded
from minitron_search.teachers.sources import hub_name, teacher_folder
from minitron_search.trials.trial import Trial

MODEL_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"  # on the Hub
LINK = r"https?://[^\s<>\"']+|[\w-][\w.-]*"  # an address, or a file beside the card
EMBEDDED = {"docstrings": "documentation strings of Python packages",
            "embedded": "minitron_search's own pairs in Winogrande's format"}  # fmt: skip
COMMANDS = {"vLLM": "vllm serve path/to/this/folder",
            "llama.cpp": "python convert_hf_to_gguf.py path/to/this/folder"}  # fmt: skip


class Source(NamedTuple):
    """A text or data set, as a card names it."""

    name: str  # a file by its name, without its folder: a card is made to be published
    hub: str | None  # the data set's name there


@dataclass(frozen=True)
class Origin:
    """What a student was made from.

    teacher: a Hub name, or the name of its folder.
    base_model: a Hub name, where there is one.
    licence: the front matter's keys for it.
    files: the teacher's licence and notices, by name.
    """

    teacher: str
    taught_by: str  # which model the distillation was from
    train: Source
    validation: Source
    winogrande: Source
    base_model: str | list[str] | None = None
    language: str | list[str] | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    files: TeacherFiles = TeacherFiles({})


def taught_by(config: Config) -> str:
    """Return how a card names what the students were distilled from."""
    model, correction = config.distillation.teacher, config.teacher.correction
    name = as_code(model) if model else "it"
    when = " in parallel" if correction.parallel else ""
    return name if correction.method == "none" else f"{name}, corrected{when} on the same text ({correction.method})"


def origin_of(model: str, taught_by: str, train: str, validation: str, winogrande: str) -> Origin:
    """Return the origin of a student of `model`, named as `teacher.model` names one; reads its card and every file that
    goes with its students. Raises ValueError for one that cannot be read."""
    folder, name = teacher_folder(model), hub_name(model)
    card, files = embedded.CARD, teacher_files(folder)
    if model == embedded.NAME:
        files = files._replace(contents={name: files.contents[name] for name in files.contents
                                         if name not in files.licences}, licences=())  # fmt: skip
    else:
        card = _card_of(folder / "README.md") if is_own(folder, folder / "README.md") else ModelCardData()
    return Origin(
        teacher=name or folder.name,
        taught_by=taught_by,
        train=_source(train),
        validation=_source(validation),
        winogrande=_source(winogrande),
        base_model=name or _matching(MODEL_NAME, card.base_model),
        language=_matching(r"[A-Za-z]{2,8}(-\w{1,8})*", card.language),
        licence=_licence(card),
        files=files,
    )


def _licence(card: ModelCardData) -> dict[str, str]:
    """Return the front matter's keys for the licence, without any that is not of its form on the Hub."""
    values = {key: getattr(card, key, None) for key in ("license", "license_name", "license_link")}
    licence = {
        "license": _matching(r"[\w.-]+", values["license"]),
        "license_name": one_line(values["license_name"]) if isinstance(values["license_name"], str) else None,
        "license_link": _matching(LINK, values["license_link"]),
    }
    if licence["license_name"] or licence["license_link"]:
        licence["license"] = licence["license"] or "other"
    return {key: value for key, value in licence.items() if isinstance(value, str) and value}


def _matching(pattern: str, value: Any) -> str | list[str] | None:
    """Return a value of a card, or of a list there those values, that are of a form; None for any other."""
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str) and _matching(pattern, item)] or None
    return value if isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) else None


def _card_of(readme: Path) -> ModelCardData:
    """Return the front matter of a README; an empty one where none can be read: a broken README of the teacher must not
    cost a retrained student."""
    try:
        return ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else ModelCardData()
    except Exception:  # of whatever its parsers raise about what a stranger wrote
        return ModelCardData()


def model_card(
    origin: Origin, trial: Trial, row: Mapping[str, Any], refusals: Mapping[str, str], renamed: str = "",
    harm: str | None = None,
) -> str:  # fmt: skip
    """Return the text of the card.

    row: the student's row of `trials.parquet`.
    refusals: by tool, why it refuses the student (`models.engines.refusals`).
    renamed: a sentence about a student of another family than its teacher's (`compatibility.renamed`).
    harm: a sentence about a student that is not below its untrained trim (`summary.harm_sentence`).
    """
    architecture, settings, teacher = trial.architecture, trial.settings, in_markdown(origin.teacher)
    kept = ", ".join(map(str, architecture.layers))
    train, validation, winogrande = (named(source) for source in (origin.train, origin.validation, origin.winogrande))
    left = "".join(
        f" Not taken over from the teacher's folder: {in_markdown(sentence)}." for sentence in origin.files.left
    )
    warning = f"\n> **Warning.** {harm}\n" if harm else ""
    return f"""---
{_front_matter(origin, row).to_yaml()}
---
# {teacher}, pruned and distilled to {row["params"] / 1e6:.1f}M parameters
{warning}
Made with minitron_search by structured pruning of the teacher {as_code(origin.teacher)} and distillation from {origin.taught_by}
(the Minitron approach, arXiv:2407.14679 and arXiv:2408.11796). {_licence_sentence(origin)}{left}{renamed and f" {renamed}"}

| | |
|---|---|
| parameters | {row["params"]:,} ({row["non_embedding_params"]:,} without embeddings) |
| weights | {trial.stored} |
| hidden_size | {architecture.hidden_size} |
| intermediate_size | {architecture.intermediate_size} |
| num_attention_heads | {architecture.num_attention_heads} ({architecture.num_key_value_heads} key-value heads) |
| teacher layers kept | {kept} |
| distillation | {row["tokens"]:,} tokens of {train}, loss {settings.loss}, temperature {settings.temperature:g}, seed {trial.seed} |

| score | value | standard error | n | of |
|---|---|---|---|---|
| LM loss (nats per token) | {row["lm_loss"]:.4f} | {row["lm_loss_stderr"]:.4f} | {row["lm_loss_n"]} windows | {validation}, held out |
| KL from the teacher (nats per token) | {row["kl"]:.4f} | {row["kl_stderr"]:.4f} | {row["lm_loss_n"]} windows | {validation}, held out |
| Winogrande accuracy | {row["winogrande_acc"]:.4f} | {row["winogrande_acc_stderr"]:.4f} | {row["winogrande_n"]} examples | {winogrande} |
| Winogrande margin (nats) | {row["winogrande_margin"]:.4f} | {row["winogrande_margin_stderr"]:.4f} | {row["winogrande_n"]} examples | {winogrande} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
prompt = tokenizer("The first thing to know", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(prompt, max_new_tokens=32, do_sample=False)[0]))
```

{chr(10).join(_usage(tool, command, refusals) for tool, command in COMMANDS.items())}
"""


def check_card(origin: Origin) -> None:
    """Raise ValueError if no card comes of an origin, whatever the scores will be."""
    row = dict.fromkeys((*score_columns(), "params", "non_embedding_params", "tokens"), 1)
    try:
        said = yaml.safe_load(_front_matter(origin, row).to_yaml())
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"teacher.model: {origin.teacher!r}: the front matter of its README.md makes no model card "
                         f"({error}); valid: one with license, language and base_model") from error  # fmt: skip
    assert isinstance(said, dict), said


def named(source: Source) -> str:
    """Return the name of a source for the card's text."""
    return source.name if source.name in EMBEDDED.values() else in_markdown(source.name)


def _front_matter(origin: Origin, row: Mapping[str, Any]) -> ModelCardData:
    name = f"{one_line(origin.teacher.rpartition('/')[2])}-pruned-{row['params'] / 1e6:.0f}M"
    licence = origin.licence or {"license": "other", "license_name": "unknown"}
    return ModelCardData(
        license=licence.get("license", "other"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        base_model=origin.base_model,
        language=origin.language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruning", "distillation", "minitron"],
        datasets=origin.train.hub,
        model_name=name,
        eval_results=[
            _result(origin.validation, "loss", "LM loss (nats per token)", row, "lm_loss", "lm_loss_n"),
            _result(origin.validation, "kl", "KL from the teacher (nats per token)", row, "kl", "lm_loss_n"),
            _result(origin.winogrande, "accuracy", "Winogrande accuracy", row, "winogrande_acc", "winogrande_n"),
            _result(origin.winogrande, "margin", "Winogrande margin (nats)", row, "winogrande_margin", "winogrande_n"),
        ],
    )


def _result(source: Source, kind: str, name: str, row: Mapping[str, Any], column: str, number: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=source.hub or one_line(source.name),  # the Hub's library groups results by it
        dataset_name=one_line(source.name),
        metric_type=kind,
        metric_name=name,
        metric_value=round(row[column], 6),
        metric_args={"stderr": round(row[f"{column}_stderr"], 6), "n": row[number]},
    )


def _usage(tool: str, command: str, refusals: Mapping[str, str]) -> str:
    return f"- {tool} does not take it: {refusals[tool]}." if tool in refusals else f"- {tool}: `{command}`"


def _licence_sentence(origin: Origin) -> str:
    if not origin.licence:
        return "The teacher's licence applies; its folder does not say which that is; ask whoever published it."
    files, licence = origin.files.licences, origin.licence
    beside = f" (beside this file: {', '.join(map(in_markdown, files))})" if files else ""
    return f"The teacher's licence applies: {in_markdown(licence.get('license_name') or licence['license'])}{beside}."


def _source(name: str) -> Source:
    """Return the source of a text or of Winogrande's examples that the configuration calls `name`."""
    if name in EMBEDDED:
        return Source(EMBEDDED[name], None)
    path, match = Path(name).expanduser(), HUB_NAME.fullmatch(name)
    if match and path.suffix not in READERS and not name.startswith((".", "~")) and not path.exists():
        return Source(name, match["path"])
    return Source(path.name, None)
