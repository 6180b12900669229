"""Read an ablation: a YAML whose arms differ in keys of the configuration, compared at equal tokens and seeds.

    question: Is pruning by importance worth more than ...?
    figure: 2408.11796, Figure 6
    base: smollm2.yaml          # optional: a configuration in the folder of this file, under the keys of this one
    architecture: width         # of all arms: sizes, or a rule (`shapes.shaped`)
    baseline: pruned            # the arm that the others are compared with; the first unless given
    search: {rungs: [0, 4K, 16K], seeds: 3}         # and any other key of the configuration, for all arms
    before: {middle: {...}}     # optional: ordinary runs, made first in <output>/before/<name>; an arm may name what
                                # they leave, as in teacher: {model: "{output}/before/middle/best"}
    arms: {random: {distillation: {initialization: random}}, pruned: {}}

Every arm is an ordinary run of one architecture, in <output>/<arm>. It says what it changes; it may not change what
the comparison relies on (`SHARED`).
"""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron_search.ablation.shapes import in_numbers, shaped
from minitron_search.architecture_search.schedule import whole_batches
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.planning.prepare import Prepared, check, check_names, complete
from minitron_search.records.bucket import bucket_copy
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import at_home, inside, is_uri, working_folder
from minitron_search.teachers.sources import is_stored

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
BEFORE = "before"
OWN = ("question", "figure", "base", "architecture", "baseline", BEFORE, "arms")
# one architecture, all of whose seeds run to the last rung: what `Ablation.config` sets in every arm
SET: dict[str, Any] = {
    "stages": None, "evaluation.tasks": [], "evaluation.references": [], "search.trials": 1, "search.promote": 1,
    "search.finalist_seeds": 1, "search.controls": False, "search.tokens": "auto", "search.scheduler": "halving",
    "search.sampler": "tpe",
}  # fmt: skip
SHARED = (
    "name", "output", "seed", "search", "evaluation", "winogrande", "space.budget", "corpus.validation",
    "corpus.validation_samples", "corpus.sequence_length", *SET,
)  # fmt: skip
SEEDS = 3
_SECTIONS = {key.partition(".")[0] for key, _ in loading.keys() if "." in key}


