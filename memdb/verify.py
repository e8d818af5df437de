"""Check every byte of a store: segments, catalog, states, and what others hand in for the files they own.

Damage is reported, never raised. Segments and catalog are compared both ways: every row must find its record,
and every record before the catalog's end must have its row. What lies behind the catalog's end was never
acknowledged: that is told, and is no problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from memdb.applying import SegmentRow, revision_of, unit_row
from memdb.contents import digests_from, stored_element_bytes
from memdb.database import CATALOG
from memdb.digest import check_digest
from memdb.records import Kind, Record, meta_int, meta_str, read_body, read_prologue, read_record
from memdb.schemas.errors import CodecError, CorruptionError
from memdb.schemas.recording import Epoch, Gap
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.times import to_s
from memdb.segments import OpenSegment, next_prologue, parse_segment_name, reading, scan
from memdb.state import read_state, recording_of, state_files
from memdb.stats import size_bytes
from memdb.store import Store


@dataclass(frozen=True)
class Problem:
    """Something that differs from what was written."""

    file: str  # relative to the store
    what: str
    recording: str = ""  # name, where one is touched
    start_s: float | None = None  # media time, where a unit is touched
    end_s: float | None = None


@dataclass
class VerifyReport:
    checked_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # worth telling, but no damage

    @property
    def ok(self) -> bool:
        return not self.problems


Checker = Callable[[Path], list[Problem]]  # of files that others own; takes the store's directory
Progress = Callable[[int, int], None]  # bytes checked, bytes in all


def verify(
    store: Store, *, checkers: Sequence[Checker] = (), progress: Progress | None = None
) -> VerifyReport:
    """Check every byte. Never raises for damage."""
    run = _Verification(store, progress)
    run.catalog()
    for recording in run.recordings:
        run.recording(recording)
    run.strangers()
    run.states()
    for checker in checkers:
        run.report.problems += checker(store.path)
    return run.report


def verify_path(
    path: str | os.PathLike[str], *, checkers: Sequence[Checker] = (), progress: Progress | None = None
) -> VerifyReport:
    """The same for a store that may be too damaged to open. Raises NotAStore, FormatVersionError."""
    try:
        with Store.open(path) as store:
            return verify(store, checkers=checkers, progress=progress)
    except CorruptionError as error:
        return VerifyReport(problems=[Problem(error.file or CATALOG, str(error))])


class _Verification:
    def __init__(self, store: Store, progress: Progress | None) -> None:
        self.report = VerifyReport()
        self.recordings: list[RecordingRow] = []
        self.store = store
        self._progress = progress
        self._catalog_files = [store.path / CATALOG, store.path / f"{CATALOG}-wal"]
        own = [*store.segments_path.iterdir(), *(store.path / "state").iterdir()]
        self._all_bytes = sum(map(size_bytes, [*own, *self._catalog_files]))

    def catalog(self) -> None:
        """SQLite's own check, and the rows that belong to no recording."""
        with self._noting(CATALOG):
            for row in self.store.catalog.database.execute("PRAGMA integrity_check"):
                if row != ("ok",):
                    self.add(CATALOG, f"SQLite finds: {row[0]!s}")
        with self._noting(CATALOG):
            self.store.catalog.database.select("meta", "")
            _ = self.store.model
        with self._noting(CATALOG):
            self.recordings = self.store.recordings()
        self._checked(sum(map(size_bytes, self._catalog_files)))

    def recording(self, recording: RecordingRow) -> None:
        """The rows of a recording, its segments, and one against the other."""
        catalog = self.store.catalog
        segments: list[SegmentRow] = []
        with self._noting(CATALOG, recording), catalog.database.reading():
            # Of one moment: a writer that is at work adds to all of them.
            recording = catalog.by_id(recording.id)
            segments = catalog.segments(recording.id)
        units: dict[str, dict[int, UnitRow]] = {row.name: {} for row in segments}  # by file and offset
        for number in range(recording.units):
            with self._noting(CATALOG, recording):
                unit = catalog.unit(recording.id, number)
                units.setdefault(unit.segment, {})[unit.offset] = unit
        events: list[Gap | Epoch] = []
        before = len(self.report.problems)
        ends = {row.name: row.end_bytes for row in segments}
        folder = self.store.segments_path
        for name, own_units in sorted(units.items()):
            # A segment whose own row is lost reaches as far as the rows of its units do.
            end = ends.get(name, max((unit.offset + unit.length for unit in own_units.values()), default=0))
            with self._noting(f"segments/{name}", recording), reading(folder, name) as file:
                _SegmentCheck(self, file, recording, own_units).run(end, events)
                self._tail(file, end, recording)
                self._checked(file.size_bytes)
        if len(self.report.problems) == before:
            gaps = tuple(event for event in events if isinstance(event, Gap))
            epochs = tuple(event for event in events if isinstance(event, Epoch))
            if (gaps, epochs) != (recording.gaps, recording.epochs):
                self.add(CATALOG, "gaps or epochs differ from those in the segments", recording)

    def strangers(self) -> None:
        """Files in segments/ that the catalog does not know."""
        known = {recording.id: recording for recording in self.recordings}
        named = {row.name for found in known for row in self._segment_rows(found)}
        for path in sorted(self.store.segments_path.iterdir()):
            parsed = parse_segment_name(path.name)
            if path.name in named:
                continue
            if parsed is None:
                self.report.notes.append(f"segments/{path.name} is no file of a store")
                continue
            with self._noting(f"segments/{path.name}"), reading(path.parent, path.name) as file:
                self._tail(file, 0, known.get(parsed[0]), recording_id=parsed[0])
                self._checked(file.size_bytes)

    def states(self) -> None:
        known = {recording.id: recording for recording in self.recordings}
        for path in state_files(self.store.path / "state"):
            recording = known.get(recording_of(path))
            try:
                state = read_state(path)
            except CorruptionError as error:
                if path.exists():  # else a writer just replaced it
                    self.add(error.file, str(error), recording)
            else:
                self._checked(len(state.payload))
                if recording and state.encoding_fingerprint != recording.spec.encoding_fingerprint:
                    self.add(f"state/{path.name}", "is of another encoding than its recording", recording)

    def _tail(
        self, file: OpenSegment, end: int, recording: RecordingRow | None, *, recording_id: str = ""
    ) -> None:
        """What lies behind the catalog's end: nobody was told that it is safe."""
        owner = recording.id if recording else recording_id
        if file.size_bytes <= end or self.store.is_written(owner):
            return
        behind = scan(file, end, bodies=True)
        if behind.records:
            self.report.notes.append(
                f"{file.file}: {len(behind.records)} whole records were never acknowledged: the next "
                "ingest of this recording brings them back"
            )
        if behind.torn:
            self.report.notes.append(
                f"{file.file}: {file.size_bytes - behind.end} torn bytes at the end were never acknowledged"
            )

    def _segment_rows(self, recording_id: str) -> list[SegmentRow]:
        try:
            return self.store.catalog.segments(recording_id)
        except CorruptionError:
            return []  # reported with the recording

    @contextmanager
    def _noting(self, file: str, recording: RecordingRow | None = None) -> Iterator[None]:
        try:
            yield
        except (CorruptionError, CodecError) as error:
            self.add(getattr(error, "file", "") or file, str(error), recording)

    def add(
        self, file: str, what: str, recording: RecordingRow | None = None, unit: UnitRow | None = None
    ) -> None:
        problem = Problem(
            file,
            what,
            recording.name if recording else "",
            to_s(unit.start_ns) if unit else None,
            to_s(unit.end_ns) if unit else None,
        )
        if problem not in self.report.problems:
            self.report.problems.append(problem)

    def _checked(self, size: int) -> None:
        self.report.checked_bytes += size
        if self._progress:
            self._progress(self.report.checked_bytes, self._all_bytes)


