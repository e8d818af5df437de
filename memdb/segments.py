"""Segment files: append-only, one writer's own, describing themselves.

A file is named `<recording id>-<sequence>.seg`, never from a user's text. It is a sequence of records that
begins with a HEADER; each footer repeats the hash of the one before. A writer never truncates and never goes
on in another's file: it starts the next one.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memdb.files import File, sync_folder, unlink
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
from memdb.room import refused
from memdb.schemas.errors import CorruptionError

SEGMENT_BYTES_MAX = 1 << 30  # a writer goes on in the next file once one has reached this size
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{6})\.seg")
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


class SegmentGone(CorruptionError):
    """A segment that the catalog named a moment ago is not there: it was replaced, or it is lost.

    Whoever meets it looks into the catalog once more; if that names the same file still, the file is lost.
    """


@dataclass(frozen=True)
class OpenSegment:
    """A segment file open for reading, with its size at that moment."""

    fd: int
    size_bytes: int
    file: str  # relative to the store, for messages


@contextmanager
def reading(folder: Path, name: str) -> Iterator[OpenSegment]:
    """Open a segment and pin it: while it is open, nobody removes it.

    Raises SegmentGone where it is missing or being removed, CorruptionError where it is unreadable or misnamed.
    """
    file = f"segments/{name}"
    if parse_segment_name(name) is None:
        raise CorruptionError(f"{file!r} is no name of a segment", file="catalog.sqlite")
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise SegmentGone(f"{file} is not there", file=file) from None
    except OSError as error:
        raise CorruptionError(f"{file} cannot be opened: {error.strerror}", file=file) from None
    try:
        _pin(fd, file)
        yield OpenSegment(fd, os.fstat(fd).st_size, file)
    finally:
        os.close(fd)


def _pin(fd: int, file: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SegmentGone(f"{file} is being removed", file=file) from None
    except OSError:
        pass  # a file system without locks: nothing is written there, or the writer would have refused it


@dataclass(frozen=True)
class Scan:
    """Whole records one after another, where the last of them ends, and what stands in the way of more."""

    records: tuple[Record, ...]
    end: int  # bytes from the start of the file: where a torn tail begins
    torn: str  # "" where the file ends with the last record


def scan(
    segment: OpenSegment,
    start: int,
    *,
    previous: bytes | None = None,
    bodies: bool = False,
    limit: int | None = None,
) -> Scan:
    """Whole records from byte `start` on, until the end of the file, the first that is not whole, or `limit`.

    A record is whole if its prologue, its footer and, with `bodies`, its body are what was written, and if it
    follows the footer `previous` (None: whatever).
    """
    records: list[Record] = []
    while start < segment.size_bytes and (limit is None or len(records) < limit):
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
    start += -start % ALIGNMENT_BYTES  # so that no magic lies across two windows
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
    """Appends to a new segment file, which it pins. Bytes are safe after `sync`."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises FileExistsError, and StoreError where the file cannot be made."""
        self.name = name
        self.end_bytes = 0
        self._folder = folder
        try:
            self._file = File(folder / name)
        except FileExistsError:
            raise
        except OSError as error:
            raise refused(error, f"cannot make segments/{name}") from None
        fcntl.flock(self._file.fd, fcntl.LOCK_SH)

    def append(self, buffers: Sequence[Buffer]) -> None:
        """Write at the end. Raises OSError."""
        self.end_bytes = self._file.write(buffers, self.end_bytes)

    def sync(self, why: str) -> None:
        """Wait until what was appended is on the disk. Raises OSError."""
        self._file.sync(why)

    def sync_new(self, why: str, why_name: str) -> None:
        """The same for a file that is new: its name must be on the disk too. Raises OSError."""
        self._file.sync(why)
        sync_folder(self._folder, why_name)

    def close(self) -> None:
        self._file.close()


def remove_segments(folder: Path, names: Sequence[str], why: str) -> list[str]:
    """Remove segment files as `unlink_segments` does, and wait until that is on the disk."""
    gone = unlink_segments(folder, names)
    if gone:
        sync_folder(folder, why)
    return gone


def unlink_segments(folder: Path, names: Sequence[str]) -> list[str]:
    """Remove segment files that nobody has open; the names of those that are gone now. Raises OSError.

    One that is being read or written stays, for a later try: bytes that somebody reads are still on the disk.
    A power cut may bring back what is gone.
    """
    return [name for name in names if _remove(folder / name)]


def _remove(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
