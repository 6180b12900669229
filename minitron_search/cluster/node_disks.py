"""Find out once which of each other's disks the nodes of a cluster see: from it follows which folders travel, and where
one has to be deleted."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron_search.cluster.remote_logs import keep_files
from minitron_search.cluster.session import UnfitError, blind_node
from minitron_search.distillation.checkpoints import CheckpointFolder
from minitron_search.planning.models import Model
from minitron_search.planning.prepare import Prepared
from minitron_search.records.directory import RunDirectory
from minitron_search.records.logs import LocalFiles
from minitron_search.records.paths import cache_folder, is_uri
from minitron_search.records.transfer import CACHE, NodeTransfer

FREE_S = 60.0  # what deleting may take on other nodes before the run goes on


def connected(prepared: Prepared) -> Prepared:
    """Return `prepared` with a run that all nodes of the joined cluster reach, whichever may still come.

    Nothing changes on one machine, or where all nodes share the caches and the run. If the caches are on the nodes' own
    disks, teacher and caches travel by the run's storage. If the run's working copy is on the driver's disk, which only
    a run in storage may have, so do checkpoints, and logs are written there through an actor.

    Raises UnfitError for a run directory that a node does not see.
    """
    output, run_dir = prepared.config.output, prepared.run_dir
    assert isinstance(run_dir.files, LocalFiles)
    token = run_dir.files.owner[1] if run_dir.files.owner else ""
    if not os.environ.get("RAY_ADDRESS"):
        return prepared
    blind = blind_node(run_dir.root)
    if blind and not is_uri(output):
        raise UnfitError(f"output: {output} is on this machine alone: node {blind} of the cluster does not see what is "
                         "written there; valid: s3://bucket/run, or a folder that all nodes share (NFS, EFS, "
                         "Filestore), mounted at the same path")  # fmt: skip
    alone = sum(node["Alive"] for node in ray.nodes()) == 1  # nodes may yet come, with disks of their own
    if not alone and not blind and not blind_node(cache_folder()):
        return prepared
    if is_uri(output) and (alone or blind):
        run_dir.transfer = NodeTransfer(output, run_dir.root, run_is_shared=False, token=token)
        run_dir.files = keep_files(run_dir.files)
    else:
        run_dir.transfer = NodeTransfer(run_dir.root.as_uri(), run_dir.root, run_is_shared=True, token=token)
    other = prepared.distillation_teacher
    return replace(prepared, pruned=_in_cache(prepared.pruned), distillation_teacher=other and _in_cache(other))


def free_checkpoints(run_dir: RunDirectory, trials: Iterable[str], on_nodes: bool = True) -> None:
    """Delete the checkpoints of trials from which nothing will go on: here, in storage, and, for `on_nodes`, on the
    nodes' own disks, which is a task on each."""
    folders = [run_dir.checkpoint(trial) for trial in trials]
    for folder in folders:
        CheckpointFolder(folder, run_dir.transfer, run_dir.files).free()
    if not on_nodes or run_dir.transfer is None or not any(map(run_dir.transfer.travels, folders)):
        return
    here, going = ray.get_runtime_context().get_node_id(), []
    for node in (node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here):
        place: Any = NodeAffinitySchedulingStrategy(node, soft=False)
        going.append(ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(_free_here).remote(folders))
    ray.wait(going, num_returns=len(going), timeout=FREE_S)  # of a node that went the disk went too


def _free_here(folders: list[Path]) -> None:
    for folder in folders:
        CheckpointFolder(folder).free()


def disconnect(run_dir: RunDirectory) -> None:
    """Remove from storage what was there only to travel."""
    if run_dir.transfer is not None:
        run_dir.transfer.clear(CACHE)
        run_dir.transfer.clear(run_dir.scratch.name)


def _in_cache(model: Model) -> Model:
    """Return `model` with a folder of the cache, named by its content: its own path may be another on other nodes."""
    if model.folder.is_relative_to(cache_folder()):
        return model
    folder = cache_folder() / "given" / model.fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.folder.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    return replace(model, folder=folder)
