"""What a run is forecast to cost: counted as the formulas say, and in time by what was measured or stated."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from minitron_search.architecture_search.schedule import search_phases, search_tokens, whole_batches
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.models.families import whole
from minitron_search.pipeline import forecast as forecast_stage
from minitron_search.planning import calibration, workload
from minitron_search.planning.calibration import Speed, measure, stated
from minitron_search.planning.forecast import (
    EXCHANGE_BYTES_PER_SECOND,
    START_UP_S,
    Forecast,
    Machine,
    comparison,
    dry_run,
    fitting,
    forecast,
    this_machine,
    total,
    trials_at_once,
)
from minitron_search.planning.workload import Costs
from minitron_search.records.directory import RunDirectory, stage_seconds
from tests import tiny

CPUS = Machine(cpus=2, gpus=0)
PLAIN = Speed(training=2e6, scoring=4e6, float32=1e6, basis="given")
# of tiny.config, a Llama of 3 layers, tied: weights of all products, and of the output head
HEAD = 61 * 24
BODY = 3 * (24 * 24 + 2 * 24 * 12 + 24 * 24 + 3 * 24 * 20)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine of the tests is."""
    monkeypatch.setattr(calibration, "SECONDS", 600.0)


def config_of(**given: Any) -> Config:
    """One legal architecture, which is the teacher; 8 windows of 16 tokens a batch."""
    values: dict[str, Any] = {
        "stages": ["search", "retrain"],
        "precision": "float32",
        "space": {"budget": {"params": {"target": BODY + HEAD, "tolerance": 0.1}}, "axes": {}},
        "corpus": {"sequence_length": 16, "validation_samples": 5},
        "search": {"trials": 1, "rungs": [128, 256], "reduction_factor": 2, "controls": False},
        "distillation": {"batch_tokens": 128},
        "retraining": {"tokens": 1000},
    }
    for section, change in given.items():
        values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
    return loading.parse_config(values)


def costs_of(config: Config, options: int = 7) -> Costs:
    teacher = tiny.config()
    return Costs(config, SearchSpace(config.space, teacher), teacher, "float32", options)


def test_flops_are_the_formulas_on_a_shape_counted_by_hand() -> None:
    costs = costs_of(config_of())
    forward = 2 * (BODY + HEAD) + 2 * 3 * 24 * 16  # and attention: 3 layers, 24 query channels, 16 tokens
    head = 2 * HEAD
    scoring = 5 * 16 * (forward + head) + 7 * forward
    assert costs.student(whole(tiny.config())) == forward and costs.scoring(forward) == scoring
    found = workload.workload(costs)
    assert list(found) == ["teacher", "search", "retrain", "speed"]
    assert (found["speed"].tokens, found["speed"].flops) == (2 * 9 * 16, 2 * 9 * 16 * forward), "teacher and student"
    assert (found["search"].tokens, found["search"].steps) == (256, 2)
    assert found["search"].flops == 256 * (3 * forward + head) + 2 * scoring
    assert found["retrain"].tokens == 1024, "whole batches"
    assert found["retrain"].flops == 1024 * (3 * forward + head) + 2 * scoring
    windows = 1008 + 5 * 16  # 63 windows of text, and validation
    assert (found["teacher"].tokens, found["teacher"].flops) == (windows, windows * (forward - head) + scoring)


def test_what_is_asked_of_the_teacher_is_counted() -> None:
    def a_token(**distillation: Any) -> int:
        costs = costs_of(config_of(**distillation))
        return costs.training(0)

    teacher = costs_of(config_of()).teacher
    assert a_token() == 2 * HEAD
    assert a_token(distillation={"loss": "ce"}) == 0
    assert a_token(distillation={"teacher_cache": "topk", "topk": 3}) == 0
    for live in ({"teacher_cache": "off"}, {"intermediate": 1.0}, {"teacher_cache_bytes": 1}):
        assert a_token(distillation=live) == teacher, live
    assert a_token(teacher={"correction": {"method": "full", "parallel": True}}) == 4 * teacher
    checkpointed = costs_of(config_of(distillation={"gradient_checkpointing": True}))
    assert checkpointed.training(10) - costs_of(config_of()).training(10) == 10


