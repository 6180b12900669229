"""What a search does next, driven without Ray: the trials' rungs are made up, the rulings and the files are real."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_search.architecture_search.space import SearchSpace
from minitron_search.architecture_search.state import CONTROLS, SearchState
from minitron_search.cluster.schedulers import rung_scheduler
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.records.directory import RunDirectory
from minitron_search.trials.settings import distillation_settings
from minitron_search.trials.trial import Trial
from tests import tiny

TEACHER = tiny.config(
    vocab_size=258, hidden_size=48, intermediate_size=128, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=3, head_dim=8, max_position_embeddings=512,
)  # fmt: skip


def asked(**search: Any) -> Config:
    return loading.parse_config({
        "corpus": {"sequence_length": 32},
        "distillation": {"batch_tokens": 64},
        "space": {
            "budget": {"params": {"target": 105_000, "tolerance": 0.1}},
            "axes": {"hidden_size": {"low": 42, "high": 48, "step": 6},
                     "intermediate_size": {"low": 64, "high": 128, "step": 16},
                     "num_attention_heads": {"choices": [3, 6]}, "drop_block": {"lengths": [0, 1, 2]}},
        },
        "search": {"trials": 9, "rungs": [128, 256, 512], "reduction_factor": 2, **search},
    })  # fmt: skip


def search_in(folder: Path, config: Config) -> SearchState:
    space = SearchSpace(config.space, TEACHER)
    return SearchState(RunDirectory(folder), config, space, distillation_settings(config, "float32"))


def loss(trial: Trial, rung: int) -> float:
    """Any deterministic number: the same whenever the same trial is asked."""
    return 5 - rung + random.Random(f"{trial.id} {rung}").random()


class Driver:
    """Runs what is handed out, as Tune does: `slots` at once, one rung of one of them at a time."""

    def __init__(self, search: SearchState, slots: int = 1, order: int = 0):
        self.search, self.ruling, self.slots = search, rung_scheduler(search), slots
        self.running: list[Trial] = []
        self.order = random.Random(order)

    def step(self) -> bool:
        """One rung; False at the end of the search."""
        search = self.search
        while len(self.running) < self.slots and (trial := search.next_trial()):
            self.running.append(trial)
            self.ruling.on_trial_add(None, SimpleNamespace(config={"trial": trial}))
        if not self.running:
            return False
        trial = self.order.choice(self.running)
        rung = len(search.rows[trial.id])
        tokens = search.settings.milestones[rung]
        row = {**trial.columns(), "rung": rung, "tokens": tokens, "lm_loss": loss(trial, rung), "lm_loss_stderr": 0.1}
        search.run.log_rung(trial.id, row)
        self.ruling.on_trial_result(None, SimpleNamespace(config={"trial": trial}), row)
        search.record(row)
        ruled = search.run.decisions(trial.id).get(rung, {}).get("decision", "stop")
        if ruled == "stop":
            self.running.remove(trial)
            search.alive.remove(trial.id)
        return True

    def to_the_end(self) -> list[tuple[str, int]]:
        while self.step():
            pass
        return table(self.search)


def table(search: SearchState) -> list[tuple[str, int]]:
    return sorted((row["trial"], row["rung"]) for row in search.run.rungs())


@pytest.mark.parametrize("scheduler", ["halving", "asha", "hyperband"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("tokens", ["auto", 900, 2000])
def test_every_search_ends_within_its_tokens(tmp_path: Path, scheduler: str, slots: int, tokens: Any) -> None:
    search = search_in(tmp_path, asked(scheduler=scheduler, tokens=tokens))
    rows = Driver(search, slots).to_the_end()
    assert len(rows) == len(set(rows)), "a rung was repeated"
    assert any(search.status(trial) == "complete" for trial in search.trials)
    assert len({trial.architecture.id for trial in search.trials.values()}) == len(search.trials), "twins"
    if tokens == "auto":
        assert len(search.trials) == 9
    else:
        assert search.committed_tokens() <= tokens
        assert tokens - search.committed_tokens() < 256 or all(
            search.status(trial) == "complete" for trial in search.trials
        ), "tokens were left that a stopped trial could have used"


@pytest.mark.parametrize("scheduler", ["halving", "asha", "hyperband"])
@pytest.mark.parametrize("cut", range(1, 24, 3))
def test_a_search_that_is_cut_off_after_any_rung_goes_on_as_if_it_had_not_been(
    tmp_path: Path, scheduler: str, cut: int
) -> None:
    config = asked(scheduler=scheduler, tokens=2400, finalist_seeds=2, trials=6)
    unbroken = Driver(search_in(tmp_path / "unbroken", config)).to_the_end()
    first = Driver(search_in(tmp_path / "cut", config))
    for _ in range(cut):
        first.step()
    assert Driver(search_in(tmp_path / "cut", config)).to_the_end() == unbroken


def test_a_stopped_trial_goes_on_from_where_it_stopped_when_tokens_are_left(tmp_path: Path) -> None:
    search = search_in(tmp_path, asked(trials=4, tokens=4 * 512, controls=False))
    Driver(search).to_the_end()
    continued = [event for event in search.run.events() if event["event"] == "trial_continued"]
    assert continued and all(search.status(trial) == "complete" for trial in search.trials)
    rungs = [rung for _, rung in table(search)]
    assert sorted(rungs) == sorted([0, 1, 2] * 4)


@pytest.mark.parametrize("scheduler", ["halving", "asha"])
def test_left_tokens_go_first_to_those_that_pass_by_the_present_order(tmp_path: Path, scheduler: str) -> None:
    search = search_in(tmp_path, asked(trials=6, tokens=6 * 512, scheduler=scheduler, controls=False))
    driver, at_the_end = Driver(search), 0
    while True:
        known = len(search.trials) == 6 and not search.alive
        stopped = {t: max(search.rows[t]) for t in search.trials if search.status(t) == "stopped"} if known else {}
        before = {rung: [t[0].id for t in search._at(rung)] for rung in (0, 1)}
        events = len(search.run.events())
        if not driver.step():
            break
        for event in search.run.events()[events:] if known else []:
            if event["event"] == "trial_continued":
                at_the_end += 1
                rung, order = event["rung"], before[event["rung"]]
                if order.index(event["trial"]) >= len(order) / 2:  # it does not pass: then nobody does, and it is best
                    assert not any(before[r].index(t) < len(before[r]) / 2 for t, r in stopped.items())
                    highest = max(stopped.values())
                    assert rung == highest
                    assert event["trial"] == next(t for t in before[rung] if stopped.get(t) == rung)
    assert at_the_end >= 2 and all(search.status(trial) == "complete" for trial in search.trials)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rungs, tokens, reached", [
    ([128, 256, 512], 8 * 128 + 4 * 128 + 2 * 256, [8, 4, 2]),
    ([128, 256, 512], "auto", [20, 10, 5]),
    ([0, 128, 512], "auto", [20, 10, 5]),
    ([0, 128, 512], 4 * 128 + 2 * 384, [20, 4, 2]),  # what is looked at as it is costs nothing
    ([0, 128, 512], 512, [20, 1, 1]),
])  # fmt: skip
def test_halving_passes_the_best_of_a_whole_rung(
    tmp_path: Path, slots: int, seed: int, rungs: list[int], tokens: Any, reached: list[int]
) -> None:
    search = search_in(tmp_path, asked(trials=20, rungs=rungs, tokens=tokens, controls=False, sampler="random"))
    search.settings = replace(search.settings, seed=seed)
    Driver(search, slots, order=seed).to_the_end()
    found = [[t for t in search.trials.values() if rung in search.rows[t.id]] for rung in range(3)]
    assert [len(of) for of in found] == reached
    if tokens != "auto":
        assert search.committed_tokens() == tokens
    for rung in (0, 1):
        best = sorted(found[rung], key=lambda trial: loss(trial, rung))[: reached[rung + 1]]
        assert {trial.id for trial in best} == {trial.id for trial in found[rung + 1]}


@pytest.mark.parametrize("slots", [1, 3])
def test_the_order_of_a_rung_is_the_same_however_many_run_at_once(tmp_path: Path, slots: int) -> None:
    config = asked(trials=12, rungs=[0, 128, 512], sampler="random", controls=False)
    alone = Driver(search_in(tmp_path / "alone", config)).to_the_end()
    assert Driver(search_in(tmp_path / "beside", config), slots, order=slots).to_the_end() == alone


def test_the_place_of_one_that_failed_is_the_next_ones(tmp_path: Path) -> None:
    search = search_in(tmp_path, asked(trials=6, rungs=[0, 128, 512], controls=False))
    driver = Driver(search)
    while sum(1 in rows for rows in search.rows.values()) < 1:
        driver.step()
    first = next(trial for trial, rows in search.rows.items() if 1 in rows)
    search.run.event("trial_failed", trial=first, message="diverged")
    search.read_failures()
    driver.to_the_end()
    order = sorted(search.trials, key=lambda trial: loss(search.trials[trial], 0))
    assert order[0] == first and search.status(first) == "failed"
    assert {trial for trial, rows in search.rows.items() if 1 in rows} == set(order[:4])


@pytest.mark.parametrize("message", [
    "EOFError: Ran out of input", "_pickle.UnpicklingError: invalid load key, '#'.",
    "torch.distributed.checkpoint.api.CheckpointException: CheckpointException ranks:dict_keys([0])",
    "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
])  # fmt: skip
def test_a_trial_that_failed_by_damage_is_tried_again_and_one_that_diverged_is_not(
    tmp_path: Path, message: str
) -> None:  # fmt: skip
    config = asked(trials=6, rungs=[0, 128, 512], controls=False)
    search = search_in(tmp_path, config)
    damaged, diverged = search.next_trial(), search.next_trial()
    assert damaged is not None and diverged is not None
    search.run.event("trial_failed", trial=damaged.id, message=message)
    search.run.event("trial_failed", trial=diverged.id, message="diverged at step 3: loss nan, limit 3")
    search.read_failures()
    assert {search.status(damaged.id), search.status(diverged.id)} == {"failed"}
    again = search_in(tmp_path, config)
    assert (again.status(damaged.id), again.status(diverged.id)) == ("running", "failed")
    assert [trial.id for trial in again.waiting] == [damaged.id]


def test_finalists_run_with_more_seeds_and_the_best_is_of_their_mean(tmp_path: Path) -> None:
    search = search_in(tmp_path, asked(trials=8, finalist_seeds=3, controls=False))
    Driver(search, slots=2).to_the_end()
    seeds: dict[str, set[int]] = {}
    for trial in search.trials.values():
        if search.status(trial.id) == "complete":
            seeds.setdefault(trial.architecture.id, set()).add(trial.seed)
    several = {name for name, of in seeds.items() if of == {0, 1, 2}}
    assert len(several) == 2 and all(of in ({0}, {0, 1, 2}) for of in seeds.values())
    means = {
        name: sum(loss(t, 2) for t in search.trials.values() if t.architecture.id == name) / len(of)
        for name, of in seeds.items()
    }
    assert search.best()[0].id == min(several, key=lambda name: means[name])


def test_all_that_no_test_tells_from_the_best_are_promoted(tmp_path: Path) -> None:
    search = search_in(tmp_path, asked(trials=6, tokens=6 * 512, promote="not_worse", controls=False))
    Driver(search).to_the_end()
    complete = sorted(search.trials.values(), key=lambda trial: loss(trial, 2))
    assert all(search.status(trial.id) == "complete" for trial in complete)
    draws = random.Random(0)
    for place, trial in enumerate(complete):  # the best two differ by less than any window does, the others by more
        shift = 0.0 if place < 2 else 1.0 + place
        windows = [loss(trial, 2) + shift + draws.gauss(0, 0.3) for _ in range(30)]
        search.run.log_scores(trial.id, 2, lm_loss=windows)
    found = {architecture.id for architecture in search.best()}
    assert found == {trial.architecture.id for trial in complete[:2]}


def test_controls_have_the_winners_shape_and_tokens(tmp_path: Path) -> None:
    search = search_in(tmp_path, asked(promote=2))
    Driver(search).to_the_end()
    best = search.best()
    assert len(best) == 2
    assert {(t.arm, t.architecture.id) for t in search.controls.values()} == {
        (arm, architecture.id) for arm in CONTROLS for architecture in best
    }
    for control in search.controls.values():
        assert search.status(control.id) == "complete"
        assert control.initialization == CONTROLS[control.arm]
        assert control.settings == next(iter(search.trials.values())).settings


def test_hyperband_stops_some_later_and_its_brackets_survive_a_resume(tmp_path: Path) -> None:
    config = asked(scheduler="hyperband", trials=9, controls=False)
    first = Driver(search_in(tmp_path, config))
    for _ in range(12):
        first.step()
    again = rung_scheduler(search_in(tmp_path, config))
    brackets = {trial: first.ruling._brackets.index(of) for trial, of in first.ruling._trial_info.items()}
    assert set(brackets.values()) == {0, 1}
    ruled = {trial: again._brackets.index(of) for trial, of in again._trial_info.items()}
    assert ruled and all(brackets[trial] == bracket for trial, bracket in ruled.items())


def test_a_search_whose_trials_all_failed_has_nothing_to_promote(tmp_path: Path) -> None:
    search = search_in(tmp_path, asked(trials=1))
    trial = search.next_trial()
    assert trial is not None
    search.failures[trial.id] = "diverged"
    search.alive.clear()
    assert search.next_trial() is None
    with pytest.raises(ValueError, match="nothing to promote"):
        search.best()


@pytest.mark.parametrize("given, message", [
    ({"tokens": 100}, "search.tokens: 100"),
    ({"promote": 0}, "search.promote"),
    ({"rungs": [0]}, "search.rungs"),
    ({"rungs": [0, 0]}, "search.rungs"),
    ({"scheduler": "median"}, "search.scheduler"),
    ({"promote": "all"}, "search.promote"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(**given)


@pytest.mark.parametrize("scheduler", ["halving", "asha"])
def test_what_no_decision_brings_back_is_known_before_the_end(tmp_path: Path, scheduler: str) -> None:
    """At every step: a trial that is said to be spent never runs again, and at the end all of them are."""
    search = search_in(tmp_path, asked(scheduler=scheduler, seeds=1, finalist_seeds=2))
    driver, spent, early = Driver(search, slots=2), set[str](), 0
    while driver.step():
        assert not spent & {trial.id for trial in driver.running}
        spent |= search.spent()
        early += bool(spent) and not search.settled
    assert spent | search.spent() == set(search.all_trials()) and early
    assert any(search.status(trial) == "stopped" for trial in spent)
