"""Keep an ablation in storage: every run keeps itself at its own address, as any run does; here is what lies beside.

The working copies of its runs are each in a place of its own in the cache. They are linked into the ablation's own
folder, so that whoever reads an ablation (its evidence, its report) reads a folder of runs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from pyarrow.fs import FileSystem, FileType, copy_files

from minitron_search.ablation.definition import BEFORE, Ablation
from minitron_search.records.bucket import bucket_copy
from minitron_search.records.directory import ABLATION_FILE, ABLATION_TABLE, RunDirectory
from minitron_search.records.paths import inside, is_uri, working_folder
from minitron_search.records.transfer import patiently


def holds_something(ablation: Ablation) -> bool:
    """Return whether storage has anything at the ablation's address. Raises ValueError if that is no address."""
    bucket = bucket_copy(ablation.output, RunDirectory(ablation.root))
    return bucket is not None and bucket.exists()


def fetch(ablation: Ablation) -> None:
    """Copy what lies beside the runs from storage."""
    if not is_uri(ablation.output):
        return
    files, base = FileSystem.from_uri(ablation.output)
    for name in (ABLATION_FILE, ABLATION_TABLE):
        if files.get_file_info(f"{base}/{name}").type == FileType.File:
            ablation.root.mkdir(parents=True, exist_ok=True)
            copy_files(f"{base}/{name}", str(ablation.root / name), source_filesystem=files)


def link(ablation: Ablation) -> None:
    """Link the working copies of the runs into the ablation's own folder."""
    if is_uri(ablation.output):
        for place in (*(f"{BEFORE}/{name}" for name in ablation.before), *ablation.changes):
            folder = ablation.root / place
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.unlink(missing_ok=True)
            folder.symlink_to(working_folder(ablation.address(place)), target_is_directory=True)


def put(ablation: Ablation) -> None:
    """Copy what lies beside the runs to storage. Raises OSError if storage fails for `transfer.PATIENCE_S`."""
    if is_uri(ablation.output):
        report = RunDirectory(ablation.root).report.name
        for name in (ABLATION_FILE, ABLATION_TABLE, report):
            file, (files, address) = ablation.root / name, FileSystem.from_uri(inside(ablation.output, name))
            if file.exists():
                patiently(partial(copy_files, str(file), address, destination_filesystem=files))


def stored(
    run_dir: RunDirectory, address: str, check: Callable[[], None] = lambda: None
) -> AbstractContextManager[None]:  # fmt: skip
    """While the block runs, keep the run in storage if `address` is there. `check`: as in `BucketCopy`."""
    bucket = bucket_copy(address, run_dir, check)
    return bucket.kept_up_to_date() if bucket else nullcontext()
