"""A student's model card: what the Hub reads of it, and that the teacher's licence goes with the student."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from minitron_search.export import model_card as module
from minitron_search.export.compatibility import renamed
from minitron_search.export.model_card import check_card, model_card, origin_of
from minitron_search.export.student_folder import write_folder
from minitron_search.messages.escaping import UNSEEN, in_markdown
from minitron_search.models.families import student_config, whole
from minitron_search.teachers import embedded
from minitron_search.teachers.sources import HUB_FILES, hub_name
from minitron_search.trials.settings import LoopSettings
from minitron_search.trials.trial import Trial
from tests import tiny
from tests.messages.test_escaping import Tags

TEXTS = ("it", "docstrings", "docstrings", "embedded")
ROW = {
    "params": 90_123_456, "non_embedding_params": 70_000_000, "tokens": 32_000, "lm_loss": 3.25,
    "lm_loss_stderr": 0.0125, "lm_loss_n": 32, "kl": 0.5, "kl_stderr": 0.01, "winogrande_acc": 0.5,
    "winogrande_acc_stderr": 0.0395,
    "winogrande_margin": 0.125, "winogrande_margin_stderr": 0.0625, "winogrande_n": 160,
}  # fmt: skip


def trial() -> Trial:
    shape = tiny.random_architecture(tiny.config(), 0)
    return Trial(shape, "retrained", 0, -1, "pruned", LoopSettings(total_tokens=32_000), "float32", {})


def teacher(folder: Path, readme: str | None = None, **files: str) -> str:
    tiny.model(tiny.config()).save_pretrained(folder)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    for name, text in files.items():
        (folder / name.replace("_TXT", ".txt")).write_text(text)
    return str(folder)


def front_matter(card: str) -> dict[str, Any]:
    """As YAML says it, which is also what the Hub's own class reads back and writes again."""
    said = yaml.safe_load(card.split("---\n")[1])
    again = ModelCard(card).data
    assert yaml.safe_load(again.to_yaml()) == said and again.to_dict() == said
    return said


