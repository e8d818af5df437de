"""Bring whole records beyond the catalog's end into the catalog.

They are there after a process died between its sync and its commit, and after damage to the catalog's WAL,
which SQLite answers by forgetting commits. A writer that opens calls this under the recording's lock; a
reader does the same to its own copy of the catalog in memory, so that damage to a WAL hides nothing. What a
forgetting or a compaction has sealed may be committed by both at once: the second changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from memdb.applying import (
    EVENTS,
    FORGET,
    STREAM,
    SegmentRow,
    counts_of,
    event_values,
    forget_recording,
    role_of,
    spec_of,
    unit_row,
)
from memdb.catalog import Catalog
from memdb.files import sync_folder, sync_open
from memdb.locks import FileLock, commit_lock, is_held, rewrite_lock, writer_lock
from memdb.records import Kind, Record, meta_int, meta_str
from memdb.schemas.errors import CorruptionError, FormatVersionError, LockedError
from memdb.schemas.format import FORMAT_VERSION
from memdb.segments import OpenSegment, SegmentGone, reading, scan, segment_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beyond:
    """Whole records of one segment that the catalog does not have."""

    segment: SegmentRow  # as it is once they are committed
    records: tuple[Record, ...]

    @property
    def forgets_all(self) -> bool:
        return any(is_whole_tombstone(record) for record in self.records)


def roll_forward(catalog: Catalog, folder: Path, recording_id: str) -> int:
    """Commit every whole record of a recording that its segments in `folder` hold beyond the catalog's end.

    Returns how many records came back. Stops before a unit that does not go on where the recording ends.
    """
    came_back = 0
    for found in beyond(catalog, folder, recording_id):
        if not catalog.database.in_memory:
            _make_safe(folder, found.segment.name)
        came_back += _commit(catalog, recording_id, found)
        file = f"segments/{found.segment.name}"
        logger.log(
            logging.INFO if catalog.database.in_memory else logging.WARNING,
            "%s: %d records came back into the catalog",
            file,
            len(found.records),
        )
    return came_back


def see_beyond(catalog: Catalog, store_path: Path) -> None:
    """For a reader: take what no living writer is about to commit into its own copy of the catalog."""
    behind = {
        recording_id: any(part.forgets_all for part in found)
        for recording_id, found in _left_behind(catalog, store_path)
    }
    # A recording that was forgotten goes first: another one may have its name since.
    for recording_id in sorted(behind, key=lambda recording_id: not behind[recording_id]):
        catalog.database.into_memory()
        roll_forward(catalog, store_path / "segments", recording_id)


def carry_out_forgettings(catalog: Catalog, store_path: Path) -> None:
    """For one who writes: commit that whole recordings are forgotten, where who forgot them sealed it and died.

    Readers see that it is so; a catalog that is written must not show them again. What somebody is at is left to him.
    """
    for recording_id, found in list(_left_behind(catalog, store_path)):
        if any(part.forgets_all for part in found):
            with (
                suppress(LockedError),
                FileLock(rewrite_lock(store_path, recording_id)),
                FileLock(commit_lock(store_path, recording_id)),
            ):
                roll_forward(catalog, store_path / "segments", recording_id)


def _left_behind(catalog: Catalog, store_path: Path) -> Iterator[tuple[str, list[Beyond]]]:
    """Of each recording that nobody writes, what its segments hold beyond the catalog, where they do."""
    folder, forgotten = store_path / "segments", set(catalog.forgotten())
    for recording_id in segment_files(folder):
        if recording_id in forgotten or is_held(writer_lock(store_path, recording_id)):
            continue
        if found := list(beyond(catalog, folder, recording_id)):
            yield recording_id, found


def beyond(catalog: Catalog, folder: Path, recording_id: str) -> Iterator[Beyond]:
    """What the segments of a recording hold that the catalog does not, file after file."""
    if catalog.is_forgotten(recording_id):
        return
    known = {row.name: row for row in catalog.segments(recording_id)}
    waiting = set(catalog.replaced(recording_id))
    for sequence, name in segment_files(folder).get(recording_id, []):
        row = known.get(name) or SegmentRow(recording_id, sequence, name, 0, b"")
        if name in waiting:
            continue
        try:
            with reading(folder, name) as segment:
                found = scan(segment, row.end_bytes, previous=row.footer_hash, bodies=True)
        except SegmentGone:
            continue  # somebody else removed it just now
        if found.torn:
            logger.info("%s: the bytes from %d on were never acknowledged", segment.file, found.end)
        if row.end_bytes == 0:
            role = header_role(found.records, catalog.store_id, recording_id)
            if role is None or (role != STREAM and found.records[-1].kind is not Kind.SEAL):
                continue  # foreign, or left unfinished: it never counted
        else:
            role = row.role
        if not found.records:
            continue
        if catalog.state(recording_id) is None:
            if row.end_bytes or not _describes(found.records, segment):
                continue  # forgotten since the catalog was asked for its segments, or no recording
            if _is_empty(found.records) and catalog.find(spec_of(found.records[0]).name) is not None:
                continue  # begun, never filled, and begun anew: it would come back beside the one that has its name
        records = _that_go_on(catalog, recording_id, found.records, segment, role)
        if records:
            end = records[-1]
            yield Beyond(
                SegmentRow(recording_id, sequence, name, end.end, end.footer_hash, role), tuple(records)
            )


def lost_recording(catalog: Catalog, folder: Path, name: str, without: Collection[str] = ()) -> str | None:
    """The id of a recording of this name that segments hold and the catalog does not know, or None."""
    return next((found for found in _unknown_ones(catalog, folder, name) if found not in without), None)


def empty_ones(catalog: Catalog, folder: Path, name: str) -> Iterator[str]:
    """Ids of recordings that the catalog does not know, begun under this name and never filled."""
    for recording_id in _unknown_ones(catalog, folder, name):
        files = segment_files(folder)[recording_id]
        with reading(folder, files[0][1]) as segment:
            records = scan(segment, 0, previous=b"", bodies=True).records
        if len(files) == 1 and role_of(records[0]) == STREAM and _is_empty(records):
            yield recording_id


def _unknown_ones(catalog: Catalog, folder: Path, name: str) -> Iterator[str]:
    """Ids of the recordings of this name that segments hold and the catalog does not know."""
    known = {row.id for row in catalog.recordings()} | set(catalog.forgotten())
    for recording_id, files in sorted(segment_files(folder).items()):
        if recording_id in known:
            continue
        with reading(folder, files[0][1]) as segment:
            header = first_header(segment, catalog.store_id)
        spec = header.meta.get("spec") if header else None
        if isinstance(spec, dict) and spec.get("name") == name:
            yield recording_id


def _is_empty(records: tuple[Record, ...]) -> bool:
    """Whether records hold the beginning of a recording and nothing of it."""
    return all(record.kind not in (Kind.UNIT, Kind.TOMBSTONE, Kind.KEEP_SET) for record in records)


def header_role(records: tuple[Record, ...], store_id: str, recording_id: str) -> str | None:
    """The role of the segment that begins with these records, None where it is not this recording's."""
    if not records or records[0].kind is not Kind.HEADER:
        return None
    header = records[0]
    check_format(header)
    own = (meta_str(header, "recording_id"), meta_str(header, "store_id")) == (recording_id, store_id)
    return role_of(header) if own else None


