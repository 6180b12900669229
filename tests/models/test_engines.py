"""What vLLM and llama.cpp assume of a family: what they would not take is said, for one student as for many."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PretrainedConfig

from minitron_search.architecture_search.deployable import verdicts
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.config.schema import Config
from minitron_search.models.engines import ENGINES, engines_of, judge, refusals, student_of
from minitron_search.models.families import student_config, whole
from minitron_search.planning.defaults import completed
from minitron_search.teachers.sources import teacher_config
from tests import tiny

PERIODS = {"gemma2": 2, "gemma3_text": 6, "smollm3": 4}


def of(
    name: str, hidden_size: int, heads: int, layers: tuple[int, ...] | None = None, **given: Any
) -> PretrainedConfig:
    shape = {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 6, "intermediate_size": 128, **given}
    teacher = tiny.config(name, **shape)
    made = replace(whole(teacher), hidden_size=hidden_size, num_attention_heads=heads, layers=layers or tuple(range(6)))
    return student_config(teacher, made)


@tiny.over(["granite", "olmo", "olmo2", "olmo3", "phi3", "exaone4", "nemotron", "starcoder2", "cohere"])
def test_heads_that_do_not_make_up_hidden_size_are_said_to_be_refused_by_llama_cpp(name: str) -> None:
    assert not refusals(of(name, 32, 4))
    assert set(refusals(of(name, 24, 4))) == {"llama.cpp"}


def test_of_qwen2_by_vllm_too() -> None:
    assert not refusals(of("qwen2", 32, 4)) and not refusals(of("qwen2", 16, 2))
    found = refusals(of("qwen2", 24, 4))
    assert set(found) == {"llama.cpp", "vLLM"} and "4 of 8 are not 24" in found["vLLM"]


@tiny.over(["llama", "mistral", "qwen3", "smollm3", "seed_oss", "ernie4_5", "gemma", "glm4"])
def test_families_that_read_head_dim_may_have_any_hidden_size(name: str) -> None:
    assert not refusals(of(name, 24, 4)) and not refusals(of(name, 24, 2))


@tiny.over(PERIODS)
def test_layers_out_of_their_rhythm_are_said_to_be_refused(name: str) -> None:
    given = {"query_pre_attn_scalar": 8} if name.startswith("gemma") else {}
    period = PERIODS[name]
    assert not refusals(of(name, 32, 4, **given))
    assert not refusals(of(name, 32, 4, tuple(range(4)), **given)), "the last ones dropped, and the rhythm is kept"
    without = tuple(layer for layer in range(6) if layer != period - 2)
    assert "repeat every" in refusals(of(name, 32, 4, without, **given))["llama.cpp"]


@tiny.over(["gemma2", "gemma3_text"])
def test_another_scale_of_attention_is_said_to_be_refused(name: str) -> None:
    assert "query_pre_attn_scalar" in refusals(of(name, 32, 4, query_pre_attn_scalar=9))["llama.cpp"]


@tiny.over([("gemma2", 46), ("gemma3_text", 62)])
def test_of_as_many_layers_as_the_27b_has_llama_cpp_takes_the_scale_of_the_27b(name: str, depth: int) -> None:
    """hidden_size / num_attention_heads in place of head_dim: 21 of 42 channels and 2 heads, then 16 of 32."""
    deep = {"num_hidden_layers": depth, "query_pre_attn_scalar": 21, "hidden_size": 42, "num_attention_heads": 2}
    teacher = tiny.config(name, **deep, head_dim=8)
    assert not refusals(teacher)
    narrower = student_config(teacher, replace(whole(teacher), hidden_size=32))
    shallower = student_config(teacher, replace(whole(teacher), layers=tuple(range(depth - 6))))
    assert {*refusals(narrower), *refusals(shallower)} == {"llama.cpp"}


@tiny.over(["phi", "gpt2"])
def test_an_mlp_of_another_width_is_said_to_be_refused(name: str) -> None:
    assert not refusals(of(name, 32, 4))
    assert "96 is not 4 x 32" in refusals(of(name, 32, 4, intermediate_size=96))["llama.cpp"]


@tiny.over([("gemma", {"llama.cpp"}), ("gemma2", {"llama.cpp", "vLLM"}), ("cohere", {"llama.cpp", "vLLM"})])
def test_a_head_of_its_own_is_said_to_be_refused_where_theirs_are_tied(name: str, engines: set[str]) -> None:
    given = {"query_pre_attn_scalar": 8} if name == "gemma2" else {}
    assert not refusals(of(name, 32, 4, **given))
    found = refusals(of(name, 32, 4, tie_word_embeddings=False, **given))
    assert set(found) == engines and all("a head of its own" in reason for reason in found.values())


@tiny.over(["ministral", "opt", "gpt_neox"])
def test_families_without_a_converter_are_said_to_be_refused(name: str) -> None:
    assert name in refusals(of(name, 32, 4))["llama.cpp"]


def test_everything_in_the_default_space_is_taken() -> None:
    """And its heads have a size that every attention back end of vLLM takes (FlashInfer's are the fewest)."""
    config, _ = completed(Config(), None)
    space = SearchSpace(config.space, teacher_config(config.teacher.model))
    assert all(verdict.taken.all() and not verdict.reason for verdict in verdicts(space.config, space.points))
    for shape in space.shapes:
        student = student_config(space.config, space.architecture(shape))
        assert not refusals(student) and student.head_dim == 64
        assert student.num_attention_heads % student.num_key_value_heads == 0


@tiny.over(tiny.FAMILIES)
def test_many_students_are_judged_as_each_is(name: str) -> None:
    """Every architecture of a space with all axes: as its own configuration says."""
    derived = tiny.FAMILIES[name].head_dim == "derived"
    scale = {"query_pre_attn_scalar": 8} if name.startswith("gemma") else {}
    config = tiny.config(name, hidden_size=32, head_dim=8, num_hidden_layers=7, intermediate_size=128, **scale)
    axes = {"hidden_size": {"choices": [16, 24, 32]}, "num_attention_heads": {"choices": [2, 3, 4]},
            "intermediate_size": {"choices": [64, 96, 128]}, "drop_block": {"lengths": [0, 2, 3, 6]}}  # fmt: skip
    if not derived:
        axes["num_key_value_heads"] = {"choices": [1, 2]}
    wide = {"params": {"target": "20K", "tolerance": 0.99}}
    space = SearchSpace(parse_config({"space": {"axes": axes, "budget": wide}}).space, config)
    found = {verdict.engine.name: verdict for verdict in verdicts(config, space.points)}
    alone = [refusals(student_config(config, each)) for each in space.architectures()]
    for engine in ("vLLM", "llama.cpp"):
        assert found[engine].taken.tolist() == [engine not in reasons for reasons in alone]
        reasons = [reasons[engine].partition(", and here ")[0] for reasons in alone if engine in reasons]
        counts = {reason: reasons.count(reason) for reason in reasons}
        assert counts.get(found[engine].reason, 0) == max(counts.values(), default=0)
    if name in ("qwen2", "gemma2", "phi"):
        assert 0 < found["llama.cpp"].taken.sum() < len(space), "or nothing was compared"


def test_a_verdict_says_how_many_and_why() -> None:
    taken = judge(ENGINES["vllm"], student_of(of("qwen2", 24, 4)))
    assert str(taken) == ("deployable by vLLM: 0 of 1; most often it takes the heads of a qwen2 to be "
                          "hidden_size / num_attention_heads wide")  # fmt: skip
    assert str(judge(ENGINES["vllm"], student_of(of("qwen2", 32, 4)))) == "deployable by vLLM: 1 of 1"


def test_an_unknown_engine_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"space.deployable: 'vLLM' is not an engine; valid: vllm, llama.cpp"):
        engines_of(["llama.cpp", "vLLM"])
