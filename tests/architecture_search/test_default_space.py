"""A teacher of any family gives a space by itself: one that keeps heads, is legal, in budget, and a choice."""

from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

from minitron_search.architecture_search.default_space import (
    ENOUGH_POINTS,
    HEADS_KEPT,
    counts_of,
    derived,
    in_numbers,
    shares,
    two_digits,
)
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.config.space import SpaceConfig
from minitron_search.models.families import family_of, is_expressible, sizes, whole
from minitron_search.teachers import embedded
from tests import tiny


def space_of(**given: Any) -> SpaceConfig:
    return parse_config({"space": given}).space


def made(teacher: PretrainedConfig, **given: Any) -> tuple[SpaceConfig, SearchSpace]:
    asked = space_of(**given)
    found = derived(asked, teacher, teacher)
    assert asked.open and not found.open
    return found, SearchSpace(found, teacher)


def shown(axis: Any) -> tuple[int, ...] | None:
    return axis.values() if axis else None


# The property, over drawn teachers of every family


@tiny.over([(name, seed) for name, seed in tiny.family_seeds(6, more=10)])
def test_any_teacher_gives_a_space_that_keeps_heads_and_is_legal_and_in_budget(name: str, seed: int) -> None:
    teacher = drawn(name, seed)
    found, space = made(teacher)
    shape, params = whole(teacher), counts_of(teacher, found.budget)["params"]
    target = found.budget.params
    assert target is not None and len(space) > 0
    wanted = two_digits(2 * params / 3)
    if target.number != wanted:  # of a teacher of few sizes, none of which is there
        assert (np.abs(space.counted().params - wanted) > target.tolerance * wanted).all()
    for row in space.shapes[np.random.default_rng(0).permutation(len(space.shapes))[:40]]:
        candidate = space.architecture(row)
        assert is_expressible(teacher, candidate)
        assert abs(space.measures(candidate).params - target.number) <= target.tolerance * target.number
        ratio = shape.num_attention_heads // shape.num_key_value_heads
        if family_of(teacher).head_dim == "derived" and found.axes.hidden_size:  # there is no other hidden_size then
            assert candidate.num_attention_heads == candidate.hidden_size // sizes(teacher)["head_dim"]
            assert ratio == 1 or candidate.num_key_value_heads == shape.num_key_value_heads
        else:
            kept = candidate.num_attention_heads, candidate.num_key_value_heads
            assert kept == (shape.num_attention_heads, shape.num_key_value_heads)


def drawn(name: str, seed: int) -> PretrainedConfig:
    """A teacher of that family: at some seeds of a vocabulary that is most of it, at some of realistic widths."""
    shape: dict[str, Any] = {"vocab_size": int(np.random.default_rng(seed).choice([61, 5_000, 50_000]))}
    if seed % 2:
        heads, head_dim = int(np.random.default_rng(seed).choice([6, 14, 16])), 16
        shape |= {"num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": head_dim,
                  "hidden_size": heads * head_dim, "intermediate_size": 640, "num_hidden_layers": 8}  # fmt: skip
        return tiny.random_config(seed, ratio=1, model_type=name, **shape)
    return tiny.random_config(seed, model_type=name, **shape)


# Teachers by name: what is printed for them is what a user of each would expect


TRUE = {
    "qwen2": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24,
              "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "gemma3_text": {"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2_048, "num_hidden_layers": 18,
                    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
    "gpt2": {},
}  # fmt: skip


def test_a_qwen_of_14_heads_keeps_them_and_its_sizes_are_multiples_of_64() -> None:
    found, space = made(CONFIG_MAPPING["qwen2"](**TRUE["qwen2"]))
    assert shown(found.axes.hidden_size) == (640, 704, 768, 832, 896)
    assert shown(found.axes.intermediate_size) == tuple(range(2_560, 4_865, 256))
    assert found.axes.num_attention_heads is None and set(space.shapes[:, 2]) == {14} and set(space.shapes[:, 3]) == {2}
    assert found.axes.drop_block and found.axes.drop_block.lengths == (0, 2, 3, 6)
    assert found.budget.params and found.budget.params.number == 420e6 and len(space) > 500


def test_a_gemma_whose_embeddings_are_most_of_it_shrinks_its_hidden_size() -> None:
    found, space = made(CONFIG_MAPPING["gemma3_text"](**TRUE["gemma3_text"]))
    assert found.budget.params and found.budget.params.number == 180e6
    assert shown(found.axes.hidden_size) == (448, 512, 576, 640) and set(space.shapes[:, 0]) == {448, 512}
    assert len(space) > 300


