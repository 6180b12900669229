"""Tables 1 and 2 (arXiv:2408.11796), of a finished run or of models by name, without Ray.

    python -m benchmarks.tables FOLDER --tasks winogrande:0,winogrande:5 [--references NAME,NAME] [--limit N]

FOLDER is a run's, whose teacher and students in best/ are evaluated beside the references; or a new one, for the
references alone. Writes evaluation.json and report.html there and prints the table. What was evaluated before is not
evaluated again. Exit status: 0 done, 1 a task failed (the others are written), 2 something asked for is wrong.
"""

import argparse
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from analysis.outcome.benchmark_tables import percent, tables_info
from analysis.page import formatting as f
from analysis.report import write_report
from analysis.run_data import load_run
from minitron_search.evaluation.benchmarks import evaluate_all, models_of
from minitron_search.evaluation.lm_eval_run import evaluate
from minitron_search.evaluation.lm_eval_tasks import check_data, parse_tasks
from minitron_search.messages.console import console, say
from minitron_search.models import device
from minitron_search.records.directory import RunDirectory
from minitron_search.teachers.sources import teacher_folder


def models_in(run: RunDirectory) -> dict[str, tuple[str, Path]]:
    """Teacher and students of a run; none of a folder that holds no run. Raises ValueError where its teacher is not to
    be had."""
    if not run.config.exists():
        return {}
    name, students = run.read_config()["teacher"]["model"], len(list(run.root.glob("best*")))
    environment = run.read_environment()
    pruned = Path(environment.get("teacher", {}).get("folder", ""))  # the corrected one, where it was pruned
    corrected = environment.get("corrected_teacher") or {}
    if corrected and Path(corrected["folder"]) == pruned:
        return models_of(run, f"{name}, corrected", pruned, students)
    return models_of(run, name, teacher_folder(name), students)


def printed(run: RunDirectory) -> Table:
    """A line per model and task."""
    info = tables_info([load_run(run)])
    table = Table(title="percent, where a metric is a share; ± is one standard error", box=SIMPLE_HEAD)
    for name in ("model", "task", "shots", "metric", "value", "n", "minus teacher", "p", "paper", "minus paper"):
        table.add_column(name, justify="left" if name in ("model", "task", "metric") else "right")
    tests = {(row["model"], row["task"], row["shots"], row["limit"]): row for row in
             info.differences.astype(object).where(info.differences.notna(), None).to_dict("records")}  # fmt: skip
    for row in info.results.astype(object).where(info.results.notna(), None).to_dict("records"):
        test = tests.get((row["model"], row["task"], row["shots"], row["limit"]))
        table.add_row(
            row["model"], row["task"], str(row["shots"]), row["metric"],
            percent(row["value"], row["stderr"]) + (" (chance)" if row["at_chance"] else ""), f"{row['n']:,}",
            f.plus_minus(100 * test["difference"], 100 * test["stderr"], 1) if test else "",
            f"{test['p']:.2g}" if test else "",
            f"{row['published']:g}" if row["published"] is not None else "",
            f.fixed(row["minus_published"], 1) if row["published"] is not None else "",
        )  # fmt: skip
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run's, or a new one")
    parser.add_argument("--tasks", default="table_1", help="as evaluation.tasks, with commas")
    parser.add_argument("--references", default="", help="folders or Hub names, with commas")
    parser.add_argument("--limit", type=int, help="of each task, the first N questions")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), help="default: the run's own, or auto")
    chosen = parser.parse_args(arguments)
    run, references = RunDirectory(chosen.folder), [name for name in chosen.references.split(",") if name]
    try:
        tasks = parse_tasks(chosen.tasks.split(","))
        models = models_in(run)
        if not models and not references:
            raise ValueError(f"{chosen.folder}: no run is there, and no --references are named; valid: a run's folder, "
                             "or --references meta-llama/Llama-3.1-8B")  # fmt: skip
        say("tables: questions and models")
        for reference in references:
            teacher_folder(reference)
        check_data(tasks)
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks.tables: {str(error).replace('teacher.model', '--references')}", file=sys.stderr)
        return 2
    resolved = device.resolve(chosen.precision or run.read_environment().get("precision", "auto"))
    done = evaluate_all(run, models, references, tasks, resolved, chosen.limit, evaluate)
    console.print(printed(run))
    say(f"tables: {run.evaluation} and {write_report(run)}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
