"""The model card of a student: what was pruned, what it was trained on, how it scores, and its licence.

Its front matter is what the Hub reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from minitron_search.data.text_sources import HUB_NAME, READERS
from minitron_search.teachers import embedded
from minitron_search.teachers.sources import hub_name, teacher_folder
from minitron_search.trials.trial import Trial

LICENCE_FILES = ("license", "licence", "notice", "copying", "use_policy")  # how their names begin, in any case
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
    files: Mapping[str, str] = field(default_factory=dict)


def origin_of(model: str, taught_by: str, train: str, validation: str, winogrande: str) -> Origin:
    """Return the origin of a student of `model`, named as `teacher.model` names one; reads its card and licence files."""
    folder, name = teacher_folder(model), hub_name(model)
    if model == embedded.NAME:
        card, files = embedded.CARD, {}
    else:
        card = _card_of(folder / "README.md")
        files = {
            file.name: file.read_text(errors="replace")
            for file in sorted(folder.iterdir())
            if file.name.lower().startswith(LICENCE_FILES) and file.is_file()
        }
    licence = {key: getattr(card, key, None) for key in ("license", "license_name", "license_link")}
    return Origin(
        teacher=name or folder.name,
        taught_by=taught_by,
        train=_source(train),
        validation=_source(validation),
        winogrande=_source(winogrande),
        base_model=name or card.base_model,
        language=card.language,
        licence={key: value for key, value in licence.items() if value},
        files=files,
    )


def _card_of(readme: Path) -> ModelCardData:
    """Return the front matter of a README; an empty one where none can be read: a broken README of the teacher must not
    cost a retrained student."""
    try:
        return ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else ModelCardData()
    except (ValueError, yaml.YAMLError):
        return ModelCardData()


def model_card(origin: Origin, trial: Trial, row: Mapping[str, Any], refusals: Mapping[str, str]) -> str:
    """Return the text of the card.

    row: the student's row of `trials.parquet`.
    refusals: by tool, why it refuses the student (`compatibility.refusals`).
    """
    architecture, settings, teacher = trial.architecture, trial.settings, origin.teacher
    kept = ", ".join(map(str, architecture.layers))
    return f"""---
{_front_matter(origin, row).to_yaml()}
---
# {teacher}, pruned and distilled to {row["params"] / 1e6:.1f}M parameters

Made with minitron_search by structured pruning of the teacher `{teacher}` and distillation from {origin.taught_by}
(the Minitron approach, arXiv:2407.14679 and arXiv:2408.11796). {_licence_sentence(origin)}

| | |
|---|---|
| parameters | {row["params"]:,} ({row["non_embedding_params"]:,} without embeddings) |
| hidden_size | {architecture.hidden_size} |
| intermediate_size | {architecture.intermediate_size} |
| num_attention_heads | {architecture.num_attention_heads} ({architecture.num_key_value_heads} key-value heads) |
| teacher layers kept | {kept} |
| distillation | {row["tokens"]:,} tokens of {origin.train.name}, loss {settings.loss}, temperature {settings.temperature:g}, seed {trial.seed} |

| score | value | standard error | n | of |
|---|---|---|---|---|
| LM loss (nats per token) | {row["lm_loss"]:.4f} | {row["lm_loss_stderr"]:.4f} | {row["lm_loss_n"]} windows | {origin.validation.name}, held out |
| KL from the teacher (nats per token) | {row["kl"]:.4f} | {row["kl_stderr"]:.4f} | {row["lm_loss_n"]} windows | {origin.validation.name}, held out |
| Winogrande accuracy | {row["winogrande_acc"]:.4f} | {row["winogrande_acc_stderr"]:.4f} | {row["winogrande_n"]} examples | {origin.winogrande.name} |
| Winogrande margin (nats) | {row["winogrande_margin"]:.4f} | {row["winogrande_margin_stderr"]:.4f} | {row["winogrande_n"]} examples | {origin.winogrande.name} |

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

{chr(10).join(_usage(tool, command, refusals) for tool, command in COMMANDS.items())}
"""


def _front_matter(origin: Origin, row: Mapping[str, Any]) -> ModelCardData:
    name = f"{origin.teacher.rpartition('/')[2]}-pruned-{row['params'] / 1e6:.0f}M"
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
        dataset_type=source.hub or source.name,  # the Hub's library groups results by it
        dataset_name=source.name,
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
    beside = f" (beside this file: {', '.join(origin.files)})" if origin.files else ""
    return f"The teacher's licence applies: {origin.licence.get('license_name') or origin.licence.get('license', 'see the link above')}{beside}."


def _source(name: str) -> Source:
    """Return the source of a text or of Winogrande's examples that the configuration calls `name`."""
    if name in EMBEDDED:
        return Source(EMBEDDED[name], None)
    path, match = Path(name).expanduser(), HUB_NAME.fullmatch(name)
    if match and path.suffix not in READERS and not name.startswith((".", "~")) and not path.exists():
        return Source(name, match["path"])
    return Source(path.name, None)