def test_a_teacher_asked_live_is_asked_nothing_before() -> None:
    for cache, tokens in (("off", 80), ("hidden", 1008 + 80)):
        assert workload.workload(costs_of(config_of(distillation={"teacher_cache": cache})))["teacher"].tokens == tokens


@pytest.mark.parametrize("more", [
    {"retraining": {"tokens": 2000}}, {"search": {"rungs": [128, 512]}}, {"search": {"seeds": 2}},
    {"corpus": {"validation_samples": 9}}, {"teacher": {"correction": {"method": "full"}}},
    {"stages": ["importance", "search", "retrain"]}, {"stages": ["depth", "search", "retrain"]},
])  # fmt: skip
def test_more_work_costs_more(more: dict[str, Any]) -> None:
    if "depth" in more.get("stages", ()):
        more = {**more, "depth": {"lengths": [1, 2]}}
    one = Machine(cpus=1, gpus=0)
    before, after = (total(forecast(costs_of(config_of(**given)), PLAIN, one)) for given in ({}, more))
    assert after.tokens > before.tokens and after.flops > before.flops and after.seconds > before.seconds


def test_the_depth_sweep_walks_only_the_layers_after_a_block() -> None:
    def flops(*metrics: str) -> float:
        asked = {"lengths": [1, 2], "metrics": list(metrics)}
        return workload.workload(costs_of(config_of(stages=["depth"], depth=asked)))["depth"].flops

    layer, head, windows = 2 * BODY // 3 + 2 * 24 * 16, 2 * HEAD, 5 * 16
    assert flops("bi") == pytest.approx(windows * 3 * layer)
    # blocks of 1 leave 2, 1 and 0 layers after them, blocks of 2 leave 1 and 0; two sets one by one of 3 at most
    assert flops("lm_loss") == pytest.approx(windows * ((3 + 4 + 2 * 3) * layer + (5 + 2) * head))
    assert flops("lm_loss", "winogrande") > flops("lm_loss")


def test_rungs_pass_one_trial_in_the_reduction_factor_and_a_small_space_has_no_more_trials_than_architectures() -> None:
    config = config_of(search={"trials": 6, "rungs": [100, 300], "reduction_factor": 3, "seeds": 2})
    assert [tuple(phase) for phase in search_phases(config, 6)] == [(12, 128, 1), (4, 256, 1)]
    assert search_tokens(config) == 12 * 128 + 4 * 256
    assert workload.workload(costs_of(config))["search"].tokens == 2 * 384, "one architecture, two seeds"
    assert [whole_batches(config, tokens) for tokens in (1, 128, 129)] == [128, 128, 256]


def test_finalists_seeds_controls_hyperband_and_a_cap_are_forecast() -> None:
    asked = {"trials": 6, "rungs": [100, 300], "reduction_factor": 3}
    further = config_of(search={**asked, "finalist_seeds": 3, "controls": True, "promote": 2})
    first, second, seeds, controls = map(tuple, search_phases(further, 6))
    assert (seeds, controls) == ((6 * 2, 384, 2), (4, 384, 2))
    assert search_tokens(further) == 6 * 128 + 2 * 256, "what comes on top of proposals continues no stopped trial"
    plain, hyperband = (search_tokens(config_of(search={**asked, "scheduler": name})) for name in ("asha", "hyperband"))
    assert plain == hyperband, "one bracket, where there are two rungs"
    three = {**asked, "rungs": [100, 300, 600]}
    plain, hyperband = (search_tokens(config_of(search={**three, "scheduler": name})) for name in ("asha", "hyperband"))
    assert plain < hyperband < 6 * 640
    assert plain == 6 * 128 + 2 * 256 + 256
    for tokens, spent in [(500, 128 + 256), (700, 3 * 128 + 256), (900, 5 * 128 + 256), (1200, 5 * 128 + 2 * 256)]:
        assert search_tokens(config_of(search={**asked, "tokens": tokens})) == spent
    as_it_is = {**asked, "rungs": [0, 300]}
    assert [tuple(phase) for phase in search_phases(config_of(search=as_it_is), 6)] == [(6, 0, 1), (2, 384, 1)]
    assert search_tokens(config_of(search={**as_it_is, "tokens": 500})) == 384