def test_heads_that_make_up_hidden_size_follow_it_only_where_the_budget_needs_that() -> None:
    small, space = made(CONFIG_MAPPING["gpt2"]())  # a third of it is embeddings
    assert shown(small.axes.hidden_size) == (512, 576, 640, 704, 768)
    assert (space.shapes[:, 0] == 64 * space.shapes[:, 2]).all() and len(np.unique(space.shapes[:, 0])) > 2
    large, space = made(CONFIG_MAPPING["gpt2"](n_embd=1_600, n_layer=48, n_head=25))
    assert large.axes.hidden_size is None and set(space.shapes[:, 2]) == {25}
    assert space.shapes[:, 4].max() == round(float(HEADS_KEPT.depth) * 48)


def test_the_rules_give_the_embedded_teachers_own_space_but_for_its_heads() -> None:
    teacher = embedded.config()
    found = derived(space_of(), teacher, teacher)
    own = embedded.SPACE
    assert own.axes.num_attention_heads and own.axes.num_attention_heads.values() == (6, 9)
    assert found.axes == own.axes.model_copy(update={"num_attention_heads": None}) and found.budget == own.budget
    assert derived(space_of(), teacher, teacher, own) == own


@pytest.mark.parametrize("share", ["95%", "50%", "33.3%", "15%"])
def test_axes_go_as_far_as_the_budget_that_is_given(share: str) -> None:
    teacher = CONFIG_MAPPING["gemma3_text"](**TRUE["gemma3_text"])
    found, space = made(teacher, budget={"params": {"target": share}})
    exact = float(share.rstrip("%")) / 100 * counts_of(teacher, found.budget)["params"]
    assert found.budget.params and found.budget.params.number == round(exact) and len(space) >= ENOUGH_POINTS


# What is given stays, and only what is left is derived


def test_what_is_given_of_an_axis_stays() -> None:
    teacher = CONFIG_MAPPING["qwen2"](**TRUE["qwen2"])

    def axis(**parts: Any) -> tuple[int, ...] | None:
        auto = {"low": "auto", "high": "auto", "step": "auto"}
        axes = {"hidden_size": {**auto, **parts}, "intermediate_size": "auto", "drop_block": "auto"}
        return shown(made(teacher, axes=axes)[0].axes.hidden_size)

    assert axis(low=768) == (768, 832, 896) and axis(high=768) == (640, 704, 768)
    assert axis(step=128) == (640, 768, 896) and axis(divisor=96) == (672, 768, 864)
    assert axis(choices=[512, 640]) == (512, 640)
    with pytest.raises(ValueError, match=r"space.axes.hidden_size: low 2000 is above high 896; valid: low at most 896"):
        axis(low=2_000)


def test_an_axis_that_a_mapping_leaves_out_is_kept_and_the_budget_is_what_the_others_reach() -> None:
    """Two thirds are out of reach of the depth alone: the nearest, which is not the teacher itself."""
    teacher = tiny.config(num_hidden_layers=3, vocab_size=5_000)
    found, space = made(teacher, axes={"drop_block": {"lengths": [0, 1, 2]}})
    params = counts_of(teacher, found.budget)["params"]
    assert found.axes.hidden_size is None and set(space.shapes[:, 0]) == {teacher.hidden_size}
    assert found.budget.params and 2 * params / 3 < found.budget.params.number < params and len(space) > 0


def test_a_teacher_that_nothing_is_cut_from_is_told_what_is_reachable() -> None:
    with pytest.raises(ValueError, match=r"no architecture on the axes' grid meets the budget; .* reachable"):
        made(tiny.config(), axes={})


def test_shares_are_of_the_same_count_of_the_teacher() -> None:
    teacher = tiny.config()
    asked = {"params": {"target": "90%"}, "non_embedding_params": {"target": "80%"},
             "memory_bytes": {"target": "87.5%", "batch_size": 3, "context_length": 50}}  # fmt: skip
    budget = in_numbers(space_of(budget=asked).budget, counts_of(teacher, space_of(budget=asked).budget))
    of_teacher = counts_of(teacher, budget)
    for name, share in shares(space_of(budget=asked).budget).items():
        assert getattr(budget, name).number == round(share * of_teacher[name])
    body, cache = (
        of_teacher["params"],
        2 * 3 * 2 * 6 * 3 * 50,
    )  # keys and values of layers, groups, head_dim, rows, tokens
    assert of_teacher["memory_bytes"] == 2 * (body + cache)


def test_a_derived_budget_that_rules_out_a_given_one_is_named() -> None:
    teacher = CONFIG_MAPPING["qwen2"](**TRUE["qwen2"])
    with pytest.raises(ValueError, match="params is derived; valid: --space.budget '{non_embedding_params"):
        made(teacher, budget={"params": {"target": "auto"}, "non_embedding_params": {"target": "1M"}})
