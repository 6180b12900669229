"""Whole runs in which another model teaches than the one that is pruned: another size, corrected, or both."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from minitron_search.cli import main
from minitron_search.cluster import tuner
from minitron_search.config.loading import load_config
from minitron_search.planning.prepare import check, prepare
from minitron_search.teachers.sources import fingerprint
from tests import tiny
from tests.runs import Command, events, rows, tiny_configuration

INLINE = ("--search.concurrency", "1", "--resources.launcher", "inline", "--search.trials", "2",
          "--search.rungs", "128,256", "--retraining.tokens", "256",
          "--search.controls", "false")  # fmt: skip
CORRECTED = ("--teacher.correction.method", "norms", "--teacher.correction.learning_rate", "1e-2")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, shared_ray: Path) -> Command:
    """`teacher`, and `larger`: wider, deeper, of another family, with the same tokenizer. Its processes have the caches
    of `shared_ray`."""
    folder = tmp_path_factory.mktemp("families")
    shape = {"vocab_size": 258, "num_attention_heads": 6, "head_dim": 8, "max_position_embeddings": 512}
    config = tiny.config(**shape, hidden_size=48, intermediate_size=128, num_hidden_layers=6, num_key_value_heads=3)
    larger = tiny.config("qwen3", **shape, hidden_size=60, intermediate_size=90, num_hidden_layers=7)
    for name, made in (("teacher", config), ("larger", larger)):
        tiny.model(made).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(tiny.prose(20_000))
    made = Command(folder, tiny_configuration(folder / "teacher", folder / "text.txt"))
    made.environment["MINITRON_SEARCH_CACHE"] = str(shared_ray)
    return made


def test_a_student_is_pruned_again_and_taught_by_another_model_corrected_before(
    command: Command, shared_ray: Path
) -> None:
    """Iterative compression with an older teacher, of another shape, which is corrected; killed meanwhile, resumed."""
    output, cache = command.folder / "again", shared_ray
    asked = (*INLINE, *CORRECTED, "--distillation.teacher", str(command.folder / "larger"))
    assert command.interrupt(output, "correction:", signal.SIGKILL, *asked) == -signal.SIGKILL
    assert not [path for path in (cache / "corrected").glob("*") if path.suffix not in (".work", ".lock")]
    printed = command.main(output, *asked, "--resume")

    (made,) = events(output, "teacher_corrected")
    folder = Path(made["folder"])
    assert folder == cache / "corrected" / made["id"] and str(folder) in printed
    assert made["made_now"] and made["tokens"] == 256 and made["of"] == fingerprint(command.folder / "larger")
    before, after = made["before"], made["after"]
    assert after["lm_loss"] < before["lm_loss"] and abs(before["kl"]) < 1e-4 < 1e-3 < after["kl"]
    assert before["lm_loss_stderr"] > 0 and after["lm_loss_n"] == 4
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "qwen3"
    assert not folder.with_name(f"{folder.name}.work").exists()
    written = json.loads((output / "environment.json").read_text())
    assert written["corrected_teacher"] == {"id": made["id"], "folder": str(folder)}
    assert written["distillation_teacher"] == {"folder": str(folder), "fingerprint": fingerprint(folder)}
    assert written["teacher"]["fingerprint"] == fingerprint(command.folder / "teacher")
    (taught,) = events(output, "taught_by")
    assert taught["lm_loss"] == pytest.approx(after["lm_loss"], rel=1e-4)

    found = rows(output)
    assert {row["arm"] for row in found} == {"teacher", "search", "untrained", "retrained"}
    last = next(row for row in found if row["arm"] == "retrained")
    assert last["kl"] < next(row for row in found if row["arm"] == "untrained")["kl"]
    assert next(row for row in found if row["arm"] == "teacher")["kl"] > 0.01  # it is not the one that teaches
    assert "larger`, corrected on the same text (norms)" in (output / "best" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(output / "best")


def test_a_corrected_teacher_is_pruned_and_made_once(command: Command) -> None:
    """Figure 4, then its student of the original: the second run finds the first one's corrected teacher."""
    pruned, kept = command.folder / "pruned", command.folder / "kept"
    command.main(pruned, *INLINE, *CORRECTED, "--stages", "importance")
    command.main(kept, *INLINE, *CORRECTED, "--stages", "importance,search", "--teacher.prune", "original")
    (first,), (second,) = events(pruned, "teacher_corrected"), events(kept, "teacher_corrected")
    assert (first["made_now"], second["made_now"]) == (True, False)
    assert first["id"] == second["id"] and first["after"] == second["after"]
    original, corrected = fingerprint(command.folder / "teacher"), fingerprint(Path(first["folder"]))
    written = [json.loads((output / "environment.json").read_text()) for output in (pruned, kept)]
    assert [made["teacher"]["fingerprint"] for made in written] == [corrected, original]
    assert [made["distillation_teacher"]["fingerprint"] for made in written] == [corrected, corrected]
    teacher = next(row for row in rows(kept) if row["arm"] == "teacher")
    assert teacher["lm_loss"] == pytest.approx(first["before"]["lm_loss"], rel=1e-6) and teacher["kl"] > 1e-3


