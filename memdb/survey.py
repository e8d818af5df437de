"""What the segments of a recording hold that counts, and which of them are worth writing anew.

A segment is due where it holds dead bytes: records of units whose current revision lies elsewhere, or a tail
that was never acknowledged. It is due where ageing changes all of its KV, or some that is a day late. And small
ones are merged once they are many. Whatever is due is written anew as a whole, in groups that make one file each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memdb.applying import FORGET, STREAM, SegmentRow
from memdb.catalog import Catalog
from memdb.locks import is_held, writer_lock
from memdb.schemas.errors import CorruptionError
from memdb.store import Store

MERGE_FILES = 8  # so many small files are worth a merge
SMALL_SHARE = 16  # a file is small below a sixteenth of a full one


@dataclass(frozen=True)
class Due:
    """How many units of a segment ageing would change, and how many of them it should have a day ago."""

    units: int = 0
    late_units: int = 0


@dataclass(frozen=True)
class Held:
    """A segment, and what of it counts."""

    row: SegmentRow
    size_bytes: int  # of the file
    units: int  # that count
    live_bytes: int  # of their records
    first_unit: int  # of those that count, -1 without
    kv_units: int  # of those that count and have KV
    due: Due

    @property
    def has_dead_bytes(self) -> bool:
        return self.row.units > self.units or self.size_bytes > self.row.end_bytes

    @property
    def is_aged(self) -> bool:
        return self.due.late_units > 0 or 0 < self.due.units == self.kv_units

    @property
    def kept_bytes(self) -> int:
        """About what it takes when it is written anew: units and a few records beside."""
        return min(self.row.end_bytes, self.live_bytes + (64 << 10))


@dataclass(frozen=True)
class Survey:
    held: list[Held]  # in the order of their units
    open_segment: Held | None  # the one that a living writer appends to: nobody else's


def survey(store: Store, catalog: Catalog, recording_id: str, due: Mapping[str, Due]) -> Survey:
    """`due`: by segment, what ageing would change. Raises CorruptionError."""
    written = is_held(writer_lock(store.path, recording_id))
    live = {
        str(name): (int(units or 0), int(size or 0), int(first or 0), int(with_kv or 0))
        for name, units, size, first, with_kv in catalog.database.execute(
            "SELECT segment, count(*), sum(length), min(number), sum(length(slices) > 0) FROM units "
            "WHERE recording = ? GROUP BY segment",
            (recording_id,),
        )
    }
    found = []
    for row in catalog.segments(recording_id):
        units, live_bytes, first_unit, kv_units = live.pop(row.name, (0, 0, -1, 0))
        size = _size_bytes(store, row)
        found.append(Held(row, size, units, live_bytes, first_unit, kv_units, due.get(row.name, Due())))
    if live:
        raise CorruptionError(f"segments/{min(live)} has units and no row: run memdb repair")
    streams = [held for held in found if held.row.role == STREAM]
    last = max(streams, key=lambda held: held.row.sequence, default=None) if written else None
    rest = [held for held in found if held is not last]
    return Survey(sorted(rest, key=lambda held: (held.first_unit, held.row.sequence)), last)


def groups(held: Sequence[Held], *, bytes_max: int) -> list[list[Held]]:
    """Segments to write anew, each group as one file of at most about `bytes_max`."""
    chosen = [one for one in held if one.has_dead_bytes or one.is_aged]
    rest = [one for one in held if one not in chosen]
    small = [one for one in rest if one.size_bytes < bytes_max // SMALL_SHARE]
    if len(small) >= MERGE_FILES:
        chosen += small
    elif chosen:  # what a forgetting wrote goes back among its neighbours
        chosen += [one for one in small if one.row.role == FORGET]
    found: list[list[Held]] = []
    room = 0
    for one in sorted(chosen, key=lambda one: (one.first_unit, one.row.sequence)):
        if not found or one.kept_bytes > room:
            found.append([])
            room = bytes_max
        found[-1].append(one)
        room -= one.kept_bytes
    return found


def _size_bytes(store: Store, row: SegmentRow) -> int:
    try:
        size = (store.segments_path / row.name).stat().st_size
    except FileNotFoundError:
        raise CorruptionError(f"segments/{row.name} is lost", file=f"segments/{row.name}") from None
    if size < row.end_bytes:
        raise CorruptionError(f"segments/{row.name} is cut off", file=f"segments/{row.name}")
    return size
