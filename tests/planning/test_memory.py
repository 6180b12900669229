"""What a run takes of memory: counted by what holds it, and held against what this machine, or its container, has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import Gemma3TextConfig, Qwen2Config

from minitron_search.architecture_search.space import SearchSpace
from minitron_search.cluster import placement, session, tuner
from minitron_search.cluster.session import Room, UnfitError, sized, slots
from minitron_search.config import loading
from minitron_search.config.training import ResourcesConfig
from minitron_search.planning import memory
from minitron_search.planning.forecast import Machine, fitting, trials_at_once
from minitron_search.planning.workload import Costs

GB = 10**9


def costs_of(precision: str = "bfloat16", **given: Any) -> Costs:
    """A teacher in the shape of Qwen's 0.5B with a head of its own, 630M, and students of two thirds, 428M."""
    teacher = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config = loading.parse_config({
        "space": {
            "budget": {"params": {"target": "428M", "tolerance": 0.06}},
            "axes": {"hidden_size": {"choices": [640, 768]}, "intermediate_size": {"choices": [2432, 3648, 4864]}},
        },
        **given,
    })  # fmt: skip
    return Costs(config, SearchSpace(config.space, teacher), teacher, precision, 100)


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A node of 16 CPUs, most of which are not there, and the memory of a small machine."""

    def have(memory_bytes: float, cpus: int = 16) -> None:
        node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": float(cpus), "memory": float(memory_bytes)}}
        monkeypatch.setattr(session.ray, "nodes", lambda: [node])
        monkeypatch.setattr(session.ray, "cluster_resources", lambda: node["Resources"])
        monkeypatch.setattr(session, "draining_nodes", lambda: {})
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    return have


def test_a_worker_of_428M_takes_what_was_measured() -> None:
    """8.3 GiB, resident and in the middle of its steps."""
    held = memory.worker(costs_of())
    students = costs_of().space.smallest_and_largest()[1]
    params = costs_of().space.measures(students).params
    assert (held["weights"], held["gradients"], held["moments"]) == (4 * params, 4 * params, 8 * params)
    assert 8.3 * 2**30 < sum(held.values()) < 12.5 * 2**30, "the largest student is of 450M"
    assert held["logits"] > 512 * 151_936 * 2 * 2, "both chunks of logits"


def test_the_depth_sweep_copies_a_teacher_of_another_dtype() -> None:
    """Gemma 3 270M, stored in bfloat16, swept in float32 by one task was measured at 2.98 GB with driver and Ray."""
    gemma = Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, dtype="bfloat16",
    )  # fmt: skip
    config = loading.parse_config({
        "stages": ["importance", "depth"], "corpus": {"sequence_length": 64, "validation_samples": 2},
        "depth": {"lengths": [6], "metrics": ["lm_loss"], "workers": 1},
        "space": {"budget": {"params": {"target": "185M", "tolerance": 0.05}},
                  "axes": {"hidden_size": {"choices": [448, 512]}, "intermediate_size": {"choices": [1536, 2048]}}},
    })  # fmt: skip
    space = SearchSpace(config.space, gemma)
    in_float32, in_bfloat16 = (
        sum(memory.run(Costs(config, space, gemma, precision, 100), 2, 1, 2).values())
        for precision in ("float32", "bfloat16")
    )
    assert in_float32 == pytest.approx(2.98e9, rel=0.15) and in_bfloat16 < in_float32


def test_memory_limits_what_runs_at_once_and_processors_do_too(sixteen: Any) -> None:
    costs = costs_of()
    each = memory.of_worker(costs)
    for free, cpus, expected in ((27 * GB, 16, 27 * GB // each), (400 * GB, 16, 16), (27 * GB, 1, 1)):
        sixteen(free, cpus)
        resources = sized(ResourcesConfig(), memory.worker(costs), memory.certain(costs))
        assert slots(resources) == expected, (free, cpus)
        assert slots(resources) * resources.of_worker()["memory"] <= free
        assert fitting(costs, Machine(cpus, 0, memory=free)) == expected
    assert trials_at_once(costs, Machine(16, 0, memory=27 * GB)) == 2


def test_a_concurrency_that_is_given_is_held_to_memory_too(sixteen: Any) -> None:
    sixteen(27 * GB)
    resources = ResourcesConfig().with_memory(memory.of_worker(costs_of()))
    assert Room(12, resources)() == Room("auto", resources)() == 2
    assert Room(1, resources)() == 1


def test_one_worker_runs_with_a_warning_where_no_node_holds_it_by_the_count(
    sixteen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    monkeypatch.setattr(session, "say", said.append)
    sixteen(8 * GB)
    monkeypatch.setattr(memory, "this_host", lambda: memory.Host(10 * GB, 8 * GB))
    resources = sized(ResourcesConfig(), memory.worker(costs_of()), memory.certain(costs_of()))
    assert slots(resources) == 1
    assert len(said) == 1 and "warning: a worker takes about" in said[0] and "moments 3." in said[0]


def test_what_cannot_be_is_refused(sixteen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sixteen(4 * GB)
    monkeypatch.setattr(memory, "this_host", lambda: memory.Host(6 * GB, 5 * GB))
    with pytest.raises(UnfitError, match=r"smallest student alone take 6\.\d GB, and this machine has 6\.0 GB"):
        sized(ResourcesConfig(), memory.worker(costs_of()), memory.certain(costs_of()))


def test_a_worker_asks_ray_for_its_memory_and_no_configuration_knows() -> None:
    resources = ResourcesConfig(workers_per_trial=2).with_memory(123)
    assert resources.of_worker() == {"CPU": 1.0, "memory": 123.0}
    assert resources.model_copy(update={"workers_per_trial": 4}).of_worker()["memory"] == 123, "a gang's too"
    assert resources.model_dump() == ResourcesConfig(workers_per_trial=2).model_dump()


def test_shards_are_a_share_recomputing_and_smaller_vocabularies_take_less() -> None:
    def total(workers: int = 1, **given: Any) -> int:
        return sum(memory.worker(costs_of(**given), workers=workers).values())

    assert total(2, resources={"strategy": "fsdp2", "workers_per_trial": 2}) < 0.7 * total()
    assert total(distillation={"gradient_checkpointing": True}) < total()
    assert total(distillation={"loss": "ce"}) < total(), "no teacher, no second chunk of logits"
    assert total(precision="float32") != total()
    assert total(resources={"gpus_per_worker": 1}) < total() / 2, "what trains is on the GPU"


def test_no_more_tasks_run_beside_trials_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[int]]()

    class Task:
        def remote(self, parts: list[int], *_: Any) -> list[int]:
            asked.append(parts)
            return parts

    node = {"id": "a", "CPU": 16.0, "memory": 5.0 * GB}
    monkeypatch.setattr(placement, "_compute_node", lambda: node)
    monkeypatch.setattr(placement, "_task", lambda *_: Task())
    monkeypatch.setattr(placement.ray, "get", lambda results: results)
    for each, tasks in ((0, 7), (GB, 5), (2 * GB, 2), (9 * GB, 1)):
        asked.clear()
        assert placement.in_parts(None, list, list(range(7)), memory=each) == list(range(7))
        assert len(asked) == tasks


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("files", [
    {  # v2, limited by the group above
        "proc/self/cgroup": "0::/slice/run\n",
        "sys/fs/cgroup/slice/run/memory.max": "max\n", "sys/fs/cgroup/slice/run/memory.current": "5\n",
        "sys/fs/cgroup/slice/memory.max": "1000\n", "sys/fs/cgroup/slice/memory.current": "900\n",
        "sys/fs/cgroup/slice/memory.stat": "anon 100\ninactive_file 500\nactive_file 200\n",
    },
    {  # v1 inside a container, which does not see the path of its own group
        "proc/self/cgroup": "9:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "900\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500\ntotal_active_file 200\n",
    },
])  # fmt: skip
def test_the_limit_of_a_container_counts(files: dict[str, str], tmp_path: Path) -> None:
    assert memory.this_host(written(tmp_path, files)) == memory.Host(1000, 800), "what was read from files is free"


def test_no_limit_is_the_machine(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().total
    none = {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "9\n", "sys/fs/cgroup/memory/memory.stat": ""}  # fmt: skip
    assert memory.this_host(written(tmp_path / "a", none)).total == machine
    assert memory.this_host(tmp_path / "nothing").total == machine


def test_a_trial_that_memory_ended_says_so_in_a_line(tmp_path: Path) -> None:
    error = tmp_path / "error.txt"
    error.write_text("Traceback\nRefer to the documentation on how to address the out of memory issue: https://docs\n")
    assert "its node ran out of memory" in tuner._cause(SimpleNamespace(error_file=str(error)))
