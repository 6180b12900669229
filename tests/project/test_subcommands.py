"""`minitron-search`: every word of it, and that it takes what `python -m minitron_search.run` takes."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from minitron_search import cli, options, subcommands
from minitron_search.config import keys
from minitron_search.config.loading import load_config
from minitron_search.planning.prepare import complete
from tests import tiny
from tests.runs import ROOT, Command

# every way to write an option or a key: the words, the key, and what it is then
SPELLINGS: tuple[tuple[list[str], str, Any], ...] = (
    (["--search.trials", "3"], "search.trials", 3),
    (["--search.trials=3"], "search.trials", 3),
    (["--search.trials", "4", "--search.trials", "3"], "search.trials", 3),
    (["--search", "{trials: 3}"], "search.trials", 3),
    (["--search", '{"trials": 3}'], "search.trials", 3),
    (["--search={trials: 3, rungs: [1K]}", "--search.seeds", "2"], "search.rungs", (1000,)),
    (["--search.reduction-factor", "4"], "search.reduction_factor", 4),
    (["--search.tokens", " 64K "], "search.tokens", 64_000),
    (["--search.tokens", "auto"], "search.tokens", "auto"),
    (["--search.rungs", "0,8K"], "search.rungs", (0, 8000)),
    (["--search.rungs", "[0, 8K]"], "search.rungs", (0, 8000)),
    (["--search.rungs", "0, 8K"], "search.rungs", (0, 8000)),
    (["--search.rungs", "8000"], "search.rungs", (8000,)),
    (["--search.objective", "lm_loss,params"], "search.objective", ("lm_loss", "params")),
    (["--search.objective", "[kl]"], "search.objective", "kl"),
    (["--search.promote", "not_worse"], "search.promote", "not_worse"),
    (["--search.controls", "false"], "search.controls", False),
    (["--search.controls=no"], "search.controls", False),
    (["--distillation.compile", "True"], "distillation.compile", True),
    (["--distillation.compile", "on"], "distillation.compile", True),
    (["--distillation.intermediate", "auto"], "distillation.intermediate", "auto"),
    (["--distillation.intermediate", ".5"], "distillation.intermediate", 0.5),
    (["--distillation.teacher_cache", "off"], "distillation.teacher_cache", "off"),
    (["--distillation.teacher", "null"], "distillation.teacher", None),
    (["--distillation.teacher", "~/x"], "distillation.teacher", str(Path.home() / "x")),
    (["--retraining.learning_rate", "3e-4"], "retraining.learning_rate", 3e-4),
    (["--retraining.tokens", "1_000_000"], "retraining.tokens", 1_000_000),
    (["--corpus.calibration", "null"], "corpus.calibration", None),
    (["--corpus.train", "data/[ab]*.txt"], "corpus.train", "data/[ab]*.txt"),
    (["--corpus.train", "a,b.txt"], "corpus.train", "a,b.txt"),
    (["--winogrande.limit", "~"], "winogrande.limit", None),
    (["--evaluation.tasks", "winogrande:5,010"], "evaluation.tasks", ("winogrande:5", "010")),
    (["--evaluation.tasks", "[winogrande, 010]"], "evaluation.tasks", ("winogrande", "010")),
    (["--trackers", "[]"], "trackers", ()),
    (["--depth.lengths", "1,0.25"], "depth.lengths", (1, 0.25)),
    (["--space.budget.params.target", "90M"], "space.budget.params.target", 90e6),
    (["--space.budget.params.target", "67%"], "space.budget.params.target", "67%"),
    (["--space.budget.memory_bytes.target", "1B"], "space.budget.memory_bytes.batch_size", 1),
    (["--space.budget", "{latency_ms: {target: 900}}"], "space.budget.params", None),
    (["--space.budget", "auto"], "space.budget.params.target", "auto"),
    (["--space.axes.hidden_size.choices", "[384, 448]"], "space.axes.hidden_size.choices", (384, 448)),
    (["--space.axes.hidden_size", "null"], "space.axes.hidden_size", None),
    (["--space.anchors", "[{hidden_size: 448}]"], "space.anchors.0.hidden_size", 448),
    (["--stages", "importance,search"], "stages", ("importance", "search")),
    (["--stages=[importance, search]"], "stages", ("importance", "search")),
    (["--name", "1.10"], "name", "1.10"),
    (["--name=010"], "name", "010"),
    (["--name", "12:30"], "name", "12:30"),
    (["--name", "null"], "name", "null"),
    (["--name", "a=b"], "name", "a=b"),
    (["--name=--x"], "name", "--x"),
    (["--output", "elsewhere"], "output", "elsewhere"),
    (["--output=-x"], "output", "-x"),
    (["--name", "a", "--output", "elsewhere"], "output", "elsewhere"),
)


def test_both_commands_take_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(cli, "run", lambda config, resumed, dry_run: taken.append((config, resumed, dry_run)) or 0)
    for flags, key, value in SPELLINGS:
        assert cli.main(flags) == subcommands.main(["run", *flags]) == 0, flags
        assert taken[-2] == taken[-1], flags
        found: Any = taken[-1][0]
        for part in key.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        assert found == value and type(found) is type(value), (flags, found)
    file = str(ROOT / "search_spaces" / "smollm2.yaml")
    assert cli.main(["--config", file, "--dry-run"]) == 0
    for words in (["run", "smollm2", "--dry-run"], ["run", file, "--dry-run"], ["run", "--config", file, "--dry-run"],
                  ["plan", "smollm2"]):  # fmt: skip
        assert subcommands.main(words) == 0 and taken[-1] == taken[len(2 * SPELLINGS)], words
    assert subcommands.main(["depth", "smollm2"]) == 0 and taken[-1][0].stages == ("depth", "report")


def test_switches_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(cli, "run", lambda config, resumed, dry_run: taken.append((config.seed, dry_run)) or 0)
    for flags in (["--dry-run", "--seed", "3"], ["--seed", "3", "--dry-run"], ["--seed=3", "--dry_run"]):
        assert cli.main(flags) == subcommands.main(["run", *flags]) == subcommands.main(["plan", *flags]) == 0
    assert taken == [(3, True)] * 9


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
        (["prune", "smollm2-135m"], "FOLDER"),
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
        "import sys; from minitron_search.subcommands import main\n"
        "assert main(['--help']) == main(['run', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'ray', 'pandas', 'pyarrow', 'plotly'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in subcommands.COMMANDS)


@pytest.mark.parametrize("command", ["", *subcommands.COMMANDS])
def test_help_lists_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With its type, and the keys with their defaults and descriptions; whatever else is on the line."""
    assert (subcommands.main([command, "x", "--help"]) if command else cli.main(["--seed", "3", "-h"])) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    taken = subcommands.arguments_of(command) if command else options.Arguments((options.run_parser(),))
    for parser in taken.parsers:
        assert all(flag in words for action in parser._actions for flag in action.option_strings)
    for name, field in keys.fields():
        if keys.section_of(field.annotation) is None and "anchors." not in name:
            default = keys.written(keys.default_of(name)) or "empty"
            shown = f"--{name} {keys.value_type(field.annotation)} {keys.described(field)} (default: {default})"
            assert (shown in words) == taken.keys, shown
        elif not keys.is_list(field.annotation) and "anchors." not in name:
            assert (keys.described(field) in words) == taken.keys, name


def test_help_of_a_part_is_that_part(capsys: pytest.CaptureFixture[str]) -> None:
    for part, has, lacks in (
        ("depth", "--depth.lengths", "--search."),
        ("search.trials", "--search.trials", "--search.seeds"),
        ("space.budget.latency-ms", "--space.budget.latency_ms.batch_size", "params"),
    ):
        assert cli.main(["--help", part]) == subcommands.main(["run", "smollm2", "--help", part]) == 0
        said = capsys.readouterr().out
        assert has in said and lacks not in said and "(default: " in said
    assert cli.main(["--help", "serch.trials"]) == 2
    assert (
        "--help: 'serch.trials' is neither a section nor a key; did you mean search.trials?" in capsys.readouterr().err
    )
