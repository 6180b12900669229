"""A trial's TensorBoard event file: its points, appended as they come."""

import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams


class Point(NamedTuple):
    """One line of a trial's log: values by tag, after so many tokens."""

    tokens: int
    values: dict[str, float]


class EventFile:
    """An event file that a resumed run appends to; `points` is how many it holds.

    A last record that a kill cut short is removed when the file is opened again, so a writer that goes on from `points`
    writes none twice. tensorboardX's own writer begins a new file, which would hold them again.

    about, scores: what TensorBoard's HPARAMS tab shows of a trial, and the tags that it sorts trials by.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], scores: Iterable[str]):
        self.path = path
        experiment, begun, _ = hparams(dict(about), dict.fromkeys(scores, 0.0))
        header = Event(file_version="brain.Event:2"), Event(summary=experiment), Event(summary=begun)
        records, size = _whole(path)
        self.points = max(0, records - len(header))
        if path.exists():
            with open(path, "r+b") as file:
                file.truncate(size if records >= len(header) else 0)
        if records < len(header):
            self._append(header)

    def append(self, points: Iterable[Point]) -> None:
        """Append points at the present time: x is tokens, and TensorBoard's relative time is when they were told."""
        events = [Event(step=point.tokens, summary=_summary(point.values)) for point in points]
        self._append(events)
        self.points += len(events)

    def _append(self, events: Iterable[Event]) -> None:
        now = time.time()
        with open(self.path, "ab") as file:
            for event in events:
                event.wall_time = now
                file.write(_record(event.SerializeToString()))


def _summary(values: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _record(data: bytes) -> bytes:
    """Return `data` as a TFRecord: length, its checksum, the data, their checksum."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def _whole(path: Path) -> tuple[int, int]:
    """Return (records, bytes) up to the first record that is not whole."""
    records, size = 0, 0
    content = path.read_bytes() if path.exists() else b""
    while len(content) >= size + 12:
        length = content[size : size + 8]
        end = size + 12 + int.from_bytes(length, "little") + 4
        if content[size + 8 : size + 12] != struct.pack("<I", masked_crc32c(length)) or end > len(content):
            break
        records, size = records + 1, end
    return records, size
