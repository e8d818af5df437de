"""Check one segment file, record by record, against the rows that the catalog has of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from memdb.applying import EVENTS, counts_of, event_values, revision_of, unit_row
from memdb.catalog import Catalog
from memdb.contents import digests_from, stored_element_bytes
from memdb.database import CATALOG
from memdb.digest import check_digest
from memdb.events import EventKey, wider
from memdb.records import Kind, Record, meta_str, read_body, read_prologue, read_record
from memdb.roll_forward import check_format
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.segments import OpenSegment, next_prologue

# Takes a file, what is wrong in it, the recording, and the unit that is touched, if one is.
Report = Callable[[str, str, RecordingRow, UnitRow | None], None]
Events = dict[EventKey, Record]  # one that was carried over stands in two files, and once here


class SegmentCheck:
    """One segment file up to the catalog's end, against the rows of its units."""

    def __init__(
        self,
        report: Report,
        catalog: Catalog,
        file: OpenSegment,
        recording: RecordingRow,
        units: dict[int, UnitRow],
    ) -> None:
        self._report = report
        self._file = file
        self._recording = recording
        self._catalog = catalog
        self._units = units  # by offset
        self._previous: bytes | None = b""  # footer hash of the record before, None behind damage
        self._spec = recording.spec
        self._is_foreign = False

    def run(self, end: int, events: Events) -> None:
        offset = 0
        while offset < end:
            try:
                record = read_record(self._file.fd, offset, self._file.size_bytes, file=self._file.file)
                body = read_body(self._file.fd, record, self._file.size_bytes, file=self._file.file)
            except CorruptionError as error:
                following = self._behind_damage(offset, end)
                self._damaged(str(error), offset, following)
                self._previous, offset = None, following
                continue
            try:
                self._check(record, body, events)
            except CorruptionError as error:
                if (
                    error.file == CATALOG and offset not in self._units
                ):  # rows that point into it are told below
                    self._report(CATALOG, str(error), self._recording, None)
                else:
                    self._damaged(str(error), offset, record.end, file=error.file)
            self._previous, offset = record.footer_hash, record.end
            if record.kind is Kind.UNIT:  # of anything else in its place, its unit is told below
                self._units.pop(record.offset, None)
        if offset > end:
            self._damaged(f"its last record ends at byte {offset}, the catalog's at {end}", end, offset)
        for unit in self._units.values():
            self._report(
                self._file.file, f"unit {unit.number} is not where the catalog has it", self._recording, unit
            )

    def _check(self, record: Record, body: bytes, events: Events) -> None:
        if self._previous is not None and record.meta.get("previous") != self._previous.hex():
            raise CorruptionError("a record does not follow the one before it")
        if record.kind is Kind.UNIT:
            self._check_unit(record, body)
        elif record.kind is Kind.HEADER:
            check_format(record)
            expected = (self._recording.id, self._catalog.store_id)
            if (meta_str(record, "recording_id"), meta_str(record, "store_id")) != expected:
                self._is_foreign = True
                raise CorruptionError("its header is of another recording or store")
        elif record.kind in EVENTS:
            event_values("", record)  # raises where it is none
            if any(count > self._recording.units for count in counts_of(record)):
                raise CorruptionError(
                    f"its {record.kind.name.lower()} {record.number} speaks of units that are not there"
                )
            key = record.kind, record.number
            events[key] = wider(events.get(key), record)

    def _check_unit(self, record: Record, body: bytes) -> None:
        row = self._units.get(record.offset)
        if row is None and self._is_superseded(record):
            return  # dead bytes, until compaction
        if row is None:
            what = f"unit {record.number} of {self._file.file} has no row in the catalog"
            raise CorruptionError(what, file=self._blamed)
        found = unit_row(record, recording_id=row.recording_id, segment=row.segment, commit_id=row.commit_id)
        differing = [
            item.name for item in fields(row) if getattr(row, item.name) != getattr(found, item.name)
        ]
        if differing:
            what = f"unit {record.number} differs from its row in the catalog: {differing[0]}"
            raise CorruptionError(what, file=self._blamed if row.number == record.number else self._file.file)
        check_digest(row, digests_from(row, body, stored_element_bytes(self._spec, row)))

    @property
    def _blamed(self) -> str:
        """Which is wrong where a unit and the catalog are whole and differ: the file, if it is another's altogether."""
        return self._file.file if self._is_foreign else CATALOG

    def _is_superseded(self, record: Record) -> bool:
        """Whether the catalog has a later revision of the unit, in another file."""
        if record.number >= self._recording.units:
            return False
        current = self._catalog.unit(self._recording.id, record.number)
        return current.revision > revision_of(record)

    def _behind_damage(self, offset: int, end: int) -> int:
        """Where to go on behind a damaged record: its prologue says, or the next one that is whole."""
        try:
            prologue = read_prologue(self._file.fd, offset, self._file.size_bytes, file=self._file.file)
        except CorruptionError:
            following = next_prologue(self._file, offset + 1, end)
            return end if following is None else following
        return min(offset + prologue.length, end)

    def _damaged(self, what: str, start: int, end: int, *, file: str = "") -> None:
        """Report damage between two bytes, once for each unit that it touches."""
        file = file or self._file.file
        touched = [self._units.pop(offset) for offset in sorted(self._units) if start <= offset < end]
        for unit in touched:
            self._report(file, what, self._recording, unit)
        if not touched:
            self._report(file, what, self._recording, None)
