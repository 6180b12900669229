"""Synthetic runs, written through RunDirectory's own writers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from analysis.report import write_report
from minitron_search.records.directory import RunDirectory

LAYERS, HIDDEN, MLP, HEADS = 30, 576, 1536, 9
TEACHER_PARAMS, EMBEDDING = 134_515_008, 28_311_552
RUNGS = (8192, 32768)
LENGTHS = (1, 2)  # of the depth sweep
FULL = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 3,
    "num_hidden_layers": LAYERS,
    "drop_block_start": 0,
    "drop_block_length": 0,
}
METRICS = ("lm_loss", "winogrande_acc", "winogrande_margin", "bi")
# a script, an image that runs one, a colour of terminals, text that reads backwards
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202egpj.exe"


def architecture(rng: np.random.Generator) -> dict[str, int]:
    axes = {
        "hidden_size": int(rng.choice([384, 448, 512])),
        "intermediate_size": int(rng.choice([768, 1024, 1280])),
        "num_attention_heads": int(rng.choice([6, 9])),
        "num_key_value_heads": 3,
        "drop_block_start": int(rng.integers(4, 20)),
        "drop_block_length": int(rng.choice([0, 2, 4, 8])),
    }
    return axes | {"num_hidden_layers": LAYERS - axes["drop_block_length"]}


def scored(loss: float, params: int, rng: np.random.Generator, tokens: int) -> dict[str, float | int]:
    return {
        "lm_loss": loss,
        "lm_loss_stderr": 0.045,
        "lm_loss_n": 32,
        "kl": max(loss - 3.15, 0.0),
        "kl_stderr": 0.01,
        "winogrande_acc": float(0.5 + 0.04 * rng.standard_normal()),
        "winogrande_acc_stderr": 0.045,
        "winogrande_margin": float(0.1 + 0.05 * rng.standard_normal()),
        "winogrande_margin_stderr": 0.03,
        "winogrande_n": 120,
        "params": params,
        "non_embedding_params": int(params * 0.8),
        "tokens": tokens,
        "memory_bytes": params * 4,
        "tokens_per_second": 2e11 / params,
        "seconds": 4.0 + tokens / 800,
    }


def log_losses(run: RunDirectory, trial: str, tokens: int, start: float, end: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for seen in range(1024, tokens + 1, 1024):
        loss = end + (start - end) * (1 + seen / 2000) ** -1.1 + 0.04 * rng.standard_normal()
        run.log_step(trial, tokens=seen, loss=float(loss), learning_rate=3e-4, tokens_per_second=900.0)


TEXT = np.random.default_rng(9).normal(0, 0.25, 32)  # how much harder each validation window is than the mean


def log_scored(run: RunDirectory, trial: str, row: dict[str, object]) -> None:
    """A rung with the loss of every window, and the event that it ended."""
    noise = np.random.default_rng(len(trial)).normal(0, 0.02, len(TEXT))
    windows = float(row["lm_loss"]) + TEXT - TEXT.mean() + noise - noise.mean()
    run.log_scores(trial, int(row["rung"]), lm_loss=windows.tolist())
    run.log_rung(trial, row)
    run.event("rung_finished", trial=trial, rung=row["rung"], tokens=row["tokens"])


def write_importance(run: RunDirectory) -> None:
    rng = np.random.default_rng(1)
    bi = 0.05 + 0.5 * np.exp(-np.arange(LAYERS) / 2.0) + 0.13 * (np.arange(LAYERS) / LAYERS) ** 6
    bi = bi * np.exp(0.25 * rng.standard_normal(LAYERS))
    path = np.concatenate([[0.0], np.cumsum(bi)])
    block = np.abs(path[:, None] - path[None, :])
    scale = np.exp(0.8 * rng.standard_normal((LAYERS, 1)))
    spread = np.linspace(0.5, 1.2, LAYERS)[:, None]
    arrays = {
        "hidden": np.exp(3 + 0.9 * rng.standard_normal(HIDDEN)),
        "hidden_per_norm": np.exp(0.9 * rng.standard_normal((2 * LAYERS, HIDDEN))),
        "mlp": scale * np.exp(spread * rng.standard_normal((LAYERS, MLP))),
        "heads": scale * np.exp(0.7 * spread * rng.standard_normal((LAYERS, HEADS))),
        "block_bi": block,
    }
    run.root.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    save_file(arrays, run.importance, metadata={"samples": "64", "batch": "l2", "sequence": "mean"})


def depth_row(kind: str, layers: list[int], metric: str, value: float) -> dict[str, object]:
    return {
        "start": layers[0] if layers else 0, "length": len(layers), "metric": metric, "value": value,
        "stderr": 0.05, "n": 8, "kind": kind, "layers": ",".join(map(str, layers)),
    }  # fmt: skip


def write_depth(run: RunDirectory, metrics: tuple[str, ...], words: tuple[str, ...]) -> None:
    """A sweep over 6 layers; 3.2 for the teacher, 3.4 one by one."""
    draw = np.random.default_rng(0)
    rows = []
    for metric in metrics:
        if metric != "bi":
            rows.append(depth_row("teacher", [], metric, 3.2))
        for length in LENGTHS:
            for start in range(6 - length + 1):
                layers = list(range(start, start + length))
                rows.append(depth_row("contiguous", layers, metric, 3.3 + draw.random()))
            if metric != "bi":
                rows.append(depth_row("one_by_one", list(range(0, 2 * length, 2)), metric, 3.4))
    run.write_depth(rows)
    run.write_depth_recommendation({"words": list(words), "at_chance": True})
    run.write_evidence(EVIDENCE)


# Beside the promoted candidate: arm, LM loss above it in nats per token, tokens.
CONTROLS = (("untrained", 4.3, 0), ("random_pruned", 0.6, RUNGS[1]), ("random_init", 3.1, RUNGS[1]),
            ("retrained", -0.35, 262144), ("random_init_retrained", 0.9, 262144))  # fmt: skip


def write_run(root: Path, trials: int = 12, name: str = "smollm2-135m", hostile: str = "") -> RunDirectory:
    """A finished search: `trials` candidates over two rungs, a failure, a promotion, retraining, controls."""
    run = RunDirectory(root)
    rng = np.random.default_rng(0)
    run.write_config(
        {
            "name": name + hostile,
            "output": f"runs/{name}",
            "seed": 0,
            "precision": "float32",
            "stages": ["importance", "depth", "search", "retrain", "report"],
            "teacher": {"model": "smollm2-135m"},
            "corpus": {"train": "docstrings" + hostile, "sequence_length": 256, "calibration_samples": 64},
            "search": {
                "trials": trials,
                "sampler": "tpe",
                "objective": "lm_loss",
                "rungs": list(RUNGS),
                "promote": 1,
            },
            "distillation": {"loss": "kld", "learning_rate": 3e-4},
        }
    )
    run.write_environment(
        {"python": "3.11.4", "versions": {"torch": "2.13.0", "ray": "2.60.0" + hostile}, "cpu": {"count": 2}}
    )
    run.event("run_started", stages=["importance", "search", "retrain"])
    foretold = {**FORECAST, "basis": "measured" + hostile}
    run.write_forecast({stage: foretold for stage in ("importance", "search", "retrain")})
    run.event("stage_started", stage="importance")
    write_importance(run)
    run.event("stage_finished", stage="importance")
    write_depth(run, METRICS, ("2 layers: drop layers 3-4." + hostile,))

    def start(trial: str, arm: str, axes: dict[str, int], proposal: int) -> dict[str, object]:
        made = {
            "trial": trial,
            "architecture": f"a{proposal:07x}",
            "arm": arm,
            "seed": 0,
            "proposal": proposal,
            **axes,
        }
        run.start_trial(trial, made)
        run.event("trial_started", trial=trial)
        return made

    full = FULL
    run.event("stage_started", stage="evaluation" + hostile)
    run.event("stage_started", stage="search")
    teacher = start("teacher", "teacher", full, -1)
    row = scored(3.214, TEACHER_PARAMS, rng, 0) | {"kl": 0.0, "winogrande_acc": 0.52}
    log_scored(run, "teacher", {**teacher, **row, "rung": 0})

    statuses, messages = {"teacher": "complete"}, {}
    finished = []
    for proposal in range(trials):
        trial = f"t{proposal:03d}" + (hostile.replace("/", "∕") if proposal == 0 else "")
        axes = architecture(rng)
        made = start(trial, "search", axes, proposal)
        if proposal == 4:
            statuses[trial], messages[trial] = (
                "failed",
                "OutOfMemoryError: 2.1 GiB asked, 1.4 GiB free" + hostile,
            )
            continue
        params = int(
            EMBEDDING * axes["hidden_size"] / HIDDEN
            + 2.9e6
            * axes["num_hidden_layers"]
            * (axes["intermediate_size"] / MLP * 0.75 + 0.25)
            * axes["hidden_size"]
            / HIDDEN
        )
        final = 3.3 + 3.2 * (1 - params / TEACHER_PARAMS) + 0.12 * rng.standard_normal()
        log_losses(run, trial, RUNGS[0], 4.0, final - 2.7, proposal)
        first = scored(final + 0.5, params, rng, RUNGS[0]) | {"bi": 0.1}
        log_scored(run, trial, {**made, **first, "rung": 0})
        statuses[trial] = "stopped"
        finished.append((final, trial, made, params))
    finished.sort(key=lambda item: item[0])
    kept = finished[: max(1, len(finished) // 3)]
    for final, trial, made, params in kept:
        log_losses(run, trial, RUNGS[1], 4.0, final - 2.9, 7)
        log_scored(run, trial, {**made, **scored(final, params, rng, RUNGS[1]), "bi": 0.1, "rung": 1})
        statuses[trial] = "complete"
    final, trial, made, params = kept[0]
    statuses[trial] = "promoted"
    run.event("promoted", trial=trial)
    run.event("stage_finished", stage="search", tokens=1, flops=1e12)
    run.event("stage_started", stage="retrain")
    for kind, about in (
        ("node_lost", {"node": "10.0.0.2" + hostile}), ("node_joined", {"node": "10.0.0.3"}),
        ("trial_restarted", {"trial": trial, "message": "the host went away" + hostile}),
        ("storage_failed", {"message": "timed out" + hostile}), ("storage_back", {"seconds": 3.5}),
    ):  # fmt: skip
        run.event(kind, **about)
    for arm, loss, tokens in CONTROLS:
        loss = final + loss
        other = start(f"{trial}-{arm}", arm, {axis: made[axis] for axis in full}, made["proposal"])
        other["architecture"] = made["architecture"]
        if tokens:
            log_losses(run, f"{trial}-{arm}", tokens, 2.0, final - 3.2, 9)
        rung = 1 if arm in ("random_pruned", "random_init") else 0
        log_scored(run, f"{trial}-{arm}", {**other, **scored(loss, params, rng, tokens), "rung": rung})
        statuses[f"{trial}-{arm}"] = "complete"
    run.write_trials(statuses, messages)
    run.event("stage_finished", stage="retrain")
    run.write_evaluation(evaluation(hostile))
    written = {writer: [f"{writer} goes on{hostile}"] for writer in ("text", "teacher", "untrained", "retrained")}
    run.write_generations({"prompts": ["It begins" + hostile], **written, "student": trial})
    return run


def evaluated(model: str, task: str, shots: int, value: float, stderr: float | None = 0.014, **given: object) -> dict:
    """One result of evaluation.json."""
    return {
        "model": model, "task": task, "label": f"{task}:{shots}", "key": "k", "metric": "acc,none", "value": value,
        "stderr": stderr, "n": 1267, "shots": shots, "limit": None, "chance": 0.5, "at_chance": value < 0.52,
        "task_version": 1.0, "metrics": {}, "samples": None, "twins": None, "questions": "q", "precision": "float32",
        "chat_template": False, "versions": {"lm_eval": "0.4.13", "transformers": "5.23.0"}, **given,
    }  # fmt: skip


WIDTH = "nvidia/Llama-3.1-Minitron-4B-Width-Base"


def evaluation(hostile: str = "") -> dict:
    """A teacher, a student, a reference of the paper's; `winogrande` with 5 shots is in its Table 1."""
    names = {"teacher": "smollm2-135m" + hostile, "best": "best", WIDTH: WIDTH}
    task = "mine" + hostile
    return {
        "models": {model: {"name": name, "content": "c", "params": 90_000_000} for model, name in names.items()},
        "results": [
            *(evaluated(model, "winogrande", 5, value) for model, value in zip(names, (0.55, 0.51, 0.74), strict=True)),
            evaluated("best", task, 0, 12.5, None, chance=None, at_chance=None, limit=100, metric="perplexity,none"),
        ],
        "failures": [{"model": WIDTH, "task": task + ":0", "message": "ConnectionError: no route" + hostile}],
        "differences": [
            {"model": "best", "task": "winogrande", "shots": 5, "metric": "acc,none", "limit": None, "units": 640,
             "difference": -0.04, "stderr": 0.015, "low": -0.07, "high": -0.01, "p": 0.02, "n": 1267, "test": "McNemar"}
        ],
    }  # fmt: skip


