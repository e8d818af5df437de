"""Segments that forgetting and rewriting make: whole once they are sealed, nothing before.

    HEADER   role forget or rewrite
    ...      tombstones, units as later revisions of themselves, events carried over
    SEAL     which files it replaces

A process that dies on the way leaves a file without a seal. That never counted: the next one removes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memdb.applying import EVENTS, SegmentRow
from memdb.catalog import Catalog
from memdb.contents import check_unit, encode_unit, stored_element_bytes, unit_from
from memdb.records import Buffer, Kind, Record, encode, read_body, read_record
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.units import Unit
from memdb.segments import reading
from memdb.writer import OwnSegment, segment_header

FORGOTTEN_DIGEST = bytes(16)  # stands for the first digest of what must not be known any more


class SealedSegment:
    """A segment on its way to its seal. Raises OSError and StoreError where it cannot be written."""

    def __init__(self, catalog: Catalog, folder: Path, recording: RecordingRow, role: str) -> None:
        self._catalog, self._recording = catalog, recording
        self._segment = OwnSegment.next(folder, recording.id, role)
        self.name = self._segment.name
        self._records: list[Record] = []
        try:
            buffers, header = segment_header(catalog.store_id, recording, self._segment)
            self._write(buffers, header)
        except BaseException:
            self._segment.close()
            raise

    @property
    def end_bytes(self) -> int:
        return self._segment.end_bytes

    def event(self, kind: Kind, number: int, meta: dict[str, object]) -> None:
        """A gap, epoch, end or tombstone."""
        self._add(kind, number, meta)

    def carry(self, record: Record) -> None:
        """An event of a segment that this one replaces, as it was."""
        _, integers, texts = EVENTS[record.kind]
        self._add(record.kind, record.number, {name: record.meta[name] for name in (*integers, *texts)})

    def unit(
        self,
        unit: Unit,
        row: UnitRow,
        *,
        codec: str | None = None,
        kept_ppm: int | None = None,
        first_digest: bytes = b"",
    ) -> None:
        """The next revision of a unit whose row was `row`."""
        check_unit(unit)
        buffers, record = encode_unit(
            unit,
            offset=self._segment.end_bytes,
            previous=self._segment.footer_hash,
            encoding_fingerprint=self._recording.spec.encoding_fingerprint,
            written={
                "revision": row.revision + 1,
                "codec": row.codec if codec is None else codec,
                "first_digest": (first_digest or row.first_digest).hex(),
                "kept_ppm": row.kept_ppm if kept_ppm is None else kept_ppm,
            },
        )
        self._write(buffers, record)

    def seal(self, *, replaces: Sequence[str] = (), kv_from_unit: int = 0) -> SegmentRow:
        """Close the file and commit it: from then on it counts. Returns its row."""
        self._seal(replaces, kv_from_unit)
        self._segment.sync_new("a sealed segment, before it is committed", "the name of a sealed segment")
        row = self._segment.row(self._records[-1])
        self._catalog.apply(self._recording.id, row, self._records)
        return row

    def seal_whole(self) -> None:
        """The same for a file that says that all of the recording is forgotten."""
        self._seal()
        self._segment.sync_new(
            "the tombstone of a recording, before it is committed", "the name of a recording's tombstone"
        )

    def seal_apart(self) -> None:
        """The same for a file of a repair, which makes the catalog anew afterwards. Two seals: one may be lost."""
        self._seal()
        self._seal()
        self._segment.sync_new("what a repair writes anew", "the name of what a repair writes anew")

    def _seal(self, replaces: Sequence[str] = (), kv_from_unit: int = 0) -> None:
        meta = {"replaces": list(replaces), "kv_from_unit": kv_from_unit, "role": self._segment.role}
        self._add(Kind.SEAL, len(self._records), meta)

    def close(self) -> None:
        self._segment.close()

    def _add(self, kind: Kind, number: int, meta: dict[str, object]) -> None:
        segment = self._segment
        self._write(*encode(kind, number, meta, offset=segment.end_bytes, previous=segment.footer_hash))

    def _write(self, buffers: list[Buffer], record: Record) -> None:
        self._segment.append(buffers)
        self._segment.footer_hash = record.footer_hash
        self._records.append(record)


def read_unit(folder: Path, recording: RecordingRow, row: UnitRow) -> Unit:
    """A unit from its segment, every byte of it verified. Raises CorruptionError."""
    with reading(folder, row.segment) as segment:
        record = read_record(segment.fd, row.offset, segment.size_bytes, file=segment.file)
        body = read_body(segment.fd, record, segment.size_bytes, file=segment.file)
    return unit_from(row, body, stored_element_bytes(recording.spec, row))


def empty_husk(row: UnitRow) -> Unit:
    """What stays of a unit of which nothing may stay, or of which the bytes are lost: number, times, rows of blocks."""
    blocks = np.array(row.blocks, copy=True)
    blocks["tokens"] = 0
    return Unit(row.number, row.start_ns, row.end_ns, row.epoch, blocks, None, None, None, None)
