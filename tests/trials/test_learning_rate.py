"""`learning_rate: auto`: what is known stays, the rule by size is careful, and a probe takes the best of its rates."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.cards.health import health_info
from analysis.run_data import load_run
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import load_config, parse_config
from minitron_search.planning.forecast import learning_rate as learning_rate_said
from minitron_search.planning.workload import Costs, planned_probe, run_tokens, workload
from minitron_search.records.directory import RunDirectory
from minitron_search.teachers import embedded
from minitron_search.trials import learning_rate, settings
from minitron_search.trials.learning_rate import (
    BATCH_POWER,
    MOST_RATES,
    SHARE,
    Probe,
    between,
    chosen,
    probe_of,
    probed,
)
from minitron_search.trials.settings import (
    automatic_rates,
    correction,
    distillation_settings,
    retraining_settings,
    rule_rate,
    with_rate,
)
from tests import tiny


def test_the_embedded_teacher_has_the_rates_that_it_always_had() -> None:
    config = parse_config({})
    assert config.distillation.learning_rate == config.retraining.learning_rate == "auto"
    assert automatic_rates(config) == () and planned_probe(config) is None
    search, retraining = distillation_settings(config, "float32"), retraining_settings(config, "float32")
    assert search.learning_rate == retraining.learning_rate == 3e-4 and retraining.min_learning_rate == 1e-5
    assert with_rate(config, 1.0).retraining.learning_rate == 3e-4


def test_a_number_stays_a_number_and_auto_may_be_given() -> None:
    config = load_config(None, ["--distillation.learning_rate", "1e-3", "--teacher.model", "anything"])
    assert config.distillation.learning_rate == 1e-3 and automatic_rates(config) == ("retraining",)
    assert with_rate(config, 5e-5).distillation.learning_rate == 1e-3
    assert with_rate(config, 5e-5).retraining.learning_rate == 5e-5
    assert load_config(None, ["--retraining.learning_rate", "auto"]).retraining.learning_rate == "auto"
    with pytest.raises(ValueError, match="distillation.learning_rate"):
        load_config(None, ["--distillation.learning_rate", "automatic"])


def test_a_larger_teacher_has_a_lower_rate_and_a_smaller_one_no_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    published = {name: embedded.config() for name in ("same", "twice", "huge")}
    published["twice"].vocab_size += settings.KNOWN_PARAMETERS // 576
    published["huge"].vocab_size *= 1000
    monkeypatch.setattr(settings, "teacher_config", published.__getitem__)
    rule_rate.cache_clear()
    rates = [rule_rate(name) for name in ("same", "twice", "huge")]
    rule_rate.cache_clear()
    assert rates == [3e-4, 1.1e-4, 1e-5]
    assert rule_rate(embedded.NAME) == 3e-4


def test_a_minimum_above_a_rate_that_is_chosen_does_not_raise_it(tmp_path: Path) -> None:
    config = with_rate(
        parse_config({"teacher": {"model": "x"}, "retraining": {"min_learning_rate": 1e-4, "tokens": 1000}}), 2e-5
    )
    assert retraining_settings(config, "float32").min_learning_rate == 2e-5
    corrected = parse_config(
        {"teacher": {"model": str(tiny.teacher_folder(tmp_path)), "correction": {"method": "full"}}}
    )
    asked = correction(corrected)
    assert asked is not None and asked.learning_rate == pytest.approx(6e-5)  # a fifth of the rule's


@pytest.mark.parametrize("tokens", [300_000, 1_000_000, 10**9])
def test_a_probe_costs_its_share_at_most_and_reads_no_more_than_a_run_has(tokens: int) -> None:
    config = parse_config({"teacher": {"model": "x"}, "retraining": {"tokens": tokens}, "search": {"controls": False}})
    probe = planned_probe(config)
    assert probe is not None
    assert probe.trained_tokens + probe.scored_tokens / 3 <= SHARE * run_tokens(config)
    assert 4 <= probe.steps <= 16 and 1 <= probe.batch <= 4 and 2 <= probe.judged <= 16


def test_a_run_that_cannot_pay_or_is_spread_has_no_probe() -> None:
    config = parse_config({"teacher": {"model": "x"}})
    assert run_tokens(config) < 100_000 and planned_probe(config) is None
    spread = parse_config({"teacher": {"model": "x"}, "resources": {"workers_per_trial": 2}})
    assert probe_of(config, 10**9) is not None and probe_of(spread, 10**9) is None


def probing(monkeypatch: pytest.MonkeyPatch, losses: dict[float, Any], middle: float) -> dict[str, Any]:
    """A probe whose trainings end with the losses given by rate."""

    class Student:
        def eval(self) -> "Student":
            return self

    def trained(inputs: Any, trial: Any, probe: Probe, rate: float, windows: np.ndarray) -> np.ndarray | None:
        found = next(value for key, value in losses.items() if np.isclose(key, rate))
        return None if found is None else np.full(len(windows), found)

    class Fake:
        settings, architecture = distillation_settings(parse_config({}), "float32"), type("A", (), {"id": "shape"})

    monkeypatch.setattr(learning_rate, "initial_student", lambda *_, **__: Student())
    monkeypatch.setattr(learning_rate, "on_device", lambda student: student)
    monkeypatch.setattr(learning_rate, "lm_losses", lambda student, windows, precision: np.full(len(windows), 5.0))
    monkeypatch.setattr(learning_rate, "_trained_loss", trained)
    fake: Any = Fake
    return probed(fake, fake, Probe(4, 1, 4, 8, 1), middle, np.zeros((9, 8), np.int32))


@pytest.mark.parametrize(
    ("losses", "rate", "tried"),
    [
        ({1.0: 4.0, 3.0: 3.5, 9.0: 4.0}, 3.0, 3),
        ({1.0: 4.0, 3.0: 3.5, 9.0: 3.7}, 3.8, 3),
        ({0.33: 3.0, 1.0: 3.5, 3.0: 4.0, 9.0: 4.5}, 0.33, 4),
        ({1.0: 4.5, 3.0: 4.0, 9.0: 3.5, 27.0: 4.0}, 9.0, 4),
        ({1.0: 4.8, 3.0: None, 9.0: None, 0.33: 4.9}, 1.0, 4),
    ],
)
def test_the_best_rate_is_taken_or_one_between_and_an_end_is_looked_beyond(
    losses: dict[float, Any], rate: float, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = probing(monkeypatch, losses, 3.0)
    assert found["rate"] == rate and len(found["rates"]) == tried <= MOST_RATES
    assert found["trained_tokens"] == tried * 4 * 8 and found["scored_tokens"] == (tried + 1) * 4 * 8
    for row in found["rates"]:
        expected = next(value for key, value in losses.items() if np.isclose(key, row["rate"]))
        assert row["lm_loss"] == expected
        assert expected is None or row["low"] == row["high"] == pytest.approx(expected - 5.0)
    assert found["helped"]
    json.dumps(found, allow_nan=False)


@given(st.floats(-2, 2), st.floats(0.01, 10), st.floats(1e-6, 1), st.integers(1, 64))
def test_of_a_parabola_the_least_is_found_and_raised_for_larger_steps(
    at: float, curvature: float, middle: float, windows: int
) -> None:
    rates = [middle * 3.0**power for power in range(-3, 4)]
    losses = {rate: curvature * (math.log(rate / middle) / math.log(3) - at) ** 2 for rate in rates}
    assert between(losses) == pytest.approx(middle * 3.0**at)
    assert chosen(losses, windows) == pytest.approx(middle * 3.0**at * windows**BATCH_POWER, rel=0.06)
    ends = dict.fromkeys(rates, math.inf) | {rates[2]: 1.0}
    assert between(ends) == rates[2], "of rates beside which all diverge"
    assert between(dict.fromkeys(rates, 1.0)) == rates[0], "of a flat line the lowest"


def test_where_no_rate_helps_the_lowest_is_taken_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probing(monkeypatch, {1.0: 5.2, 3.0: 5.1, 9.0: None}, 3.0)
    assert found["rate"] == pytest.approx(1.0) and not found["helped"]


def test_the_report_shows_what_auto_became(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    found = {**probing(monkeypatch, {1.0: 4.0, 3.0: None, 9.0: 4.5, 0.33: 5.5}, 3.0), "share": 0.02, "how": "probe"}
    run.event("learning_rate", **found)
    run.write_config({"name": "probed"})
    (check,) = [check for check in health_info(load_run(run)).checks if check.name == "Learning rate"]
    assert check.well and "1.0, probe" in check.found and "2.0% of the run" in check.found


def test_the_forecast_has_the_probe_and_says_which_rate_it_will_be(tmp_path: Path) -> None:
    teacher = tiny.config()
    space = {"budget": {"params": {"target": tiny.model(teacher).num_parameters(), "tolerance": 0.1}}, "axes": {}}
    folder = tiny.teacher_folder(tmp_path / "teacher")
    given = {"space": space, "precision": "float32", "teacher": {"model": str(folder)}}
    long = parse_config({**given, "retraining": {"tokens": "1M"}})
    costs = Costs(long, SearchSpace(long.space, teacher), teacher, "float32", 7)
    probe, work, student = planned_probe(long), workload(costs), costs.student(costs.space.typical())
    assert probe is not None and list(work) == ["importance", "teacher", "probe", "search", "retrain", "speed"]
    assert work["probe"].training == probe.trained_tokens * costs.training(student)
    assert work["probe"].alone == probe.scored_tokens * student
    said = learning_rate_said(long)
    assert f"{probe.steps} steps of one candidate" in said and f"{probe.trained_tokens:,} tokens" in said
    assert learning_rate_said(parse_config(given)).startswith("learning rate: 0.0003, by the teacher's size")
    assert learning_rate_said(parse_config({})) == "learning rate: 0.0003, known for the embedded teacher"
