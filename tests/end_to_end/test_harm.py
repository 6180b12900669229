"""A run whose learning rate makes every student worse says so everywhere, and still ends with status 0."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.runs import Command, events, rows, tiny_configuration


@pytest.fixture
def command(tmp_path: Path, shared_ray: Path) -> Command:
    """Of a teacher that is sure of nothing, whose loss is that of a guess: a random one that is sure has more, and any
    training lowers it."""
    config = tiny.config(vocab_size=258, hidden_size=48, intermediate_size=128, num_hidden_layers=6,
                         num_attention_heads=6, num_key_value_heads=3, head_dim=8,
                         max_position_embeddings=512)  # fmt: skip
    model = tiny.model(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.01)
    model.save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(tiny.prose(20_000))
    return Command(tmp_path, tiny_configuration(tmp_path / "teacher", tmp_path / "text.txt"))


def test_a_rate_that_is_far_too_high_is_blamed_everywhere(command: Command) -> None:
    """At the time, at the end, in the events, in the report and on the card."""
    output = command.folder / "harmed"
    printed = command.main(
        output, "--search.concurrency", "1", "--resources.launcher", "inline", "--search.trials", "2",
        "--search.rungs", "0,128", "--search.controls", "false", "--retraining.tokens", "128",
        "--distillation.learning_rate", "0.3", "--retraining.learning_rate", "0.3",
    )  # fmt: skip
    printed = " ".join(printed.split())
    assert {event["trial"].split("-")[0] for event in events(output, "above_trim")} == {"search", "retrained"}
    best = next(row for row in rows(output) if row["arm"] == "retrained")
    assert printed.count("WORSE than its own untrained trim") >= 2
    assert "* The retrained student of " + best["architecture"] in printed
    assert "> **Warning.** The retrained student" in (output / "best" / "README.md").read_text()
    assert "WORSE than its own untrained trim" in (output / "report.html").read_text()
