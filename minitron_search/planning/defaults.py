"""Fill in what a configuration leaves to its teacher, once that is known, and say what was derived."""

from collections.abc import Iterator

from transformers import PretrainedConfig

from minitron_search.architecture_search.default_space import counts_of, derived, in_numbers, shares, two_digits
from minitron_search.config import loading
from minitron_search.config.schema import Config, name_after
from minitron_search.config.space import Axes, Axis, Budget, DropBlock
from minitron_search.depth.sweep import in_layers
from minitron_search.importance.methods import trimmed_config
from minitron_search.models.families import family_of, sizes, whole
from minitron_search.teachers import embedded
from minitron_search.teachers.sources import teacher_config

# Spaces that are a teacher's own, where no rule gives them; only what a configuration leaves open is taken from here.
OWN_SPACES = {embedded.NAME: embedded.SPACE}


def pruned_config(config: Config) -> PretrainedConfig:
    """Return the configuration of the model that candidates are cut from, and counted as it is."""
    teacher = teacher_config(config.teacher.model)
    family_of(teacher)
    return trimmed_config(config.importance.method, teacher)


def budget_of(config: Config) -> Budget:
    """Return the budget in numbers, by the teacher alone: not by what any axes reach."""
    teacher, own = teacher_config(config.teacher.model), OWN_SPACES.get(config.teacher.model)
    return in_numbers(config.space.budget, counts_of(teacher, config.space.budget), own.budget if own else None)


def completed(config: Config, begun: Config | None) -> tuple[Config, list[str]]:
    """Return the configuration with nothing left to the teacher, and a line for each value that was.

    begun: the configuration of the run that goes on, from which such values are then taken.
    """
    if begun is not None and config.name == name_after(config.teacher.model):
        config = config.model_copy(update={"name": begun.name})
    if not config.is_open:
        return config, []
    if begun is not None:  # no run leaves its file open, but a hand may
        begun, _ = completed(begun, None)
    teacher, pruned = teacher_config(config.teacher.model), pruned_config(config)
    own = begun.space if begun is not None else OWN_SPACES.get(config.teacher.model)
    values = config.dump()
    if config.space.open:
        values["space"] = derived(config.space, teacher, pruned, own).model_dump(mode="json")
    if config.depth.lengths == "auto":
        lengths = in_layers("auto", max(2, pruned.num_hidden_layers)) if begun is None else begun.depth.lengths
        values["depth"]["lengths"] = list(lengths)
    complete = loading.parse_config(values)
    return complete, [] if begun is not None else list(_lines(config, complete, teacher))


def _lines(asked: Config, complete: Config, teacher: PretrainedConfig) -> Iterator[str]:
    shape, open_budgets = whole(teacher), shares(asked.space.budget)
    counts = counts_of(teacher, asked.space.budget) if open_budgets else {}
    if complete.name == name_after(complete.teacher.model):
        yield f"name: {complete.name}, after teacher.model"
    for name, share in open_budgets.items():
        number, target = getattr(complete.space.budget, name).number, getattr(asked.space.budget, name).target
        line = f"space.budget.{name}.target: {number:,.0f}"
        if target != "auto":
            yield f"{line}, {target} of the teacher's {counts[name]:,}"
        elif number == two_digits(share * counts[name]):
            yield f"{line}, two thirds of the teacher's {counts[name]:,}, in two digits"
        else:
            yield (f"{line}, which is the nearest that the axes reach to two thirds of the teacher's {counts[name]:,}, "
                   f"{share * counts[name]:,.0f}")  # fmt: skip
    for name in Axes.model_fields:
        axis = getattr(asked.space.axes, name)
        if isinstance(axis, Axis) and axis.open:
            found = getattr(complete.space.axes, name)
            follows = name == "num_attention_heads" and found is None and complete.space.axes.hidden_size is not None
            if follows and family_of(teacher).head_dim == "derived":
                yield f"space.axes.{name}: hidden_size / {sizes(teacher)['head_dim']}, as in every {teacher.model_type}"
            else:
                yield f"space.axes.{name}: {_shown(found, getattr(shape, name))}"
        elif isinstance(axis, DropBlock) and axis.lengths == "auto":
            lengths = complete.space.axes.drop_block.lengths  # type: ignore[union-attr]
            yield f"space.axes.{name}.lengths: {', '.join(map(str, lengths))} of the {shape.num_hidden_layers} layers"
    if asked.depth.lengths == "auto" and "depth" in asked.stages:
        yield f"depth.lengths: {', '.join(map(str, complete.depth.lengths))}"


def _shown(axis: Axis | None, size: int) -> str:
    if axis is None:
        return f"the teacher's {size} in every candidate"
    if axis.choices is not None:
        return f"{', '.join(map(str, axis.choices))} of {size}"
    return f"{axis.low} to {axis.high} in steps of {axis.step or axis.divisor}"