def test_time_is_work_over_speed_and_start_up() -> None:
    costs = costs_of(config_of())
    work = workload.workload(costs)
    found = forecast(costs, PLAIN, Machine(cpus=1, gpus=0))
    start = START_UP_S["train"]
    search, retrain, teacher = (work[name] for name in ("search", "retrain", "teacher"))
    assert found["search"].seconds == pytest.approx(search.training / 2e6 + search.scoring / 4e6 + start)
    assert found["retrain"].seconds == pytest.approx(retrain.training / 2e6 + retrain.alone / 1e6 + start)
    assert found["teacher"].seconds == pytest.approx(teacher.forward / 4e6 + teacher.alone / 1e6)
    two = forecast(costs, PLAIN, CPUS)  # both CPUs share every batch of the retraining, and exchange gradients
    exchanged = 4 * costs.space.measures(costs.space.teacher).params / EXCHANGE_BYTES_PER_SECOND
    halves = retrain.training / 2 / 2e6 + retrain.alone / 1e6 + start + 8 * exchanged
    assert two["retrain"].seconds == pytest.approx(halves)
    assert two["search"] == found["search"], "one trial has no use for a second slot"
    inline = costs_of(config_of(resources={"launcher": "inline"}))
    assert forecast(inline, PLAIN, CPUS)["retrain"].seconds == pytest.approx(
        found["retrain"].seconds - start + START_UP_S["inline"]
    )


def test_a_stated_mfu_gives_hours_gpu_hours_and_money_exactly() -> None:
    resources = {
        "workers_per_trial": 4,
        "gpus_per_worker": 2,
        "mfu": 0.5,
        "flops_per_second": "989T",
        "price_per_hour": 3,
    }
    config = config_of(resources=resources)
    assert config.resources.flops_per_second == 989e12
    speed, costs = stated(config), costs_of(config)
    assert speed is not None
    for name, about in forecast(costs, speed, CPUS).items():
        flops = workload.workload(costs)[name].flops
        assert about.flops == flops and about.gpus == 8
        assert about.seconds == pytest.approx(flops / (4 * 989e12 * 0.5))
        assert about.gpu_seconds == pytest.approx(8 * about.seconds)
        assert about.cost == pytest.approx(3 * about.gpu_seconds / 3600)
        assert about.price_per_hour == 24


def test_without_gpus_the_price_is_of_a_machine() -> None:
    costs = costs_of(config_of(resources={"price_per_hour": 0.4}))
    for nodes in (1, 3):
        for about in forecast(costs, PLAIN, Machine(cpus=2, gpus=0, nodes=nodes)).values():
            assert (about.gpu_seconds, about.gpus) == (0, 0)
            assert about.cost == pytest.approx(0.4 * nodes * about.seconds / 3600)
    assert total(forecast(costs_of(config_of()), PLAIN, CPUS)).cost is None


def test_gpu_hours_are_not_told_of_a_machine_without_any() -> None:
    costs = costs_of(config_of(resources={"gpus_per_worker": 1, "price_per_hour": 2}))
    found = forecast(costs, PLAIN, CPUS)
    assert {(about.gpu_seconds, about.cost) for about in found.values()} == {(None, None)}
    there = forecast(costs, PLAIN, Machine(cpus=8, gpus=2))
    assert all(about.cost == pytest.approx(2 * about.gpu_seconds / 3600) for about in there.values())


@pytest.mark.parametrize(("machine", "resources", "search", "expected"), [
    (Machine(2, 0), {}, {}, 2),
    (Machine(8, 0), {"workers_per_trial": 2, "cpus_per_worker": 2}, {}, 2),
    (Machine(8, 0), {}, {"concurrency": 3}, 3),
    (Machine(8, 0), {}, {"concurrency": 99}, 4),  # trials
    (Machine(8, 2), {"gpus_per_worker": 1}, {}, 2),
    (Machine(8, 2), {"gpus_per_worker": 0.5}, {}, 4),
    (Machine(2, 0), {"gpus_per_worker": 1, "workers_per_trial": 8}, {}, 1),  # another machine's
    (Machine(2, 0), {"gpus_per_worker": 1, "workers_per_trial": 8}, {"concurrency": 3}, 3),
])  # fmt: skip
def test_as_many_trials_run_at_once_as_fit(
    machine: Machine, resources: dict[str, Any], search: dict[str, Any], expected: int
) -> None:
    config = config_of(resources=resources, search={"trials": 4, **search})
    assert trials_at_once(costs_of(config), machine) == expected


