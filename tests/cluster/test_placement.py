"""How many trials fit which nodes, and where what is computed beside them runs: on simulated nodes, by real Ray."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.cluster import session
from minitron_search.cluster.placement import in_parts, on_all_cpus, on_one_node
from minitron_search.cluster.session import UnfitError, blind_node, slots
from minitron_search.config import loading
from minitron_search.config.training import ResourcesConfig
from minitron_search.records.directory import RunDirectory
from minitron_search.records.transfer import NodeTransfer


def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": node} for node in resources]


@pytest.mark.parametrize(
    "have, asked, fitting",
    [
        ([{"CPU": 3}, {"CPU": 3}], {"cpus_per_worker": 2}, 2),  # not the three that six CPUs would hold together
        ([{"CPU": 3}, {"CPU": 3}], {"cpus_per_worker": 2, "workers_per_trial": 2}, 1),
        ([{}, {"CPU": 8, "GPU": 1}], {"gpus_per_worker": 0.1}, 8),
        ([{"CPU": 64, "GPU": 1}], {"gpus_per_worker": 0.1}, 10),
        ([{"CPU": 64, "GPU": 2}], {"gpus_per_worker": 0.4}, 4),
        ([{"CPU": 64, "GPU": 7}], {"gpus_per_worker": 2}, 3),
        ([{"CPU": 64}, {"CPU": 1, "GPU": 8}], {"gpus_per_worker": 1}, 1),
        ([{"CPU": 8, "GPU": 8, "accelerator_type:L4": 1}, {"CPU": 8, "GPU": 2, "accelerator_type:H100": 1}],
         {"gpus_per_worker": 1, "accelerator_type": "H100"}, 2),
    ],
)  # fmt: skip
def test_slots_are_counted_node_by_node(
    monkeypatch: pytest.MonkeyPatch, have: list[dict[str, float]], asked: dict[str, Any], fitting: int
) -> None:
    monkeypatch.setattr(session.ray, "nodes", lambda: [*nodes(*have), {"Alive": False, "Resources": {"CPU": 99}}])
    monkeypatch.setattr(session, "draining_nodes", lambda: {})
    assert slots(ResourcesConfig(**asked)) == fitting


def test_what_fits_nowhere_is_told_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
    monkeypatch.setattr(session.ray, "nodes", lambda: nodes(have))
    monkeypatch.setattr(session, "draining_nodes", lambda: {})
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: have)
    with pytest.raises(
        UnfitError, match="1 GPUs of kind H100 each does not fit the cluster's 8 CPUs and 1 GPUs of kind L4"
    ):
        slots(ResourcesConfig(gpus_per_worker=1, accelerator_type="H100"))


def test_a_kind_is_of_gpus() -> None:
    with pytest.raises(ValueError, match=r"resources.accelerator_type: H100 is of GPUs, and gpus_per_worker is 0"):
        loading.parse_config({"resources": {"accelerator_type": "H100"}})


@pytest.fixture(scope="module")
def three_nodes(no_shared_ray: None) -> Iterator[Cluster]:
    """A head that runs nothing, a node of two CPUs, one of three."""
    for name, value in session.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    for cpus in (2, 3):
        made.add_node(num_cpus=cpus, object_store_memory=80 * 2**20)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def node_and_threads(*_: Any) -> tuple[str, int]:
    import torch

    return ray.get_runtime_context().get_node_id(), torch.get_num_threads()


def each(parts: list[int]) -> list[tuple[int, str]]:
    return [(part, ray.get_runtime_context().get_node_id()) for part in parts]


def parts_from_there(count: int) -> tuple[str, list[tuple[int, str]]]:
    return ray.get_runtime_context().get_node_id(), in_parts(None, each, list(range(count)))


def test_what_is_beside_the_trials_is_on_one_node(three_nodes: Cluster) -> None:
    largest = next(node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU") == 3)
    assert on_all_cpus(None, node_and_threads) == (largest, 3)
    found = in_parts(None, each, list(range(7)))
    assert [part for part, _ in found] == list(range(7)) and {node for _, node in found} == {largest}
    node, parts = on_one_node(None, parts_from_there, 4)
    assert {node} == {node for _, node in parts} == {largest}


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    return folder


def test_folders_come_and_go_with_what_needs_and_makes_them(three_nodes: Cluster, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    transfer = NodeTransfer(storage.as_uri(), tmp_path / "run", run_is_shared=False)
    given = written(tmp_path / "given", "teacher")
    run_dir = RunDirectory(tmp_path / "run", transfer=transfer)
    made = on_one_node(run_dir, copied, given, tmp_path / "made")
    assert transfer.has(given) and transfer.has(made) and (made / "file").read_text() == "teacher"


def copied(given: Path, into: Path) -> Path:
    return written(into, (given / "file").read_text())


def test_nodes_that_come_and_go_are_events(
    three_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = RunDirectory(tmp_path / "run"), list[str]()
    monkeypatch.setattr(session, "say", said.append)
    with session.watched(run):
        node = three_nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        wait_for(lambda: said)
        before = slots(ResourcesConfig())
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ray.remote(num_cpus=1, max_retries=0, scheduling_strategy=there)(busy).remote()  # idle it would end at once
        wait_for(lambda: ray.available_resources().get("CPU") == 5)
        drain(three_nodes.address, node.node_id)
        wait_for(lambda: len(said) > 1)
        assert slots(ResourcesConfig()) == before - 1 == 5
        three_nodes.remove_node(node, allow_graceful=True)
        wait_for(lambda: len(said) > 2)
    joined, leaving, lost = run.events()
    assert [event["event"] for event in run.events()] == ["node_joined", "node_leaving", "node_lost"]
    assert joined["node_id"] == leaving["node_id"] == lost["node_id"] and joined["CPU"] == 1 and lost["message"]
    assert [line.partition(": 1")[0] for line in said] == [
        "cluster: node joined", "cluster: node leaving", "cluster: node lost"
    ]  # fmt: skip


def busy() -> None:
    time.sleep(600)


def drain(address: str, node: str) -> None:
    """As clusters/spot_notice.py does."""
    told = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", address, "--node-id", node, *told]
    subprocess.run([*command, "--deadline-remaining-seconds", "120"], check=True, capture_output=True, timeout=60)


def wait_for(happened: Any) -> None:
    deadline = time.monotonic() + 300  # of what hangs
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_folder_of_this_machine_is_seen_by_all_its_nodes(three_nodes: Cluster, tmp_path: Path) -> None:
    assert blind_node(tmp_path / "new") is None
    assert not (tmp_path / "new").exists(), "looking leaves nothing"
