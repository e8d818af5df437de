"""Events of a recording as records; and tombstones that stand for several.

Forgetting what is oldest leaves a tombstone a step, thousands in a year. Compaction makes one of those that follow
each other, in number and in time: it has the number of the last of them and says which was the `first`. Whoever
counts the tombstones that he has taken note of counts on, for it stands in the place of each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memdb.applying import EVENTS
from memdb.catalog import Catalog
from memdb.records import Kind, Record, encode, meta_int
from memdb.schemas.rows import RecordingRow

EventKey = tuple[Kind, int]


def known_events(catalog: Catalog, recording_id: str) -> list[Record]:
    """The events of a recording as the catalog has them, as records of no file, by kind and number."""
    found: list[Record] = []
    for kind, (table, integers, texts) in EVENTS.items():
        for row in catalog.database.select(table, "WHERE recording = ? ORDER BY number", (recording_id,)):
            meta = dict(zip((*integers, *texts), row[2:], strict=True))
            found.append(_record(kind, int(row[1] or 0), meta))
    return sorted(found, key=lambda event: (event.kind, event.number))


def wider(known: Record | None, event: Record) -> Record:
    """Of two records of one event that which says more: a tombstone may stand for others since."""
    if known is None or event.kind is not Kind.TOMBSTONE:
        return event
    return min((event, known), key=lambda stone: meta_int(stone, "first"))


def without_joined(events: Mapping[EventKey, Record]) -> dict[EventKey, Record]:
    """Events without the tombstones in whose place another one stands."""
    hidden: set[EventKey] = set()
    low: int | None = None  # the first number in whose place a later tombstone stands
    for key in sorted((key for key in events if key[0] is Kind.TOMBSTONE), reverse=True):
        if low is not None and key[1] >= low:
            hidden.add(key)
        first = meta_int(events[key], "first")
        low = first if low is None else min(low, first)
    return {key: event for key, event in events.items() if key not in hidden}


def join_tombstones(
    catalog: Catalog, row: RecordingRow, events: Sequence[Record], *, written: bool
) -> list[Record]:
    """Events, in order, with one tombstone in place of those that are one span.

    Nothing more is forgotten by it: units that came in after the first of them lie behind its span, and so does
    what a writer has in hand. `written`: there may be one.
    """
    found: list[Record] = []
    for event in events:
        before = found[-1] if found else None
        if before is not None and _are_one(catalog, row, before, event, written=written):
            found[-1] = _joined(before, event)
        else:
            found.append(event)
    return found


def _are_one(catalog: Catalog, row: RecordingRow, before: Record, stone: Record, *, written: bool) -> bool:
    if before.kind is not Kind.TOMBSTONE or stone.kind is not Kind.TOMBSTONE:
        return False
    if meta_int(stone, "first") != before.number + 1:
        return False
    end_ns, below = meta_int(before, "end_ns"), meta_int(before, "below_unit")
    start_ns = meta_int(stone, "start_ns")
    if end_ns > meta_int(stone, "end_ns") or below > meta_int(stone, "below_unit"):
        return False
    if below >= row.units and written:
        return False  # nobody knows yet where that begins which is in the writer's hand
    if end_ns > (catalog.unit(row.id, below).start_ns if below < row.units else row.watermark_ns):
        return False  # something that came in later lies in the older span, or may come: that stays
    if start_ns <= end_ns:
        return True
    behind = catalog.first_unit(row, lambda unit: unit.end_ns > end_ns)
    return behind < row.units and catalog.unit(row.id, behind).start_ns >= start_ns  # nothing between


def _joined(before: Record, stone: Record) -> Record:
    names = EVENTS[Kind.TOMBSTONE][1]
    meta = {name: meta_int(stone, name) for name in names}
    meta["start_ns"] = min(meta["start_ns"], meta_int(before, "start_ns"))
    meta["first"] = meta_int(before, "first")
    return _record(Kind.TOMBSTONE, stone.number, meta)


def _record(kind: Kind, number: int, meta: Mapping[str, object]) -> Record:
    return encode(kind, number, meta, offset=0, previous=b"")[1]