@dataclass(frozen=True)
class Ablation:
    """One ablation.

    `values`: the keys of the configuration for all arms. `changes`, `before`: the keys that each arm, and each run that
    is made first, sets over them; `architecture` is one of them. `output`: a folder or an address.
    """

    name: str
    output: str
    question: str
    figure: str
    baseline: str
    values: dict[str, Any]
    changes: dict[str, dict[str, Any]]
    before: dict[str, dict[str, Any]]

    @property
    def root(self) -> Path:
        """The folder that the ablation is worked on in."""
        return working_folder(self.output) if is_uri(self.output) else Path(self.output)

    def address(self, place: str) -> str:
        """Return the output of one of its runs."""
        return inside(self.output, place)

    def config(self, arm: str) -> Config:
        """Return the configuration of one arm. Raises ValueError that names the arm."""
        with_changes = _merged(self.values, self.changes[arm])
        with _naming(f"arms.{arm}"):
            config = self._parsed(with_changes, arm)
            block = config.space.axes.drop_block
            stages = ["importance", *(["depth"] if block and block.seeds == "sweep" else []), "search"]
            given = config.dump()
            if "depth" in stages and block:
                given["depth"]["lengths"] = given["space"]["axes"]["drop_block"]["lengths"]
            return loading.parse_config({**given, "stages": stages})

    def config_before(self, name: str) -> Config:
        """Return the configuration of a run that is made first: an ordinary one, which leaves its student in best/."""
        with _naming(f"{BEFORE}.{name}"):
            config = self._parsed(_merged(self.values, self.before[name]), f"{BEFORE}/{name}")
            return loading.parse_config({**config.dump(), "stages": ["importance", "search", "retrain"]})

    def _parsed(self, values: dict[str, Any], place: str) -> Config:
        values = _substituted(values, self.output)
        architecture = values.pop("architecture", None)
        values = _merged(values, {"name": f"{self.name}-{place}".replace("/", "-"), "output": self.address(place)})
        for key, value in SET.items():
            if value is not None:
                values = _merged(values, nested(key, value))
        values["space"] = {"axes": {}, **values.get("space", {})}
        common = _only(_substituted(self.values, self.output), "teacher", "model")  # an arm's own may be another
        values = _merged(values, {"space": {"budget": in_numbers(_only(values, "space", "budget"), common)}})
        values["search"] = {"seeds": SEEDS, **values["search"]}
        if architecture is not None:
            decides = {
                "teacher": _only(values, "teacher", "model"),
                "importance": _only(values, "importance", "method"),
                "space": {**_only(values, "space", "budget"), "axes": {}},
            }
            values = _merged(values, {"space": shaped(architecture, loading.parse_config(decides))})
        config = loading.parse_config(values)
        tokens = {"retraining": {"tokens": config.search.rungs[-1], **values.get("retraining", {})}}
        return loading.parse_config(_merged(values, tokens))

    def waits(self, name: str, changes: Mapping[str, Any]) -> bool:
        """Return whether a model that an arm names is still to be made."""
        values = _substituted(_merged(self.values, changes), self.output)
        named = (values.get("teacher", {}).get("model"), values.get("distillation", {}).get("teacher"))
        if is_uri(self.output):
            start = self.address(f"{BEFORE}/").partition("?")[0]
            return any(not is_stored(model) for model in named if model and model.startswith(start))
        ours = [Path(model) for model in named if model and Path(model).is_relative_to(self.root / BEFORE)]
        return any(not model.exists() for model in ours)

    def definition(self) -> dict[str, Any]:
        """Return the YAML that defines it, with what flags and base have added: all that continuing it takes."""
        own = {"name": self.name, "question": self.question, "figure": self.figure, "baseline": self.baseline}
        return {**own, BEFORE: self.before, "arms": self.changes, **self.values}

    def about(self) -> dict[str, Any]:
        """Return what ablation.json holds."""
        shared = loading.parse_config({
            "seed": self.values.get("seed", 0),
            "search": {"seeds": SEEDS, **_only(self.values, "search", "seeds", "rungs")},
            "corpus": _only(self.values, "corpus", "sequence_length"),
            "distillation": _only(self.values, "distillation", "batch_tokens"),
        })  # fmt: skip
        return {
            "name": self.name,
            "question": self.question,
            "figure": self.figure,
            "baseline": self.baseline,
            "arms": list(self.changes),
            "seeds": [shared.seed + number for number in range(shared.search.seeds)],
            "tokens": whole_batches(shared, shared.search.rungs[-1]),
            "changes": self.changes,
        }


def load(file: str, overrides: list[str]) -> Ablation:
    """Return the ablation of a YAML with dotted overrides on top.

    An override holds for all arms, except for keys that an arm sets itself, which `--arms.NAME.KEY` changes. Raises
    ValueError with the key, its value and a valid alternative.
    """
    values = loading.read_yaml(file)
    base = values.pop("base", None)
    loading.override(values, overrides)
    under: dict[str, Any] = {}
    if base is not None:
        under = loading.read_yaml(str(Path(file).parent / at_home(str(base))))
        for key in SET:  # those of a search
            _without(under, key)
    return defined(values, under, Path(file).stem)


