"""A key that other tools call otherwise is looked for by its meaning."""

import pytest

from minitron_search.config import keys, loading
from minitron_search.config.synonyms import SYNONYMS

KNOWN = {name for name, _ in keys.keys()}


def test_every_key_that_is_meant_is_one() -> None:
    assert not {key for meant in SYNONYMS.values() for key in meant} - KNOWN


@pytest.mark.parametrize("key, meant", [
    ("distillation.lr", "distillation.learning_rate"),
    ("retraining.lr", "retraining.learning_rate"),
    ("lr", "distillation.learning_rate"),
    ("retraining.epochs", "retraining.tokens"),
    ("batch_size", "distillation.batch_tokens"),
    ("space.budget.memory", "space.budget.memory_bytes"),
    ("teacher.name", "teacher.model"),
    ("search.workers", "search.concurrency"),
    ("space.axes.layers", "space.axes.drop_block"),
    ("depth.metric", "depth.metrics"),
    ("teacher_model", "teacher.model"),
    ("gradient_accumulation_steps", "distillation.batch_tokens"),
    ("report_to", "trackers"),
    ("teacher_model_name_or_path", "distillation.teacher"),
    ("prune_target_params", "space.budget.params.target"),
    ("target_ffn_hidden_size", "space.axes.intermediate_size"),
    ("base_model", "teacher.model"),
    ("search.trails", "search.trials"),
])  # fmt: skip
def test_the_nearest_by_meaning_is_named(key: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}: unknown key .*did you mean {meant}\?"):
        loading.load_config(None, [f"--{key}=3"])