@pytest.mark.parametrize(("resources", "message"), [
    ({"mfu": 0.4}, "resources.mfu: 0.4 without resources.flops_per_second; valid: both"),
    ({"flops_per_second": "989T"}, "resources.flops_per_second: 9.89e+14 without resources.mfu"),
    ({"mfu": 1.5, "flops_per_second": 1}, "resources.mfu: 1.5"),
    ({"mfu": 0, "flops_per_second": 1}, "resources.mfu: 0"),
    ({"price_per_hour": -1}, "resources.price_per_hour: -1"),
])  # fmt: skip
def test_a_half_stated_speed_is_refused(resources: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        config_of(resources=resources)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3", "opt"])
def test_shallow_students_of_a_family_are_measured(family: str) -> None:
    teacher = tiny.config(family)
    params = sum(p.numel() for p in tiny.model(teacher).parameters())
    config = config_of(space={"budget": {"params": {"target": params}}, "axes": {}})
    costs = Costs(config, SearchSpace(config.space, teacher), teacher, "float32", 7)
    threads = torch.get_num_threads()
    speed = measure(config, costs, teacher.hidden_size, "float32", at_once=2)
    assert "measured" in speed.basis and "2 at once" in speed.basis and not speed.stated
    assert min(speed.training, speed.scoring, speed.float32) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("distillation", "precision"), [
    ({"loss": "ce"}, "bfloat16"), ({"intermediate": 1.0}, "float32"),
    ({"teacher_cache": "topk", "topk": 3}, "bfloat16"),
])  # fmt: skip
def test_any_loss_is_measured(distillation: dict[str, Any], precision: Any) -> None:
    config = config_of(distillation=distillation)
    speed = measure(config, costs_of(config), 24, precision, at_once=1)
    assert "measured" in speed.basis and min(speed.training, speed.scoring, speed.float32) > 0


def test_a_layer_is_at_most_its_share_whatever_the_clock_said() -> None:
    for one, deep, expected in ((1.0, 3.0, 1.0), (2.0, 4.0, 1.0), (2.0, 1.5, 0.25), (0.1, 3.0, 1.0)):
        assert calibration._layer(one, deep, 3) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("CPU_BYTES", 1000, "would take"), ("SECONDS", 0.0, "timing steps would take"),
])  # fmt: skip
def test_what_is_too_large_to_measure_is_told_from_a_product(
    monkeypatch: pytest.MonkeyPatch, name: str, value: float, reason: str
) -> None:
    monkeypatch.setattr(calibration, name, value)
    config = config_of()
    speed = measure(config, costs_of(config), 24, "float32", at_once=1)
    assert reason in speed.basis and "matrix product" in speed.basis and speed.training == speed.scoring > 0


def test_a_gpu_that_is_not_here_is_not_measured() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = config_of(resources={"gpus_per_worker": 1})
    assert fitting(costs_of(config), this_machine()) == 0
    assert "a trial does not fit this machine" in measure(config, costs_of(config), 24, "float32", 0).basis


def test_a_trial_that_does_not_fit_is_timed_on_all_of_this_machine() -> None:
    large = costs_of(config_of(resources={"workers_per_trial": 8, "cpus_per_worker": 4}))
    found, work = forecast(large, PLAIN, CPUS), workload.workload(large)
    assert found["teacher"].seconds == pytest.approx(work["teacher"].forward / 4e6 + work["teacher"].alone / 1e6)
    assert found["retrain"].seconds > work["retrain"].training / 2e6


