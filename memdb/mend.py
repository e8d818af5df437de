"""Mending a recording: what its segments lack is written anew, into a sealed segment of role repair.

    events      that only a file has which does not count, or that are lost: those get a stand-in of their number
    units       of which no whole copy counts: another copy where there is one, else a husk, with a number and
                times and nothing in it

A copy is never taken as it is where a tombstone means it: what was forgotten is left out again. Damaged files
stay as they are, so that whoever can read more of them than this may.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memdb.applying import EVENTS, REPAIR
from memdb.catalog import Catalog
from memdb.contents import husk, overlapping, stored_element_bytes, unit_from, without_blocks
from memdb.digest import check_digest, digests_of
from memdb.events import wider
from memdb.records import Kind, meta_int, read_exactly
from memdb.remembered import Remembered
from memdb.salvage import SegmentContents, read_contents, row_at
from memdb.schemas.errors import CodecError, CorruptionError
from memdb.schemas.recording import Tombstone
from memdb.schemas.rows import Part, RecordingRow, UnitRow
from memdb.schemas.units import Unit
from memdb.sealed import FORGOTTEN_DIGEST, SealedSegment, empty_husk, read_unit
from memdb.segments import parse_segment_name, reading
from memdb.truth import NOWHERE, Truth

logger = logging.getLogger(__name__)

LOST = "is lost"
DAMAGED = "is damaged: what of it is whole is served"
MENDED = "was brought back from another copy"
REWRITTEN = -2  # the file of a unit that was lost and has a place in the new one
HIDDEN = "was forgotten, its record is damaged: it stays forgotten"


@dataclass(frozen=True)
class Touched:
    """What became of a unit that was not whole."""

    unit: int
    start_ns: int
    end_ns: int
    fate: str


class Mender:
    """Mends one recording. The locks of the recording are held."""

    def __init__(
        self, catalog: Catalog, folder: Path, truth: Truth, recording: RecordingRow, remembered: Remembered
    ) -> None:
        """`catalog` is the new one, of which only the store's id is used; `folder` is segments/."""
        self._catalog, self._folder = catalog, folder
        self._truth, self._row, self._remembered = truth, recording, remembered
        self._segment: SealedSegment | None = None
        self._places = np.zeros(0, np.intp)  # the numbers of units that have times
        self.touched: list[Touched] = []
        self.notes: list[str] = []

    def run(self) -> SegmentContents | None:
        """Write what is needed; the file, None where nothing is. Raises OSError, StoreError."""
        try:
            if all(file.header is None or file.corrected for file in self._truth.standing):
                self._open()  # its header describes the recording from now on
            self._events()
            self._units()
            if self._segment is None:
                return None
            self._segment.seal_apart()
            name = self._segment.name
        finally:
            if self._segment is not None:
                self._segment.close()
        parsed = parse_segment_name(name)
        assert parsed is not None
        return read_contents(self._folder, name, parsed[1])

    def _open(self) -> SealedSegment:
        if self._segment is None:
            self._segment = SealedSegment(self._catalog, self._folder, self._row, REPAIR)
        return self._segment

    # Events

    def _events(self) -> None:
        truth = self._truth
        for key, event in sorted(truth.events.items()):
            standing = truth.standing_events.get(key)
            if standing is None or wider(event, standing) is not standing:
                self._open().carry(event)
        for kind in EVENTS:
            for number in range(truth.event_count(kind)):
                if (kind, number) not in truth.events and number not in truth.joined:
                    self.notes.append(f"{self._row.name}: the record of {kind.name.lower()} {number} is lost")
                    self._open().event(kind, number, self._stand_in(kind, number))
        self._lost_epochs()

    def _stand_in(self, kind: Kind, number: int) -> dict[str, object]:
        """An event that says nothing, so that the others keep their numbers."""
        if kind is Kind.EPOCH:
            before = self._truth.events.get((kind, number - 1))
            epoch = meta_int(before, "epoch") + 1 if before else number
            return {"epoch": epoch, "first_unit": self._first_of(epoch), "reason": "its record was lost"}
        if kind is Kind.GAP:
            following = next(
                self._truth.events[kind, later]
                for later in range(number + 1, self._truth.event_count(kind))
                if (kind, later) in self._truth.events
            )
            at = meta_int(following, "start_ns")
            return {"start_ns": at, "end_ns": at, "reason": "its record was lost"}
        if kind is Kind.END:
            return {"media_end_ns": 0, "units": -1}
        return {"start_ns": 0, "end_ns": 0, "below_unit": 0, "at_ns": 0, "first": number}

    def _lost_epochs(self) -> None:
        """Epochs that units speak of and no record at the end does."""
        number = self._truth.event_count(Kind.EPOCH)
        known = [
            meta_int(event, "epoch") for key, event in self._truth.events.items() if key[0] is Kind.EPOCH
        ]
        units = self._truth.chosen
        spoken_of = np.unique(units["epoch"][units["file"] != NOWHERE])
        for epoch in spoken_of[spoken_of > max(known, default=0)].tolist():
            meta = {"epoch": epoch, "first_unit": self._first_of(epoch), "reason": "its record was lost"}
            self.notes.append(f"{self._row.name}: the record of epoch {epoch} is lost")
            self._open().event(Kind.EPOCH, number, meta)
            number += 1

    def _first_of(self, epoch: int) -> int:
        units = self._truth.chosen
        found = np.flatnonzero((units["file"] != NOWHERE) & (units["epoch"] >= epoch))
        return int(found[0]) if len(found) else self._truth.unit_count

    # Units

    def _units(self) -> None:
        truth = self._truth
        units, blind = truth.chosen, truth.blindly_forgotten()
        unwell = np.flatnonzero((units["file"] == NOWHERE) | (units["whole"] == 0)).tolist()
        self._places = np.flatnonzero(units["file"] != NOWHERE)
        lost: list[tuple[int, UnitRow | None, str]] = []
        for number in sorted({*unwell, *truth.covered().tolist(), *blind}):
            row = self._row_of(units[number]) if units["file"][number] != NOWHERE else None
            whole = row is not None and bool(units["whole"][number])
            holds = row is not None and any(_holds(row, stone) for stone in self._stones(row))
            if number in blind:
                lost.append((number, row, HIDDEN))
            elif row is not None and whole and holds:
                # Its record is whole, and that of the forgetting is not.
                self._put(row, read_unit(self._folder, self._row, row), HIDDEN)
            elif whole or self._bring_back(number, row):
                pass
            elif row is not None and not holds:
                self._tell(row, DAMAGED)
            else:
                lost.append((number, row, HIDDEN if row is not None else LOST))
        self._places = np.flatnonzero(units["file"] != NOWHERE)
        for number, row, fate in lost:
            self._put_husk(number, row, fate)

    def _bring_back(self, number: int, damaged: UnitRow | None) -> bool:
        """Write a whole copy of a unit anew, from a file that does not count or what an old catalog knows."""
        for row, unit in self._copies(number, damaged):
            if self._fits(row):
                self._put(row, unit, MENDED)
                return True
        return False

    def _copies(self, number: int, damaged: UnitRow | None) -> Iterator[tuple[UnitRow, Unit]]:
        for found in self._truth.copies_of(number)[::-1]:
            if not found["whole"]:
                continue
            row = self._row_of(found)
            other = damaged is not None and row.revision == damaged.revision and row.digest != damaged.digest
            if not other:
                yield from self._whole(row)
        remembered = self._remembered.unit(self._row.id, number)
        if remembered is not None and (damaged is None or remembered.digest == damaged.digest):
            yield from self._whole(remembered)

    def _whole(self, row: UnitRow) -> Iterator[tuple[UnitRow, Unit]]:
        """The unit of a row, if every byte of it is right. Its record's footer may be damaged."""
        try:
            with reading(self._folder, row.segment) as segment:
                end = max((span.offset + span.length for span in row.parts.values()), default=row.body_offset)
                length = end - row.body_offset
                body = read_exactly(
                    segment.fd, row.body_offset, length, segment.size_bytes, file=segment.file
                )
            unit = unit_from(row, body, stored_element_bytes(self._row.spec, row))
            check_digest(row, digests_of(unit))
        except (CorruptionError, CodecError, ValueError) as error:
            logger.debug("not to be used: %s", error)
        else:
            yield row, unit

    def _put(self, row: UnitRow, unit: Unit, fate: str) -> None:
        """Write a unit as its next revision, without what was forgotten of it."""
        element_bytes = stored_element_bytes(self._row.spec, row)
        stones = self._stones(row)
        for stone in stones:
            unit = husk(unit, stone.start_ns, stone.end_ns, element_bytes)
        if unit.kv is not None and row.number < self._truth.kv_from_unit:
            unit = without_blocks(unit, np.ones(len(unit.blocks), bool), element_bytes)
        if stones and not (unit.blocks["tokens"] > 0).any():
            unit = empty_husk(row)
        self._write(unit, row, FORGOTTEN_DIGEST if stones else b"")
        self._tell(row, fate)

    def _put_husk(self, number: int, row: UnitRow | None, fate: str) -> None:
        if row is None:
            start_ns, end_ns, epoch = self._between(number)
            none = b""
            row = UnitRow(
                self._row.id, number, 0, "", 0, 0, start_ns, end_ns, epoch, none, 0, 0, None, none, none, none
            )
        self._write(empty_husk(row), row, FORGOTTEN_DIGEST)
        self._tell(row, fate)

    def _write(self, unit: Unit, row: UnitRow, first_digest: bytes) -> None:
        units = self._truth.chosen
        revision = int(self._truth.copies_of(row.number)["revision"].max(initial=row.revision))
        self._open().unit(unit, replace(row, revision=revision), first_digest=first_digest)
        for name in ("start_ns", "end_ns", "epoch"):
            units[name][row.number] = getattr(row, name)
        if units["file"][row.number] == NOWHERE:
            units["file"][row.number] = REWRITTEN

    def _stones(self, row: UnitRow) -> list[Tombstone]:
        return [
            stone for stone in self._truth.tombstones if stone.covers(row.number, row.start_ns, row.end_ns)
        ]

    def _tell(self, row: UnitRow, fate: str) -> None:
        self.touched.append(Touched(row.number, row.start_ns, row.end_ns, fate))

    def _row_of(self, found: np.void) -> UnitRow:
        name = self._truth.files[int(found["file"])].name
        return row_at(self._folder, self._row.id, name, int(found["offset"]))

    def _fits(self, row: UnitRow) -> bool:
        """Whether a unit's times lie between those of its neighbours: neither starts nor ends go back."""
        units = self._truth.chosen
        number = row.number
        after = int(self._places.searchsorted(number + 1))
        while number and units["file"][number - 1] == NOWHERE:
            number -= 1
        low = units[number - 1] if number else None
        high = units[self._places[after]] if after < len(self._places) else None
        return (low is None or (low["start_ns"] <= row.start_ns and low["end_ns"] <= row.end_ns)) and (
            high is None or (row.start_ns <= high["start_ns"] and row.end_ns <= high["end_ns"])
        )

    def _between(self, number: int) -> tuple[int, int, int]:
        """Start, end and epoch for a lost unit: an even share of what lies between its neighbours."""
        units = self._truth.chosen
        at = int(self._places.searchsorted(number))
        first = int(self._places[at - 1]) + 1 if at else 0
        last = int(self._places[at]) if at < len(self._places) else len(units)
        low = int(units["end_ns"][first - 1]) if first else 0
        high = int(units["start_ns"][last]) if last < len(units) else self._end_ns(low + last - first)
        epoch = int(units["epoch"][first - 1 if first else last]) if len(self._places) else 0
        if high - low >= last - first:
            shares = [low + (high - low) * (edge - first) // (last - first) for edge in (number, number + 1)]
            return shares[0], shares[1], epoch
        start_ns = min(low, high)
        return start_ns, max(low, start_ns + 1), epoch

    def _end_ns(self, least_ns: int) -> int:
        """Where the recording ended, as far as that is on record."""
        ends = [event for key, event in self._truth.events.items() if key[0] is Kind.END]
        return max([least_ns, *(meta_int(event, "media_end_ns") for event in ends)])


def _holds(row: UnitRow, stone: Tombstone) -> bool:
    """Whether a copy of a unit still has something of what was forgotten."""
    left = (row.blocks["tokens"] > 0) & overlapping(row.blocks, stone.start_ns, stone.end_ns)
    return row.has_caption or Part.KEYFRAME in row.parts or bool(left.any())
