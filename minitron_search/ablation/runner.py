"""Run an ablation's arms, one after another in one Ray: each an ordinary run, whose caches the next one finds."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from minitron_search.ablation import storage
from minitron_search.ablation.definition import BEFORE, Ablation, begun, check_arm, check_text, checked
from minitron_search.ablation.differences import differences, read_arms, shown, write_differences
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.cluster import session
from minitron_search.cluster.node_disks import free_checkpoints
from minitron_search.config import loading
from minitron_search.config.schema import Config
from minitron_search.messages.console import console, say
from minitron_search.models.device import release_memory, resolve
from minitron_search.ownership.owner import held, holds_anything
from minitron_search.planning.calibration import Speed, measure, stated
from minitron_search.planning.forecast import Forecast, fitting, forecast, teaching_config, this_machine, total
from minitron_search.planning.prepare import Prepared, prepare
from minitron_search.planning.workload import Costs, option_tokens
from minitron_search.records.damage import mend
from minitron_search.records.directory import ABLATION_FILE, RunDirectory, chosen_rate, replace_text
from minitron_search.trials.settings import automatic_rates


def prepare_ablation(ablation: Ablation, resume: bool) -> dict[str, Prepared]:
    """Return every unfinished run that does not wait for another, by its folder in the output.

    Raises ValueError, naming the arm, for what is wrong with any of them.
    """
    _check_output(ablation, resume)
    prepared: dict[str, Prepared] = {}
    for place, (config, _) in checked(ablation, resume).items():
        say(f"preparing {place}")
        prepared[place] = _prepared(ablation, place, config, resume, prepared)
        release_memory()
    return {place: run for place, run in prepared.items() if not _ended(run.run_dir)}


def run_ablation(ablation: Ablation, prepared: dict[str, Prepared], run_one: Callable[[Prepared], None]) -> list[str]:
    """Run what is left, each run by `run_one`, and write what the arms are worth; return the arms that failed.

    Raises what `run_one` raises for a run that others wait for.
    """
    _begin(ablation)
    with session.joined():
        for name in ablation.before:
            _run_before(ablation, prepared, name, run_one)
        failed = [arm for arm in ablation.changes if not _run_arm(ablation, prepared, arm, run_one)]
    _compare(ablation)
    return failed


def _begin(ablation: Ablation) -> None:
    """Write ablation.json, and link the runs' folders into the ablation's."""
    ablation.root.mkdir(parents=True, exist_ok=True)
    replace_text(
        ablation.root / ABLATION_FILE, json.dumps({**ablation.about(), "definition": ablation.definition()}, indent=1)
    )
    storage.put(ablation)
    storage.link(ablation)


def _run_before(
    ablation: Ablation, prepared: dict[str, Prepared], name: str, run_one: Callable[[Prepared], None]
) -> None:  # fmt: skip
    """Run one of the runs that arms wait for, unless it has ended."""
    if (place := f"{BEFORE}/{name}") in prepared:
        say(f"{place}: made first")
        _run_and_store(ablation, place, prepared[place], run_one)


def _run_arm(
    ablation: Ablation, prepared: dict[str, Prepared], arm: str, run_one: Callable[[Prepared], None]
) -> bool:  # fmt: skip
    """Run one arm unless it has ended; return False if it failed: the other arms are worth having."""
    ended = RunDirectory(ablation.address(arm))
    if _ended(ended):
        with storage.stored(ended, ablation.address(arm)):  # storage may have been unreachable when it ended
            return True
    number = list(ablation.changes).index(arm) + 1
    say(f"arm {number} of {len(ablation.changes)}, {arm}: {_described(ablation.changes[arm])}")
    try:
        if arm not in prepared:
            config, _ = check_arm(ablation, arm, resume=True)
            prepared[arm] = _prepared(ablation, arm, config, True, prepared)
        others = [RunDirectory(ablation.root / other) for other in ablation.changes if other != arm]
        _take_teacher_scores(prepared[arm], [other for other in others if _ended(other)])
        _take_learning_rate(prepared[arm], others)
        _run_and_store(ablation, arm, prepared[arm], run_one)
    except session.UnfitError:
        raise
    except Exception as error:  # the other arms are worth having, whatever it is
        say(f"arm {arm} failed: {session.message_of(error)}")
        return False
    finally:
        release_memory()
    return True


def _run_and_store(ablation: Ablation, place: str, prepared: Prepared, run_one: Callable[[Prepared], None]) -> None:
    with held(ablation.address(place)) as hold:
        prepared.run_dir.files = hold.files
        with storage.stored(prepared.run_dir, ablation.address(place), hold.check):
            run_one(prepared)
            ended = [trial.name for trial in prepared.run_dir.root.glob("trials/*")]
            free_checkpoints(prepared.run_dir, ended, on_nodes=False)  # a gigabyte a seed with the smallest teacher


def _compare(ablation: Ablation) -> None:
    """Write and show the difference of every arm from the baseline."""
    about = ablation.about()
    rows, scores = read_arms(ablation.root, about["arms"])
    compared = differences(rows, scores, ablation.baseline)
    write_differences(ablation.root, compared)
    storage.put(ablation)
    console.print(shown(about, rows, compared))


def dry_run(ablation: Ablation, runs: dict[str, tuple[Config, SearchSpace]], out: Console) -> None:
    """Print what every run would be and cost, from one measurement of the first."""
    out.print(yaml.safe_dump(ablation.about(), sort_keys=False).rstrip(), markup=False)
    table = Table(title="forecast", box=SIMPLE_HEAD)
    for name in ("", "architecture", "parameters", "tokens", "FLOPs", "hours"):
        table.add_column(name, justify="right" if name not in ("", "architecture") else "left")
    speed, hours = None, 0.0
    for place, (config, space) in runs.items():
        speed, cost = _cost(config, space, speed)
        shape, block = (space.anchors or (space.typical(),))[0], config.space.axes.drop_block
        which = f", {block.seeds}" if block and block.seeds != "none" else ""
        hours += cost.seconds / 3600
        table.add_row(place, f"{shape}{which}", f"{space.measures(shape).params:,}", f"{cost.tokens:,}",
                      f"{cost.flops:.3g}", f"{cost.seconds / 3600:.2f}")  # fmt: skip
    out.print(table)
    for arm, changes in ablation.changes.items():
        if ablation.waits(arm, changes):
            out.print(f"{arm}: checked once {BEFORE}/ is there", markup=False)
    if speed:
        out.print(f"{hours:.2f} hours, without the start-up of {len(runs)} runs; time: {speed.basis}", markup=False)


def _cost(config: Config, space: SearchSpace, speed: Speed | None) -> tuple[Speed, Forecast]:
    """Return the speed of a worker, measured unless it is given, and what the whole run costs at it."""
    machine, precision, teacher = this_machine(), resolve(config.precision), teaching_config(config, space)
    costs = Costs(config, space, teacher, precision, option_tokens(config.winogrande))
    at_once = fitting(costs, machine) * config.resources.workers_per_trial
    speed = speed or stated(config) or measure(config, costs, teacher.hidden_size, precision, at_once)
    return speed, total(forecast(costs, speed, machine))


def _prepared(
    ablation: Ablation, place: str, config: Config, resume: bool, others: dict[str, Prepared]
) -> Prepared:  # fmt: skip
    goes_on = resume and begun(config.output)
    prepared = prepare(config, goes_on)
    if goes_on:
        mend(prepared.run_dir)
    first = next((other for name, other in others.items() if name in ablation.changes), None)
    if first is not None and place in ablation.changes:
        check_text(place, ablation.changes[place], prepared, first)
    return prepared


def _check_output(ablation: Ablation, resume: bool) -> None:
    output, root, file = ablation.output, ablation.root, ablation.root / ABLATION_FILE
    occupied = root.exists() and (not root.is_dir() or holds_anything(root))
    if resume:
        storage.fetch(ablation)
    if resume and not file.exists():
        raise ValueError(f"output: {output} holds no ablation to continue; valid: the same command without --resume")
    if not resume and (occupied or storage.holds_something(ablation)):
        raise ValueError(f"output: {output} is not empty; valid: another folder, or --resume to continue the ablation "
                         "that it holds")  # fmt: skip
    if resume:
        begun_with, wanted = _begun_with(file), json.loads(json.dumps(ablation.about()))
        changed = [key for key in wanted if wanted[key] != begun_with.get(key)]
        if changed:
            raise ValueError(f"output: {output} holds an ablation of another {', '.join(changed)}; valid: the same "
                             "values, or another folder")  # fmt: skip


def _begun_with(file: Path) -> dict[str, Any]:
    """Return what an ablation was begun as."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"output: {file} is damaged ({error}); valid: the file from a copy, or delete it and give the "
                         "arms to a new output") from None  # fmt: skip


