"""What the catalog and the segments say of captions: the truth behind the table, for searching and indexing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memdb.bm25 import words_of
from memdb.schemas.errors import CorruptionError, UnknownRecording, UsageError

if TYPE_CHECKING:
    from memdb.schemas.recording import Tombstone
    from memdb.schemas.rows import RecordingRow, UnitRow
    from memdb.schemas.units import Caption
    from memdb.store import Store

Place = tuple[str, int]  # recording id and unit number: a unit keeps them for ever
Said = tuple[list[str], npt.NDArray[np.float32]]  # a caption's words and vector (E,)

_CHUNK_UNITS = 1024
_KEPT_CAPTIONS_MAX = 8192
_STRETCH_UNITS = 128  # rows that are looked up together where many of them are wanted
_STRETCH_WANTED = 10


def recordings_of(recordings: Iterable[RecordingRow], encoder: str) -> dict[str, RecordingRow]:
    """Those whose captions this encoder turned into vectors, by id."""
    return {row.id: row for row in recordings if row.spec.caption_encoder == encoder}


def captions_between(
    store: Store,
    recordings: Iterable[RecordingRow],
    first: Mapping[str, int],
    below: Mapping[str, int] | None = None,
) -> Iterator[UnitRow]:
    """The units with captions from number `first` of each recording on, up to before number `below`."""
    for recording in recordings:
        start = first.get(recording.id, 0)
        end = recording.units if below is None else min(recording.units, below.get(recording.id, 0))
        while start < end:
            last = min(start + _CHUNK_UNITS, end) - 1
            try:
                rows = store.units(recording.id, first=start, last=last)
            except UnknownRecording:  # forgotten since it was listed
                break
            yield from (row for row in rows if row.has_caption)
            start = last + 1


def read_said(store: Store, row: UnitRow) -> Said | None:
    """A caption's words and vector from its segment; None where it was forgotten meanwhile.

    Raises CorruptionError where it is damaged.
    """
    caption = caption_now(store, row)
    return (words_of(caption.text), np.asarray(caption.vector, np.float32)) if caption is not None else None


def caption_now(store: Store, row: UnitRow) -> Caption | None:
    """The caption of a row that was looked up a while ago; None where it was forgotten since.

    A compaction may have moved it: where it cannot be read, the catalog is asked once more. Raises
    CorruptionError.
    """
    try:
        return store.read_caption(row)
    except CorruptionError:
        now = unit_now(store, (row.recording_id, row.number))
        if now is None:
            return None
        if (now.segment, now.offset) == (row.segment, row.offset):
            raise
        return store.read_caption(now)


def unit_now(store: Store, place: Place) -> UnitRow | None:
    """A unit that has a caption, as the catalog has it now; None where it is gone."""
    try:
        row = store.unit(*place)
    except (UnknownRecording, UsageError):
        return None
    return row if row.has_caption else None


class LiveRows:
    """The units that the catalog has now, looked up once each: for one search."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: dict[Place, UnitRow | None] = {}

    def __getitem__(self, place: Place) -> UnitRow | None:
        """A unit with a caption; None where it is gone."""
        if place not in self._rows:
            self._rows[place] = unit_now(self._store, place)
        return self._rows[place]

    def look_up(self, places: Iterable[Place]) -> None:
        """The same ahead for many: neighbours come in one reading of the catalog."""
        wanted = [place for place in places if place not in self._rows]
        crowds = Counter((name, number // _STRETCH_UNITS) for name, number in wanted)
        for (name, stretch), count in crowds.items():
            if count >= _STRETCH_WANTED:
                first = stretch * _STRETCH_UNITS
                try:
                    rows = self._store.units(name, first=first, last=first + _STRETCH_UNITS - 1)
                except UnknownRecording:
                    rows = []
                self._rows.update(((name, first + at), None) for at in range(_STRETCH_UNITS))
                self._rows.update(((name, row.number), row) for row in rows if row.has_caption)


class KeptCaptions:
    """Words and vectors that were read, for the next search. Nothing that was forgotten. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Place, tuple[int, int, Said]] = {}  # start_ns, end_ns, what was said
        self._tombstones: dict[str, tuple[Tombstone, ...]] = {}  # by recording, as of the last search

    def read(self, store: Store, row: UnitRow) -> Said | None:
        """A caption's words and vector; None where it was forgotten meanwhile. Raises CorruptionError."""
        place = (row.recording_id, row.number)
        with self._lock:
            kept = self._kept.get(place)
        if kept is not None:
            return kept[2]
        said = read_said(store, row)
        with self._lock:
            if said is not None and not self._is_forgotten(place, row.start_ns, row.end_ns):
                if len(self._kept) >= _KEPT_CAPTIONS_MAX:
                    self._kept.clear()
                self._kept[place] = row.start_ns, row.end_ns, said
        return said

    def drop_forgotten(self, recordings: Sequence[RecordingRow]) -> None:
        """Keep nothing of what was forgotten, by whatever process. `recordings`: all that there are."""
        tombstones = {row.id: row.tombstones for row in recordings}
        with self._lock:
            if tombstones != self._tombstones:
                self._tombstones = tombstones
                self._kept = {
                    place: kept
                    for place, kept in self._kept.items()
                    if not self._is_forgotten(place, *kept[:2])
                }

    def _is_forgotten(self, place: Place, start_ns: int, end_ns: int) -> bool:
        tombstones = self._tombstones.get(place[0])
        if tombstones is None:  # the whole recording; or it is so new that only the next search knows it
            return True
        return any(stone.covers(place[1], start_ns, end_ns) for stone in tombstones)
