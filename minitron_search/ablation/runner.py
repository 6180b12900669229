"""An ablation's arms, one after another in one Ray: each an ordinary run, whose caches the next one finds."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from minitron_search.ablation import storage
from minitron_search.ablation.definition import BEFORE, Ablation, begun, check_arm, check_text, checked
from minitron_search.ablation.differences import differences, read_arms, shown, write_differences
from minitron_search.cluster import session
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.models.device import release_memory, resolve
from minitron_search.planning.calibration import measure, stated
from minitron_search.planning.forecast import fitting, forecast, teaching_config, this_machine, total
from minitron_search.planning.prepare import Prepared, prepare
from minitron_search.planning.workload import Costs, option_tokens
from minitron_search.records.console import console, say
from minitron_search.records.directory import ABLATION_FILE, RunDirectory, replace_text
from minitron_search.search.space import SearchSpace


def prepare_ablation(ablation: Ablation, resume: bool) -> dict[str, Prepared]:
    """Every run that does not wait for another, by its folder in the output; those that have ended are left out.

    Raises ValueError, naming the arm, for what is wrong with any.
    """
    _check_output(ablation, resume)
    prepared: dict[str, Prepared] = {}
    for place, (config, _) in checked(ablation, resume).items():
        say(f"preparing {place}")
        prepared[place] = _prepared(ablation, place, config, resume, prepared)
        release_memory()
    return {place: each for place, each in prepared.items() if not _ended(each.run)}


def run_ablation(ablation: Ablation, prepared: dict[str, Prepared], run: Callable[[Prepared], None]) -> list[str]:
    """Run what is left, by `run`, and write what the arms are worth. Returns the arms that failed.

    Raises what `run` raises for a run that others wait for.
    """
    about, root = ablation.about(), ablation.root
    root.mkdir(parents=True, exist_ok=True)
    replace_text(root / ABLATION_FILE, json.dumps(about, indent=1))
    storage.put(ablation)
    storage.link(ablation)

    def kept(place: str) -> AbstractContextManager[None]:
        address = ablation.address(place)
        return storage.kept(prepared[place].run if place in prepared else RunDirectory(address), address)

    failed = []
    with session.joined():
        for name in ablation.before:
            if (place := f"{BEFORE}/{name}") in prepared:
                say(f"{place}: made first")
                with kept(place):
                    run(prepared[place])
                    _drop_checkpoints(prepared[place].run)
        for number, arm in enumerate(ablation.changes, 1):
            if _ended(RunDirectory(ablation.address(arm))):
                with kept(arm):  # storage may have been gone when it ended
                    continue
            say(f"arm {number} of {len(ablation.changes)}, {arm}: {_said(ablation.changes[arm])}")
            try:
                if arm not in prepared:
                    config, _ = check_arm(ablation, arm, resume=True)
                    prepared[arm] = _prepared(ablation, arm, config, True, prepared)
                scored = [RunDirectory(root / other) for other in ablation.changes if other != arm]
                _take_teacher_scores(prepared[arm], [other for other in scored if _ended(other)])
                with kept(arm):
                    run(prepared[arm])
                    _drop_checkpoints(prepared[arm].run)
            except session.UnfitError:
                raise
            except (ValueError, RuntimeError) as error:  # the other arms are worth having
                say(f"arm {arm} failed: {error}")
                failed.append(arm)
            release_memory()
    rows, scores = read_arms(root, about["arms"])
    found = differences(rows, scores, ablation.baseline)
    write_differences(root, found)
    storage.put(ablation)
    console.print(shown(about, rows, found))
    return failed


def dry_run(ablation: Ablation, runs: dict[str, tuple[Config, SearchSpace]], out: Console) -> None:
    """What every run would be and cost, from one measurement of the first."""
    about = ablation.about()
    out.print(yaml.safe_dump({**about, "changes": ablation.changes}, sort_keys=False).rstrip(), markup=False)
    table = Table(title="forecast", box=SIMPLE_HEAD)
    for name in ("", "architecture", "parameters", "tokens", "FLOPs", "hours"):
        table.add_column(name, justify="right" if name not in ("", "architecture") else "left")
    speed, machine, hours = None, this_machine(), 0.0
    for place, (config, space) in runs.items():
        precision, teaching = resolve(config.precision), teaching_config(config, space)
        costs = Costs(config, space, teaching, precision, option_tokens(config.winogrande))
        at_once = fitting(config, machine) * config.resources.workers_per_trial
        speed = speed or stated(config) or measure(config, costs, teaching.hidden_size, precision, at_once)
        cost = total(forecast(costs, speed, machine))
        shape, block = (space.anchors or (space.typical(),))[0], config.space.axes.drop_block
        which = f", {block.seeds}" if block and block.seeds != "none" else ""
        hours += cost.seconds / 3600
        table.add_row(place, f"{shape}{which}", f"{space.measures(shape).params:,}", f"{cost.tokens:,}",
                      f"{cost.flops:.3g}", f"{cost.seconds / 3600:.2f}")  # fmt: skip
    out.print(table)
    for arm, changes in ablation.changes.items():
        if ablation.waits(arm, changes):
            out.print(f"{arm}: looked at once {BEFORE}/ is there", markup=False)
    if speed:
        out.print(f"{hours:.2f} hours, start-up of {len(runs)} runs apart; time: {speed.basis}", markup=False)


def _prepared(
    ablation: Ablation, place: str, config: Config, resume: bool, others: dict[str, Prepared]
) -> Prepared:  # fmt: skip
    made = prepare(config, resume and begun(config.output))
    first = next((each for name, each in others.items() if name in ablation.changes), None)
    if first is not None and place in ablation.changes:
        check_text(place, ablation.changes[place], made, first)
    return made


def _check_output(ablation: Ablation, resume: bool) -> None:
    output, root, file = ablation.output, ablation.root, ablation.root / ABLATION_FILE
    here = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if resume:
        storage.fetch(ablation)
    if resume and not file.exists():
        raise ValueError(f"output: {output} holds no ablation to continue; valid: the same command without --resume")
    if not resume and (here or storage.holds_something(ablation)):
        raise ValueError(f"output: {output} is not empty; valid: another folder, or --resume to continue the ablation "
                         "that it holds")  # fmt: skip
    if resume:
        there, asked = json.loads(file.read_text()), json.loads(json.dumps(ablation.about()))
        changed = [key for key in asked if asked[key] != there.get(key)]
        if changed:
            raise ValueError(f"output: {output} holds an ablation of another {', '.join(changed)}; valid: the same "
                             "values, or another folder")  # fmt: skip


def _ended(run: RunDirectory) -> bool:
    return any(event["event"] == "run_finished" for event in run.events())


def _take_teacher_scores(prepared: Prepared, ended: Sequence[RunDirectory]) -> None:
    """The teacher's scores of an arm that had the same one, in the same order, at the same questions."""
    run, config = prepared.run, prepared.config
    same = [other for other in ended if _heard(loading.parse_config(other.read_config())) == _heard(config)]
    if not same or run.config.exists():
        return
    run.write_config(config.dump())
    for trial in same[0].root.glob("trials/teacher-*"):
        shutil.copytree(trial, run.trial(trial.name))


def _heard(config: Config) -> dict[str, Any]:
    """What of a configuration decides the teacher's scores: to a rounding, the order of its elements does too."""
    given, distillation = config.dump(), config.distillation
    decides = ("seed", "precision", "teacher", "corpus", "winogrande", "importance", "retraining")
    order = given["space"] if config.importance.rounds > 1 else None
    return {
        **{key: given[key] for key in decides},
        "order": ["as it is"] if distillation.initialization == "merged" else order,
        "taught by": distillation.teacher,
    }


def _drop_checkpoints(run: RunDirectory) -> None:
    """Of a run that has ended nothing goes on; a gigabyte a seed of the smallest teacher."""
    for trial in run.root.glob("trials/*"):
        shutil.rmtree(trial / "checkpoint", ignore_errors=True)
        if run.depot is not None:  # those that travelled are in storage, whoever made them
            run.depot.clear(f"trials/{trial.name}/checkpoint")


def _said(changes: dict) -> str:
    return yaml.safe_dump(changes, default_flow_style=True, width=10_000).strip() if changes else "as the others"
