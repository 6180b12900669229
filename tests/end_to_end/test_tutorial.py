"""The tutorial's commands, in its order, on a small random model in the place of the Hub's."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import AutoConfig

from analysis import report
from minitron_search.cli import main
from minitron_search.config.loading import load_config, parse_config
from minitron_search.planning import forecast
from minitron_search.planning.prepare import check
from tests import tiny
from tests.project.test_docs import ROOT, fenced
from tests.project.test_recipes import named
from tests.runs import Command, tiny_inputs

TUTORIAL = ROOT / "docs" / "tutorial.md"
FILE, HUB_MODEL = "smollm2-240m.yaml", "HuggingFaceTB/SmolLM2-360M"
(ASKED,) = (yaml.safe_load(block) for block in fenced(TUTORIAL, "yaml") if block.startswith(f"# {FILE}"))
# as the Hub has it
PUBLISHED = {
    "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
    "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49152,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
NOT_RUN = ("make", "source", "hf")
MODULES = {"minitron_search.run": main, "analysis.report": report.main}


def lines() -> list[str]:
    scripts = "\n".join(fenced(TUTORIAL, "bash"))
    joined = re.sub(r"\\\n\s*", " ", scripts)
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def test_what_the_dry_run_is_said_to_print_is_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / HUB_MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    tiny.sparse_weights(folder / "model.safetensors", AutoConfig.for_model(**PUBLISHED))
    (tmp_path / FILE).write_text(yaml.safe_dump(ASKED))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "this_machine", lambda: forecast.Machine(8, 1))
    monkeypatch.setattr(forecast.memory, "free_for_run", lambda: 240e9)
    (words,) = (shlex.split(line) for line in lines() if "--dry-run" in line)
    flags = [word for word in words[3:] if word not in ("--config", FILE, "--dry-run")]
    config = load_config(FILE, flags)
    _, space = check(config, resume=False)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    forecast.dry_run(config, space, console)
    printed = [line.rstrip() for line in console.export_text().splitlines()]
    begin = next(number for number, line in enumerate(printed) if line.startswith("space: "))
    (shown,) = re.findall(r"dry run: begin -->\n\n```\n(.*?)```\n\n<!-- dry run: end", TUTORIAL.read_text(), re.DOTALL)
    assert shown.split() == "\n".join(printed[begin:]).split()


@pytest.mark.slow
def test_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_ray: Path) -> None:
    """The first of them in a process of its own, as a shell starts it; the others by what they call."""
    monkeypatch.chdir(tmp_path)
    inputs = tiny_inputs(tmp_path)
    text = inputs["corpus"]["train"]
    small: dict[str, Any] = {
        **inputs, "name": ASKED["name"], "winogrande": {"source": str(tiny.winogrande_file(tmp_path / "few.jsonl"))},
        "search": {"trials": 4, "rungs": [0, 64, 128], "reduction_factor": 2, "finalist_seeds": 2},
        "retraining": {"tokens": 256, "warmup_steps": 2},
        "resources": {"gpus_per_worker": 0, "cpus_per_worker": 1, "launcher": "inline"},
    }  # fmt: skip
    del small["precision"], small["space"]["axes"]["num_attention_heads"]
    small["corpus"] |= {"train": text, "validation": text}
    assert set(named(small)) - set(named(ASKED)) == {"resources.launcher"} and set(named(ASKED)) <= set(named(small))
    parse_config(small)
    command = Command(tmp_path, small)
    command.file.rename(tmp_path / FILE)
    smaller = {
        HUB_MODEL: small["teacher"]["model"], "hidden_size: 768": "hidden_size: 42", "size: 1920": "size: 112",
        "512K": "128", "1B": "512",
    }  # fmt: skip
    ran = []
    for line in lines():
        words = shlex.split(line, comments=True)
        if words[0] in NOT_RUN or "..." in words:
            continue
        for given, instead in smaller.items():
            words = [word.replace(given, instead) for word in words]
        assert words[:2] == ["python", "-m"], line
        if ran:
            assert MODULES[words[2]](words[3:]) == 0, line
        else:
            done = subprocess.run([sys.executable, *words[1:]], env=command.environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        ran.append(line)
    kinds = ("--dry-run", "240m.yaml", "analysis.report", "--resume", "-longer")
    assert len(ran) == len(kinds) and all(kind in line for kind, line in zip(kinds, ran, strict=True)), ran
    runs = tmp_path / "runs"
    assert (runs / "smollm2-240m" / "report.html").exists() and (runs / "smollm2-240m" / "best" / "README.md").exists()
    longer = json.loads((runs / "smollm2-240m-longer" / "best" / "config.json").read_text())
    assert (longer["hidden_size"], longer["intermediate_size"]) == (42, 112)
    for block in fenced(TUTORIAL, "python"):
        with redirect_stdout(StringIO()) as printed:
            exec(compile(block, str(TUTORIAL), "exec"), {})
        assert printed.getvalue()


def test_the_hubs_command_takes_what_it_is_given() -> None:
    (words,) = (shlex.split(line) for line in lines() if line.startswith("hf upload"))
    _, _, repository, folder, place = words
    hf = Path(sys.executable).with_name("hf")
    said = subprocess.run([hf, "upload", "--help"], capture_output=True, text=True).stdout
    assert re.search(r"REPO_ID \[LOCAL_PATH\] \[PATH_IN_REPO\]", said), said
    assert repository.count("/") == 1 and folder == "runs/smollm2-240m/best" and place == "."
