"""Choose the one architecture of an ablation's arm: by sizes that are given, or by a rule for the budget."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from transformers import PretrainedConfig

from minitron_search.architecture_search.default_space import shares
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.config.space import Anchor, Axes, Axis, DropBlock, SpaceConfig
from minitron_search.importance.methods import trimmed_config
from minitron_search.models.families import whole
from minitron_search.planning.defaults import budget_of
from minitron_search.teachers.sources import teacher_config

# the largest steps that come near a budget: a percent of the parameters of the smallest teachers
HIDDEN_DIVISOR, MLP_DIVISOR = 16, 32
CLOSE = 0.005  # of the target: shapes that are no further from it than this are equal in parameters
LAYERS = tuple(name for name in get_args(DropBlock.model_fields["seeds"].annotation) if name != "none")
RULES = ("width", *(f"depth_{name}" for name in LAYERS))


def shaped(architecture: Any, config: Config) -> dict[str, Any]:
    """Return the keys of `space` that leave one architecture, the first that the search of `config` proposes.

    architecture: a mapping of sizes, of which those left out are the teacher's, with drop_block [start, length] or
    {lengths: [n], seeds: bi}; or a rule. width: all heads and layers, hidden_size and intermediate_size shrunk as alike
    as comes near the budget's parameters. depth_<seeds>: all widths, and as many layers as come nearest to them;
    which ones, `space.axes.drop_block.seeds` says. Raises ValueError for anything else.
    """
    if isinstance(architecture, Mapping):
        return _given(architecture)
    if architecture not in RULES:
        raise ValueError(f"architecture: {architecture!r} is not a rule; valid: {', '.join(RULES)}, or sizes such as "
                         "{hidden_size: 448, intermediate_size: 1184}")  # fmt: skip
    if config.space.budget.params is None:
        raise ValueError(f"architecture: {architecture} comes near space.budget.params, which is not given; valid: "
                         "space.budget: {params: {target: 90M, tolerance: 0.03}}")  # fmt: skip
    teacher = trimmed_config(config.importance.method, teacher_config(config.teacher.model))
    if architecture == "width":
        return _given(_shrunk_alike(config, teacher))
    length = _layers_to_drop(config, teacher)
    return {"axes": {"drop_block": {"lengths": [length], "seeds": architecture.removeprefix("depth_")}}}


def in_numbers(space: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Return `space.budget` in numbers: a share of the teacher's is of the one that all arms have in common."""
    config = loading.parse_config({"space": dict(space), "teacher": dict(teacher)})
    budget = budget_of(config) if shares(config.space.budget) else config.space.budget
    return budget.model_dump(mode="json")


def _given(sizes: Mapping[str, Any]) -> dict[str, Any]:
    known = list(Anchor.model_fields)
    if unknown := [name for name in sizes if name not in known]:
        raise ValueError(f"architecture.{unknown[0]}: unknown key (value {sizes[unknown[0]]!r}); "
                         f"valid: {', '.join(known)}")  # fmt: skip
    block = sizes.get("drop_block")
    widths = {name: size for name, size in sizes.items() if name != "drop_block" and size is not None}
    axes: dict[str, Any] = {name: {"choices": [size]} for name, size in widths.items()}
    if isinstance(block, Mapping):
        return {"axes": {**axes, "drop_block": block}}
    if block is None:
        return {"axes": axes}
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise ValueError(f"architecture.drop_block: {block!r}; valid: [start, length], or "
                         "{lengths: [4], seeds: bi}")  # fmt: skip
    return {"axes": {**axes, "drop_block": {"lengths": [block[1]]}}, "anchors": [{**widths, "drop_block": block}]}


def _shrunk_alike(config: Config, teacher: PretrainedConfig) -> dict[str, int]:
    """Return the papers' own choice for width (2408.11796, section 4.2): heads and depth stay."""
    target, full = config.space.budget.params, whole(teacher)
    assert target is not None
    hidden, mlp = full.hidden_size, full.intermediate_size
    axes = Axes(
        hidden_size=Axis(low=1, high=hidden, divisor=math.gcd(HIDDEN_DIVISOR, hidden)),
        intermediate_size=Axis(low=1, high=mlp, divisor=math.gcd(MLP_DIVISOR, mlp)),
    )
    space = SearchSpace(SpaceConfig(budget=config.space.budget, axes=axes, deployable=config.space.deployable), teacher)

    def order(point: Sequence[int]) -> tuple[float, ...]:
        shape = space.architecture(point)
        off = abs(space.measures(shape).params / target.number - 1)
        kept = shape.hidden_size / full.hidden_size, shape.intermediate_size / full.intermediate_size
        return max(off, CLOSE), abs(math.log(kept[0] / kept[1])), off

    chosen = space.architecture(min(space.points.tolist(), key=order))
    chosen_sizes = {"hidden_size": chosen.hidden_size, "intermediate_size": chosen.intermediate_size}
    if chosen.num_attention_heads != full.num_attention_heads:  # of a family whose heads make up hidden_size
        chosen_sizes |= {
            "num_attention_heads": chosen.num_attention_heads,
            "num_key_value_heads": chosen.num_key_value_heads,
        }
    return chosen_sizes


def _layers_to_drop(config: Config, teacher: PretrainedConfig) -> int:
    target = config.space.budget.params
    assert target is not None
    axes = Axes(drop_block=DropBlock(lengths=tuple(range(teacher.num_hidden_layers))))
    space = SearchSpace(SpaceConfig(budget=config.space.budget, axes=axes, deployable=config.space.deployable), teacher)
    shapes = [space.architecture(shape) for shape in space.shapes.tolist()]
    nearest = min(shapes, key=lambda shape: abs(space.measures(shape).params - target.number))
    return teacher.num_hidden_layers - nearest.num_hidden_layers
