"""Writing whole segments anew, as a sealed segment that replaces them, or as several where they are big.

Every unit that counts goes over as a later revision of itself, and every event: gaps, epochs, ends, and
tombstones, of which those that are one span become one. What was dead stays behind. Until a seal is committed the
sources count, from then on the new file does for the units in it, so that a kill costs the file in hand. The last
one replaces the sources. A source with damage in what counts is left alone: nothing may be lost by it, and nothing
that is wrong may get a fresh checksum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from memdb.applying import EVENTS, REWRITE
from memdb.catalog import Catalog
from memdb.digest import check_digest, digests_of
from memdb.events import EventKey, join_tombstones, known_events, wider, without_joined
from memdb.files import unlink
from memdb.locks import is_held, writer_lock
from memdb.records import ALIGNMENT_BYTES, Kind, Record, read_prologue, read_record
from memdb.salvage import next_record
from memdb.schemas.errors import CorruptionError, MemdbError
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.units import Unit
from memdb.sealed import SealedSegment, read_unit
from memdb.segments import OpenSegment, reading
from memdb.store import Store
from memdb.survey import Held

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changed:
    """A unit as ageing leaves it."""

    unit: Unit
    codec: str
    kept_ppm: int


# Gives a unit as it is to be from now on, None where it stays as it is.
Change = Callable[[UnitRow], Changed | None]


@dataclass(frozen=True)
class Written:
    segments: int
    units: int
    changed: int  # of them, by ageing


def rewrite(
    store: Store,
    catalog: Catalog,
    recording_id: str,
    sources: Sequence[Held],
    *,
    bytes_max: int,
    change: Change | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> Written:
    """Write `sources` anew, in files of about `bytes_max`, and commit that; they then wait for their removal.

    The recording's rewrite lock is held. `told` gets the bytes of each unit that went over. Raises
    CorruptionError where something that counts is damaged, and OSError; the sources then count as before.
    """
    recording = catalog.by_id(recording_id)
    run = _Rewrite(store, catalog, recording, sources, change, told)
    events, units = run.look_through()
    files = list(_shared_out(units, bytes_max))
    for numbers in files[:-1]:
        run.write(numbers, [], replaces=[])
    # What waits for its removal must not count again in a catalog that is built from the segments.
    waiting = catalog.replaced(recording_id)
    run.write(files[-1], events, replaces=[*(held.row.name for held in sources), *waiting])
    logger.info("%s: %d files replace %d", recording.name, len(files), len(sources))
    return Written(len(files), len(units), run.changed)


def _shared_out(units: Sequence[tuple[int, int]], bytes_max: int) -> Iterator[list[int]]:
    """Numbers of units, given with their bytes, a list for each file; the last file may be a quarter bigger."""
    left = sum(size for _, size in units)
    numbers: list[int] = []
    room = bytes_max
    for number, size in units:
        if room <= 0 and left > bytes_max // 4:
            yield numbers
            numbers, room = [], bytes_max
        numbers.append(number)
        room, left = room - size, left - size
    yield numbers


class _Rewrite:
    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        recording: RecordingRow,
        sources: Sequence[Held],
        change: Change | None,
        told: Callable[[int], None],
    ) -> None:
        self._store, self._catalog, self._row = store, catalog, recording
        self._sources, self._change, self._told = sources, change, told
        self.changed = 0
        self._holes = 0  # stretches of the sources in which no record is whole
        self._first_kv: int | None = None  # the first unit here that has KV afterwards
        self._last_without: int | None = None  # the last one that has lost it to ageing

    def look_through(self) -> tuple[list[Record], list[tuple[int, int]]]:
        """The events to carry over, each once, and the units that count, by number and bytes; both in order."""
        events: dict[EventKey, Record] = {}
        units: list[tuple[int, int]] = []
        for held in self._sources:
            before = len(units)
            with reading(self._store.segments_path, held.row.name) as segment:
                for record in self._records(segment, held.row.end_bytes):
                    if record.kind is Kind.UNIT:
                        if self._counts(held.row.name, record.number, record.offset):
                            units.append((record.number, record.length))
                    elif record.kind in EVENTS:
                        key = record.kind, record.number
                        events[key] = wider(events.get(key), record)
                    elif record.kind not in (Kind.HEADER, Kind.SEAL):
                        raise CorruptionError(f"{segment.file}: {record.kind.name} cannot be carried over")
            if len(units) - before != held.units:
                raise CorruptionError(
                    f"segments/{held.row.name} holds {len(units) - before} of {held.units} units",
                    file=f"segments/{held.row.name}",
                )
        if self._holes:  # any event may have stood there, and what reads like one may be none
            return known_events(self._catalog, self._row.id), sorted(units)
        events = without_joined(events)
        in_order = [events[key] for key in sorted(events)]
        written = is_held(writer_lock(self._store.path, self._row.id))
        return join_tombstones(self._catalog, self._row, in_order, written=written), sorted(units)

    def write(self, numbers: Sequence[int], events: Sequence[Record], *, replaces: Sequence[str]) -> None:
        """One file, sealed and committed. Tombstones stand in it twice: no single flip brings back what they mean."""
        segment = SealedSegment(self._catalog, self._store.segments_path, self._row, REWRITE)
        sealing = False
        try:
            for record in events:
                segment.carry(record)
            for number in numbers:
                self._write_unit(segment, number)
            for record in events:
                if record.kind is Kind.TOMBSTONE:
                    segment.carry(record)
            sealing = True
            segment.seal(replaces=replaces, kv_from_unit=self._kv_from_unit())
        except (OSError, MemdbError):
            if not sealing:  # it never counted: its room is free at once
                with suppress(OSError):
                    unlink(self._store.segments_path / segment.name)
            raise
        finally:
            segment.close()

    def _write_unit(self, segment: SealedSegment, number: int) -> None:
        row = self._catalog.unit(self._row.id, number)
        changed = self._change(row) if self._change is not None else None
        if changed is None:
            unit = read_unit(self._store.segments_path, self._row, row)
            check_digest(row, digests_of(unit))
            segment.unit(unit, row)
        else:
            unit = changed.unit
            segment.unit(unit, row, codec=changed.codec, kept_ppm=changed.kept_ppm)
            self.changed += 1
            if unit.kv is None and len(row.slices):
                self._last_without = number
        if unit.kv is not None and self._first_kv is None:
            self._first_kv = number
        self._told(row.length)

    def _kv_from_unit(self) -> int:
        """The first unit below which none has KV once this is committed, as far as ageing came."""
        known = self._row.kv_from_unit
        if self._last_without is None:
            return known
        own = {held.row.name for held in self._sources}
        elsewhere = [
            int(first or 0)
            for name, first in self._catalog.database.execute(
                "SELECT segment, min(number) FROM units WHERE recording = ? AND number BETWEEN ? AND ? "
                "AND length(slices) > 0 GROUP BY segment",
                (self._row.id, known, self._last_without),
            )
            if name not in own
        ]
        here = [self._first_kv] if self._first_kv is not None else []
        return max(known, min([self._last_without + 1, *elsewhere, *here]))

    def _counts(self, name: str, number: int, offset: int) -> bool:
        """Whether this record is the current revision of its unit."""
        if number >= self._row.units:
            return False
        row = self._catalog.unit(self._row.id, number)
        return (row.segment, row.offset) == (name, offset)

    def _records(self, segment: OpenSegment, end: int) -> Iterator[Record]:
        """The records up to the catalog's end, bodies unread. What is damaged and does not count is passed over."""
        offset, previous = 0, ""
        while offset < end:
            try:
                record = read_record(segment.fd, offset, segment.size_bytes, file=segment.file)
            except CorruptionError:
                offset, previous = self._behind_damage(segment, offset, end), ""
                continue
            if previous and record.meta.get("previous") != previous:
                raise CorruptionError(
                    f"{segment.file}: the record at byte {offset} does not follow the one before it",
                    file=segment.file,
                )
            yield record
            offset, previous = record.end, record.footer_hash.hex()

    def _behind_damage(self, segment: OpenSegment, offset: int, end: int) -> int:
        """Where to go on. Raises CorruptionError where a unit that counts is damaged.

        One whose prologue is damaged too is missed by `look_through`, which counts.
        """
        name = segment.file.removeprefix("segments/")
        try:
            prologue = read_prologue(segment.fd, offset, segment.size_bytes, file=segment.file)
        except CorruptionError:
            following = next_record(segment, offset + ALIGNMENT_BYTES)
            behind = end if following is None else min(following, end)
            self._holes += 1
        else:
            behind = offset + prologue.length
            if prologue.kind not in set(Kind):
                raise CorruptionError(
                    f"{segment.file}: kind {prologue.kind} cannot be carried over", file=segment.file
                )
            if prologue.kind != Kind.UNIT:
                self._holes += 1
            elif self._counts(name, prologue.number, offset):
                raise CorruptionError(
                    f"{segment.file}: unit {prologue.number} is damaged: run memdb repair", file=segment.file
                )
        logger.warning("%s: bytes %d to %d are damaged, and are left out", segment.file, offset, behind)
        return behind
