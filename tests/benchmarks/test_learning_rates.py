"""The benchmark of learning rates compares a choice with the best rate of a sweep, and says what is missing."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.learning_rates import middle_first, row_file, table
from minitron_search.records.directory import replace_text

RATES = (1e-5, 1e-4, 1e-3)
MEANS = {1e-5: 4.5, 1e-4: 4.0, 1e-3: 4.2, 3e-4: 4.05}


def made(work: Path, rates: tuple[float, ...] = (*RATES, 3e-4), seeds: tuple[int, ...] = (0, 1)) -> None:
    for seed in seeds:
        text = np.random.default_rng(seed).normal(0, 1, 16)
        for rate in rates:
            row = {"teacher": "t", "kept": 0.5, "rate": rate, "seed": seed, "tokens": 64,
                   "validation": {"0": [6.0] * 16, "64": (text - text.mean() + MEANS[rate]).tolist()}}  # fmt: skip
            replace_text(row_file(work, "t", 0.5, rate, seed), json.dumps(row))
        probe = {"teacher": "t", "kept": 0.5, "seed": seed, "rate": 3e-4, "rule": 1e-4, "untrained": 6.0, "steps": 4,
                 "batch": 4, "length": 256, "helped": True, "trained_tokens": 200, "scored_tokens": 300,
                 "run_tokens": 10_000,
                 "rates": [{"rate": 3e-4, "lm_loss": 5.0}, {"rate": 1e-3, "lm_loss": None}]}  # fmt: skip
        replace_text(work / "probes" / f"t-0.5-{seed}.json", json.dumps(probe))


def test_a_choice_is_paired_with_the_best_rate_of_the_sweep(tmp_path: Path) -> None:
    made(tmp_path)
    said = table(tmp_path, RATES, (0, 1))
    assert "| t | 0.5 | rule | 0.0001 | +0.0000 over 0.0001 | 0.0000 to 0.0000 | 2 | 0.0% |" in said
    assert "| t | 0.5 | probe | 0.0003 | +0.0500 over 0.0001 | 0.0500 to 0.0500 | 2 | 3.0% |" in said
    assert "0.0003: 5.000, 0.001: diverged" in said and said.endswith("Every training of these shapes is there.")


def test_what_is_missing_is_counted_and_not_compared(tmp_path: Path) -> None:
    made(tmp_path, (1e-4, 3e-4))
    said = table(tmp_path, RATES, (0, 1, 2))
    assert "the sweep is not whole for any seed" in said and "| t | 0.5 | 6.000 | 0.0001 | 4.000 | 2 |" in said
    assert said.endswith("7 trainings of these shapes are missing.")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_rates_come_from_the_middle_outwards(count: int) -> None:
    rates = [10.0**place for place in range(count)]
    assert sorted(middle_first(rates)) == rates and middle_first(rates)[0] == rates[count // 2]
