"""Every criterion measures every family, and the order it gives trims it."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch

from minitron_search.config.inputs import ImportanceConfig
from minitron_search.importance.importance import measure
from minitron_search.models.families import whole
from minitron_search.pruning.trimming import permute_teacher
from tests import tiny

METHODS = ("activation", "magnitude", "taylor", "wanda")
ONCE = [(name, METHODS[place % len(METHODS)]) for place, name in enumerate(tiny.FAMILIES)]
# families that keep several matrices in one weight, whose layout every criterion must know
FUSED = [
    name
    for name, family in tiny.FAMILIES.items()
    if any("+" in dim or "|" in dim for dims in family.layer_weights.values() for dim in dims)
]
PAIRS = list(itertools.product(tiny.FAMILIES, METHODS))
MORE = [PAIRS[at] for at in np.random.default_rng(0).permutation(len(PAIRS))[:20]]


@tiny.over(dict.fromkeys([*ONCE, *itertools.product(["llama"], METHODS), *MORE]))
def test_scores_of_a_family_have_its_shape_and_do_not_depend_on_the_batch(name: str, method: str) -> None:
    teacher = tiny.model(tiny.random_config(1, model_type=name))
    windows = tiny.tokens(teacher.config, rows=4).numpy().astype(np.int32)
    asked = ImportanceConfig(method=method)
    found = measure(teacher, windows, asked)
    shape = whole(teacher.config)
    assert found.hidden.shape == (shape.hidden_size,)
    assert found.mlp.shape == (shape.num_hidden_layers, shape.intermediate_size)
    assert found.heads.shape == (shape.num_hidden_layers, shape.num_attention_heads)
    one_by_one = measure(teacher, windows, asked, rows_at_once=1)
    for scores, alone in (
        (found.hidden, one_by_one.hidden),
        (found.mlp, one_by_one.mlp),
        (found.heads, one_by_one.heads),
    ):
        assert scores.isfinite().all() and (scores > 0).any()
        assert torch.allclose(scores, alone, rtol=1e-3, atol=1e-5 * float(scores.max()))


@tiny.over(dict.fromkeys([*ONCE, *itertools.product(["llama", *FUSED], METHODS)]))
def test_a_permuted_teacher_has_the_permuted_scores(name: str, method: str, tmp_path: Path) -> None:
    """An element keeps its score wherever it stands: a wrong layout of a fused weight would mix them."""
    teacher = tiny.model(tiny.random_config(2, model_type=name))
    teacher.save_pretrained(tmp_path / "teacher")
    windows = tiny.tokens(teacher.config, rows=2).numpy().astype(np.int32)
    asked = ImportanceConfig(method=method)
    before = measure(teacher, windows, asked)
    groups = whole(teacher.config).num_key_value_heads
    rankings = before.rankings(groups)
    folder = permute_teacher(tmp_path / "teacher", rankings, tmp_path / "permuted")
    after = measure(type(teacher).from_pretrained(folder, dtype=torch.float32).eval(), windows, asked)
    heads = before.heads.view(len(before.heads), groups, -1)
    heads = heads.gather(2, rankings.heads).gather(1, rankings.groups[:, :, None].expand_as(heads)).flatten(1)
    expected = dataclasses.replace(
        before, hidden=before.hidden[rankings.hidden], mlp=before.mlp.gather(1, rankings.mlp), heads=heads
    )
    for field in ("hidden", "mlp", "heads"):
        left, right = getattr(after, field), getattr(expected, field)
        assert torch.allclose(left, right, rtol=1e-2, atol=1e-4 * float(right.max())), field
