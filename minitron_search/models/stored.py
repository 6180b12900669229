"""A model folder in storage, as a run leaves one: `teacher.model: s3://BUCKET/NAME/best`."""

import os
import shutil
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, copy_files

from minitron_search.models.architecture import digest
from minitron_search.records.paths import cache_folder
from minitron_search.records.transfer import WHOLE


def is_stored(address: str) -> bool:
    """Whether a run has put it there, and whole."""
    there, base = FileSystem.from_uri(address)
    return there.get_file_info(base + WHOLE).type == FileType.File


def stored_model(address: str) -> Path:
    """A copy in the cache, made once of what is there; a path where nothing is if nothing is there.

    Raises ValueError where storage does not answer.
    """
    try:
        there, base = FileSystem.from_uri(address)
        found = there.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
        files = sorted((info.path, info.size, str(info.mtime)) for info in found if info.type == FileType.File)
        folder = cache_folder() / "stored" / digest([address.partition("?")[0], files])
        if files and not folder.exists():
            partial = folder.with_name(f".{folder.name}.{os.getpid()}")
            for path, _, _ in files:
                here = partial / Path(path).relative_to(base)
                here.parent.mkdir(parents=True, exist_ok=True)
                copy_files(path, str(here), source_filesystem=there)
            try:
                partial.rename(folder)
            except OSError:  # another process was first: its folder is the same
                shutil.rmtree(partial)
    except (ArrowException, OSError) as error:
        raise ValueError(f"teacher.model: {address!r} could not be read: {str(error).strip().splitlines()[0]}; valid: "
                         "an address that these credentials may read, as s3://BUCKET/NAME/best") from None  # fmt: skip
    return folder