class _SegmentCheck:
    """One segment file up to the catalog's end, against the rows of its units."""

    def __init__(
        self, run: _Verification, file: OpenSegment, recording: RecordingRow, units: dict[int, UnitRow]
    ) -> None:
        self._run = run
        self._file = file
        self._recording = recording
        self._store_id = run.store.store_id
        self._units = units  # by offset
        self._previous: bytes | None = b""  # footer hash of the record before, None behind damage
        self._spec = recording.spec

    def run(self, end: int, events: list[Gap | Epoch]) -> None:
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
                self._damaged(str(error), offset, record.end, file=error.file)
            self._previous, offset = record.footer_hash, record.end
            self._units.pop(record.offset, None)
        if offset > end:
            self._damaged(f"its last record ends at byte {offset}, the catalog's at {end}", end, offset)
        for unit in self._units.values():
            self._run.add(
                self._file.file, f"unit {unit.number} is not where the catalog has it", self._recording, unit
            )

    def _check(self, record: Record, body: bytes, events: list[Gap | Epoch]) -> None:
        if self._previous is not None and record.meta.get("previous") != self._previous.hex():
            raise CorruptionError("a record does not follow the one before it")
        if record.kind is Kind.UNIT:
            self._check_unit(record, body)
        elif record.kind is Kind.HEADER:
            expected = (self._recording.id, self._store_id)
            if (meta_str(record, "recording_id"), meta_str(record, "store_id")) != expected:
                raise CorruptionError("its header is of another recording or store")
        elif record.kind is Kind.GAP:
            start_ns, end_ns = meta_int(record, "start_ns"), meta_int(record, "end_ns")
            events.append(Gap(start_ns, end_ns, meta_str(record, "reason")))
        elif record.kind is Kind.EPOCH:
            number, first_unit = meta_int(record, "epoch"), meta_int(record, "first_unit")
            events.append(Epoch(number, first_unit, meta_str(record, "reason")))

    def _check_unit(self, record: Record, body: bytes) -> None:
        row = self._units.get(record.offset)
        if row is None and self._is_superseded(record):
            return  # dead bytes, until compaction
        if row is None:
            what = f"unit {record.number} of {self._file.file} has no row in the catalog"
            raise CorruptionError(what, file=CATALOG)
        found = unit_row(record, recording_id=row.recording_id, segment=row.segment, commit_id=row.commit_id)
        differing = [
            item.name for item in fields(row) if getattr(row, item.name) != getattr(found, item.name)
        ]
        if differing:
            what = f"unit {record.number} differs from its row in the catalog: {differing[0]}"
            raise CorruptionError(what, file=CATALOG)
        check_digest(row, digests_from(row, body, stored_element_bytes(self._spec, row)))

    def _is_superseded(self, record: Record) -> bool:
        """Whether the catalog has a later revision of the unit, in another file."""
        if record.number >= self._recording.units:
            return False
        current = self._run.store.catalog.unit(self._recording.id, record.number)
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
            self._run.add(file, what, self._recording, unit)
        if not touched:
            self._run.add(file, what, self._recording)
