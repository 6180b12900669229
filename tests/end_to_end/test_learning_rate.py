"""A run that chooses its learning rate by a probe: once, written down, and used by everything after it."""

import json

import pytest

from minitron_search.trials import learning_rate
from tests.runs import Command, events


def test_a_probe_chooses_once_for_the_search_and_the_retraining(
    tiny_command: Command, shared_ray: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_rate, "SHARE", 3.0)  # of a run that trains on a few hundred tokens
    # five windows: with the four of other tests in the cache, what their teacher is asked would depend on the order
    output = tiny_command.folder / "probed"
    asked = ("--search.concurrency", "1", "--resources.launcher", "inline", "--search.trials", "2",
             "--search.rungs", "0,256", "--search.controls", "false", "--retraining.tokens", "256",
             "--corpus.validation_samples", "5")  # fmt: skip
    printed = tiny_command.main(output, *asked, "--stages", "importance,search")
    (found,) = events(output, "learning_rate")
    assert f"learning rate: {found['rate']:g}, chosen by a probe" in " ".join(printed.split())
    losses = {row["rate"]: row["lm_loss"] for row in found["rates"]}
    assert found["rate"] == learning_rate.chosen(losses, found["run_batch"] / found["batch"])
    assert min(losses.values()) < found["untrained"] and found["steps"] >= 4 and len(losses) in (3, 4)
    written = json.loads((output / "learning_rate.json").read_text())
    assert written == {key: value for key, value in found.items() if key not in ("time", "event")} and found["helped"]
    assert "learning_rate: auto" in (output / "config.yaml").read_text()
    assert json.loads((output / "forecast.json").read_text())["probe"]["tokens"] >= found["trained_tokens"]

    monkeypatch.setattr(learning_rate, "SHARE", 0.0)  # what a run began with it goes on with, whatever is so now
    tiny_command.main(output, *asked, "--resume")
    assert len(events(output, "learning_rate")) == 1
    made = [json.loads(path.read_text()) for path in output.glob("trials/*/architecture.json")]
    used = {trial["arm"]: trial["settings"]["learning_rate"] for trial in made if trial["arm"] != "teacher"}
    assert used == dict.fromkeys(("search", "untrained", "retrained"), found["rate"])