def defined(values: dict[str, Any], under: Mapping[str, Any], default_name: str) -> Ablation:
    """Return the ablation of plain values over those of its base. Raises ValueError as `load` does."""
    own: dict[str, Any] = {key: values.pop(key, None) for key in OWN if key not in ("base", "architecture")}
    _check_shared(values)
    _check_sections(values)
    values = _merged({key: value for key, value in under.items() if key not in ("name", "output")}, values)
    arms, name = own["arms"], values.pop("name", default_name)
    if not isinstance(arms, Mapping) or len(arms) < 2:
        raise ValueError(f"arms: {arms!r}; valid: two or more, as in {{random: {{distillation: {{initialization: "
                         "random}}, pruned: {}}")  # fmt: skip
    before = own[BEFORE] or {}
    if not isinstance(before, Mapping):
        raise ValueError(f"{BEFORE}: {before!r}; valid: runs by name, as in {{middle: {{}}}}")
    for key, named in (("arms", arms), (BEFORE, before)):
        for arm, changes in named.items():
            if not NAME.fullmatch(str(arm)) or arm == BEFORE:
                raise ValueError(f"{key}: {arm!r} names a folder; valid: lower-case letters, digits, _ and -, as in "
                                 f"{_folder_name(str(arm))!r}")  # fmt: skip
            if not isinstance(changes or {}, Mapping):
                raise ValueError(f"{key}.{arm}: {changes!r}; valid: keys of the configuration, or {{}}")
            with _naming(f"{key}.{arm}"):
                _check_sections(changes or {})
    for arm, changes in arms.items():
        _check_arm(arm, changes or {})
    for key in ("question", "figure", "baseline"):
        if not isinstance(own[key], str | int | float | None):
            raise ValueError(f"{key}: {own[key]!r} is no text; valid: a line of text")
    baseline = own["baseline"] or next(iter(arms))
    if baseline not in arms:
        raise ValueError(f"baseline: {baseline!r} is not an arm; valid: {', '.join(map(str, arms))}")
    if not own["question"]:
        raise ValueError("question: none; valid: what the arms are to answer, in a sentence")
    output = loading.parse_config({"name": name, "output": values.pop("output", None) or f"runs/{name}"}).output
    return Ablation(
        name=str(name),
        output=output if is_uri(output) else str(Path(output.removeprefix("file://"))),
        question=str(own["question"]).strip(),
        figure=str(own["figure"] or ""),
        baseline=str(baseline),
        values=values,
        changes={str(arm): dict(changes or {}) for arm, changes in arms.items()},
        before={str(name): dict(changes or {}) for name, changes in before.items()},
    )


def checked(ablation: Ablation, resume: bool) -> dict[str, tuple[Config, SearchSpace]]:
    """Do the quick checks of every run that can be checked now; return (configuration, space) by folder in the output.

    Those are the runs made first, then the arms that wait for none of them. Arms have to be alike in what they are
    compared at. Raises ValueError that names the arm.
    """
    runs = {}
    for name in ablation.before:
        runs[f"{BEFORE}/{name}"] = _checked(ablation.config_before(name), f"{BEFORE}.{name}", resume)
    for arm, changes in ablation.changes.items():
        if not ablation.waits(arm, changes):
            runs[arm] = check_arm(ablation, arm, resume)
        else:
            with _naming(f"arms.{arm}"):
                values = _merged(ablation.values, changes)
                check_names(loading.parse_config({key: values[key] for key in values if key != "architecture"}))
    return runs


def begun(output: str) -> bool:
    """Return whether there is a run to continue; one in storage has been copied here then."""
    run_dir = RunDirectory(output)
    if bucket := bucket_copy(output, run_dir):
        bucket.pull()
    return run_dir.config.exists()


def check_arm(ablation: Ablation, arm: str, resume: bool) -> tuple[Config, SearchSpace]:
    """Do the quick checks of one arm; return its configuration and its space, which has to be one architecture."""
    config, space = _checked(ablation.config(arm), f"arms.{arm}", resume)
    about, block = ablation.about(), config.space.axes.drop_block
    if (tokens := whole_batches(config, config.search.rungs[-1])) != about["tokens"]:
        raise ValueError(f"arms.{arm}: trains on {tokens:,} tokens, in whole batches, and the others on "
                         f"{about['tokens']:,}; valid: the same distillation.batch_tokens, or search.rungs that are "
                         "whole batches of both")  # fmt: skip
    if len(space) > 1 and not space.anchors and (block is None or block.seeds == "none"):
        raise ValueError(f"arms.{arm}: {len(space):,} architectures are in its space; valid: one, by architecture: "
                         "width, depth_bi or sizes")  # fmt: skip
    return config, space


