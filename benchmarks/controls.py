"""The retrained student against its own untrained trim and the same architecture from random weights, equal tokens.

    python -m benchmarks.controls RUN_DIR

Trains the random initialisation exactly as the run trained its student (same tokens, data, schedule), as one more
trial of that run (arm `random_init_retrained`, Figure 6 of arXiv:2408.11796), and prints the three validation losses.
"""

import sys
from dataclasses import replace

import ray

from minitron_search.architecture_search.state import SearchState, make_trial
from minitron_search.cluster import session
from minitron_search.cluster.placement import resolved_precision
from minitron_search.config import loading
from minitron_search.models.architecture import Architecture
from minitron_search.pipeline import retraining
from minitron_search.pipeline.correction import correct_teacher
from minitron_search.pipeline.teacher import make_trial_inputs
from minitron_search.planning.prepare import prepare
from minitron_search.records.directory import RunDirectory, chosen_rate
from minitron_search.trials.settings import distillation_settings, retraining_settings, with_rate


def main(folder: str) -> None:
    run = RunDirectory(folder)
    settings = loading.parse_config({**run.read_config(), "output": folder})
    prepared = prepare(settings, resume=True)
    if chosen := chosen_rate(run):  # of `learning_rate: auto`
        settings = with_rate(settings, chosen["rate"])
    with session.joined():
        precision = resolved_precision(settings.precision)
        prepared = correct_teacher(replace(prepared, precision=precision))
        inputs = ray.put(make_trial_inputs(prepared))
        rows = {row["arm"]: row for row in run.read_trials() if row["arm"] in ("untrained", "retrained")}
        best: Architecture = SearchState(
            run, settings, prepared.space, distillation_settings(settings, precision)
        ).best()[0]
        trial = make_trial(
            prepared.space, best, "random_init_retrained", retraining_settings(settings, precision),
            seed=settings.seed, initialization="random",
        )  # fmt: skip
        run.start_trial(trial.id, trial.describe())
        slots = session.slots(settings.resources)
        retraining.train_on_cluster(settings, trial, inputs, slots, run)
    control = next(row for row in run.metrics(trial.id) if row["kind"] == "rung")
    print(f"{best}: validation LM loss, nats per token +- standard error ({control['lm_loss_n']} windows)")
    for name, row in (("untrained trim", rows["untrained"]), ("random initialisation", control),
                      ("retrained student", rows["retrained"])):  # fmt: skip
        print(f"  {name:22} {row['tokens']:>9,} tokens  {row['lm_loss']:.4f} +- {row['lm_loss_stderr']:.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
