"""What `evaluation.tasks` names: lm-eval's tasks, YAML files of one's own, `table_1` and `table_2` (arXiv:2408.11796).

A name may end in `:shots`. Without, a task of the papers' tables has the papers' shots, and any other its own, which is
what lm-eval gives it.
"""

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from minitron_search.records.cache import content_id, file_hash

# Of the papers' base models: pass@1 at temperature 0.2, top-p 0.95 ("Evaluation"); lm-eval's own is greedy.
SAMPLED = {"do_sample": True, "temperature": 0.2, "top_p": 0.95}
IFEVAL = tuple(f"{level}_level_{way}_acc,none" for level in ("prompt", "inst") for way in ("strict", "loose"))


class Task(NamedTuple):
    """One task, as it is evaluated.

    name: lm-eval's, or that in the YAML file. yaml: that file, relative to lm-eval's own where it is one of them; None
    for what only its index can find. metrics: `metric,filter`, whose mean is the value; empty for the first that the
    task has. changes: what replaces the file's own values. chat: whether the model's chat template is put around
    prompts, where it has one. unsafe: it runs code that the model writes. content: for a file that is not lm-eval's, a
    digest of it and of the data that it names.
    """

    name: str
    shots: int | None
    yaml: str | None
    metrics: tuple[str, ...] = ()
    changes: Mapping[str, Any] = {}
    chat: bool = False
    unsafe: bool = False
    content: str = ""

    @property
    def label(self) -> str:
        shots = "" if self.shots is None else f":{self.shots}"
        return f"{self.name}{shots}{' chat' if self.chat else ''}"


# Shots as the tables' own rows give them; metrics as in the poster's table of the same benchmarks.
TABLES: dict[str, tuple[Task, ...]] = {
    "table_1": (
        Task("winogrande", 5, "winogrande/default.yaml", ("acc,none",)),
        Task("arc_challenge", 25, "arc/arc_challenge.yaml", ("acc_norm,none",)),
        Task("mmlu", 5, "mmlu/default/_mmlu.yaml", ("acc,none",)),
        Task("hellaswag", 10, "hellaswag/hellaswag.yaml", ("acc_norm,none",)),
        Task("gsm8k", 5, "gsm8k/gsm8k.yaml", ("exact_match,strict-match",)),
        Task("truthfulqa_mc2", 0, "truthfulqa/truthfulqa_mc2.yaml", ("acc,none",)),
        Task("mbpp", 0, "mbpp/mbpp.yaml", ("pass_at_1,none",), {"generation_kwargs": SAMPLED}, unsafe=True),
        Task("humaneval", 0, "humaneval/humaneval.yaml", ("pass@1,create_test",),
             {"generation_kwargs": SAMPLED, "repeats": 20}, unsafe=True),
    ),
    "table_2": (
        Task("mmlu", 5, "mmlu/default/_mmlu.yaml", ("acc,none",), chat=True),
        Task("gsm8k_cot_zeroshot", 0, "gsm8k/gsm8k-cot-zeroshot.yaml", ("exact_match,flexible-extract",), chat=True),
        Task("gpqa_main_zeroshot", 0, "gpqa/zeroshot/gpqa_main_zeroshot.yaml", ("acc_norm,none",), chat=True),
        Task("humaneval_instruct", 0, "humaneval/humaneval_instruct.yaml", ("pass@1,create_test",), chat=True,
             unsafe=True),
        Task("mbpp_instruct", 0, "mbpp/mbpp_instruct.yaml", ("pass_at_1,extract_code",), chat=True, unsafe=True),
        Task("ifeval", 0, "ifeval/ifeval.yaml", IFEVAL, chat=True),
    ),
}  # fmt: skip
# the values of `task: a`, `tag: [a, b]` and `"group": "a"`, and the `- a` of a list
NAMED = re.compile(
    rb"(?m)^[ \t]*(?:-[ \t]*)?(?:[\"']?(?:task|group|tag)[\"']?[ \t]*:)?([ \t\[\"'\w.,()\-]+\]?)[ \t]*(?:#.*)?\r?$"
)
MOST_SHOTS = 1_000  # as of winogrande.shots
CANNOT = {
    "xlsum": "lm-eval has XL-Sum in other languages, not the English one of Table 1",
    "mt_bench": "MT-Bench needs a judge (GPT-4 Turbo in Table 2), and lm-eval has none",
    "bfcl": "lm-eval has no BFCL, whose own program calls functions",
}


