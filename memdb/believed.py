"""How far a repair believes numbers of which nothing is left but the number.

A record that speaks of unit 999 says that units were lost where only 60 are found; so far, that is what makes a
repair tell of them, and keep their places. But a record whose checksum is right may speak of unit 4,000,000,000,
and a place takes memory. So a number is believed as long as what is missing below it can have been there: in the
bytes that cannot be read, or in files that are gone, as the numbers of the others show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from memdb.records import Kind, Record, meta_int
from memdb.salvage import SegmentContents
from memdb.segments import SEGMENT_BYTES_MAX

LOST_MAX = 1 << 17  # so many units, or events of a kind, are believed to be lost at most
_LOST_MIN = 16  # so many without a trace: a record of another number may stand in the place of one
_RECORD_BYTES_MIN = 192  # a prologue, and a footer with the least that one says


def lost_bytes(files: Iterable[SegmentContents]) -> int:
    """How much may be missing of a recording: what cannot be read, and files that are gone, at most a full one each."""
    there = list(files)
    gone = 1 + max((file.sequence for file in there), default=-1) - len({file.sequence for file in there})
    return gone * SEGMENT_BYTES_MAX + sum(hole.end - hole.start for file in there for hole in file.holes)


def units_there(files: Iterable[SegmentContents]) -> npt.NDArray[np.int64]:
    """(n,) sorted: the numbers of units of which a trace is left, if only a prologue."""
    numbers = [np.zeros(0, np.int64)]
    for file in files:
        lost = [hole.unit for hole in file.holes if hole.unit is not None]
        numbers += [file.units["number"], np.array(lost, np.int64)]
    return np.unique(np.concatenate(numbers))


def believed_count(
    claims: Iterable[int], there: npt.NDArray[np.int64], missing_bytes: int, *, told: int = 0
) -> int:
    """The largest of the counts that are claimed of which not too many are missing; 0 without one.

    `told`: below it none is missing, as an old catalog knows.
    """
    allowed = told + min(LOST_MAX, _LOST_MIN + missing_bytes // _RECORD_BYTES_MIN)
    there = there[there >= told]
    return max((count for count in claims if count - int(there.searchsorted(count)) <= allowed), default=0)


def believed_events(
    events: dict[tuple[Kind, int], Record], missing_bytes: int
) -> tuple[dict[tuple[Kind, int], Record], list[Record]]:
    """Events whose number can be, and those whose number cannot.

    A tombstone is obeyed whatever its number: it gets the next one that is free, unless one says the same already.
    """
    believed, doubted = dict(events), []
    for kind in {kind for kind, _ in events}:
        numbers = np.unique([number for found, number in events if found is kind]).astype(np.int64)
        count = believed_count((numbers + 1).tolist(), _places(events, kind), missing_bytes)
        for number in numbers[numbers >= count].tolist():
            doubted.append(believed.pop((kind, number)))
            if kind is Kind.TOMBSTONE:
                count += _obey(believed, doubted[-1], count)
    return believed, doubted


def _places(events: dict[tuple[Kind, int], Record], kind: Kind) -> npt.NDArray[np.int64]:
    """(n,) sorted: the numbers that are taken. A tombstone may stand in the place of several."""
    taken: set[int] = set()
    for (found, number), event in events.items():
        if found is kind:
            first = meta_int(event, "first") if kind is Kind.TOMBSTONE else number
            taken.update(range(max(first, number - LOST_MAX), number + 1))
    return np.array(sorted(taken), np.int64)


def _obey(believed: dict[tuple[Kind, int], Record], stone: Record, number: int) -> bool:
    """Put a tombstone in the next place; False where one says the same."""
    said = _span(stone)
    if any(_span(event) == said for (kind, _), event in believed.items() if kind is Kind.TOMBSTONE):
        return False
    meta = {**stone.meta, "first": number}
    believed[Kind.TOMBSTONE, number] = replace(stone, number=number, meta=meta)
    return True


def _span(stone: Record) -> tuple[int, ...]:
    return tuple(meta_int(stone, name) for name in ("start_ns", "end_ns", "below_unit", "at_ns"))
