"""Does the search win? Against random search, NVIDIA's rule and the papers' rule of thumb, at equal total tokens.

    python -m benchmarks.search_proof [--config search_spaces/smollm2-proof.yaml] [--seeds 0 1 2] [--share 0.25]
        [--methods ...] [--work runs/search_proof] [--output docs/results.md]

`retraining.tokens` of the configuration is what every method may spend in all; `--share` of it goes to a search:
- `tpe`: TPE + rungs;  `random`: random search + the same rungs;  then the winner is retrained on what is left;
- `nvidia`: the ten shapes closest to the budget (each without its block of least BI), ranked untrained by LM loss, the
  winner distilled on all the tokens, and on what the searches have left ("the same retraining");
- `thumb`: the papers' rule of thumb, heads and depth kept, hidden and MLP shrunk: of the shapes closest to the budget
  the one whose two axes shrink most alike; again on both numbers of tokens;
- `heads`: the same hidden size, a third of the heads dropped, and their parameters given to the MLP (equal to the last
  parameter), on all the tokens: should heads be kept?

What foretells what is asked of random draws that are all distilled, whatever they are worth untrained. A seed is the
sampler's, and the order of the training windows. What is finished is kept in `--work` and not repeated; the same
command goes on with what is not. Rows are in `search_proof.parquet`; a section goes between two marker comments of
`--output`.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron_search.config import loading

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import ray

from benchmarks.document import replaced
from minitron_search.architecture_search.space import SearchSpace
from minitron_search.architecture_search.state import make_trial
from minitron_search.cluster import session
from minitron_search.cluster.placement import resolved_precision
from minitron_search.config.schema import Config
from minitron_search.evaluation.statistics import agreement, mean_and_error, paired
from minitron_search.messages.console import say
from minitron_search.models.architecture import Architecture
from minitron_search.pipeline.importance import measure_importance
from minitron_search.pipeline.teacher import make_trial_inputs
from minitron_search.planning.prepare import Prepared, prepare
from minitron_search.records.directory import RunDirectory, replace_text, write_table
from minitron_search.trials.settings import retraining_settings, untrained
from minitron_search.trials.trial import Trial

CLOSEST = 10  # architectures that NVIDIA's rule scores
SEARCHES = {
    "tpe": "ours: TPE + rungs",
    "random": "random search + the same rungs",
}
DRAWS = 8  # a seed, that are all distilled to the first rung that trains
FIXED = {
    "nvidia": "NVIDIA's rule: ten closest to the budget, ranked untrained",
    "thumb": "rule of thumb: heads and depth kept, hidden and MLP shrunk",
    "heads": "the rule of thumb, a third of the heads given to the MLP",
}
SCHEMA = pa.schema([
    ("method", pa.string()), ("seed", pa.int64()), ("architecture", pa.string()), ("shape", pa.string()),
    ("params", pa.int64()), ("search_tokens", pa.int64()), ("retraining_tokens", pa.int64()),
    ("lm_loss", pa.float64()), ("lm_loss_stderr", pa.float64()),  # nats per token; over windows
    ("losses", pa.list_(pa.float64())),  # of every validation window
    ("seconds", pa.float64()),  # of the retraining, one thread
])  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One retraining. `method` is what asks for it; two methods that ask for the same are trained once."""

    method: str
    seed: int
    architecture: Architecture
    tokens: int


# The fixed rules


def closest(space: SearchSpace, block_bi: np.ndarray) -> list[Architecture]:
    """The `CLOSEST` shapes nearest to the parameter budget, each dropping its block of least BI."""
    assert space.budget.params is not None
    target = space.budget.params.number
    points = {}
    for point in space.points.tolist():
        *shape, length, start = point
        bi = block_bi[start, start + length] if length else 0.0
        if (*shape, length) not in points or bi < points[(*shape, length)][0]:
            points[(*shape, length)] = (bi, start)
    found = []
    for (*shape, length), (_, start) in points.items():
        kept = tuple(
            layer for layer in range(space.teacher.num_hidden_layers) if not start <= layer < start + length
        )  # fmt: skip
        architecture = Architecture(*shape, kept)
        found.append((abs(space.measures(architecture).params - target), architecture.id, architecture))
    return [architecture for *_, architecture in sorted(found)[:CLOSEST]]


