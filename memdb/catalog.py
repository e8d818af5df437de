"""The catalog: the index of what the segments hold. All reading of rows and all committing goes through here.

A row of `recordings` counts what belongs to it (units, gaps, epochs, ends, segments), `meta` counts the
recordings, and units are numbered without holes: so a row that SQLite lost is noticed, as a damaged one is by
its checksum. Units are found by their number alone; times and commit ids grow with it and are searched by
bisection.
"""

from __future__ import annotations

import heapq
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from memdb.database import CATALOG, Database, Value
from memdb.migrations import MIGRATIONS
from memdb.records import Kind, Record, canonical_ascii
from memdb.schemas.errors import (
    CorruptionError,
    FormatVersionError,
    RecipeError,
    StoreError,
    UnknownRecording,
)
from memdb.schemas.fingerprint import ModelIdentity
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.recording import Epoch, Gap
from memdb.schemas.rows import (
    Part,
    RecordingRow,
    RecordingSpec,
    TierBytes,
    UnitRow,
    model_as_json,
    model_from_json,
)
from memdb.schemas.units import BLOCK_DTYPE

_CHUNK_ROWS = 256
_BYTES_COLUMN = {
    Part.CAPTION: "captions_bytes",
    Part.VECTOR: "captions_bytes",
    Part.KEYFRAME: "keyframes_bytes",
    Part.KEYS: "keys_bytes",
    Part.KV: "kv_bytes",
}
# Kinds of record with a table of their own: the table, and its columns after recording and number.
_EVENTS: dict[Kind, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    Kind.GAP: ("gaps", ("start_ns", "end_ns"), ("reason",)),
    Kind.EPOCH: ("epochs", ("epoch", "first_unit"), ("reason",)),
    Kind.END: ("ends", ("media_end_ns", "units"), ()),
}


@dataclass(frozen=True)
class SegmentRow:
    """A segment file as far as it is committed."""

    recording: str  # id
    sequence: int
    name: str  # file name in segments/
    end_bytes: int  # end of the last committed record
    footer_hash: bytes  # of that record


@dataclass
class _RecordingState:
    """A row of `recordings`: the counts grow within a commit."""

    id: str
    name: str
    created_ns: int
    spec: str  # JSON
    units: int = 0
    start_ns: int = 0
    watermark_ns: int = 0
    last_commit: int = 0
    segments: int = 0
    gaps: int = 0
    epochs: int = 0
    ends: int = 0
    kv_bytes: int = 0
    keys_bytes: int = 0
    captions_bytes: int = 0
    keyframes_bytes: int = 0