def _ended(run_dir: RunDirectory) -> bool:
    return any(event["event"] == "run_finished" for event in run_dir.events())


def _take_teacher_scores(prepared: Prepared, ended: Sequence[RunDirectory]) -> None:
    """Copy the teacher's scores from an arm that had the same teacher, in the same order, and the same questions."""
    run_dir, ours = prepared.run_dir, _teacher_inputs(prepared.config)
    same = [other for other in ended if _teacher_inputs(loading.parse_config(other.read_config())) == ours]
    if not same or run_dir.config.exists():
        return
    run_dir.write_config(prepared.config.dump())
    for trial in same[0].root.glob("trials/teacher-*"):
        shutil.copytree(trial, run_dir.trial(trial.name))


def _take_learning_rate(prepared: Prepared, others: Sequence[RunDirectory]) -> None:
    """Give an arm the learning rate that `auto` became in an arm of the same teacher: one that a probe chose for each
    alone would be another difference between them."""
    run_dir, config = prepared.run_dir, prepared.config
    if not automatic_rates(config) or chosen_rate(run_dir) is not None:
        return
    for other in others:
        chosen = chosen_rate(other)
        if chosen and loading.parse_config(other.read_config()).teacher.model == config.teacher.model:
            if not run_dir.config.exists():
                run_dir.write_config(config.dump())
            run_dir.event("learning_rate", rate=chosen["rate"], how=f"as in arm {other.root.name}: {chosen['how']}")
            return


def _teacher_inputs(config: Config) -> dict[str, Any]:
    """Return what decides the teacher's scores: to a rounding, the order of its elements does too."""
    values, distillation = config.dump(), config.distillation
    decides = ("seed", "precision", "teacher", "corpus", "winogrande", "importance", "retraining")
    order = values["space"] if config.importance.rounds > 1 else None
    return {
        **{key: values[key] for key in decides},
        "order": ["unpermuted"] if distillation.initialization == "merged" else order,
        "distillation_teacher": distillation.teacher,
    }


def _described(changes: dict) -> str:
    return yaml.safe_dump(changes, default_flow_style=True, width=10_000).strip() if changes else "unchanged"