def rule_of_thumb(space: SearchSpace) -> Architecture:
    """Of the shapes with the teacher's heads and depth nearest to the budget (1%), the one whose hidden and MLP sizes
    shrink most alike (2408.11796, section 4.2 shrinks both, and keeps heads and depth)."""
    assert space.budget.params is not None
    target, teacher = space.budget.params.number, space.teacher
    found = []
    for architecture in space.architectures():
        kept = architecture.num_attention_heads, architecture.layers
        if kept != (teacher.num_attention_heads, teacher.layers):
            continue
        off = abs(space.measures(architecture).params / target - 1)
        skew = abs(math.log(architecture.hidden_size / teacher.hidden_size)
                   - math.log(architecture.intermediate_size / teacher.intermediate_size))  # fmt: skip
        found.append((off > 0.01, skew, architecture.id, architecture))
    return min(found)[-1]


def without_a_third_of_heads(space: SearchSpace, of: Architecture) -> Architecture:
    """`of` with two thirds of its heads and as many parameters, the difference given to the MLP."""
    heads = of.num_attention_heads * 2 // 3
    wanted = space.measures(of).params
    alike = [a for a in space.architectures()
             if (a.hidden_size, a.num_attention_heads, a.layers) == (of.hidden_size, heads, of.layers)]  # fmt: skip
    return min(alike, key=lambda a: abs(space.measures(a).params - wanted))


# Running


def seed_config(config: Config, seed: int, folder: Path, search: str = "tpe") -> Config:
    asked = config.dump()
    # one trial at a time is the same search every time; as many searches at once as there are CPUs
    how = {**asked["search"], "sampler": "tpe" if search == "tpe" else "random", "concurrency": 1}
    if search == "draws":
        how |= {"trials": DRAWS, "tokens": "auto", "rungs": [rung for rung in how["rungs"] if rung]}
    return loading.parse_config({
        **asked, "seed": seed, "output": str(folder), "stages": ["importance", "search"], "search": how,
    })  # fmt: skip