def test_the_embedded_teacher_needs_no_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "teacher_folder", lambda model: Path(teacher(tmp_path)))
    said = front_matter(model_card(origin_of(embedded.NAME, *TEXTS), trial(), ROW, {}))
    assert said["license"] == "apache-2.0" and said["language"] == "en"
    assert said["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" == hub_name(embedded.NAME)
    assert "datasets" not in said, "documentation strings are no data set of the Hub"


def test_scores_are_in_the_hubs_form_with_their_standard_errors(tmp_path: Path) -> None:
    said = front_matter(model_card(origin_of(teacher(tmp_path), *TEXTS), trial(), ROW, {}))
    (index,) = said["model-index"]
    assert index["name"].endswith("-pruned-90M")
    found = {metric["name"]: metric for result in index["results"] for metric in result["metrics"]}
    assert found["LM loss (nats per token)"] == {
        "type": "loss", "name": "LM loss (nats per token)", "value": 3.25, "args": {"stderr": 0.0125, "n": 32},
    }  # fmt: skip
    assert found["Winogrande accuracy"]["args"] == {"stderr": 0.0395, "n": 160}
    assert len(index["results"]) == 2, "one a data set"
    assert {result["task"]["type"] for result in index["results"]} == {"text-generation"}
    assert all(isinstance(metric["value"], float) and math.isfinite(metric["value"]) for metric in found.values())


@tiny.over(
    [
        {"license": "mit"},
        {"license": "llama3.1"},
        {"license": "other", "license_name": "nvidia-open-model-license", "license_link": "LICENSE.txt"},
    ]
)
def test_a_teachers_licence_is_its_students(given: dict[str, str], tmp_path: Path) -> None:
    readme = f"---\n{yaml.safe_dump({**given, 'language': ['en', 'de'], 'base_model': 'owner/base'})}---\n# A model\n"
    origin = origin_of(teacher(tmp_path, readme, LICENSE_TXT="Do well."), *TEXTS)
    card = model_card(origin, trial(), ROW, {})
    said = front_matter(card)
    assert {key: said[key] for key in given} == given
    assert said["language"] == ["en", "de"] and said["base_model"] == "owner/base"
    assert (given.get("license_name") or given["license"]) in card.split("---\n")[2] and "LICENSE.txt" in card


@tiny.over([None, "# No front matter\n", "---\nlanguage: en\n---\n# No licence\n"])
def test_an_unknown_licence_is_said_to_be_unknown(readme: str | None, tmp_path: Path) -> None:
    card = model_card(origin_of(teacher(tmp_path, readme), *TEXTS), trial(), ROW, {})
    said = front_matter(card)
    assert (said["license"], said["license_name"]) == ("other", "unknown")
    assert "does not say which" in card and "base_model" not in said


def test_licence_and_notices_are_copied_beside_the_student(tmp_path: Path) -> None:
    files = {"LICENSE": "Do well.", "Notice_TXT": "Made by people.", "USE_POLICY.md": "Für alle."}
    origin = origin_of(teacher(tmp_path / "teacher", **files), *TEXTS)
    model = tiny.model(tiny.config())
    card = model_card(origin, trial(), ROW, {}).encode()
    write_folder(model, {**origin.files.contents, "README.md": card}, tmp_path / "best")
    for name, text in (("LICENSE", "Do well."), ("Notice.txt", "Made by people."), ("USE_POLICY.md", "Für alle.")):
        assert (tmp_path / "best" / name).read_text() == text
    assert origin_of(str(tmp_path / "best"), *TEXTS).files.licences == origin.files.licences, (
        "a student's student has them too"
    )


def test_what_the_card_needs_is_fetched_from_the_hub() -> None:
    assert {"README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"} <= set(HUB_FILES)


@tiny.over(
    [
        ("Salesforce/wikitext/wikitext-2-raw-v1:train", "Salesforce/wikitext/wikitext-2-raw-v1:train",
         "Salesforce/wikitext"),
        ("allenai/winogrande", "allenai/winogrande", "allenai/winogrande"),
        ("/home/someone/private/text.jsonl", "text.jsonl", None),
        ("data/*.txt", "*.txt", None),
        ("data/text.txt", "text.txt", None),
    ]
)  # fmt: skip
def test_texts_are_named_and_nobodys_folders_are(source: str, name: str, hub: str | None, tmp_path: Path) -> None:
    origin = origin_of(teacher(tmp_path / "secret" / "my-model"), "it", source, source, source)
    card = model_card(origin, trial(), ROW, {})
    said = front_matter(card)
    assert said.get("datasets") == hub and origin.train.name == name and name in card
    assert "secret" not in card and "someone" not in card and "my-model" in card
    assert {result["dataset"]["type"] for result in said["model-index"][0]["results"]} == {hub or name}


def test_the_card_says_what_was_pruned(tmp_path: Path) -> None:
    made = trial()
    card = model_card(origin_of(teacher(tmp_path), *TEXTS), made, ROW, {})
    assert f"| hidden_size | {made.architecture.hidden_size} |" in card
    assert f"| teacher layers kept | {', '.join(map(str, made.architecture.layers))} |" in card
    assert "32,000 tokens of documentation strings" in card
    assert json.loads(json.dumps(front_matter(card)))["library_name"] == "transformers"


def test_the_card_says_who_takes_the_student(tmp_path: Path) -> None:
    origin = origin_of(teacher(tmp_path), *TEXTS)
    assert "- vLLM: `vllm serve path" in model_card(origin, trial(), ROW, {})
    card = model_card(origin, trial(), ROW, {"llama.cpp": "of a reason"})
    assert "- llama.cpp does not take it: of a reason.\n" in card and "convert_hf_to_gguf" not in card


@tiny.over([b"caf\xe9", b"---\n- a\n- list\n---\n", b"---\nlicense: [broken\n---\n", b"---\nlicense_name: ours\n---\n"])
def test_a_student_is_not_lost_for_its_teachers_readme(readme: bytes, tmp_path: Path) -> None:
    folder = teacher(tmp_path)
    (tmp_path / "README.md").write_bytes(readme)
    card = model_card(origin_of(folder, *TEXTS), trial(), ROW, {})
    assert front_matter(card)["license"] == "other" and "The teacher's licence applies" in card


@tiny.over(["org/data-v1.1", "allenai/c4/en.noblocklist:train"])
def test_a_data_set_with_a_dot_in_its_name_is_one(name: str) -> None:
    source = module._source(name)
    assert source.name == name and source.hub == "/".join(name.split("/")[:2])


NAME = (
    "</td><script>alert(1)</script> | [x](javascript:alert(1)) ![y](https://evil.example/y.png) \x1b[31m \u202egpj"
    "\n---\nlicense: mit\n# H"
)


def test_nothing_that_others_wrote_is_live_in_a_card(tmp_path: Path) -> None:
    folder = tmp_path / NAME.replace("/", "-")[:120]
    given = {"license": "other", "license_name": NAME, "license_link": "javascript:alert(1)", "language": [NAME, "en"],
             "base_model": NAME}  # fmt: skip
    readme = f"---\n{yaml.safe_dump(given)}---\n# A model\n"
    name = teacher(folder, readme)
    (folder / f"LICENSE{NAME.replace('/', '-')[:100]}").write_text("Do well.")
    origin = origin_of(name, in_markdown(NAME), NAME.replace("/", "-"), f"./{NAME}", f"./{NAME}.jsonl")
    origin = dataclasses.replace(origin, files=origin.files._replace(left=(f"{NAME} is a link",)))
    card = model_card(origin, trial(), ROW, {})
    said = front_matter(card)
    assert said["license"] == "other" and said["language"] == ["en"]
    assert not {"license_link", "base_model"} & set(said) and len(said["model-index"][0]["results"]) >= 2
    body = card.split("---\n", 2)[2]
    assert UNSEEN.search(card) is None and "<script" not in card
    found = Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    plain = Tags(
        MarkdownIt("commonmark")
        .enable("table")
        .render(model_card(origin_of(teacher(tmp_path / "p"), *TEXTS), trial(), ROW, {}).split("---\n", 2)[2])
    )
    assert [tag for tag in found.tags if tag != "code"] == [tag for tag in plain.tags if tag != "code"]
    check_card(origin)


@tiny.over(
    [
        {"license": ["mit", "apache-2.0"], "language": {"en": 1}, "base_model": 3},
        {"license": {"a": 1}, "license_name": ["x"], "license_link": 7, "language": False},
        {"license": "mit\nlicense_name: x", "language": "not a language at all", "base_model": ["a/b", "<b>"]},
        {"language": [["en"], {"en": 1}], "model-index": [["a"]], "license": "x y"},
        {"datasets": 5, "model-index": "x", "tags": {"a": 1}, "license": None, "pipeline_tag": ["x"]},
    ]
)
def test_a_readme_of_any_form_makes_a_card(given: dict[str, Any], tmp_path: Path) -> None:
    readme = f"---\n{yaml.safe_dump(given)}---\n"
    origin = origin_of(teacher(tmp_path, readme), *TEXTS)
    check_card(origin)
    said = front_matter(model_card(origin, trial(), ROW, {}))
    assert isinstance(said["license"], str) and "\n" not in said["license"]
    assert said.get("base_model") in (None, ["a/b"]) and "language" not in said


def test_the_card_says_why_a_llama_became_a_mistral_and_in_which_dtype_it_is(tmp_path: Path) -> None:
    llama = tiny.config(hidden_size=24, num_attention_heads=4)
    shape = dataclasses.replace(whole(llama), hidden_size=22)
    student = student_config(llama, shape)
    assert student.model_type == "mistral" and renamed(llama, llama) == ""
    origin, made = origin_of(teacher(tmp_path), *TEXTS), dataclasses.replace(trial(), stored="bfloat16")
    card = model_card(origin, made, ROW, {}, renamed(llama, student))
    assert "Its teacher is a llama and it is stored as a mistral, which computes the same: transformers" in card
    assert "hidden_size, here 22, its num_attention_heads, here 4, do not divide" in card
    assert "| weights | bfloat16 |" in card
    assert "mistral" not in model_card(origin, made, ROW, {}, renamed(llama, llama))