# of one stage; money at the price of a machine, on CPUs
FORECAST = {
    "tokens": 1000, "flops": 1e12, "seconds": 60.0, "gpus": 0.0, "gpu_seconds": 0.0, "price_per_hour": 3.0,
    "cost": 0.05,
}  # fmt: skip


@pytest.fixture
def make_run() -> Callable[..., RunDirectory]:
    return write_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run, shared: a test writes nothing into it but its report."""
    return write_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same run, whose every word would be a tag and a script; shared likewise."""
    return write_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=HOSTILE)


@pytest.fixture(scope="session")
def finished_page(finished: RunDirectory) -> Path:
    """The report of `finished`, which nobody writes anew."""
    return Path(shutil.copy(write_report(finished), finished.root.with_name("finished.html")))


@pytest.fixture(scope="session")
def hostile_page(hostile: RunDirectory) -> Path:
    return Path(shutil.copy(write_report(hostile), hostile.root.with_name("hostile.html")))


TEST = {"difference": 0.1, "stderr": 0.01, "p": 0.001, "n": 32, "low": 0.08, "high": 0.12, "seeds": 1}
EVIDENCE = {
    "objective": "lm_loss", "seeds": None, "words": ["Of 1 other, 1 differs."],
    "at_chance": {"winogrande_acc": {"at_chance": True}, "winogrande_margin": {"at_chance": False}},
    "rungs": [
        {"before": "rung 0", "after": "rung 1", "before_n": 9, "n": 2, "best_kept": False, "regret": 0.1,
         "regret_p": 0.5, "chosen": "b", "best": "a", "flips": [["b", "a"]], "kendall": None, "kendall_p": None,
         "kendall_interval": None, "top": [{"k": 1, "shared": 0, "by_chance": 0.5, "p": 1.0}]},
    ],
    "finalists": [
        {"architecture": "a", "trials": ["x"], "lm_loss": 3.0, "stderr": 0.04, "seeds": 1, "error_over_seeds": None},
        {"architecture": "b", "trials": ["y"], "lm_loss": 3.1, "stderr": 0.04, "seeds": 1, "error_over_seeds": None,
         "lm_loss_against_best": {**TEST, "p_holm": 0.001}},
    ],
    "controls": [
        {"architecture": "a",
         "candidate": {"trials": ["x"], "tokens": 32768, "lm_loss": 3.0, "winogrande_margin": 0.1,
                       "precision": "float32"},
         "controls": [
             {"arm": arm, "trials": [arm], "tokens": 32768, "lm_loss": 3.1, "winogrande_margin": 0.1,
              "precision": "float32", "against_candidate": {"lm_loss": TEST}}
             for arm in ("random_pruned", "random_init", "untrained", "teacher")]},
    ],
}  # fmt: skip


