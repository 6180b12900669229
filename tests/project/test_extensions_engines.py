"""An engine from outside: one entry of `ENGINES`, and the dry run counts by it and `space.deployable` knows it."""

import pytest

from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.models.engines import ENGINES, Engine, Rule, refusals
from minitron_search.models.families import student_config
from minitron_search.planning.forecast import deployability
from tests import tiny

ODD = Rule(("llama", "mistral"), lambda students: students.hidden % 16 != 0, "its tiles are 16 wide", ", not {hidden}")


def test_an_engine_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "tiles", Engine("Tiles", (ODD,)))
    teacher = tiny.config(hidden_size=32, num_attention_heads=4, head_dim=8)
    asked = {"axes": {"hidden_size": {"low": 8, "high": 32, "step": 8}}, "deployable": ["tiles"],
             "budget": {"params": {"target": "20K", "tolerance": 0.99}}}  # fmt: skip
    space = SearchSpace(parse_config({"space": asked}).space, teacher)
    assert space.points[:, 0].tolist() == [16, 32]
    assert deployability(space)[-2:] == ["deployable by Tiles: 2 of 4; most often its tiles are 16 wide",
                                         "space.deployable: tiles: 2 of 4 are left"]  # fmt: skip
    narrow = space.architecture((24, 20, 4, 2, 0, 0))
    assert refusals(student_config(teacher, narrow)) == {"Tiles": "its tiles are 16 wide, not 24"}
