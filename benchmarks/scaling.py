"""How a search grows with the cluster: simulated nodes, and trials that wait where they would compute.

    python -m benchmarks.scaling [--nodes 1 2 4 8] [--slots 4] [--wait 20] [--waves 3]

Nodes are raylets of this machine (`ray.cluster_utils.Cluster`), `--slots` CPUs each; the head runs no trials, as in
cluster.yaml. Everything but the work of a trial is real: proposals, Tune, a process a trial, rungs, rulings, tables,
the study, and logs written through the actor of the driver's node, as by nodes that share no disk. A trial waits
`--wait` seconds and has one rung: of several, a slot also waits for its rung's last trial. For every number of nodes:

    throughput        rungs a minute from the first trial of the second wave on, beside slots / wait
    driver CPU        seconds of the driver's processor time a rung, the same window
    actor CPU         of the actor that keeps the logs
    free slot         seconds from a rung's end in a slot until the next trial waits there (median and largest)

What limits the cluster that one driver can feed is its processor time a rung: one core makes 1 / driver CPU rungs a
second. The rest of Ray (GCS, raylets) shares this machine's cores with every simulated node, as it would not on real
ones.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray.cluster_utils import Cluster

from minitron_search.architecture_search.space import SearchSpace
from minitron_search.architecture_search.state import SearchState
from minitron_search.cluster import launchers, tuner
from minitron_search.cluster.remote_logs import keep_files
from minitron_search.cluster.session import ENVIRONMENT
from minitron_search.config import loading
from minitron_search.config import schema as configuration
from minitron_search.records.directory import RunDirectory
from minitron_search.records.metrics import METRICS, scored
from minitron_search.trials.settings import distillation_settings
from minitron_search.trials.trial import Trial
from tests import tiny

TEACHER = tiny.config(
    vocab_size=258, hidden_size=96, intermediate_size=256, num_hidden_layers=8, num_attention_heads=6,
    num_key_value_heads=3, head_dim=16, max_position_embeddings=512,
)  # fmt: skip
SCORES = tuple(column for name in scored() for column in (name, METRICS[name].error))


class Measured(NamedTuple):
    slots: int
    rungs: int
    rungs_per_minute: float
    ideal: float
    driver_s: float
    actor_s: float
    free_median_s: float
    free_largest_s: float


def asked(trials: int, slots: int) -> configuration.Config:
    return loading.parse_config({
        "corpus": {"sequence_length": 32},
        "distillation": {"batch_tokens": 64},
        "space": {
            "budget": {"params": {"target": 500_000, "tolerance": 0.5}},
            "axes": {"hidden_size": {"low": 48, "high": 96, "step": 8},
                     "intermediate_size": {"low": 64, "high": 256, "step": 16},
                     "num_attention_heads": {"choices": [3, 6]}, "drop_block": {"lengths": [0, 1, 2, 3]}},
        },
        "search": {"trials": trials, "rungs": [64], "sampler": "tpe", "concurrency": slots, "controls": False},
        "resources": {"launcher": "inline"},
    })  # fmt: skip


def wait_instead(seconds: float) -> Any:
    def work(materials: ray.ObjectRef, run: RunDirectory, resources: Any, trial: Trial) -> None:
        run.event("trial_placed", trial=trial.id, slot=ray.get_runtime_context().get_actor_id())
        done = {line["rung"] for line in run.metrics(trial.id) if line["kind"] == "rung"}
        for rung, tokens in enumerate(trial.settings.milestones):
            if rung not in done:
                time.sleep(seconds)
                drawn = random.Random(f"{trial.id} {rung}")
                made = {name: drawn.random() for name in SCORES}
                run.log_scores(trial.id, rung, lm_loss=[drawn.random() for _ in range(32)])
                run.log_rung(trial.id, {**trial.columns(), **made, "lm_loss_n": 32, "winogrande_n": 32, "rung": rung,
                                        "tokens": tokens, "seconds": seconds, "bi": 0.0,
                                        "tokens_per_second": 0.0})  # fmt: skip
            if rung < len(trial.settings.milestones) - 1:
                began = time.monotonic()
                while rung not in run.decisions(trial.id):
                    time.sleep(run.files.poll_s(time.monotonic() - began))
                if run.decisions(trial.id)[rung]["decision"] == "stop":
                    return

    return work


def measure(nodes: int, slots_per_node: int, wait: float, waves: int) -> Measured:
    slots = nodes * slots_per_node
    config = asked(waves * slots, slots)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=slots_per_node, object_store_memory=80 * 2**20)
            ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
            files = keep_files()
            run = RunDirectory(Path(folder) / "run", files)
            actor = ray.get(files.actor.__ray_call__.remote(lambda _: os.getpid()))
            space = SearchSpace(config.space, TEACHER)
            assert len(space) >= config.search.trials, len(space)
            searched = SearchState(run, config, space, distillation_settings(config, "float32"))
            samples = sampled([os.getpid(), actor])
            tuner.tune_function = lambda inputs, run_dir, resources: launchers.followed(
                wait_instead(wait), inputs, run_dir, resources
            )
            tuner.run_search(searched, ray.put(None), partial(int, slots))
            return read(run, samples, slots, wait)
        finally:
            ray.shutdown()
            cluster.shutdown()


def sampled(pids: list[int]) -> list[tuple[float, list[float]]]:
    """Grows while this process lives: the time, and the processor seconds that each of `pids` has used."""
    samples: list[tuple[float, list[float]]] = []
    processes = [psutil.Process(pid) for pid in pids]

    def sample() -> None:
        with suppress(psutil.Error):  # the actor has ended
            while True:
                samples.append((time.time(), [sum(process.cpu_times()[:2]) for process in processes]))
                time.sleep(0.2)

    threading.Thread(target=sample, daemon=True).start()
    return samples


def read(run: RunDirectory, samples: list[tuple[float, list[float]]], slots: int, wait: float) -> Measured:
    """From when every slot has started its process to the last start of a trial: until then every slot has work."""
    starts = [event for event in run.events() if event["event"] == "trial_placed"]
    ends = {event["trial"]: event["time"] for event in run.events() if event["event"] == "rung_finished"}
    placed, ended = sorted(event["time"] for event in starts), sorted(ends.values())
    begin, end = placed[slots - 1] + wait, placed[-1]
    inside = [time for time in ended if begin < time <= end]
    first, last = (min(samples, key=lambda sample, at=at: abs(sample[0] - at)) for at in (begin, end))
    free, last_of = [], dict[str, str]()
    for event in starts:
        if (before := last_of.get(event["slot"])) and begin < event["time"]:
            free.append(event["time"] - ends[before])
        last_of[event["slot"]] = event["trial"]
    count = len(inside)
    return Measured(
        slots, count, 60 * count / (end - begin), 60 * slots / wait, (last[1][0] - first[1][0]) / count,
        (last[1][1] - first[1][1]) / count, statistics.median(free), max(free),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--slots", type=int, default=4, help="of a node")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds a rung")
    parser.add_argument("--waves", type=int, default=3, help="trials a slot")
    asked = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    print("| nodes | slots | rungs a minute | slots / wait | driver CPU s a rung | actor CPU s a rung "
          "| free slot s, median | largest |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for nodes in asked.nodes:
        found = measure(nodes, asked.slots, asked.wait, asked.waves)
        cells = [f"{found.rungs_per_minute:.1f}", f"{found.ideal:.1f}", f"{found.driver_s:.3f}", f"{found.actor_s:.3f}",
                 f"{found.free_median_s:.2f}", f"{found.free_largest_s:.2f}"]  # fmt: skip
        print(f"| {nodes} | {found.slots} | {' | '.join(cells)} |", flush=True)
    print(json.dumps({"load_average": os.getloadavg()}))


if __name__ == "__main__":
    main()
