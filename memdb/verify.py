"""Check every byte of a store: segments, catalog, states, and what others hand in for the files they own.

Damage is reported, never raised. Segments and catalog are compared both ways: every row must find its record,
and every record before the catalog's end must have its row. What lies behind the catalog's end was never
acknowledged: that is told, and is no problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from memdb.applying import STREAM, SegmentRow, event_values, role_of
from memdb.believed import LOST_MAX
from memdb.database import CATALOG, Value
from memdb.events import EventKey, without_joined
from memdb.folder import FILES, FOLDERS
from memdb.records import Kind, Record
from memdb.schemas.errors import CodecError, CorruptionError, UnknownRecording
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.times import to_s
from memdb.segments import OpenSegment, SegmentGone, parse_segment_name, reading, scan
from memdb.state import OlderState, read_state, recording_of, state_files
from memdb.stats import size_bytes
from memdb.store import Store
from memdb.verify_segments import Events, SegmentCheck

_TRIES = 5


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


# Of files that others own: takes the store's directory, gives problems, and notes as text.
Checker = Callable[[Path], Sequence[Problem | str]]
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
        for found in checker(store.path):
            if isinstance(found, str):
                run.report.notes.append(found)
            else:
                run.report.problems.append(found)
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


def _is_unfinished(records: Sequence[Record]) -> bool:
    """Whether a forgetting or a rewriting died before it sealed its file."""
    header = bool(records) and records[0].kind is Kind.HEADER
    return header and role_of(records[0]) != STREAM and records[-1].kind is not Kind.SEAL


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
        if self.store.catalog.database.in_memory:
            self._note(f"{CATALOG} is behind the segments, or of an older format: the next ingest mends it")
        self._checked(sum(map(size_bytes, self._catalog_files)))

    def recording(self, recording: RecordingRow) -> None:
        """The rows of a recording, its segments, and one against the other.

        Where another process moved its units meanwhile, or forgot it, what looked like damage is looked at again.
        """
        report = self.report
        for left in reversed(range(_TRIES)):
            problems, notes, checked_bytes = len(report.problems), len(report.notes), report.checked_bytes
            try:
                names = self._recording(recording)
            except UnknownRecording:  # forgotten, and nothing of it is left to check
                names = set()
            else:
                if len(report.problems) == problems or not left or not self._has_moved(recording, names):
                    return
            del report.problems[problems:], report.notes[notes:]
            report.checked_bytes = checked_bytes
            if not names:
                return

    def _has_moved(self, recording: RecordingRow, names: set[str]) -> bool:
        return {row.name for row in self._segment_rows(recording.id)} != names

    def _recording(self, recording: RecordingRow) -> set[str]:
        """The names of the segments that were checked."""
        catalog = self.store.catalog
        segments: list[SegmentRow] = []
        with self._noting(CATALOG, recording), catalog.database.reading():
            # Of one moment: a writer that is at work adds to all of them.
            recording = catalog.by_id(recording.id)
            segments = catalog.segments(recording.id)
        units: dict[str, dict[int, UnitRow]] = {row.name: {} for row in segments}  # by file and offset
        for number in range(self._rows_there(recording)):
            with self._noting(CATALOG, recording):
                unit = catalog.unit(recording.id, number)
                units.setdefault(unit.segment, {})[unit.offset] = unit
        events: Events = {}
        before = len(self.report.problems)
        ends = {row.name: row.end_bytes for row in segments}
        folder = self.store.segments_path
        for name, own_units in sorted(units.items()):
            # A segment whose own row is lost reaches as far as the rows of its units do.
            end = ends.get(name, max((unit.offset + unit.length for unit in own_units.values()), default=0))
            with self._noting(f"segments/{name}", recording), reading(folder, name) as file:
                SegmentCheck(self.add, catalog, file, recording, own_units).run(end, events)
                self._tail(file, end, recording)
                self._checked(file.size_bytes)
        if len(self.report.problems) == before:
            self._events(recording, events)
        return {row.name for row in segments}

    def _rows_there(self, recording: RecordingRow) -> int:
        """How many units to look at: a row that counts more than there are is not believed."""
        there = 0
        with self._noting(CATALOG, recording):
            where = "SELECT count(*), max(number) FROM units WHERE recording = ?"
            [(count, last)] = self.store.catalog.database.execute(where, (recording.id,))
            rows = int(count or 0)
            if not 0 <= recording.units <= rows:
                self.add(CATALOG, f"{rows} of {recording.units} rows of units are there", recording)
            there = min(rows + LOST_MAX, int(last) + 1 if isinstance(last, int) else 0)
        return min(there, recording.units)

    def _events(self, recording: RecordingRow, events: Events) -> None:
        """Gaps, epochs and tombstones of the segments against those of the catalog."""
        known: dict[EventKey, tuple[Value, ...]] = {}
        for number, gap in enumerate(recording.gaps):
            known[Kind.GAP, number] = (gap.start_ns, gap.end_ns, gap.reason)
        for number, epoch in enumerate(recording.epochs):
            known[Kind.EPOCH, number] = (epoch.number, epoch.first_unit, epoch.reason)
        for first, stone in enumerate(recording.tombstones):
            values = (stone.start_ns, stone.end_ns, stone.below_unit, stone.at_ns, first)
            known.setdefault((Kind.TOMBSTONE, stone.number), values)
        found = {key: event_values("", event)[2:] for key, event in without_joined(events).items()}
        if known != {key: values for key, values in found.items() if key[0] is not Kind.END}:
            self.add(CATALOG, "gaps, epochs or tombstones differ from those in the segments", recording)

    def strangers(self) -> None:
        """Files that the catalog does not know, or waits to see removed."""
        known = {recording.id: recording for recording in self.recordings}
        named = {row.name for found in known for row in self._segment_rows(found)}
        waiting: set[str] = set()
        forgotten: set[str] = set()
        with self._noting(CATALOG):
            forgotten = set(self.store.catalog.forgotten())
            waiting = {name for found in known for name in self.store.catalog.replaced(found)}
        for path in sorted(self.store.segments_path.iterdir()):
            parsed = parse_segment_name(path.name)
            if path.name in named:
                continue
            if parsed is None:
                self._note(f"segments/{path.name} is no file of a store")
            elif parsed[0] in forgotten:
                self._note(f"segments/{path.name} is of a forgotten recording: memdb compact removes it")
            elif path.name in waiting:
                self._note(f"segments/{path.name} was written anew elsewhere: memdb compact removes it")
            else:
                own = f"segments/{path.name}"
                with self._noting(own), suppress(SegmentGone), reading(path.parent, path.name) as file:
                    self._tail(file, 0, known.get(parsed[0]), recording_id=parsed[0])
                    self._checked(file.size_bytes)
        for path in sorted(self.store.path.iterdir()):
            if path.name not in FOLDERS and not path.name.startswith(FILES):
                self._note(f"{path.name} is no file of a store")

    def _note(self, what: str) -> None:
        self.report.notes.append(what)

    def states(self) -> None:
        known = {recording.id: recording for recording in self.recordings}
        for path in state_files(self.store.path / "state"):
            recording = known.get(recording_of(path))
            try:
                state = read_state(path)
            except OlderState as error:
                self._note(str(error))
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
        if end == 0 and _is_unfinished(behind.records):
            self._note(f"{file.file} was left unfinished and never counted: memdb compact removes it")
            return
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
