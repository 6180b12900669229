"""The command that runs students in the real engines has one for every rule that an engine may be broken by."""

from benchmarks.engines import FAMILIES, broken, space_of
from minitron_search.models.engines import ENGINES, refusals
from minitron_search.models.families import student_config


def test_every_rule_has_a_student_that_breaks_it_and_no_other() -> None:
    for key, engine in ENGINES.items():
        for rule in engine.rules:
            config, architecture = broken(key, rule)
            said = refusals(student_config(config, architecture))[engine.name]
            assert said.startswith(rule.reason.format(family=rule.families[0]))


def test_the_spaces_that_students_are_drawn_from_leave_something_out_and_something_to_draw() -> None:
    spaces = {family: space_of(family) for family in FAMILIES}
    assert all(len(space) >= 100 for space in spaces.values())
    assert {name for name, space in spaces.items() if len(space) < len(space.in_budget)} == {"qwen2", "gemma3_text"}
    assert len({shape[0] for shape in spaces["qwen2"].shapes.tolist()}) > 1, "heads follow hidden_size"