def test_in_parallel_end_to_end(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "free_checkpoints", lambda run_dir, trials, on_nodes=True: None)
    output = command.folder / "parallel"
    command.main(output, *INLINE, "--teacher.correction.method", "full", "--teacher.correction.parallel", "true",
                 "--teacher.correction.learning_rate", "1e-2", "--stages", "importance,search")  # fmt: skip
    assert {row["arm"] for row in rows(output)} == {"teacher", "search"}
    checkpoint = next((output / "trials").glob("search-*/checkpoint/step-*"))
    assert (checkpoint / "teacher.pt").exists()
    assert not events(output, "teacher_corrected")


# What is refused, before anything is written


@pytest.fixture
def refused(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(command.folder)

    def refuse(*flags: str) -> str:
        assert main(["--config", str(command.file), "--output", "refused", *flags]) == 2
        assert not (command.folder / "refused").exists()
        return capsys.readouterr().err

    return refuse


def test_a_teacher_of_a_smaller_vocabulary_is_refused(refused: Any, command: Command) -> None:
    folder = command.folder / "foreign"
    tiny.model(tiny.config(vocab_size=200, max_position_embeddings=512)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    said = refused("--distillation.teacher", str(folder))
    assert "distillation.teacher: " in said and "a vocabulary of 200 and teacher.model" in said and "one of 258" in said
    assert "valid: a model with the same tokenizer" in said


def test_a_teacher_that_means_other_words_by_the_same_ids_is_refused(refused: Any, command: Command) -> None:
    folder = command.folder / "swapped"
    shutil.copytree(command.folder / "larger", folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(made))
    said = refused("--distillation.teacher", str(folder))
    assert "distillation.teacher: " in said and f"'a' is its token {vocabulary['a']} and the other's" in said


def test_a_teacher_that_is_not_there_or_of_no_known_family_is_named_by_its_key(refused: Any, command: Command) -> None:
    said = refused("--distillation.teacher", str(command.folder / "large"))
    assert "distillation.teacher: " in said and "near it: " in said and "teacher.model" not in said
    folder = command.folder / "unknown"
    shutil.copytree(command.folder / "larger", folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gptj", "vocab_size": 258}))
    said = refused("--distillation.teacher", str(folder))
    assert "distillation.teacher: family 'gptj' is not supported" in said


def test_a_teacher_of_too_few_positions_is_refused(refused: Any, command: Command) -> None:
    folder = command.folder / "short"
    shutil.copytree(command.folder / "larger", folder)
    made = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(made | {"max_position_embeddings": 16}))
    assert "corpus.sequence_length: 32 is above" in refused("--distillation.teacher", str(folder))


def test_intermediate_states_need_a_teacher_of_the_same_shape(command: Command) -> None:
    for name, shape_fits in (("larger", False), ("teacher", True)):
        config = load_config(str(command.file), ["--distillation.teacher", str(command.folder / name)])
        with_states = config.distillation.model_copy(update={"intermediate": 1.0})
        config = config.model_copy(update={"distillation": with_states, "output": str(command.folder / "none")})
        if shape_fits:
            check(config, resume=False)
        else:
            with pytest.raises(ValueError, match="distillation.intermediate: 1.0 .*another shape.*valid: 0, or"):
                check(config, resume=False)


def test_text_for_a_longer_correction_is_there(command: Command) -> None:
    flags = ["--output", str(command.folder / "none"), *CORRECTED, "--teacher.correction.tokens", "2048",
             "--depth.lengths", "1"]  # fmt: skip
    for stages in ("depth", "importance,search"):
        config = load_config(str(command.file), [*flags, "--stages", stages])
        assert prepare(config, resume=False).corpus.train.size == 2048
