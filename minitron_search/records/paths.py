"""Find where things are kept: the cache, and the folder that a run is worked on in."""

import os
import re
from hashlib import sha256
from pathlib import Path

LOCK, OWNER = ".lock", ".owner"  # in an output: what its writer locks, and who that is (`ownership.owner`)
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")  # of pyarrow's file systems


def cache_folder() -> Path:
    """Return the folder of the cache: `$MINITRON_SEARCH_CACHE`, else `~/.cache/minitron_search`."""
    return Path(os.environ.get("MINITRON_SEARCH_CACHE", "~/.cache/minitron_search")).expanduser().absolute()


def at_home(place: str) -> str:
    """Return a path with `~` for the home folder written out. Raises ValueError where there is no such user."""
    if not place.startswith("~"):
        return place
    expanded = os.path.expanduser(place)
    if expanded.startswith("~"):
        raise ValueError(
            f"names no user of this machine; valid: a folder that exists, or ./{place} for one of that name"
        )
    return expanded


def located(place: str) -> str:
    """Return a path, or an address in storage, as it is meant: `~` is the home folder, and `S3://` is `s3://`.

    Raises ValueError for what is neither, such as `s3:/bucket`, which would be a folder called `s3:`.
    """
    scheme, colon, rest = place.partition(":")
    if colon and scheme.lower() in ("file", *SCHEMES):
        if scheme.lower() == "file":
            if not re.match("///.", rest):  # of file://host/x the host is no part of the path
                raise ValueError(f"is no address of a folder; valid: file:///{rest.strip('/') or 'runs/first'}")
        elif not re.match("//.", rest):
            raise ValueError(f"is no address; valid: {scheme.lower()}://{rest.strip('/') or 'bucket/run'}")
        return f"{scheme.lower()}:{rest}"
    return at_home(place)


def is_uri(output: str) -> bool:
    """Return whether `output` is an address in storage rather than a folder."""
    return output.partition("://")[0] in SCHEMES


def inside(output: str, name: str) -> str:
    """Return the path or address of `name` inside the folder or address `output`."""
    path, mark, options = output.partition("?") if is_uri(output) else (output, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def working_folder(output: str) -> Path:
    """Return the folder that a run is worked on in: for one in storage, its copy in the cache.

    The path is absolute: a Ray Train worker has a working directory of its own.
    """
    if not is_uri(output):
        return Path(output.removeprefix("file://")).absolute()
    address = output.partition("?")[0].rstrip("/")
    return cache_folder() / "runs" / f"{address.rpartition('/')[2]}-{sha256(address.encode()).hexdigest()[:10]}"
