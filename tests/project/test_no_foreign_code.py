"""Nothing that a model, a data set or a run directory holds is run: not by us, and not by a library that we ask."""

import ast
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from minitron_search.distillation.correction import float32_of
from minitron_search.teachers.sources import load_tokenizer, teacher_config
from tests.project.test_layering import ANALYSIS, PACKAGE
from tests.runs import ROOT
from tests.tiny import teacher_folder

# Calls that build whatever objects a file names, or run what it says.
FORBIDDEN = (
    "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "dill.load", "dill.loads", "joblib.load",
    "shelve.open", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval",
    "exec", "input", "compile", "os.system",
)  # fmt: skip
# How one process hands work to another one that lives beside it, in a folder that is emptied when a session begins.
ALLOWED = {("minitron_search.cluster.worker_groups", "ray.cloudpickle.loads")}
AUTO = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def given(call: ast.Call, name: str) -> object:
    """The constant that a keyword has; None without it."""
    return next((word.value.value for word in call.keywords  # type: ignore[attr-defined]
                 if word.arg == name and isinstance(word.value, ast.Constant)), None)  # fmt: skip


def risks(tree: ast.Module) -> Iterator[str]:
    """Calls that may run what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "marshal", "cloudpickle"):
            yield f"from {node.module} import"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in FORBIDDEN or name.endswith("cloudpickle.loads") or name.endswith("cloudpickle.load"):
            yield name
        if name == "torch.load" and given(node, "weights_only") is not True:
            yield "torch.load without weights_only=True"
        if given(node, "allow_pickle") is True:
            yield f"{name} with allow_pickle=True"
        if given(node, "trust_remote_code") is True:
            yield f"{name} with trust_remote_code=True"
        owner, _, method = name.rpartition(".")
        if (
            owner in AUTO
            and method in ("from_pretrained", "from_config")
            and given(node, "trust_remote_code") is not False
        ):
            yield f"{name} without trust_remote_code=False"
        if name.endswith("HFLM") and given(node, "trust_remote_code") is not False:
            yield f"{name} without trust_remote_code=False"
        if name in ("dcp.load", "torch.distributed.checkpoint.load"):
            yield f"{name}, which unpickles what it finds"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "AutoConfig.from_pretrained(folder)",
        "AutoModelForCausalLM.from_config(config)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "ray.cloudpickle.loads(data)",
        "dcp.load(tensors, checkpoint_id=folder)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(risks(ast.parse(source)))


def test_no_module_runs_what_a_file_holds() -> None:
    found = {
        (name, risk) for name, path in {**PACKAGE, **ANALYSIS}.items() for risk in risks(ast.parse(path.read_text()))
    }
    assert found == ALLOWED
    unpicklers = {name for name, path in PACKAGE.items() if "pickle.Unpickler" in path.read_text()}
    assert unpicklers == {"minitron_search.checkpoints.safe_reading"}


def test_data_sets_are_read_by_a_library_that_runs_none_of_their_code() -> None:
    assert int(version("datasets").partition(".")[0]) >= 4 and '"datasets>=4"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_gives_no_library_an_answer() -> None:
    """A library that asks reads the end of a file, whatever is piped in."""
    ran_as_command = """
import runpy
import minitron_search.cli
def asks(arguments=None):
    try:
        print("answered", input())
    except EOFError:
        print("no answer")
    return 0
minitron_search.cli.main = asks
runpy.run_module("minitron_search.run", run_name="__main__")
"""
    ran = subprocess.run(
        [sys.executable, "-c", ran_as_command], input="y\n" * 100, capture_output=True, text=True, cwd=ROOT
    )
    assert ran.stdout == "no answer\n", ran


def evil(folder: Path, file: str, changes: dict[str, object]) -> Path:
    """A teacher that brings Python of its own, and says in `file` that it is needed."""
    made = teacher_folder(folder / "teacher")
    content = json.loads((made / file).read_text())
    (made / file).write_text(json.dumps(content | changes))
    (made / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass C:\n    pass\n")
    return made


def test_a_models_own_python_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    needed = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    with pytest.raises(ValueError, match="teacher.model: .* contains custom code") as raised:
        teacher_config(str(evil(tmp_path, "config.json", needed)))
    assert "\n" not in str(raised.value)
    needed = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.C", None]}}
    with pytest.raises(ValueError, match="teacher.model: .* has no tokenizer that can be loaded"):
        load_tokenizer(str(evil(tmp_path / "other", "tokenizer_config.json", needed)))
    assert not list(tmp_path.glob("**/ran"))


def test_python_beside_a_model_of_a_known_family_is_left_alone(tmp_path: Path) -> None:
    """As many folders of the Hub have it: the family's own code in transformers is what is run."""
    with_map = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    made = evil(tmp_path, "config.json", with_map)
    config = teacher_config(str(made))
    assert type(config).__module__.startswith("transformers.")
    assert float32_of(made).config.model_type == "llama" and not (tmp_path / "ran").exists()