class Bench:
    """The retrainings' one run directory for every seed, and the searches' own."""

    def __init__(self, config: Config, work: Path, share: float):
        self.config, self.work = config, work
        self.all_tokens = config.retraining.tokens
        self.left = self.all_tokens - round(self.all_tokens * share)
        self.prepared: dict[int, Prepared] = {}

    def prepare(self, seed: int) -> Prepared:
        if seed not in self.prepared:
            asked = seed_config(self.config, seed, self.work / f"retrained-{seed}")
            run = RunDirectory(asked.output)
            self.prepared[seed] = prepare(asked, resume=run.config.exists())
            if not run.config.exists():
                run.write_config(asked.dump())
        return self.prepared[seed]

    def search(self, name: str, seed: int) -> Path:
        """A run of the command itself; a finished one is not repeated."""
        folder = self.work / f"{name}-{seed}"
        run = RunDirectory(folder)
        if any(event["event"] == "run_finished" for event in run.events()):
            return folder
        file = self.work / f"{name}-{seed}.json"  # JSON is YAML
        file.write_text(json.dumps(seed_config(self.config, seed, folder, name).dump()))
        command = [sys.executable, "-m", "minitron_search.run", "--config", str(file)]
        subprocess.run(command + (["--resume"] if run.config.exists() else []), check=True)
        for checkpoint in folder.glob("trials/*/checkpoint"):  # a gigabyte each
            shutil.rmtree(checkpoint)
        return folder

    def untrained_losses(self, seed: int, listed: list[Architecture]) -> dict[str, float]:
        """LM loss by architecture id of `listed`, as they are."""
        file = self.work / "untrained.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        missing = [architecture for architecture in listed if architecture.id not in found]
        if missing:
            rows = self._trained([self._trial(Job("untrained", seed, a, 0)) for a in missing])
            found |= {row["architecture"]: row["lm_loss"] for row in rows}
            replace_text(file, json.dumps(found))
        return found

    def retrain(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """Rows of all jobs, one training for those that are the same; each on one CPU, as many at once as there are."""
        trials = [self._trial(job) for job in jobs]
        rows = {(row["trial"], row["seed"]): row for row in self._trained(trials)}
        return [{**rows[trial.id, job.seed], "method": job.method, "shape": str(job.architecture)}
                for job, trial in zip(jobs, trials, strict=True)]  # fmt: skip

    def _trial(self, job: Job) -> Trial:
        prepared = self.prepare(job.seed)
        config = prepared.config.model_copy(
            update={"retraining": prepared.config.retraining.model_copy(update={"tokens": max(job.tokens, 1)})}
        )
        precision = resolved_precision(config.precision)
        settings = retraining_settings(config, precision)
        return make_trial(
            prepared.space, job.architecture, f"for_{job.tokens}", settings if job.tokens else untrained(settings),
            seed=config.seed, initialization=config.distillation.initialization, score_precision=precision,
        )  # fmt: skip

    def _trained(self, trials: list[Trial]) -> list[dict[str, Any]]:
        runs = {trial.seed: self.prepare(trial.seed).run_dir for trial in trials}
        logged = {row["trial"] for run in runs.values() for row in run.rungs()}
        left = {trial.id: trial for trial in trials if trial.id not in logged}
        materials = {seed: ray.put(self.materials(seed)) for seed in sorted({trial.seed for trial in left.values()})}
        task = ray.remote(num_cpus=1, max_retries=2)(train_and_drop)
        running = {}
        for trial in left.values():
            runs[trial.seed].start_trial(trial.id, trial.describe())
            running[task.remote([materials[trial.seed]], trial)] = trial
        began = time.monotonic()
        while running:
            (done,), _ = ray.wait(list(running))
            ray.get(done)
            trial = running.pop(done)
            say(f"{trial.arm} seed {trial.seed}: {trial.architecture}: done, {len(running)} of {len(left)} left, "
                f"{(time.monotonic() - began) / 60:.1f} min")  # fmt: skip
        wanted, found = {trial.id for trial in trials}, []
        for run in runs.values():
            scores = run.scores()
            found += [{**row, "losses": scores[row["trial"], 0]["lm_loss"]} for row in run.rungs()
                      if row["trial"] in wanted]  # fmt: skip
        return found

    def materials(self, seed: int) -> Any:
        prepared = self.prepare(seed)
        prepared = replace(prepared, precision=resolved_precision(prepared.config.precision))
        if not prepared.run_dir.importance.exists():
            measure_importance(prepared)
        return make_trial_inputs(prepared)


def train_and_drop(materials: list[ray.ObjectRef], trial: Trial) -> None:
    """To its last row; what it would go on from is then no longer needed."""
    from minitron_search.trials.runner import run_to_end

    made = ray.get(materials[0])
    run_to_end(made, trial, decided=False)
    shutil.rmtree(made.run_dir.checkpoint(trial.id), ignore_errors=True)


def winner(folder: Path) -> tuple[Architecture, int]:
    """Of a finished search: the promoted architecture, and the tokens that all its trials trained on."""
    run = RunDirectory(folder)
    rows = [row for row in run.read_trials() if row["arm"] == "search"]
    spent: dict[str, int] = {}
    for row in rows:
        spent[row["trial"]] = max(spent.get(row["trial"], 0), row["tokens"])
    best = next(row["trial"] for row in rows if row["status"] == "promoted")
    return architecture_of(run, best), sum(spent.values())


def architecture_of(run: RunDirectory, trial: str) -> Architecture:
    return Architecture.of_trial(json.loads((run.trial(trial) / "architecture.json").read_text()))


# What foretells what


def proxies(bench: Bench, folders: list[Path], seed: int) -> list[tuple[str, dict[str, Any]]]:
    """How well cheaper orders foretold dearer ones, over architectures that nobody chose: closeness to the budget and
    the untrained loss against the first rung, the first rung against the last."""
    first, closeness, rungs = {}, {}, {}
    space, shapes = bench.prepare(seed).space, {}
    assert space.budget.params is not None
    for run in map(RunDirectory, folders):
        for row in run.read_trials():
            if row["arm"] == "search" and row["status"] != "failed":
                shapes[row["architecture"]] = architecture_of(run, row["trial"])
                rungs[row["architecture"], row["rung"]] = row["lm_loss"]
    names = sorted(shapes)
    with session.joined():
        untrained_losses = bench.untrained_losses(seed, [shapes[name] for name in names])
    for name in names:
        first[name] = rungs[name, 0]
        closeness[name] = abs(space.measures(shapes[name]).params - space.budget.params.number)
    last = max(rung for _, rung in rungs)
    survivors = [name for name in names if (name, last) in rungs]

    def order(title: str, before: dict[str, float], after: dict[str, float], of: list[str]) -> tuple[str, dict]:
        return title, agreement([before[name] for name in of], [after[name] for name in of], of)

    return [
        order("closeness to the budget -> first rung", closeness, first, names),
        order("untrained LM loss -> first rung", untrained_losses, first, names),
        order("first rung -> last rung (survivors only)", first, {n: rungs[n, last] for n in survivors}, survivors),
    ]


# What it says


def section(rows: list[dict[str, Any]], found: list[tuple[str, dict[str, Any]]], bench: Bench, about: str) -> str:
    """The table, the differences from our search over seeds and over windows, and the rank correlations."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        groups.setdefault((row["method"], row["retraining_tokens"]), []).append(row)
    ours = groups.get(("tpe", bench.left))
    lines = [about, "", "| | architecture (a seed each, where they differ) | tokens: search + retraining | LM loss "
             "| over seeds | over windows | minus ours (seeds) | minus ours (windows) | p |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (method, tokens), of in sorted(groups.items(), key=lambda item: np.mean([r["lm_loss"] for r in item[1]])):
        by_seed, windows = np.array([r["lm_loss"] for r in of]), np.mean([r["losses"] for r in of], axis=0)
        mean, error, _ = mean_and_error(by_seed)
        shapes = "; ".join(dict.fromkeys(short(row["shape"]) for row in of))
        spent = f"{round(np.mean([row['search_tokens'] for row in of])):,} + {tokens:,}"
        against = " | | "
        if ours and (method, tokens) != ("tpe", bench.left):
            pairs = [(a["lm_loss"], b["lm_loss"]) for a in of for b in ours if a["seed"] == b["seed"]]
            over_seeds = mean_and_error(np.array([a - b for a, b in pairs]))
            over_windows = paired(np.mean([row["losses"] for row in ours], axis=0), windows)
            against = (f"{over_seeds[0]:+.3f} +- {over_seeds[1]:.3f} | {over_windows['difference']:+.3f} +- "
                       f"{over_windows['stderr']:.3f} | {over_windows['p']:.4f}")  # fmt: skip
        title = {**SEARCHES, **FIXED}[method]
        lines.append(f"| {title} | {shapes} | {spent} | {mean:.3f} | {error:.3f} | {mean_and_error(windows)[1]:.3f} "
                     f"| {against} |")  # fmt: skip
    if found:
        lines += ["", "| what foretold what | n | Kendall's tau | p | Spearman's rho | the best stayed the best |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for title, of_order in found:
            said = ["-" if of_order[name] is None else f"{of_order[name]:.2f}"
                    for name in ("kendall", "kendall_p", "spearman")]  # fmt: skip
            lines.append(f"| {title} | {of_order['n']} | {said[0]} | {said[1]} | {said[2]} "
                         f"| {'yes' if of_order['best_kept'] else 'no'} |")  # fmt: skip
    return "\n".join(lines)


def short(shape: str) -> str:
    return shape.replace("hidden ", "h").replace(" mlp ", " m").replace(" heads ", " a").replace(" in 3 groups", "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="search_spaces/smollm2-proof.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.25, help="of all tokens, a search's")
    parser.add_argument("--methods", nargs="+", default=[*FIXED, *SEARCHES], choices=[*FIXED, *SEARCHES])
    parser.add_argument("--work", type=Path, default=Path("runs/search_proof"))
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    chosen = parser.parse_args(arguments)
    config = loading.load_config(chosen.config, [])
    work = chosen.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(config, work, chosen.share)
    asked = [name for name in SEARCHES if name in chosen.methods]
    with session.joined():
        rows = fixed_rules(bench, chosen.methods, chosen.seeds)
    pairs = [(name, seed) for name in asked for seed in chosen.seeds]
    beside = [("draws", seed) for seed in chosen.seeds] if pairs else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda pair: bench.search(*pair), [*pairs, *beside])
        folders_of = dict(zip([*pairs, *beside], made, strict=True))
    searches = {pair: winner(folders_of[pair]) for pair in pairs}
    if searches:
        with session.joined():
            jobs = [Job(name, seed, architecture, bench.left)
                    for (name, seed), (architecture, _) in searches.items()]  # fmt: skip
            found = bench.retrain(jobs)
        rows += [{**row, "search_tokens": searches[row["method"], row["seed"]][1]} for row in found]
    listed = [{**row, "retraining_tokens": row["tokens"]} for row in rows]
    complete = [{name: row.get(name) for name in SCHEMA.names} for row in listed]
    write_table(work / "search_proof.parquet", pa.Table.from_pylist(complete, schema=SCHEMA))
    orders = proxies(bench, [folders_of["draws", seed] for seed in chosen.seeds], chosen.seeds[0]) if searches else []
    size = len(bench.prepare(chosen.seeds[0]).space)
    about = (f"`python -m benchmarks.search_proof`: {config.teacher.model}, {size:,} "
             f"legal architectures, {len(chosen.seeds)} seeds, at most {bench.all_tokens:,} tokens for each method and "
             f"seed, text `{config.corpus.train}`, {config.corpus.validation_samples} validation windows of "
             f"{config.corpus.sequence_length}. Shapes: h hidden, m MLP, a heads.")  # fmt: skip
    said = section(complete, orders, bench, about)
    print(said)
    text = chosen.output.read_text() if chosen.output.exists() else "# Results\n"
    replace_text(chosen.output, replaced(text, said, "search_proof", "Does the search win?"))


def fixed_rules(bench: Bench, methods: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    first = bench.prepare(seeds[0])
    thumb = rule_of_thumb(first.space)
    asked = {"thumb": thumb, "heads": without_a_third_of_heads(first.space, thumb)}
    if "nvidia" in methods:
        ten = closest(first.space, bench.materials(seeds[0]).block_bi)
        losses = bench.untrained_losses(seeds[0], ten)
        asked["nvidia"] = min(ten, key=lambda architecture: losses[architecture.id])
        say("untrained, the ten closest: " + "; ".join(f"{losses[a.id]:.3f} {a}" for a in ten))
    jobs = []
    for method in FIXED:
        if method in methods:
            lengths = [bench.all_tokens] if method == "heads" else [bench.all_tokens, bench.left]
            jobs += [Job(method, seed, asked[method], tokens) for tokens in lengths for seed in seeds]
    return [{**row, "search_tokens": 0} for row in bench.retrain(jobs)]


if __name__ == "__main__":
    main()