def check_text(arm: str, changes: Mapping[str, Any], prepared: Prepared, baseline: Prepared) -> None:
    """Raise ValueError if an arm is scored on other windows, or trained on others without changing just that."""
    ours, theirs = prepared.corpus, baseline.corpus
    if not np.array_equal(ours.validation, theirs.validation):
        raise ValueError(f"arms.{arm}: its teacher has another tokenizer than the baseline's, so that its losses are "
                         "not of the same tokens; valid: a teacher.model with the same tokenizer")  # fmt: skip
    needed = min(len(ours.train), len(theirs.train))
    if "train" not in changes.get("corpus", {}) and not np.array_equal(ours.train[:needed], theirs.train[:needed]):
        raise ValueError(f"arms.{arm}: distils on other windows than the baseline, because it draws or leaves out "
                         "others; valid: importance.samples with one corpus.calibration_samples for all arms, and one "
                         "retraining.tokens, at least teacher.correction.tokens, for all")  # fmt: skip


def _checked(config: Config, name: str, resume: bool) -> tuple[Config, SearchSpace]:
    with _naming(name):
        goes_on = resume and begun(config.output)
        config, _ = complete(config, goes_on)
        return config, check(config, goes_on)[1]


def _check_shared(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that every ablation sets itself."""
    for key in _dotted(values):
        if key in SET:
            raise ValueError(f"{key}: an ablation sets it: every arm is one architecture, which runs importance and "
                             "search to the last rung; valid: leave it out")  # fmt: skip


def _check_sections(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a section that has a value instead of keys."""
    for key, value in values.items():
        if key != "architecture" and (value is None or (not isinstance(value, Mapping) and key in _SECTIONS)):
            loading.parse_config({key: value})  # which says so


def _check_arm(arm: str, changes: Mapping[str, Any]) -> None:
    for key in _dotted(changes):
        alike = [shared for shared in SHARED if key == shared or key.startswith(f"{shared}.")]
        if alike and alike[0].startswith("search"):
            raise ValueError(f"arms.{arm}.{key}: arms are compared at equal tokens and seeds; valid: search.rungs and "
                             "search.seeds beside arms, for all of them")  # fmt: skip
        if alike:
            raise ValueError(f"arms.{arm}.{key}: arms are compared at the same {alike[0]}; "
                             f"valid: {key} beside arms, for all of them")  # fmt: skip


class _naming:
    """While the block runs, let errors in a configuration name the arm that has it."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self.name}: {error}") from error


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with `over` on top: mappings are merged key by key, anything else is replaced."""
    merged = deepcopy(dict(under))
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping) and key != "architecture":
            merged[key] = _merged(inner, value)
        else:
            merged[key] = deepcopy(value)
    return merged


def _only(values: Mapping[str, Any], section: str, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.get(section, {}).items() if key in keys}


def nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def _without(values: dict[str, Any], key: str) -> None:
    first, _, rest = key.partition(".")
    if rest and isinstance(values.get(first), dict):
        _without(values[first], rest)
    elif not rest:
        values.pop(first, None)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value and key != "architecture":
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _substituted(values: Any, output: str) -> Any:
    if isinstance(values, Mapping):
        return {key: _substituted(value, output) for key, value in values.items()}
    if not isinstance(values, str):
        return values
    return re.sub(r"\{output\}(?:/([\w./-]+))?", lambda match: inside(output, match[1]) if match[1] else output, values)


def _folder_name(text: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "_", text.lower()).strip("_-")[:40] or "arm"