def first_header(segment: OpenSegment, store_id: str) -> Record | None:
    """The header of a segment of this store, None where it is damaged or foreign."""
    try:
        first = scan(segment, 0, previous=b"", bodies=True, limit=1).records
        if first and first[0].kind is Kind.HEADER and meta_str(first[0], "store_id") == store_id:
            check_format(first[0])
            return first[0]
    except CorruptionError:
        pass
    return None


def _makes_sense(record: Record, segment: OpenSegment, units: int | None) -> bool:
    """Whether a record can be committed. In a stream an event speaks of no unit that comes after it."""
    try:
        if record.kind is Kind.UNIT:
            unit_row(record, recording_id="", segment=segment.file.removeprefix("segments/"), commit_id=0)
        elif record.kind in EVENTS and not is_whole_tombstone(record):
            event_values("", record)
            return units is None or all(count <= units for count in counts_of(record))
    except CorruptionError as error:
        logger.warning("%s", error)
        return False
    return True


def _describes(records: tuple[Record, ...], segment: OpenSegment) -> bool:
    """Whether a segment can begin a recording: one that cannot stands in the way of no other."""
    try:
        spec_of(records[0])
    except CorruptionError as error:
        logger.warning("%s: %s: it is passed over", segment.file, error)
        return is_whole_tombstone(records[-2]) if len(records) > 2 else False
    return True


def check_format(header: Record) -> None:
    """Raises FormatVersionError for a segment that a newer memdb wrote: nobody may guess what is in it."""
    found = header.meta.get("format")
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise FormatVersionError(
            f"a segment has format {found}, this memdb reads up to {FORMAT_VERSION}: install a newer memdb-video"
        )


def is_whole_tombstone(record: Record) -> bool:
    """Whether a record says that the whole recording was forgotten."""
    return record.kind is Kind.TOMBSTONE and record.meta.get("whole") is True


def _commit(catalog: Catalog, recording_id: str, found: Beyond) -> int:
    if found.forgets_all:
        at_ns = next(meta_int(record, "at_ns") for record in found.records if is_whole_tombstone(record))
        forget_recording(catalog, recording_id, at_ns)
    elif not catalog.is_forgotten(recording_id):
        catalog.apply(recording_id, found.segment, found.records)
    return len(found.records)


def _make_safe(folder: Path, name: str) -> None:
    """A killed writer's bytes may not be on the disk yet: they must be before they are committed."""
    with reading(folder, name) as segment:
        sync_open(segment.fd, folder / name, "what a killed writer left, before it is committed")
    sync_folder(folder, "the names of what a killed writer left, before it is committed")


def _that_go_on(
    catalog: Catalog, recording_id: str, records: tuple[Record, ...], segment: OpenSegment, role: str
) -> list[Record]:
    """The records up to the first that leaves a hole in the recording's units, or is encoded in another way.

    Of a forgetting all that make sense: it is obeyed as far as it can be. Of what writes a file anew all or none:
    what it replaces is removed afterwards.
    """
    state = catalog.state(recording_id)
    next_unit = state.units if state else 0
    encoding = catalog.by_id(recording_id).spec.encoding_fingerprint if state else None
    good: list[Record] = []
    for record in records:
        if not _makes_sense(record, segment, next_unit if role == STREAM else None):
            logger.warning("%s: the record at byte %d makes no sense", segment.file, record.offset)
            if role == FORGET:
                continue
            return good if role == STREAM else []
        if record.kind is Kind.UNIT:
            if role == STREAM and (
                record.number > next_unit or (encoding and meta_str(record, "encoding") != encoding)
            ):
                logger.warning("%s: unit %d does not go on here", segment.file, record.number)
                break
            next_unit = max(next_unit, record.number + 1)
        good.append(record)
    return good
