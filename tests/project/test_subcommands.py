"""`minitron-search`: every word of it, and that it takes what `python -m minitron_search.run` takes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from minitron_search import cli, subcommands
from minitron_search.config.loading import load_config
from minitron_search.planning.prepare import complete
from tests import tiny
from tests.runs import ROOT, Command

# every way to write an option and a key; both commands hand them to the same parser
SPELLINGS = (
    ["--search.trials", "3"],
    ["--search.trials=3"],
    ["--search", "{trials: 3}"],
    ["--stages", "importance,search"],
    ["--stages=[importance, search]"],
    ["--distillation.intermediate", "auto"],
    ["--corpus.calibration", "null"],
    ["--space.budget.params.target", "90M"],
    ["--space.axes.hidden_size.choices", "[384, 448]"],
    ["--retraining.learning_rate", "3e-4"],
    ["--output", "elsewhere"],
)


def test_both_commands_take_the_same_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(cli, "run", lambda config, resumed, dry_run: taken.append((config, resumed, dry_run)) or 0)
    for flags in SPELLINGS:
        assert cli.main(flags) == subcommands.main(["run", *flags]) == 0, flags
        assert taken[-2] == taken[-1], flags
    file = str(ROOT / "search_spaces" / "smollm2.yaml")
    assert cli.main(["--config", file, "--dry-run"]) == 0
    for words in (["run", "smollm2", "--dry-run"], ["run", file, "--dry-run"], ["run", "--config", file, "--dry-run"],
                  ["plan", "smollm2"]):  # fmt: skip
        assert subcommands.main(words) == 0 and taken[-1] == taken[len(2 * SPELLINGS)], words
    assert subcommands.main(["depth", "smollm2"]) == 0 and taken[-1][0].stages == ("depth", "report")


def test_what_is_wrong_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, told in (
        (["serach"], "'serach' is not a command; valid: run, plan, depth"),
        (["run", "smollm3"], "'smollm3' is neither a file nor a configuration that is shipped; valid: a YAML file"),
        (["run", "--search.trails", "3"], "did you mean search.trials"),
        (["ablate", "smollm2"], "it has no arms"),
        (["compare", "one"], "valid: two or more"),
        (["prune", "smollm2-135m", str(tmp_path / "full")], "is there already"),
        (["prune", "smollm2-135m"], "output"),
        (["plan", str(tmp_path / "nothing")], "is not a folder"),
        (["report", str(tmp_path / "full")], "no run here; valid: a run directory"),
    ):
        status = subcommands.main(words)
        said = capsys.readouterr().err
        assert status == 2 and told in said and said.count("\n") == 1, (words, status, said)
    assert subcommands.main([]) == 2


def test_a_plan_of_a_model_is_a_configuration_that_is_all_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRON_SEARCH_CACHE", str(tmp_path / "cache"))
    for family, shape in (("qwen2", {"tie_word_embeddings": False}), ("gemma3_text", {}), ("gpt2", {})):
        config = tiny.config(family, hidden_size=96, intermediate_size=256, num_hidden_layers=6, **shape)
        tiny.model(config).save_pretrained(tmp_path / family)
        tiny.tokenizer().save_pretrained(tmp_path / family)
        assert subcommands.main(["plan", str(tmp_path / family), "--params", "70%", "--search.trials", "3"]) == 0
        said = capsys.readouterr().out
        written = yaml.safe_load((tmp_path / f"{family}.yaml").read_text())
        planned, derived = complete(load_config(f"{family}.yaml", []), resume=False)
        assert derived == [], "everything is in numbers"
        assert abs(written["space"]["budget"]["params"]["target"] / tiny.model(config).num_parameters() - 0.7) < 0.02
        assert planned.retraining.tokens > planned.search.rungs[-1] > 0 and "legal and in budget" in said
        assert subcommands.main(["plan", str(tmp_path / family)]) == 2
        assert "exists" in capsys.readouterr().err, "nothing that is there is overwritten"


def test_prune_writes_the_best_trim(tmp_path: Path, tiny_command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    given = tiny_command.configuration
    words = ["prune", given["teacher"]["model"], str(tmp_path / "trim"), "--params", "75%", "--text",
             given["corpus"]["train"], "--trials", "2"]  # fmt: skip
    assert subcommands.main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "trim")
    assert f"{student.num_parameters():,} parameters" in said and "lm_loss" in said


def test_runs_are_reported_and_compared(finished_run: Path, tmp_path: Path) -> None:
    one, other = (Path(shutil.copytree(finished_run, tmp_path / name)) for name in ("one", "other"))
    (one / "report.html").unlink()
    assert subcommands.main(["report", str(one)]) == 0 and (one / "report.html").is_file()
    page = tmp_path / "both.html"
    assert subcommands.main(["compare", str(one), str(other), "--output", str(page)]) == 0 and page.is_file()


def test_help_waits_for_nothing_large() -> None:
    script = (
        "import sys; from minitron_search.subcommands import main; assert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers', 'ray', 'pandas', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in subcommands.COMMANDS)
