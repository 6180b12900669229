"""An ablation in storage: every run keeps itself at its own address, as any run does; here is what lies beside them.

The working copies of its runs are each in a place of its own in the cache. They are linked into the ablation's own
folder, so that whoever reads an ablation (its evidence, its report) reads a folder of runs.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from pyarrow.fs import FileSystem, FileType, copy_files

from minitron_search.ablation.definition import BEFORE, Ablation
from minitron_search.records.bucket import mirror_of
from minitron_search.records.console import say
from minitron_search.records.directory import ABLATION_FILE, ABLATION_TABLE, RunDirectory
from minitron_search.records.paths import inside, is_uri, working_folder
from minitron_search.records.transfer import patiently


def holds_something(ablation: Ablation) -> bool:
    """Whether storage does, at its address. Raises ValueError where the address is none."""
    mirror = mirror_of(ablation.output, RunDirectory(ablation.root))
    return mirror is not None and mirror.exists()


def fetch(ablation: Ablation) -> None:
    """What lies beside the runs, from storage."""
    if not is_uri(ablation.output):
        return
    there, base = FileSystem.from_uri(ablation.output)
    for name in (ABLATION_FILE, ABLATION_TABLE):
        if there.get_file_info(f"{base}/{name}").type == FileType.File:
            ablation.root.mkdir(parents=True, exist_ok=True)
            copy_files(f"{base}/{name}", str(ablation.root / name), source_filesystem=there)


def link(ablation: Ablation) -> None:
    if is_uri(ablation.output):
        for place in (*(f"{BEFORE}/{name}" for name in ablation.before), *ablation.changes):
            made = ablation.root / place
            made.parent.mkdir(parents=True, exist_ok=True)
            made.unlink(missing_ok=True)
            made.symlink_to(working_folder(ablation.address(place)), target_is_directory=True)


def put(ablation: Ablation) -> None:
    """What lies beside the runs, to storage. Raises OSError where it is gone for `depot.PATIENCE_S`."""
    if is_uri(ablation.output):
        report = RunDirectory(ablation.root).report.name
        for name in (ABLATION_FILE, ABLATION_TABLE, report):
            file, (there, at) = ablation.root / name, FileSystem.from_uri(inside(ablation.output, name))
            if file.exists():
                patiently(partial(copy_files, str(file), at, destination_filesystem=there))


def kept(run: RunDirectory, address: str) -> AbstractContextManager[None]:
    """While the block runs, storage has what the run at `address` has here."""
    mirror = mirror_of(address, run)
    return mirror.kept(say) if mirror else nullcontext()
