"""Reading a segment that may be damaged anywhere: each whole record of it, and where one is missing.

One bad record hides none behind it. A prologue that is whole says where the next record begins, whatever became
of body and footer; without it the next one is searched for. Bodies are read and verified one at a time; of units
a line of numbers is kept each, so that a year of footage fits into memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memdb.applying import EVENTS, FORGET, REWRITE, STREAM, TOMBSTONES_MAX, meta_names, role_of, unit_row
from memdb.one_bit import corrected_header
from memdb.records import (
    ALIGNMENT_BYTES,
    Kind,
    Record,
    meta_int,
    meta_str,
    read_body,
    read_prologue,
    read_record,
)
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.schemas.units import Table
from memdb.segments import OpenSegment, next_prologue, reading

# One row a unit's record whose footer is whole. `whole`: its body is, too.
FOUND_DTYPE = np.dtype(
    [
        (name, "<i8")
        for name in ("number", "revision", "offset", "end", "start_ns", "end_ns", "epoch", "whole")
    ]
)
_SECTOR_BYTES = 4096
Progress = Callable[[int], None]  # bytes that were read since


@dataclass(frozen=True)
class Hole:
    """A stretch of a file in which no record is whole."""

    start: int  # bytes from the start of the file
    end: int
    what: str
    unit: int | None = None  # the number of the unit that stood there, where that much could be read


@dataclass(eq=False)
class SegmentContents:
    """What could be read of one segment file."""

    name: str
    sequence: int
    size_bytes: int
    header: Record | None = None
    corrected: bool = False  # the header is whole but for a flipped bit
    events: list[Record] = field(default_factory=list)  # gaps, epochs, ends, tombstones
    seals: list[Record] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    units: Table = field(default_factory=lambda: np.zeros(0, FOUND_DTYPE))

    @property
    def file(self) -> str:
        return f"segments/{self.name}"

    @property
    def sealed(self) -> bool:
        return bool(self.seals)

    @property
    def role(self) -> str:
        """As the header says, else as what it holds tells."""
        if self.header is not None:
            return role_of(self.header)
        told = [str(seal.meta["role"]) for seal in self.seals if "role" in seal.meta]
        if told:
            return told[0]
        if any(event.kind is Kind.TOMBSTONE for event in self.events):
            return FORGET
        return REWRITE if self.seals or self.units["revision"].any() else STREAM

    @property
    def replaces(self) -> set[str]:
        return {name for seal in self.seals for name in meta_names(seal, "replaces")}

    @property
    def kv_from_unit(self) -> int:
        return max((meta_int(seal, "kv_from_unit") for seal in self.seals), default=0)

    def tombstones(self, *, whole: bool) -> list[Record]:
        """Those of spans, or those that say that all of the recording is forgotten."""
        found = [event for event in self.events if event.kind is Kind.TOMBSTONE]
        return [event for event in found if (event.meta.get("whole") is True) == whole]


def read_contents(
    folder: Path, name: str, sequence: int, progress: Progress | None = None
) -> SegmentContents:
    """Everything that can be read of a segment file; nothing, where it cannot be opened."""
    contents = SegmentContents(name, sequence, 0)
    rows = array("q")
    try:
        with reading(folder, name) as segment:
            contents.size_bytes = segment.size_bytes
            for item in _walk(segment):
                if isinstance(item, Hole):
                    _add_hole(contents.holes, item)
                    start, end = item.start, item.end
                else:
                    record, whole = item
                    start, end = record.offset, record.end
                    try:
                        _add_record(contents, rows, record, whole)
                    except (CorruptionError, ValueError) as error:
                        _add_hole(contents.holes, Hole(start, end, f"a record has no known form: {error}"))
                if progress:
                    progress(end - start)
            if contents.header is None and (found := corrected_header(segment)) is not None:
                with suppress(CorruptionError, ValueError):
                    _add_record(contents, rows, found, True)
                    contents.corrected = contents.header is not None
    except CorruptionError as error:
        contents.holes.append(Hole(0, contents.size_bytes, str(error)))
    contents.units = np.frombuffer(rows.tobytes(), FOUND_DTYPE)
    return contents


def record_at(folder: Path, name: str, offset: int) -> Record:
    """One record, its footer verified. Raises CorruptionError."""
    with reading(folder, name) as segment:
        return read_record(segment.fd, offset, segment.size_bytes, file=segment.file)


def row_at(folder: Path, recording_id: str, name: str, offset: int, commit_id: int = 0) -> UnitRow:
    """The row of a unit whose record stands there. Raises CorruptionError."""
    record = record_at(folder, name, offset)
    return unit_row(record, recording_id=recording_id, segment=name, commit_id=commit_id)


def _walk(segment: OpenSegment) -> Iterator[tuple[Record, bool] | Hole]:
    """Records with whether their bodies are whole, and holes, in the order of the file."""
    offset = 0
    while offset < segment.size_bytes:
        try:
            record = read_record(segment.fd, offset, segment.size_bytes, file=segment.file)
        except CorruptionError as error:
            hole = _hole(segment, offset, str(error))
            yield hole
            offset = hole.end
            continue
        whole = True
        try:
            read_body(segment.fd, record, segment.size_bytes, file=segment.file)
        except CorruptionError:
            whole = False
        yield record, whole
        offset = record.end


def _hole(segment: OpenSegment, offset: int, what: str) -> Hole:
    try:
        prologue = read_prologue(segment.fd, offset, segment.size_bytes, file=segment.file)
    except CorruptionError:
        following = next_record(segment, offset + ALIGNMENT_BYTES)
        return Hole(offset, segment.size_bytes if following is None else following, what)
    unit = prologue.number if prologue.kind == Kind.UNIT else None
    return Hole(offset, offset + prologue.length, what, unit)


def next_record(segment: OpenSegment, start: int) -> int | None:
    """Where the next record begins. Sectors that cannot be read are passed over."""
    try:
        return next_prologue(segment, start, segment.size_bytes)
    except CorruptionError:
        for at in range(start, segment.size_bytes, _SECTOR_BYTES):
            with suppress(CorruptionError):
                found = next_prologue(segment, at, at + _SECTOR_BYTES)
                if found is not None:
                    return found
    return None


def _add_hole(holes: list[Hole], hole: Hole) -> None:
    """Nameless holes side by side are one."""
    if holes and holes[-1].end == hole.start and holes[-1].unit is None and hole.unit is None:
        holes[-1] = Hole(holes[-1].start, hole.end, holes[-1].what)
    else:
        holes.append(hole)


def _add_record(contents: SegmentContents, rows: array[int], record: Record, whole: bool) -> None:
    if record.kind is Kind.UNIT:
        row = unit_row(record, recording_id="", segment=contents.name, commit_id=0)
        _ = row.parts, row.slices
        rows.extend(
            (row.number, row.revision, record.offset, record.end, row.start_ns, row.end_ns, row.epoch, whole)
        )
    elif record.kind is Kind.HEADER and record.offset == 0:
        for key in ("recording_id", "store_id"):
            meta_str(record, key)
        role_of(record)
        contents.header = record
    elif record.kind is Kind.SEAL:
        meta_names(record, "replaces")
        meta_int(record, "kv_from_unit")
        contents.seals.append(record)
    elif record.kind is Kind.TOMBSTONE and record.meta.get("whole") is True:
        meta_int(record, "at_ns")
        contents.events.append(record)
    elif record.kind in EVENTS:
        _, integers, texts = EVENTS[record.kind]
        for key in integers:
            meta_int(record, key)
        for key in texts:
            meta_str(record, key)
        if (
            record.kind is Kind.TOMBSTONE
            and not 0 <= meta_int(record, "first") <= record.number < TOMBSTONES_MAX
        ):
            raise ValueError("it stands for tombstones that cannot be")
        contents.events.append(record)
