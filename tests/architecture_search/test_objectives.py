"""search.objective and search.sampler: what may be asked, and what is refused by name before anything starts."""

from typing import Any

import pytest

from minitron_search.architecture_search.samplers import check_sampler
from minitron_search.config.loading import load_config, parse_config
from tests.tiny import over


@over([
    ("lm_loss", ("lm_loss",)),
    (["kl"], ("kl",)),
    ("winogrande_margin,params", ("winogrande_margin", "params")),
    (["lm_loss", "kl", "memory_bytes"], ("lm_loss", "kl", "memory_bytes")),
    (["lm_loss", "non_embedding_params"], ("lm_loss", "non_embedding_params")),
])  # fmt: skip
def test_one_or_several_and_the_first_ranks(asked: Any, objectives: tuple[str, ...]) -> None:
    config = parse_config({"search": {"objective": asked}})
    assert config.search.objectives == objectives and config.search.ranks_by == objectives[0]
    again = parse_config(config.dump())
    assert again == config and again.dump() == config.dump()


def test_the_command_line_takes_a_list_and_a_name() -> None:
    assert load_config(None, ["--search.objective", "lm_loss,params"]).search.objectives == ("lm_loss", "params")
    assert load_config(None, ["--search.objective", "kl"]).dump()["search"]["objective"] == "kl"
    assert load_config(None, []).dump()["search"]["objective"] == "lm_loss"


@over([
    ({"objective": "loss"},
     "search.objective: 'loss' is not an objective; valid: lm_loss, kl, winogrande_margin, params"),
    ({"objective": ["lm_loss", "flops"]}, "search.objective: 'flops' is not an objective; valid: lm_loss"),
    ({"objective": ["lm_loss", "kl", "lm_loss"]}, "search.objective: lm_loss,kl,lm_loss names one twice; valid: lm_"),
    ({"objective": "params"}, "search.objective: params: rungs rank by the first, .*valid: lm_loss,params"),
    ({"objective": ["params", "lm_loss"]}, "search.objective: params,lm_loss: .*valid: lm_loss,params"),
    ({"objective": []}, "search.objective: empty: .*valid: lm_loss"),
    ({"objective": 3}, "search.objective"),
    ({"objective": None}, "search.objective"),
    ({"objective": {"lm_loss": 1}}, "search.objective"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"search": asked})


@pytest.mark.parametrize(("sampler", "objective", "message"), [
    ("nsga2", "lm_loss", "search.sampler: nsga2 with the one objective lm_loss.*valid: tpe"),
    ("nsga3", "kl", "search.sampler: nsga3 with the one objective kl.*valid: tpe"),
    ("cmaes", "lm_loss", "search.sampler: 'cmaes' is not a sampler; valid: tpe, random, grid, nsga2, nsga3, gp"),
])  # fmt: skip
def test_a_sampler_that_cannot_search_is_refused_by_name(sampler: str, objective: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampler(sampler, [objective])


@over(["tpe", "random", "grid", "nsga2", "nsga3", "gp"])
def test_every_sampler_takes_several(sampler: str) -> None:
    check_sampler(sampler, ["lm_loss", "params"])
