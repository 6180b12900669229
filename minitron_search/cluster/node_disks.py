"""What the nodes of a cluster see of each other's disks, found out once: from it follows what has to travel."""

import os
from dataclasses import replace
from pathlib import Path

import ray

from minitron_search.cluster.remote_logs import keep_files
from minitron_search.cluster.session import UnfitError, blind_node
from minitron_search.planning.prepare import Model, Prepared
from minitron_search.records.directory import RunDirectory
from minitron_search.records.paths import cache_folder, is_uri
from minitron_search.records.transfer import CACHE, Depot


def connected(prepared: Prepared) -> Prepared:
    """`prepared`, whose run is reached from all nodes of the cluster that was joined, whichever may come yet.

    On one machine it is as it was, and so it is where all nodes share the caches and the run. Where the caches are on
    the nodes' own disks, teacher and caches travel by the run's storage; where the run's working copy is on the
    driver's disk, which only a run in storage may have, so do checkpoints, and logs are written there through an actor.

    Raises UnfitError for a run directory that a node does not see.
    """
    output, run = prepared.config.output, prepared.run
    if not os.environ.get("RAY_ADDRESS"):
        return prepared
    blind = blind_node(run.root)
    if blind and not is_uri(output):
        raise UnfitError(f"output: {output} is on this machine alone: node {blind} of the cluster does not see what is "
                         "written there; valid: s3://bucket/run, or a folder that all nodes share (NFS, EFS, "
                         "Filestore), mounted at the same path")  # fmt: skip
    alone = sum(node["Alive"] for node in ray.nodes()) == 1  # nodes may yet come, with disks of their own
    if not alone and not blind and not blind_node(cache_folder()):
        return prepared
    if is_uri(output) and (alone or blind):
        run.depot, run.files = Depot(output, run.root, run_is_shared=False), keep_files()
    else:
        run.depot = Depot(run.root.as_uri(), run.root, run_is_shared=True)
    return replace(
        prepared,
        teacher_folder=_by_content(prepared.teacher_folder, prepared.teacher_fingerprint),
        other=prepared.other and _with_folder(prepared.other),
    )


def disconnect(run: RunDirectory) -> None:
    """Leave nothing in storage of what only travelled."""
    if run.depot is not None:
        run.depot.clear(CACHE)
        run.depot.clear(run.scratch.name)


def _with_folder(model: Model) -> Model:
    return replace(model, folder=_by_content(model.folder, model.fingerprint))


def _by_content(folder: Path, fingerprint: str) -> Path:
    """A folder of the cache with the files of `folder`: what is at its path on another node may be something else."""
    if folder.is_relative_to(cache_folder()):
        return folder
    named = cache_folder() / "given" / fingerprint
    named.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and not (named / file.name).exists():
            (named / file.name).symlink_to(file.resolve())
    return named
