"""Bring whole records beyond the catalog's end into the catalog.

They are there after a writer died between its fdatasync and its commit, and after damage to the catalog's
WAL, which SQLite answers by forgetting commits. A writer that opens calls this under the recording's lock.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from memdb.catalog import Catalog, SegmentRow, meta_str
from memdb.records import Kind, Record
from memdb.schemas.errors import CorruptionError
from memdb.segments import OpenSegment, reading, scan, segment_files, sync_folder

logger = logging.getLogger(__name__)


def roll_forward(catalog: Catalog, folder: Path, recording_id: str) -> int:
    """Commit every whole record of a recording that its segments in `folder` hold beyond the catalog's end.

    Returns how many records came back. Stops before a unit that does not go on where the recording ends.
    """
    known = {row.name: row for row in catalog.segments(recording_id)}
    came_back = 0
    for sequence, name in segment_files(folder).get(recording_id, []):
        row = known.get(name)
        start = row.end_bytes if row else 0
        with reading(folder, name) as segment:
            if segment.size_bytes <= start:
                continue
            previous = row.footer_hash if row else b""
            found = scan(segment, start, previous=previous, bodies=True)
            if found.torn:
                logger.info("%s: the bytes from %d on were never acknowledged", segment.file, found.end)
            records = _that_go_on(catalog, recording_id, found.records, segment)
            if not records:
                continue
            # A killed writer's bytes may not be on the disk yet: make them safe before they are committed.
            os.fsync(segment.fd)
        sync_folder(folder)
        end = SegmentRow(recording_id, sequence, name, records[-1].end, records[-1].footer_hash)
        catalog.apply(recording_id, end, records)
        came_back += len(records)
        logger.warning("%s: %d records came back into the catalog", segment.file, len(records))
    return came_back


def lost_recording(catalog: Catalog, folder: Path, name: str) -> str | None:
    """The id of a recording of this name that segments hold and the catalog does not know, or None."""
    known = {row.id for row in catalog.recordings()}
    for recording_id, files in sorted(segment_files(folder).items()):
        if recording_id in known:
            continue
        with reading(folder, files[0][1]) as segment:
            header = _header(segment, catalog.store_id)
        spec = header.meta.get("spec") if header else None
        if isinstance(spec, dict) and spec.get("name") == name:
            return recording_id
    return None


def _that_go_on(
    catalog: Catalog, recording_id: str, records: tuple[Record, ...], segment: OpenSegment
) -> list[Record]:
    """The records up to the first that is not this recording's or leaves a hole in its units."""
    recording = next((row for row in catalog.recordings() if row.id == recording_id), None)
    next_unit = recording.units if recording else 0
    encoding = recording.spec.encoding_fingerprint if recording else None
    good: list[Record] = []
    for record in records:
        if record.kind is Kind.HEADER:
            if (
                meta_str(record, "recording_id") != recording_id
                or meta_str(record, "store_id") != catalog.store_id
            ):
                break
        elif record.kind is Kind.UNIT:
            if record.number > next_unit or (encoding and meta_str(record, "encoding") != encoding):
                logger.warning("%s: unit %d does not go on here", segment.file, record.number)
                break
            next_unit = max(next_unit, record.number + 1)
        good.append(record)
    return good


def _header(segment: OpenSegment, store_id: str) -> Record | None:
    try:
        first = scan(segment, 0, previous=b"", bodies=True).records
        if first and first[0].kind is Kind.HEADER and meta_str(first[0], "store_id") == store_id:
            return first[0]
    except CorruptionError:
        pass
    return None
