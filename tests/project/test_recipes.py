"""The papers' recipes plan what the papers published (arXiv:2408.11796, Tables 1 and 3)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.keys import keys
from minitron_search.config.loading import load_config, parse_config, yaml_values
from minitron_search.config.schema import Config
from minitron_search.planning.prepare import check
from minitron_search.teachers.sources import teacher_config

RECIPES = Path(__file__).parents[2] / "search_spaces"
PAPERS = {
    "llama-3.1-minitron-4b-width": (4.5, 3.7),
    "llama-3.1-minitron-4b-depth": (4.5, 3.5),
    "mn-minitron-8b": (8.4, 7.3),
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration_that_is_all_in_order(path: Path, tmp_path: Path) -> None:
    _, space = check(load_config(str(path), ["--output", str(tmp_path / "run")]), resume=False)
    assert len(space) > 10


@pytest.mark.parametrize("name", PAPERS)
def test_an_anchor_has_the_papers_parameters(name: str) -> None:
    config = load_config(str(RECIPES / f"{name}.yaml"), [])
    space = SearchSpace(config.space, teacher_config(config.teacher.model))
    (anchor,) = space.anchors
    measures = space.measures(anchor)
    assert (round(measures.params / 1e9, 1), round(measures.non_embedding_params / 1e9, 1)) == PAPERS[name]
    assert anchor.id in {architecture.id for architecture in space.architectures()}


# The template


def test_the_template_as_it_is_asks_for_the_defaults() -> None:
    assert load_config(str(RECIPES / "template.yaml"), []) == Config()


def test_the_template_names_every_key_and_what_it_shows_is_valid() -> None:
    """With its `#:` lines; no key is there twice then."""
    shown = yaml_values((RECIPES / "template.yaml").read_text().replace("#: ", ""), "template.yaml")
    parse_config(shown)
    assert {name for name, _ in keys()} - set(named(shown)) == set()


def named(values: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key, those of the mappings in a list too."""
    for each in values if isinstance(values, list) else [values]:
        if isinstance(each, dict):
            for key, value in each.items():
                yield prefix + key
                yield from named(value, f"{prefix}{key}.")
