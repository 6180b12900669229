"""A metric, a sampler and a report card added from outside, each by one line, do all that the built-in ones do."""

import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest

from analysis.page.card import Card
from analysis.report import write_report
from analysis.run_cards import CARDS
from analysis.run_data import RunData
from minitron_search.architecture_search.samplers import SAMPLERS, Observation, check_sampler
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.models.architecture import Architecture
from minitron_search.records.directory import RunDirectory
from tests.architecture_search.test_state import Driver, asked, search_in

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "old_run" / "finished"

# In a process of its own: the schema of the trials table is made when it is imported.
NEW_METRIC = """
import sys
import numpy as np
from minitron_search.records.metrics import METRICS, Metric

METRICS["copying"] = Metric("copying score", "copying", "share", -1, "window", objective=True,
                            error="copying_stderr", n="copying_n", values="copying")

from rich.console import Console
from analysis.report import write_report
from minitron_search.config.loading import parse_config
from minitron_search.evaluation.evidence import evidence
from minitron_search.records.directory import RunDirectory
from minitron_search.records.metrics import scored
from minitron_search.records.summary import summary_table

assert parse_config({"search": {"objective": ["copying", "params"]}}).search.ranks_by == "copying"
run_dir, draw = RunDirectory(sys.argv[1]), np.random.default_rng(0)
text = draw.normal(0.5, 0.1, 16)
for name, better in (("good", 0.3), ("bad", 0.0)):
    values = text + better + draw.normal(0, 0.01, 16)
    row = {"trial": name, "architecture": name, "arm": "search", "seed": 0, "rung": 0, "tokens": 64, "proposal": 0,
           "params": 1000, "tokens_per_second": 1.0}
    row |= {column: 0.1 for metric in scored() for column in (metric, METRICS[metric].error)}
    run_dir.start_trial(name, row)
    run_dir.log_scores(name, 0, copying=values.tolist())
    run_dir.log_rung(name, {**row, "copying": float(values.mean()), "copying_n": 16})
run_dir.write_trials({"good": "promoted", "bad": "complete"})
assert run_dir.read_trials()[0]["copying_n"] == 16
found = evidence(run_dir, "copying")
assert found["finalists"][0]["architecture"] == "good", found
assert found["finalists"][1]["copying_against_best"]["p_holm"] < 0.05, found
assert "1 differ from good in copying score on the same windows" in " ".join(found["words"]), found
run_dir.write_evidence(found)
console = Console(width=200)
console.print(summary_table(run_dir))
page = write_report(run_dir).read_text()
assert "could not be made" not in page and "copying score" in page
"""


def test_a_new_metric_is_an_objective_is_tested_and_is_reported(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NEW_METRIC, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "copying" in done.stdout


def test_a_new_sampler_proposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def largest_first(
        space: SearchSpace, observed: Sequence[Observation], taken: Collection[str], seed: np.random.SeedSequence
    ) -> Architecture | None:
        free = [architecture for architecture in space.architectures() if architecture.id not in taken]
        return max(free, key=lambda architecture: space.measures(architecture).params, default=None)

    with pytest.raises(ValueError, match=r"search.sampler: 'largest' is not a sampler; valid: tpe, "):
        check_sampler("largest", ["lm_loss"])
    monkeypatch.setitem(SAMPLERS, "largest", largest_first)
    check_sampler("largest", ["lm_loss"])
    search = search_in(tmp_path, asked(sampler="largest", trials=4, controls=False))
    Driver(search).to_the_end()
    sizes = [search.space.measures(trial.architecture).params for trial in search.trials.values()]
    assert sizes == sorted((search.space.measures(a).params for a in search.space.architectures()), reverse=True)[:4]


def test_a_new_card_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowest_card(run: RunData) -> Card:
        slowest = run.trials.loc[run.trials["seconds"].idxmax()]
        return Card("Slowest rung", "Which rung took longest.", f"n = {len(run.trials)} rows", f"<p>{slowest['trial']}")

    monkeypatch.setitem(CARDS, "slowest", slowest_card)
    page = write_report(RunDirectory(OLD_RUN), tmp_path / "report.html").read_text()
    assert "Slowest rung" in page and "n = 16 rows" in page