def parse_tasks(names: Iterable[str]) -> list[Task]:
    """Return every task that `names` has, once. Raises ValueError for what lm-eval does not know or cannot do, for
    shots that are not a number, and for tasks that run a model's code where the environment does not allow it."""
    tasks_by_label: dict[str, Task] = {}
    for task in (task for name in names for task in _named(name)):
        before = tasks_by_label.setdefault(task.label, task)
        if (before.yaml, before.content) != (task.yaml, task.content):
            raise ValueError(f"evaluation.tasks: {task.label} is of two different files; valid: another name under "
                             "`task:` in one of them")  # fmt: skip
    tasks = list(tasks_by_label.values())
    if unsafe := [task.name for task in tasks if task.unsafe and os.environ.get("HF_ALLOW_CODE_EVAL") != "1"]:
        safe = ",".join(_as_asked(task) for task in tasks if not task.unsafe) or "winogrande"
        raise ValueError(f"evaluation.tasks: {', '.join(unsafe)} runs code that the model writes, on this machine; "
                         f"valid: {safe}, or HF_ALLOW_CODE_EVAL=1 in the environment, in a container that has nothing "
                         "to lose")  # fmt: skip
    return tasks


def load(task: Task) -> list[Any]:
    """Load lm-eval's own objects of a task, or of a group, with their data sets. Raises whatever lm-eval and the Hub
    do."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    shipped = Path(lm_eval.tasks.__file__).parent
    if task.yaml is None:
        loaded = _manager().load([task.name])
    else:
        path = shipped / task.yaml  # an absolute one stays as it is
        config: dict[str, Any] = load_yaml(path, resolve_func=True)
        if isinstance(config.get("task"), list):  # a group's members lie beside it, in lm-eval as well
            beside = lm_eval.tasks.TaskManager(include_defaults=False, include_path=path.parent)
            loaded = beside.load([config["group"]])
        else:
            changed = {key: task.changes[key] for key in ("dataset_kwargs",) if key in task.changes}
            loaded = lm_eval.tasks.TaskManager(include_defaults=False).load([{**config, **changed}])
    for loaded_task in loaded["tasks"].values():
        if task.shots is not None:
            loaded_task.set_config("num_fewshot", task.shots)
        if "generation_kwargs" in task.changes:
            loaded_task.set_config("generation_kwargs", task.changes["generation_kwargs"], update=True)
        if "repeats" in task.changes:
            loaded_task.set_config("repeats", task.changes["repeats"])
    roots = [group for group in loaded.get("groups", {}).values() if group.name == task.name]
    return roots or list(loaded["tasks"].values())


def check_data(tasks: Sequence[Task]) -> None:
    """Fetch the tasks' questions. Raises ValueError for a task whose questions cannot be had."""
    for task in tasks:
        try:
            load(task)
        except Exception as error:  # the Hub's client and lm-eval fail in a dozen types; the cause is in the message
            raise ValueError(
                f"evaluation.tasks: {task.label}: its questions cannot be had ({reason(error)}); valid: a task whose "
                "data set is in reach (one that is gated needs a login: hf auth login), or a YAML file of your own "
                "over a local file, as docs/evaluation.md shows"
            ) from error


def reason(error: BaseException) -> str:
    """Return the type of an error and the last line of its message, which is all that matters of one from another
    process."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    line = lines[-1].strip() if lines else ""
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"[:500]


def _named(request: str) -> Iterator[Task]:
    if request in TABLES:
        yield from TABLES[request]
        return
    name, shots = _split(request)
    if name in CANNOT:
        raise ValueError(f"evaluation.tasks: {request!r}: {CANNOT[name]}; valid: table_1, table_2 or winogrande")
    known = {task.name: task for table in reversed(TABLES.values()) for task in table}.get(name)
    if known is not None:
        yield known._replace(shots=known.shots if shots is None else shots)
    elif name.endswith((".yaml", ".yml")):
        yield _own(name, shots)
    else:
        yield from _indexed(request, name, shots)


def _split(request: str) -> tuple[str, int | None]:
    name, colon, shots = request.rpartition(":")
    if not colon:
        return request, None
    if not re.fullmatch(r"\d{1,4}", shots) or int(shots) > MOST_SHOTS:
        raise ValueError(f"evaluation.tasks: {request!r}: {shots!r} is not a number of shots, of which there are at "
                         f"most {MOST_SHOTS:,}; valid: {name}:5")  # fmt: skip
    return name, int(shots)


def _as_asked(task: Task) -> str:
    return f"{task.name}:{task.shots}" if task.shots is not None else task.name


def _own(name: str, shots: int | None) -> Task:
    """Return the task of a YAML file that is not lm-eval's. Data files in it are relative to it, or to where the
    command was started."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(name).expanduser().absolute()
    if not path.is_file():
        near = [str(path.with_name(other)) for other in
                difflib.get_close_matches(path.name, [entry.name for entry in path.parent.glob("*.y*ml")])]  # fmt: skip
        hint = f"near it: {', '.join(near)}" if near else "valid: a task of lm-eval, as winogrande, or a file"
        raise ValueError(f"evaluation.tasks: no file {name!r}; {hint}")
    try:
        config = load_yaml(path, resolve_func=False)
    except Exception as error:  # YAML's errors, and those of what it includes
        raise ValueError(f"evaluation.tasks: {name}: not a task ({reason(error)}); valid: lm-eval's YAML, as in "
                         "docs/evaluation.md") from error  # fmt: skip
    if not isinstance(config, dict) or not isinstance(config.get("task"), str | list) or not _title(config):
        raise ValueError(f"evaluation.tasks: {name} names no task; valid: a line `task: my_winogrande` in it")
    if shots is None and isinstance(config["task"], str):
        shots = config.get("num_fewshot") or 0
    changes, content = {}, [_of_folder(path)]
    if isinstance(files := (config.get("dataset_kwargs") or {}).get("data_files"), str | list | dict):
        files = _absolute(files, path.parent, name)
        changes["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": files}
        content += [file_hash(Path(file)) for file in _leaves(files) if Path(file).is_file()]
    for place in (config.get("dataset_path"), (config.get("dataset_kwargs") or {}).get("data_dir")):
        local = [folder for folder in (path.parent / str(place), Path(str(place))) if place and folder.is_dir()]
        content += [file_hash(file) for folder in local[:1] for file in sorted(folder.rglob("*")) if file.is_file()]
    digest = content_id(content, digits=16)
    unsafe = bool(config.get("unsafe_code"))
    return Task(_title(config), shots, str(path), changes=changes, unsafe=unsafe, content=digest)