def test_dry_run_says_every_stage_the_sum_and_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    config = config_of(resources={"mfu": 0.4, "flops_per_second": "1T", "price_per_hour": 2})
    dry_run(config, SearchSpace(config.space, tiny.config()), Console(file=said, width=120))
    text = said.getvalue()
    for words in ("teacher", "search", "retrain", "in all", "GPU-hours", "money at the price given",
                  "stated: 0.4 of 1e+12 FLOP/s", "runs once for every window"):  # fmt: skip
        assert words in text, words


def event(time: float, kind: str, **more: Any) -> dict[str, Any]:
    return {"time": time, "event": kind, **more}


def test_seconds_of_a_stage_are_added_over_sessions_even_cut_off() -> None:
    log = [
        event(0, "run_started"), event(1, "stage_started", stage="a"), event(4, "stage_finished", stage="a"),
        event(5, "stage_started", stage="b"), event(9, "rung_finished"),  # killed here
        event(100, "run_started"), event(101, "stage_started", stage="b"), event(103, "stage_finished", stage="b"),
        event(104, "stage_started", stage="c"), event(110, "rung_finished"),
    ]  # fmt: skip
    assert stage_seconds(log) == {"a": 3, "b": 6, "c": 6}
    assert stage_seconds([]) == {} == stage_seconds([event(1, "stage_finished", stage="a")])


def test_spent_is_counted_of_each_trials_own_architecture() -> None:
    costs = costs_of(config_of())
    made = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
    rows = [
        {"trial": trial, "arm": arm, "tokens": tokens, "num_hidden_layers": layers, **made}
        for trial, arm, layers, tokens in (
            ("s", "search", 3, 256), ("s", "search", 3, 128), ("z", "search", 1, 128), ("t", "teacher", 3, 0),
            ("u", "untrained", 3, 0), ("r", "retrained", 3, 1024),
        )
    ]  # fmt: skip
    found, foretold = workload.spent(costs, rows), workload.workload(costs)
    assert found["retrain"] == (1024, foretold["retrain"].flops)
    tokens, flops = found["search"]
    assert tokens == 256 + 128
    assert foretold["search"].flops < flops < 1.6 * foretold["search"].flops


def test_a_run_that_goes_on_keeps_its_forecast_and_adds_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    node = {"Alive": True, "Resources": {"CPU": 4.0}}
    monkeypatch.setattr(forecast_stage.ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(forecast_stage.ray, "nodes", lambda: [node, node, {"Alive": False}])
    monkeypatch.setattr(
        forecast_stage, "on_all_cpus", lambda depot, work, *arguments, kind: measured.append(arguments) or PLAIN
    )
    config = config_of(resources={"price_per_hour": 1})
    prepared: Any = SimpleNamespace(
        config=config, run_dir=RunDirectory(tmp_path), precision="float32",
        space=SearchSpace(config.space, tiny.config()), teacher=SimpleNamespace(config=tiny.config()),
        packed=SimpleNamespace(row_lengths=np.array([3, 4])),
    )  # fmt: skip
    forecast_stage.write_forecast(prepared)
    first = prepared.run_dir.read_forecast()
    assert list(first) == ["teacher", "search", "retrain", "speed"] and measured[0][-1] == 4, "workers of one machine"
    assert first["search"]["price_per_hour"] == 2, "two machines"
    prepared.config = config_of(resources={"price_per_hour": 9})
    forecast_stage.write_forecast(prepared)
    assert prepared.run_dir.read_forecast() == first and len(measured) == 1
    prepared.config = config_of(resources={"price_per_hour": 9}, stages=["importance", "search", "retrain"])
    forecast_stage.write_forecast(prepared)
    now = prepared.run_dir.read_forecast()
    assert list(now)[0] == "importance" and {name: now[name] for name in first} == first


def test_the_end_of_a_run_compares_what_ran(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert comparison(run) is None
    about = Forecast(1, 1.0, 120.0, 0, 0.0, None, None, "given")._asdict()
    run.write_forecast({"search": about, "retrain": about})
    assert comparison(run) is None, "nothing has run"
    run.event("stage_started", stage="search")
    run.event("stage_finished", stage="search")
    words = comparison(run)
    assert words is not None and words.startswith("forecast 2.0 min, spent 0.0 min") and "retrain" not in words