class Catalog:
    """A catalog that is open for reading, or for reading and writing. Usable by several threads."""

    def __init__(self, path: Path, *, write: bool) -> None:
        """`path` is the file. Raises FormatVersionError, StoreError, CorruptionError."""
        self.database = Database(path, write=write)
        try:
            self._check_format(write)
        except BaseException:
            self.database.close()
            raise

    @staticmethod
    def create(path: Path, *, store_id: str, created_ns: int) -> None:
        """Make the tables, unless another process just did."""
        database = Database(path, write=True)
        try:
            with database.writing():
                if not database.execute("SELECT 1 FROM sqlite_master LIMIT 1"):
                    _migrate(database, since=0)
                    for key, value in (
                        ("store_id", store_id),
                        ("created_ns", created_ns),
                        ("last_commit", 0),
                        ("recordings", 0),
                    ):
                        database.insert("meta", (key, value))
            database.checkpoint()
        finally:
            database.close()

    def close(self) -> None:
        self.database.close()

    # Store

    @property
    def store_id(self) -> str:
        return str(self._meta("store_id"))

    def model(self) -> ModelIdentity | None:
        text = self._meta("model", None)
        if text is None:
            return None
        return model_from_json(json.loads(str(text)))

    def bind_model(self, identity: ModelIdentity) -> ModelIdentity:
        """The model of the store: the one that was bound first, whoever asks."""
        with self.database.writing():
            bound = self.model()
            if bound is None:
                self.database.insert("meta", ("model", canonical_ascii(model_as_json(identity)).decode()))
                return identity
        return bound

    def last_commit(self) -> int:
        return self._meta_int("last_commit")

    # Recordings

    def recordings(self) -> list[RecordingRow]:
        """All recordings by name."""
        with self.database.reading():
            rows = self.database.select("recordings", "ORDER BY name")
            self._check_count("recordings", len(rows), self._meta_int("recordings"))
            return [self._recording_row(row) for row in rows]

    def find(self, name: str) -> RecordingRow | None:
        return next((row for row in self.recordings() if row.name == name), None)

    def by_id(self, recording_id: str) -> RecordingRow:
        with self.database.reading():
            rows = self.database.select("recordings", "WHERE id = ?", (recording_id,))
            if not rows:
                self.recordings()  # notices a row that was lost
                raise UnknownRecording(f"no recording has the id {recording_id}")
            return self._recording_row(rows[0])

    def segments(self, recording_id: str) -> list[SegmentRow]:
        """In order of their sequence."""
        with self.database.reading():
            rows = self.database.select("segments", "WHERE recording = ? ORDER BY sequence", (recording_id,))
            state = self._state(recording_id)
            self._check_count("segments", len(rows), state.segments if state else 0)
        return [SegmentRow(*cast("tuple[str, int, str, int, bytes]", row)) for row in rows]

    def end_count(self, recording_id: str) -> int:
        """How many ends are recorded."""
        state = self._state(recording_id)
        return state.ends if state else 0

    # Units

    def unit(self, recording_id: str, number: int) -> UnitRow:
        rows = self.database.select("units", "WHERE recording = ? AND number = ?", (recording_id, number))
        if not rows:
            raise CorruptionError(f"{CATALOG}: the row of unit {number} is lost", file=CATALOG)
        return UnitRow(*cast("tuple[Any, ...]", rows[0]))

    def units(self, recording_id: str, low: int, high: int) -> Iterator[UnitRow]:
        """Units `low` to `high - 1`, which must be there."""
        for first in range(low, high, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, high) - 1
            span = "WHERE recording = ? AND number BETWEEN ? AND ? ORDER BY number"
            rows = self.database.select("units", span, (recording_id, first, last))
            if [row[1] for row in rows] != list(range(first, last + 1)):
                raise CorruptionError(f"{CATALOG}: rows of units {first} to {last} are lost", file=CATALOG)
            for row in rows:
                yield UnitRow(*cast("tuple[Any, ...]", row))

    def first_unit(self, recording: RecordingRow, reached: Callable[[UnitRow], bool]) -> int:
        """The first number from which on `reached` holds; the count of units where it never does."""
        numbers = range(recording.units)
        return bisect_left(numbers, True, key=lambda number: reached(self.unit(recording.id, number)))

    def units_after(self, commit_id: int, recordings: Sequence[RecordingRow]) -> Iterator[UnitRow]:
        """Units of these recordings that were committed after `commit_id`, in order of commit."""
        streams = []
        for recording in recordings:
            if recording.last_commit > commit_id:
                first = self.first_unit(recording, lambda unit: unit.commit_id > commit_id)
                streams.append(self.units(recording.id, first, recording.units))
        return heapq.merge(*streams, key=lambda unit: unit.commit_id)

    # Committing

    def apply(self, recording_id: str, segment: SegmentRow, records: Sequence[Record]) -> RecordingRow:
        """Commit records that lie safely in `segment`, in one transaction. `segment` is its row afterwards.

        A header makes the recording where there is none. Units must go on where the recording ends; ones that
        are there already are passed over. Raises CorruptionError for records that make no sense.
        """
        with self.database.writing():
            state = self._state(recording_id)
            last_commit = self.last_commit()
            for record in records:
                if state is None:
                    state = self._new_recording(recording_id, record)
                elif record.kind is Kind.UNIT and record.number >= state.units:
                    last_commit += 1
                    self._add_unit(state, segment, record, last_commit)
                elif record.kind in _EVENTS:
                    self._add_event(state, record)
            if state is None:
                raise CorruptionError(
                    f"segments/{segment.name} has no header", file=f"segments/{segment.name}"
                )
            known = "WHERE recording = ? AND sequence = ?"
            if not self.database.select("segments", known, (recording_id, segment.sequence)):
                state.segments += 1
            self.database.upsert("recordings", astuple(state))
            self.database.upsert("segments", astuple(segment))
            self.database.upsert("meta", ("last_commit", last_commit))
        return self.by_id(recording_id)

    def drop_empty(self, recording_id: str) -> None:
        """Take a recording without units out of the catalog, with all that belongs to it."""
        with self.database.writing():
            state = self._state(recording_id)
            if state is None or state.units:
                raise StoreError("only a recording without units can be dropped")
            for table in ("gaps", "epochs", "ends", "segments"):
                self.database.delete(table, "WHERE recording = ?", (recording_id,))
            self.database.delete("recordings", "WHERE id = ?", (recording_id,))
            self.database.upsert("meta", ("recordings", self._meta_int("recordings") - 1))

    def _state(self, recording_id: str) -> _RecordingState | None:
        rows = self.database.select("recordings", "WHERE id = ?", (recording_id,))
        return _RecordingState(*cast("tuple[Any, ...]", rows[0])) if rows else None

    def _new_recording(self, recording_id: str, header: Record) -> _RecordingState:
        spec = spec_of(header)
        text = canonical_ascii(spec.as_json()).decode()
        state = _RecordingState(recording_id, spec.name, meta_int(header, "created_ns"), text)
        self.database.insert("recordings", astuple(state))  # before the rows that refer to it
        self.database.upsert("meta", ("recordings", self._meta_int("recordings") + 1))
        return state

    def _add_unit(self, state: _RecordingState, segment: SegmentRow, record: Record, commit_id: int) -> None:
        if record.number != state.units:
            file = f"segments/{segment.name}"
            raise CorruptionError(
                f"{file}: unit {record.number} stands where {state.units} should", file=file
            )
        row = unit_row(record, recording_id=state.id, segment=segment.name, commit_id=commit_id)
        self.database.insert("units", [getattr(row, field.name) for field in fields(row)])
        if record.number == 0:
            state.start_ns = row.start_ns
        state.units, state.watermark_ns, state.last_commit = record.number + 1, row.end_ns, commit_id
        for part, span in row.parts.items():
            column = _BYTES_COLUMN[part]
            setattr(state, column, getattr(state, column) + span.length)

    def _add_event(self, state: _RecordingState, record: Record) -> None:
        table, integers, texts = _EVENTS[record.kind]
        count: int = getattr(state, table)
        if record.number < count:
            return  # there already
        values = [meta_int(record, name) for name in integers] + [meta_str(record, name) for name in texts]
        self.database.insert(table, (state.id, record.number, *values))
        setattr(state, table, count + 1)

    def _recording_row(self, row: tuple[Value, ...]) -> RecordingRow:
        state = _RecordingState(*cast("tuple[Any, ...]", row))
        events = {
            table: self.database.select(table, "WHERE recording = ? ORDER BY number", (state.id,))
            for table in ("gaps", "epochs", "ends")
        }
        for table, rows in events.items():
            self._check_count(table, len(rows), getattr(state, table))
        end = cast("tuple[str, int, int, int]", events["ends"][-1]) if events["ends"] else None
        try:
            spec = RecordingSpec.from_json(json.loads(state.spec))
        except (ValueError, TypeError, KeyError, RecipeError) as error:
            raise FormatVersionError(f"recording {state.name!r} was made by another memdb: {error}") from None
        return RecordingRow(
            id=state.id,
            spec=replace(spec, name=state.name),
            created_ns=state.created_ns,
            units=state.units,
            start_ns=state.start_ns,
            watermark_ns=state.watermark_ns,
            last_commit=state.last_commit,
            gaps=tuple(Gap(*cast("tuple[int, int, str]", row[2:])) for row in events["gaps"]),
            epochs=tuple(Epoch(*cast("tuple[int, int, str]", row[2:])) for row in events["epochs"]),
            # An end counts as long as nothing came after it.
            end_ns=end[2] if end and end[3] == state.units else None,
            tier_bytes=TierBytes(
                state.kv_bytes, state.keys_bytes, state.captions_bytes, state.keyframes_bytes
            ),
        )

    # Meta

    def _check_format(self, write: bool) -> None:
        found = self._meta_int("format")
        if found > FORMAT_VERSION:
            raise FormatVersionError(
                f"the store has format {found}, this memdb reads up to {FORMAT_VERSION}: "
                "install a newer memdb-video"
            )
        if found < FORMAT_VERSION:
            if not write:
                raise FormatVersionError(
                    f"the store has the older format {found}: ingest into it once, which brings it up to date"
                )
            with self.database.writing():
                _migrate(self.database, since=self._meta_int("format"))

    def _meta(self, key: str, *default: Value) -> Value:
        rows = self.database.select("meta", "WHERE key = ?", (key,))
        if rows:
            return rows[0][1]
        if default:
            return default[0]
        raise CorruptionError(f"{CATALOG}: the row of {key!r} is lost", file=CATALOG)

    def _meta_int(self, key: str) -> int:
        value = self._meta(key)
        if not isinstance(value, int):
            raise CorruptionError(f"{CATALOG}: {key!r} is no number", file=CATALOG)
        return value

    @staticmethod
    def _check_count(table: str, found: int, expected: int) -> None:
        if found != expected:
            raise CorruptionError(f"{CATALOG}: {found} of {expected} rows of {table} are there", file=CATALOG)