def _title(config: Mapping[str, Any]) -> str:
    return config["task"] if isinstance(config["task"], str) else config.get("group", "")


def _of_folder(path: Path) -> str:
    """Return a digest of a YAML file and of what it may include: the YAML and Python beside it."""
    files = sorted(file for file in path.parent.iterdir() if file.is_file() and (
        file.suffix in (".yaml", ".yml", ".py") or file.name.endswith("_yaml")))  # fmt: skip
    return content_id("".join(f"{file.name} {file_hash(file)}" for file in files).encode(), digits=64)


def _absolute(files: Any, folder: Path, name: str) -> Any:
    """Return `data_files` with every path absolute. Raises ValueError for one that is not there."""
    if isinstance(files, dict):
        return {split: _absolute(part, folder, name) for split, part in files.items()}
    if isinstance(files, list):
        return [leaf for part in files for leaf in _leaves(_absolute(part, folder, name))]
    if "://" not in files and glob.has_magic(files):
        here = (sorted(glob.glob(str(base / files), recursive=True)) for base in (folder, Path.cwd()))
        return next(filter(None, here), files)  # where nothing matches, files of a data set on the Hub
    if "://" in files:
        return files
    for place in (folder / Path(files).expanduser(), Path(files).absolute()):
        if place.is_file():
            return str(place.resolve())
    raise ValueError(f"evaluation.tasks: {name}: no file {files!r} there or here; valid: data_files that are there")


def _leaves(files: Any) -> Iterator[str]:
    if isinstance(files, str):
        yield files
    else:
        for part in files.values() if isinstance(files, dict) else files:
            yield from _leaves(part)


def _indexed(request: str, name: str, shots: int | None) -> Iterator[Task]:
    """Yield the tasks of a name that only lm-eval's index knows: a task, a group with a metric of its own, or a tag's
    tasks."""
    if name not in (written := _written_names()):  # lm-eval's own index takes twenty seconds to say so
        near = ", ".join(difflib.get_close_matches(name, [*TABLES, *written])) or "winogrande, table_1"
        raise ValueError(f"evaluation.tasks: lm-eval has no task {request!r}; valid: {near}")
    import lm_eval.tasks

    manager = _manager()
    if name not in manager.all_tasks:
        near = ", ".join(difflib.get_close_matches(name, [*TABLES, *manager.all_tasks])) or "winogrande, table_1"
        raise ValueError(f"evaluation.tasks: lm-eval has no task {request!r}; valid: {near}")
    entry = manager.task_index[name]
    if name in manager.all_tags:
        for member in sorted(entry.tags):
            yield from _named(member if shots is None else f"{member}:{shots}")
        return
    config = entry.cfg or {}
    if name in manager.all_groups:
        members = [member if isinstance(member, str) else member.get("task") for member in config.get("task", [])]
        if not config.get("aggregate_metric_list"):
            listed = ",".join(str(member) for member in members[:8])
            raise ValueError(f"evaluation.tasks: lm-eval's group {name!r} has no metric of its own; valid: {listed}")
        yield Task(name, shots, None)
        return
    own = config.get("num_fewshot") or 0
    relative = entry.yaml_path.relative_to(Path(lm_eval.tasks.__file__).parent)
    yield Task(name, own if shots is None else shots, str(relative), unsafe=bool(config.get("unsafe_code")))


@cache
def _written_names() -> frozenset[str]:
    """Return every word that lm-eval's YAML files may name a task, a group or a tag by; it takes a second."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("evaluation.tasks: lm-eval is not installed; valid: none, or pip install lm-eval")
    places = Path(spec.submodule_search_locations[0], "tasks").rglob("*")
    files = (path for path in places if path.suffix in ("", ".yaml", ".yml") and path.is_file())
    found = (match for file in files for match in NAMED.findall(file.read_bytes()))
    return frozenset(name.decode() for line in found for name in re.findall(rb"[\w.()\-]+", line))


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager  # its index of 15,000 files takes 10 s and more: only when one is asked for

    return TaskManager()
