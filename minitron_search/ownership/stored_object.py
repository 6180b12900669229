"""Write one object in storage, only if it is as the writer knows it.

On S3, and whatever speaks its protocol, storage itself decides (If-None-Match, If-Match), by boto3 where that is
installed: pyarrow has no conditions. Elsewhere, and where storage refuses them, a writer reads back what it wrote,
after `SETTLE_S`: of two that began within that time the later one has it.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from pyarrow.fs import FileSystem, FileType

from minitron_search.records.cache import content_id
from minitron_search.records.paths import inside

SETTLE_S = 2.0
# How S3 says that an object is gone, is being written by another, or was written by another.
TAKEN = ("NoSuchKey", "ConditionalRequestConflict", "PreconditionFailed")


class Kept(NamedTuple):
    """An object as it was read. `tag`: changes when it is written. `age_s`: seconds since it was."""

    content: bytes
    tag: str
    age_s: float


class StoredObject(Protocol):
    """An object whose failures are OSError or ArrowException, as all of storage's are here."""

    def read(self) -> Kept | None:
        """Return the object; None if there is none."""

    def write(self, content: bytes, tag: str | None) -> str | None:
        """Write the object if its tag is `tag`, None where there must be none; return its new tag, None if it is not
        written."""

    def delete(self) -> None:
        """Remove the object."""


def stored_object(output: str, name: str) -> StoredObject:
    """Return the object `name` inside the address `output`. Raises ValueError if that is no address."""
    if output.startswith("s3://") and find_spec("boto3") is not None:
        return S3Object(inside(output, name))
    return PlainObject(inside(output, name))


class S3Object:
    """An object of S3, at an address as pyarrow reads it."""

    def __init__(self, address: str):
        import boto3  # half a second, and only a run in storage needs it
        from botocore.exceptions import BotoCoreError, ClientError

        self.errors: Any = (BotoCoreError, ClientError)
        parts, options = urlsplit(address), parse_qs(urlsplit(address).query)
        option = {key: values[-1] for key, values in options.items()}
        endpoint = option.get("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{option.get('scheme', 'https')}://{endpoint}"
        self.place = {"Bucket": parts.netloc.rpartition("@")[2], "Key": unquote(parts.path).lstrip("/")}
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=option.get("region"),
            aws_access_key_id=unquote(parts.username) if parts.username else None,
            aws_secret_access_key=unquote(parts.password) if parts.password else None,
        )

    def read(self) -> Kept | None:
        try:
            answer = self.client.get_object(**self.place)
            content = answer["Body"].read()
        except self.errors as error:
            if _code(error) == "NoSuchKey":
                return None
            raise OSError(f"{self._address}: {error}") from error
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])  # by the clock of storage
        return Kept(content, answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def write(self, content: bytes, tag: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            return self.client.put_object(**self.place, Body=content, **condition)["ETag"]
        except self.errors as error:
            if _code(error) in TAKEN:
                return None
            if _code(error) == "NotImplemented":
                return written_and_read_back(self, content, tag, lambda: self._put(content))
            raise OSError(f"{self._address}: {error}") from error

    def _put(self, content: bytes) -> None:
        try:
            self.client.put_object(**self.place, Body=content)
        except self.errors as error:
            raise OSError(f"{self._address}: {error}") from error

    def delete(self) -> None:
        try:
            self.client.delete_object(**self.place)
        except self.errors as error:
            raise OSError(f"{self._address}: {error}") from error

    @property
    def _address(self) -> str:
        return f"s3://{self.place['Bucket']}/{self.place['Key']}"


class PlainObject:
    """An object of any of pyarrow's file systems."""

    def __init__(self, address: str):
        self.storage, self.path = FileSystem.from_uri(address)

    def read(self) -> Kept | None:
        try:
            info = self.storage.get_file_info(self.path)
            if info.type == FileType.NotFound:
                return None
            with self.storage.open_input_stream(self.path) as stream:
                content = stream.readall()
        except FileNotFoundError:
            return None
        age = (datetime.now(UTC) - info.mtime).total_seconds() if info.mtime else 0.0
        return Kept(content, f"{info.mtime_ns} {content_id(content)}", age)

    def write(self, content: bytes, tag: str | None) -> str | None:
        return written_and_read_back(self, content, tag, lambda: self._put(content))

    def _put(self, content: bytes) -> None:
        folder = self.path.rpartition("/")[0]
        self.storage.create_dir(folder, recursive=True)
        with self.storage.open_output_stream(self.path) as stream:
            stream.write(content)

    def delete(self) -> None:
        self.storage.delete_file(self.path)


def written_and_read_back(
    stored: StoredObject, content: bytes, tag: str | None, put: Callable[[], None]
) -> str | None:  # fmt: skip
    """Do what `write` of an object does where storage knows no conditions; `put` writes the content without one."""
    before = stored.read()
    if (before and before.tag) != tag:
        return None
    put()
    if before is None or before.content != content:  # taken, not kept
        time.sleep(SETTLE_S)
    after = stored.read()
    return after.tag if after is not None and after.content == content else None


def _code(error: Any) -> str | None:
    return getattr(error, "response", {}).get("Error", {}).get("Code")