def unit_row(record: Record, *, recording_id: str, segment: str, commit_id: int) -> UnitRow:
    """The row of a unit's record. Raises CorruptionError where its meta is not a unit's."""
    caption_tokens = record.meta.get("caption_tokens")
    return UnitRow(
        recording_id=recording_id,
        number=record.number,
        commit_id=commit_id,
        segment=segment,
        offset=record.offset,
        length=record.length,
        start_ns=meta_int(record, "start_ns"),
        end_ns=meta_int(record, "end_ns"),
        epoch=meta_int(record, "epoch"),
        digest=bytes.fromhex(meta_str(record, "digest")),
        layers=meta_int(record, "layers"),
        block_count=len(record.blocks) // BLOCK_DTYPE.itemsize,
        caption_tokens=None if caption_tokens is None else meta_int(record, "caption_tokens"),
        parts_table=record.parts,
        blocks_table=record.blocks,
        slices_table=record.slices,
    )


def spec_of(header: Record) -> RecordingSpec:
    """The recording that a segment's header describes."""
    spec = header.meta.get("spec")
    try:
        return RecordingSpec.from_json(cast("dict[str, object]", spec))
    except (ValueError, TypeError, KeyError, RecipeError) as error:
        raise CorruptionError(f"a segment's header describes no recording: {error}") from None


def meta_int(record: Record, key: str) -> int:
    value = record.meta.get(key)
    if not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
        raise CorruptionError(f"the record at byte {record.offset} has no number {key!r}")
    return value


def meta_str(record: Record, key: str) -> str:
    value = record.meta.get(key)
    if not isinstance(value, str):
        raise CorruptionError(f"the record at byte {record.offset} has no text {key!r}")
    return value


def _migrate(database: Database, *, since: int) -> None:
    for migration in MIGRATIONS[since:]:
        for statement in migration.statements:
            database.execute(statement)
    database.upsert("meta", ("format", len(MIGRATIONS)))
