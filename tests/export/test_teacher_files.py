"""What a student takes over from its teacher's folder: all of the tokenizer, its own regular files, and no code."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minitron_search.data.tokenizer_files import tokenizer_files
from minitron_search.evaluation.benchmarks import model_content
from minitron_search.export.student_folder import write_folder
from minitron_search.export.teacher_files import check_tokenizer, generation_problem, stored_dtype, teacher_files
from minitron_search.teachers.sources import HUB_FILES, load_tokenizer
from tests import tiny

TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tiny.teacher_folder(tmp_path / "teacher")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(made)
    return made


def exported(folder: Path) -> Path:
    best = folder.parent / "best"
    write_folder(tiny.model(tiny.config()), teacher_files(folder).contents, best)
    return best


def test_every_file_of_the_tokenizer_and_nothing_else(folder: Path) -> None:
    (folder / "tokenizer_training").mkdir()
    (folder / "tokenizer_training" / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").mkdir()
    for name in ("spiece.model", "merges.txt", "tokenizer.4.0.json"):
        (folder / name).write_text("x")
    for name in ("tokenizer.py", "tokenization_evil.py", "tokenizer.json.bak", "additional_chat_templates/evil.py",
                 "vocab_report.csv", "optimizer.pt"):  # fmt: skip
        (folder / name).write_text("raise SystemExit")
    assert tokenizer_files(folder) == [
        "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "merges.txt", "spiece.model",
        "tokenizer.4.0.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    before = model_content(folder)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    assert model_content(folder) != before, "an answer by that template is another one"
    assert "*.py" not in HUB_FILES and "additional_chat_templates/*.jinja" in HUB_FILES


def test_all_chat_templates_are_kept(folder: Path) -> None:
    best = exported(folder)
    for place in (folder, best):
        assert AutoTokenizer.from_pretrained(place).chat_template == TEMPLATES


def test_no_link_out_of_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "more.jinja").write_text("a key")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "vocab.json").symlink_to("../secret")
    (folder / "NOTICE").symlink_to(folder / "NOTICE")  # a circle
    (folder / "added_tokens.json").symlink_to("nothing")
    shutil.rmtree(folder / "additional_chat_templates")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    (folder / "LICENCE.txt").symlink_to("terms")  # inside
    (folder / "terms").write_text("Do well.")
    found = teacher_files(folder)
    assert b"a key" not in found.contents.values()
    assert found.licences == ("LICENCE.txt",) and found.contents["LICENCE.txt"] == b"Do well."
    for name in ("LICENSE", "NOTICE", "vocab.json", "added_tokens.json", "additional_chat_templates"):
        assert f"{name} is a link that leads out of the teacher's folder, or to no file" in found.left
    assert "LICENCE.txt" not in str(found.left)
    assert not any(path.is_symlink() for path in exported(folder).rglob("*"))


def test_a_snapshot_of_the_hubs_cache_is_links_to_blobs_of_the_same_model(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = model / "snapshots" / "0123", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    other = tmp_path / "hub" / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    (other / "f00").write_text("another model's")
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = blobs / f"{number:040x}"
        shutil.copy(path, blob)
        place = snapshot / path.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    (snapshot / "LICENSE").symlink_to("../../../models--other--name/blobs/f00")
    found = teacher_files(snapshot)
    assert found.contents == teacher_files(folder).contents and "tokenizer.json" in found.contents
    assert [sentence.split()[0] for sentence in found.left] == ["LICENSE"]
    copied = tmp_path / "hub" / "name" / "snapshots" / "0123"  # the same links beside blobs that are no model's
    shutil.copytree(model, copied.parents[1], symlinks=True)
    assert "tokenizer.json" not in teacher_files(copied).contents


def test_a_tokenizer_that_needs_more_than_its_own_files_is_refused_before(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    check_tokenizer("teacher", folder, teacher_files(folder), tokenizer)
    shutil.move(folder / "tokenizer.json", tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"teacher\.model: 'teacher': its tokenizer .*tokenizer\.json is a link"):
        check_tokenizer("teacher", folder, teacher_files(folder), tokenizer)


def test_what_cannot_be_read_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "LICENSE").write_text("Do well.")
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "LICENSE":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(ValueError, match=r"teacher\.model: .*LICENSE goes with the student .*Permission denied"):
        teacher_files(folder)


def test_files_are_readable_whatever_the_umask_and_the_teachers_modes(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    before = os.umask(0o077)
    try:
        best = exported(folder)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (best, *best.rglob("*"))}
    assert modes.pop("best") == modes.pop("additional_chat_templates") == 0o755
    assert len(modes) > 5 and set(modes.values()) == {0o644}


def test_the_place_of_the_teachers_code_is_not_taken_over(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", None]}}
    path.write_text(json.dumps(values))
    del values["auto_map"]
    assert json.loads(teacher_files(folder).contents["tokenizer_config.json"]) == values
    for name in ("LICENSE.py", "license.html", "NOTICE.sh"):
        (folder / name).write_text("x")
    with open(folder / "copying.bin", "wb") as file:
        file.truncate(2**20 + 1)
    assert teacher_files(folder).licences == ()


GENERATION: list[tuple[Any, bool]] = [
    ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, True),
    ({"temperature": 0.7, "do_sample": True}, True),
    ({"max_new_tokens": -5}, False),
    ({"num_return_sequences": 4}, False),
    ({"early_stopping": 3}, False),
    ({"watermarking_config": 3}, False),
    ([1], False),
    (None, False),
]


@tiny.over(GENERATION)
def test_generation_defaults_cost_no_load_and_are_kept_or_said(values: Any, kept: bool, tmp_path: Path) -> None:
    folder = tiny.teacher_folder(tmp_path / "teacher")
    text = json.dumps(values)
    (folder / "generation_config.json").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = teacher_files(folder)
    assert (found.contents.get("generation_config.json") == text.encode()) == kept == (not found.left)
    assert kept or "generation_config.json is none that transformers loads" in found.left[0]
    write_folder(model, found.contents, tmp_path / "best")
    assert generation_problem(tmp_path / "best") is None
    again = GenerationConfig.from_pretrained(tmp_path / "best")
    assert not kept or all(getattr(again, key) == value for key, value in values.items())


def test_broken_generation_defaults_are_said(folder: Path) -> None:
    (folder / "generation_config.json").write_bytes(b'{"temp\xff')
    assert "generation_config.json is none" in teacher_files(folder).left[0]
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    assert "no regular file" in teacher_files(folder).left[0]


@tiny.over(["float32", "bfloat16", "float16"])
def test_the_dtype_that_a_model_is_stored_in(dtype: str, tmp_path: Path) -> None:
    config = tiny.config()
    model = tiny.model(config)
    model.to(getattr(__import__("torch"), dtype)).save_pretrained(tmp_path)
    config.dtype = dtype
    assert stored_dtype(tmp_path, config) == dtype
    config.dtype = None  # an old configuration
    assert stored_dtype(tmp_path, config) == dtype
