"""Segment files: append-only, one writer's own, describing themselves.

A file is named `<recording id>-<sequence>.seg`, never from a user's text. It is a sequence of records that
begins with a HEADER; each footer repeats the hash of the one before. A writer never truncates and never goes
on in another's file: it starts the next one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memdb.records import (
    ALIGNMENT_BYTES,
    MAGIC,
    Buffer,
    Record,
    read_body,
    read_exactly,
    read_prologue,
    read_record,
)
from memdb.schemas.errors import CorruptionError, StoreError

SEGMENT_BYTES_MAX = 1 << 30  # a writer goes on in the next file once one has reached this size
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{6})\.seg")
_BUFFERS_MAX = 1024  # of one pwritev (IOV_MAX)
_WINDOW_BYTES = 1 << 20


def segment_name(recording_id: str, sequence: int) -> str:
    return f"{recording_id}-{sequence:06d}.seg"


def parse_segment_name(name: str) -> tuple[str, int] | None:
    """Recording id and sequence, or None for a name that no segment has."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def segment_files(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Recording id to (sequence, file name) in order, as the folder has them."""
    files: dict[str, list[tuple[int, str]]] = {}
    for entry in os.listdir(folder):
        parsed = parse_segment_name(entry)
        if parsed:
            files.setdefault(parsed[0], []).append((parsed[1], entry))
    return {recording_id: sorted(found) for recording_id, found in files.items()}


@dataclass(frozen=True)
class OpenSegment:
    """A segment file open for reading, with its size at that moment."""

    fd: int
    size_bytes: int
    file: str  # relative to the store, for messages


@contextmanager
def reading(folder: Path, name: str) -> Iterator[OpenSegment]:
    """Open a segment. Raises CorruptionError where it is missing, unreadable or misnamed."""
    file = f"segments/{name}"
    if parse_segment_name(name) is None:
        raise CorruptionError(f"{file!r} is no name of a segment", file="catalog.sqlite")
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise CorruptionError(f"{file} cannot be opened: {error.strerror}", file=file) from None
    try:
        yield OpenSegment(fd, os.fstat(fd).st_size, file)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Scan:
    """Whole records one after another, where the last of them ends, and what stands in the way of more."""

    records: tuple[Record, ...]
    end: int  # bytes from the start of the file: where a torn tail begins
    torn: str  # "" where the file ends with the last record


def scan(segment: OpenSegment, start: int, *, previous: bytes | None = None, bodies: bool = False) -> Scan:
    """Whole records from byte `start` on, until the end of the file or the first that is not whole.

    A record is whole if its prologue, its footer and, with `bodies`, its body are what was written, and if it
    follows the footer `previous` (None: whatever).
    """
    records: list[Record] = []
    while start < segment.size_bytes:
        try:
            record = read_record(segment.fd, start, segment.size_bytes, file=segment.file)
            if previous is not None and record.meta.get("previous") != previous.hex():
                raise CorruptionError(f"{segment.file}: byte {start} does not follow what stands before it")
            if bodies:
                read_body(segment.fd, record, segment.size_bytes, file=segment.file)
        except CorruptionError as error:
            return Scan(tuple(records), start, str(error))
        records.append(record)
        start, previous = record.end, record.footer_hash
    return Scan(tuple(records), start, "")


def next_prologue(segment: OpenSegment, start: int, end: int) -> int | None:
    """The first aligned byte from `start` on, before `end`, at which a record begins; None without one."""
    end = min(end, segment.size_bytes)
    for window_start in range(start, end, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, end - window_start)
        window = read_exactly(segment.fd, window_start, length, segment.size_bytes, file=segment.file)
        at = window.find(MAGIC)
        while at >= 0:
            if (window_start + at) % ALIGNMENT_BYTES == 0:
                try:
                    read_prologue(segment.fd, window_start + at, segment.size_bytes, file=segment.file)
                except CorruptionError:
                    pass
                else:
                    return window_start + at
            at = window.find(MAGIC, at + 1)
    return None


class SegmentWriter:
    """Appends to a new segment file. Bytes are safe after `sync`."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises StoreError where the file exists or cannot be made."""
        self.name = name
        self.end_bytes = 0
        self._folder = folder
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd = os.open(folder / name, flags, 0o644)
        except OSError as error:
            raise StoreError(f"cannot make segments/{name}: {error.strerror}") from None

    def append(self, buffers: Sequence[Buffer]) -> None:
        """Write at the end. Raises OSError."""
        pending = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while pending:
            done = os.pwritev(self._fd, pending[:_BUFFERS_MAX], self.end_bytes)
            self.end_bytes += done
            while pending and done >= len(pending[0]):
                done -= len(pending.pop(0))
            if done:
                pending[0] = pending[0][done:]

    def sync(self) -> None:
        """Wait until what was appended is on the disk. Raises OSError."""
        os.fdatasync(self._fd)

    def sync_new(self) -> None:
        """The same for a file that is new: its name must be on the disk too. Raises OSError."""
        os.fsync(self._fd)
        sync_folder(self._folder)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
