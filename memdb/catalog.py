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
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from memdb.applying import TOMBSTONES_MAX, RecordingState, SegmentRow, apply, spec_of
from memdb.database import CATALOG, Database, Value
from memdb.migrate import migrate
from memdb.records import Kind, Record, canonical_ascii
from memdb.schemas.errors import (
    CorruptionError,
    FormatVersionError,
    UnknownRecording,
)
from memdb.schemas.fingerprint import ModelIdentity
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.recording import Epoch, Gap, Tombstone
from memdb.schemas.rows import (
    ALL_PPM,
    NOT_WHAT_IT_SAYS,
    RecordingRow,
    RecordingSpec,
    TierBytes,
    UnitRow,
    model_as_json,
    model_from_json,
)

_CHUNK_ROWS = 256


class Catalog:
    """A catalog that is open for reading, or for reading and writing. Usable by several threads."""

    def __init__(self, path: Path, *, write: bool, on_open: Callable[[Catalog], None] | None = None) -> None:
        """`path` is the file. `on_open` is called now and whenever a reader's copy in memory was renewed.

        Raises FormatVersionError, StoreError, CorruptionError.
        """
        self.database = Database(path, write=write)
        self._on_open = on_open
        self._write = write
        try:
            self._opened()
        except BaseException:
            self.database.close()
            raise
        self.database.on_copy = self._opened

    def _opened(self) -> None:
        """Bring the format up to date, and let the caller see the catalog first."""
        self._check_format(self._write)
        if self._on_open is not None:
            self._on_open(self)

    @staticmethod
    def create(path: Path, *, store_id: str, created_ns: int) -> None:
        """Make the tables, unless another process just did."""
        database = Database(path, write=True)
        try:
            with database.writing():
                if not database.execute("SELECT 1 FROM sqlite_master LIMIT 1"):
                    migrate(database, since=0)
                    for key, value in (
                        ("store_id", store_id),
                        ("created_ns", created_ns),
                        ("last_commit", 0),
                        ("recordings", 0),
                        ("forgotten", 0),
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
            if self._meta_int("recordings"):
                raise CorruptionError(f"{CATALOG}: the row of 'model' is lost", file=CATALOG)
            return None
        try:
            return model_from_json(json.loads(str(text)))
        except NOT_WHAT_IT_SAYS as error:
            raise CorruptionError(
                f"{CATALOG}: the row of 'model' is none: {error!s:.200}", file=CATALOG
            ) from None

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
            state = self.state(recording_id)
            self._check_count("segments", len(rows), state.segments if state else 0)
        return [SegmentRow(*cast("tuple[Any, ...]", row)) for row in rows]

    def end_count(self, recording_id: str) -> int:
        """How many ends are recorded."""
        state = self.state(recording_id)
        return state.ends if state else 0

    # Units

    def unit(self, recording_id: str, number: int) -> UnitRow:
        rows = self.database.select("units", "WHERE recording = ? AND number = ?", (recording_id, number))
        if not rows:
            raise CorruptionError(f"{CATALOG}: the row of unit {number} is lost", file=CATALOG)
        return _unit_row(rows[0])

    def units(self, recording_id: str, low: int, high: int) -> Iterator[UnitRow]:
        """Units `low` to `high - 1`, which must be there."""
        for first in range(low, high, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, high) - 1
            span = "WHERE recording = ? AND number BETWEEN ? AND ? ORDER BY number"
            rows = self.database.select("units", span, (recording_id, first, last))
            if [row[1] for row in rows] != list(range(first, last + 1)):
                raise CorruptionError(f"{CATALOG}: rows of units {first} to {last} are lost", file=CATALOG)
            for row in rows:
                yield _unit_row(row)

    def units_without_kv(self, recording: RecordingRow) -> list[int]:
        """Numbers of the units, from where ageing came to, that hold no slice."""
        where = "SELECT number FROM units WHERE recording = ? AND number >= ? AND length(slices) = 0 ORDER BY number"
        rows = self.database.execute(where, (recording.id, recording.kv_from_unit))
        return [cast(int, number) for (number,) in rows]

    def gathered_units(self, recording: RecordingRow) -> dict[int, int]:
        """Number to revision of the units of which ageing left some tokens only."""
        where = "SELECT number, revision FROM units WHERE recording = ? AND number >= ? AND kept_ppm < ?"
        rows = self.database.execute(where, (recording.id, recording.kv_from_unit, ALL_PPM))
        return {cast(int, number): cast(int, revision) for number, revision in rows}

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

    def live_units(self, recording_id: str) -> dict[str, tuple[int, int]]:
        """Segment name to how many units of a recording count in it, and the bytes of their records."""
        rows = self.database.execute(
            "SELECT segment, count(*), sum(length) FROM units WHERE recording = ? GROUP BY segment",
            (recording_id,),
        )
        return {str(name): (int(count or 0), int(size or 0)) for name, count, size in rows}

    def dead_bytes(self, recording_id: str) -> int:
        """Bytes of segments that hold nothing that counts, about: headers of dead files count as dead too."""
        live = self.live_units(recording_id)
        dead = 0
        for row in self.segments(recording_id):
            units, size = live.get(row.name, (0, 0))
            if row.units > units:
                dead += row.end_bytes - size
        return dead

    # Committing: memdb/applying.py

    def apply(self, recording_id: str, segment: SegmentRow, records: Sequence[Record]) -> RecordingRow:
        """Commit records that lie safely in `segment`; the recording afterwards. See `applying.apply`."""
        if records and records[0].kind is Kind.HEADER and self._meta("model", None) is None:
            self.bind_model(
                spec_of(records[0]).model
            )  # it was bound when the file was made, and lost with a WAL
        apply(self, recording_id, segment, records)
        return self.by_id(recording_id)

    def state(self, recording_id: str) -> RecordingState | None:
        rows = self.database.select("recordings", "WHERE id = ?", (recording_id,))
        return RecordingState(*cast("tuple[Any, ...]", rows[0])) if rows else None

    def is_forgotten(self, recording_id: str) -> bool:
        return bool(self.database.select("forgotten", "WHERE recording = ?", (recording_id,)))

    def forgotten(self) -> list[str]:
        """The ids of all recordings that were forgotten and of which files may still be there."""
        with self.database.reading():
            rows = self.database.select("forgotten", "ORDER BY recording")
            self._check_count("forgotten", len(rows), self.count_of("forgotten"))
        return [str(row[0]) for row in rows]

    def replaced(self, recording_id: str) -> list[str]:
        """The segment files of a recording that wait for their removal."""
        with self.database.reading():
            rows = self.database.select("replaced", "WHERE recording = ? ORDER BY sequence", (recording_id,))
            state = self.state(recording_id)
            self._check_count("replaced", len(rows), state.replaced if state else 0)
        return [str(row[2]) for row in rows]

    def tombstones(self, recording_id: str) -> int:
        """How many spans of a recording were forgotten: cheap, for a writer to ask again and again."""
        state = self.state(recording_id)
        return state.tombstones if state else 0

    def count_of(self, what: str) -> int:
        """A count that `meta` keeps: recordings, forgotten, last_commit."""
        return self._meta_int(what)

    def _recording_row(self, row: tuple[Value, ...]) -> RecordingRow:
        state = RecordingState(*cast("tuple[Any, ...]", row))
        events = {
            table: self.database.select(table, "WHERE recording = ? ORDER BY number", (state.id,))
            for table in ("gaps", "epochs", "ends", "tombstones")
        }
        stones = _in_every_place(events["tombstones"])
        for table, rows in events.items():
            count = len(stones) if table == "tombstones" else len(rows)
            self._check_count(table, count, getattr(state, table))
        end = cast("tuple[str, int, int, int]", events["ends"][-1]) if events["ends"] else None
        try:
            spec = RecordingSpec.from_json(json.loads(state.spec))
        except NOT_WHAT_IT_SAYS as error:
            what = f"recording {state.name!r:.140} was made by another memdb: {error!s:.200}"
            raise FormatVersionError(what) from None
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
                state.kv_bytes,
                state.keys_bytes,
                state.captions_bytes,
                state.keyframes_bytes,
                state.keep_sets_bytes,
            ),
            tombstones=stones,
            generation=state.generation,
            kv_from_unit=state.kv_from_unit,
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
                self.database.into_memory()
            with self.database.writing():
                migrate(self.database, since=self._meta_int("format"))

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


def _in_every_place(rows: Sequence[tuple[Value, ...]]) -> tuple[Tombstone, ...]:
    """Tombstones by number; one that stands for several is there as often as they were."""
    found: list[Tombstone] = []
    for row in rows:
        *values, first = cast("tuple[int, int, int, int, int, int]", row[1:])
        stone = Tombstone(*values)
        if not (found[-1].number if found else -1) < first <= stone.number < TOMBSTONES_MAX:
            raise CorruptionError(f"{CATALOG}: tombstone {stone.number} has no place", file=CATALOG)
        found += [stone] * (stone.number - first + 1)
    return tuple(found)


def _unit_row(values: tuple[Value, ...]) -> UnitRow:
    row = UnitRow(*cast("tuple[Any, ...]", values))
    row.check_counts()
    return row
