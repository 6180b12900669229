"""A candidate on the teacher's own memory: the same weights as a trimmed student's, and nothing copied that leads."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_search.distillation.settings import LoopSettings
from minitron_search.models.architecture import Architecture
from minitron_search.models.device import release_memory
from minitron_search.models.families import family_of, split_name, whole
from minitron_search.pruning.trimming import as_views, trim
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.runner import initial_student, run_trial
from minitron_search.trials.settings import untrained
from tests import tiny
from tests.materials import materials, trial

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are read as Linux shows them")
SETTINGS = LoopSettings(total_tokens=64, milestones=(64,), batch_tokens=64, threads=1)


def mapped(folder: Path) -> list[range]:
    """The addresses at which this process has mapped files of `folder`."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]


def copied(folder: Path, architecture: Architecture) -> set[str]:
    """The names, inside their layer, of the weights that are not in the mapped files; of the views as they are."""
    views, student = as_views(folder, architecture), trim(folder, architecture)
    addresses, family = mapped(folder), family_of(views.config)
    assert addresses
    found = set()
    for (name, view), own in zip(views.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(view, own), name
        storage = view.untyped_storage().data_ptr()
        if not any(storage in where for where in addresses):
            found.add(split_name(family, name)[1])
    ids = tiny.tokens(views.config)
    # MKL gives the same bits, but for products of a single row
    torch.testing.assert_close(tiny.logits(views, ids), tiny.logits(student, ids), rtol=1e-5, atol=1e-5)
    return found


@tiny.over(tiny.FAMILIES)
def test_only_what_no_view_can_say_is_copied(model_type: str, tmp_path: Path) -> None:
    # 3 heads a group, where there are groups
    config = tiny.config(model_type, num_attention_heads=6, hidden_size=36, tie_word_embeddings=False)
    tiny.model(config).save_pretrained(tmp_path)
    teacher, family = whole(config), tiny.FAMILIES[model_type]
    fused = {name for name, dims in family.layer_weights.items() if "+" in "".join(dims)}
    fused_mlp = {name for name in fused if "mlp" in "".join(family.layer_weights[name])}
    query = {name for name, dims in family.layer_weights.items() if "query" in dims}
    scaled = {"model.embed_tokens.weight"} if family.embedding_scaled else set()
    assert copied(tmp_path, replace(teacher, layers=(0, 2))) == set()
    assert copied(tmp_path, replace(teacher, intermediate_size=13)) == fused_mlp
    if family.grouped_query:
        groups = replace(teacher, num_attention_heads=3, num_key_value_heads=1)
        heads = replace(teacher, num_attention_heads=4)
        one_group = replace(groups, num_attention_heads=2)
        if family.head_dim != "derived":
            assert copied(tmp_path, replace(teacher, hidden_size=24)) == scaled
            assert copied(tmp_path, one_group) == copied(tmp_path, groups)
        else:  # heads take hidden channels with them
            groups, heads = replace(groups, hidden_size=18), replace(heads, hidden_size=24)
        present = {split_name(family, name)[1] for name, _ in trim(tmp_path, heads).named_parameters()}
        assert copied(tmp_path, groups) == (fused - fused_mlp) & present
        assert copied(tmp_path, heads) == (query | fused - fused_mlp) & present
    else:
        assert copied(tmp_path, replace(teacher, num_attention_heads=4, num_key_value_heads=4, hidden_size=24)) == fused


@tiny.over(tiny.family_seeds(4, 10))
def test_any_candidate_on_views_is_the_trimmed_one(model_type: str, seed: int, tmp_path: Path) -> None:
    config = tiny.random_config(seed, model_type=model_type)
    tiny.model(config, seed).save_pretrained(tmp_path)
    copied(tmp_path, tiny.random_architecture(config, seed))


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_scoring_a_candidate_on_views_takes_no_memory_for_its_weights(tmp_path: Path) -> None:
    config = tiny.config(hidden_size=256, intermediate_size=1024, num_hidden_layers=12, head_dim=64)
    teacher = tiny.model(config)
    teacher.save_pretrained(tmp_path)
    architecture = replace(whole(config), hidden_size=224, intermediate_size=768)
    ids = tiny.tokens(config)
    first = trim(tmp_path, architecture)
    tiny.logits(first, ids)  # what a first pass allocates besides
    release_memory()  # of earlier tests, which would be used again, and nothing be seen
    before = anonymous_bytes()
    views = as_views(tmp_path, architecture)
    tiny.logits(views, ids)
    on_views = anonymous_bytes() - before
    student = trim(tmp_path, architecture)
    tiny.logits(student, ids)
    trimmed = anonymous_bytes() - before - on_views
    weights = 4 * student.num_parameters()
    assert weights > 30e6
    assert on_views < 0.1 * weights < 0.9 * weights < trimmed, (on_views, trimmed)
    del teacher, first  # kept until here: memory that is free already would be used again, and nothing be seen


@tiny.over(itertools.product(["float32", "bfloat16"], ["float32", "bfloat16"]))
def test_a_trial_that_does_not_train_is_scored_on_views_of_a_float32_teacher(
    stored: str, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    made = materials(tmp_path, precision, stored)
    architecture = Architecture(16, 13, 4, 2, (0, 1, 3))
    own = trim(made.teacher_folder, architecture)

    def held(trains: bool, initialization: str = "pruned") -> bool:
        """Whether its weights are in the teacher's mapped file."""
        student = initial_student(made, trial(architecture, SETTINGS, initialization), trains=trains)
        parts = list(zip(student.parameters(), own.parameters(), strict=True))
        assert initialization != "pruned" or all(torch.equal(part, expected) for part, expected in parts)
        assert all(part.dtype == torch.float32 for part, _ in parts)
        return all(any(part.data_ptr() in where for where in mapped(made.teacher_folder)) for part, _ in parts)

    assert held(trains=False) == (stored == "float32")
    assert not held(trains=True)
    for other in ("random", "random_pruned"):
        assert not held(trains=False, initialization=other)


def rungs(run: RunDirectory, trial: str) -> list[dict[str, Any]]:
    return [line for line in run.metrics(trial) if line["kind"] == "rung"]


def test_a_trial_scored_on_views_has_the_scores_of_the_trimmed_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    made = materials(tmp_path)
    asked = trial(Architecture(16, 13, 4, 2, (0, 1, 3)), untrained(SETTINGS))
    file = made.teacher_folder / "model.safetensors"
    before = file.read_bytes()
    run_trial(made, asked, decided=False)
    (on_views,) = rungs(made.run_dir, asked.id)
    monkeypatch.setattr("minitron_search.trials.runner.is_float32", lambda folder: False)
    trimmed = replace(asked, arm="untrained")
    run_trial(made, trimmed, decided=False)
    (of_trim,) = rungs(made.run_dir, trimmed.id)
    for key in ("lm_loss", "kl", "winogrande_margin"):
        assert on_views[key] == pytest.approx(of_trim[key], rel=1e-5)
    assert file.read_bytes() == before


@tiny.over(["pruned", "random", "random_pruned"])
def test_a_rung_at_0_tokens_is_the_trim_as_it_is_and_changes_nothing_after_it(
    initialization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    made = materials(tmp_path)
    shape, scores = Architecture(16, 13, 4, 2, (0, 1, 3)), ("lm_loss", "kl", "winogrande_margin")

    def run(arm: str, milestones: tuple[int, ...], decided: bool = False) -> list[dict[str, Any]]:
        settings = replace(SETTINGS, milestones=milestones, total_tokens=milestones[-1])
        asked = replace(trial(shape, settings, initialization), arm=arm)
        run_trial(made, asked, decided=decided)
        return rungs(made.run_dir, asked.id)

    (as_it_is,) = run("untrained", (0,))
    plain = run("plain", (64, 128))
    first, *later = run("with", (0, 64, 128))
    assert (first["tokens"], first["rung"]) == (0, 0) and [row["tokens"] for row in later] == [64, 128]
    assert [first[name] for name in scores] == [as_it_is[name] for name in scores]
    assert [[row[name] for name in scores] for row in later] == [[row[name] for name in scores] for row in plain]

    name = replace(trial(shape, SETTINGS, initialization), arm="stopped").id
    made.run_dir.decide(name, 0, "stop")
    assert len(run("stopped", (0, 64, 128), decided=True)) == 1
    assert not made.run_dir.checkpoint(name).exists(), "nothing to go on from but the teacher"
    made.run_dir.decide(name, 0, "continue")
    made.run_dir.decide(name, 1, "continue")
    assert [[row[s] for s in scores] for row in run("stopped", (0, 64, 128), decided=True)[1:]] == [
        [row[s] for s in scores] for row in plain
    ]