ARMS = ("kept", "random", "none")  # of an ablation: LM loss above the first, nats per token: 0, 0.2, 0.2
SHIFTS = (0.0, 0.2, 0.2)
MILESTONES = (0, 4096, 8192)


def write_ablation(
    folder: Path, arms: tuple[str, ...] = ARMS, seeds: tuple[int, ...] = (0, 1, 2), hostile: str = ""
) -> Path:
    """An ablation whose `arms` have finished, of the three that were asked for. Seeds scatter by 0.1 in the last."""
    names = [arm + hostile for arm in ARMS]
    asked = {"name": "figure-6" + hostile, "question": "What is pruning worth?" + hostile, "baseline": names[0],
             "figure": "Figure 6" + hostile, "arms": names, "seeds": list(seeds), "tokens": MILESTONES[-1],
             "changes": {name: {"distillation": {"loss": name}} for name in names}}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "ablation.json").write_text(json.dumps(asked))
    rng = np.random.default_rng(3)
    for place, arm in enumerate(ARMS):
        if arm not in arms:
            continue
        run = RunDirectory(folder / names[place])
        run.write_config({"name": names[place], "corpus": {"validation": "text"}, "distillation": {"loss": arm}})
        run.event("run_started", stages=["search"])
        run.event("stage_started", stage="search")
        for seed in seeds:
            made = {"trial": f"s{seed}", "architecture": "a", "arm": "search", "seed": seed, "proposal": 0, **FULL}
            run.start_trial(made["trial"], made)
            shift = SHIFTS[place] + (0.1 * (seed - 1) if place == 2 else 0.0)
            for rung, tokens in enumerate(MILESTONES):
                loss = 3.5 + 2 * np.exp(-tokens / 4096) + shift
                windows = loss + TEXT + rng.normal(0, 0.02, len(TEXT))
                run.log_scores(made["trial"], rung, lm_loss=windows.tolist())
                row = scored(float(windows.mean()), 90_000_000, rng, tokens)
                run.log_rung(made["trial"], {**made, **row, "rung": rung})
        run.write_trials({})
        run.event("stage_finished", stage="search", flops=1e14)
        run.event("run_finished", seconds=1.0)
    return folder


@pytest.fixture
def going(tmp_path: Path) -> RunDirectory:
    """A run in its first rungs: no table, one trial with a rung, one with steps only, a log cut mid-line."""
    run = RunDirectory(tmp_path / "going")
    run.write_config({"name": "going", "search": {"trials": 4}})
    run.event("stage_started", stage="search")
    rng = np.random.default_rng(2)
    for proposal in range(2):
        made = {
            "trial": f"t{proposal}",
            "architecture": "a",
            "arm": "search",
            "seed": 0,
            "proposal": proposal,
            **architecture(rng),
        }
        run.start_trial(f"t{proposal}", made)
        log_losses(run, f"t{proposal}", 4096, 4.0, 1.0, proposal)
        if proposal == 0:
            run.log_rung("t0", {**made, **scored(4.4, 90_000_000, rng, 4096), "rung": 0})
    with open(run.trial("t1") / "metrics.jsonl", "a") as log:
        log.write('{"kind": "step", "tok')
    return run
