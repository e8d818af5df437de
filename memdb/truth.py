"""What the segments of one recording say, taken together: which files count, and which copy of each unit.

    stream files        count as they are
    sealed files        count once their seal is there, until a sealed rewriting replaces them
    everything else     never counted, but may hold a whole copy of what is damaged elsewhere: a spare

Of a unit the highest revision counts. A tombstone is obeyed whatever the revisions say: a copy that still holds
what it forgot does not count as it is. Units are numbered without holes, so that what is missing shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from memdb.applying import EVENTS, FORGET, IMPORT, STREAM, counts_of, spec_of
from memdb.believed import believed_count, believed_events, lost_bytes, units_there
from memdb.events import EventKey, wider, without_joined
from memdb.records import Kind, Record, meta_int
from memdb.salvage import FOUND_DTYPE, SegmentContents
from memdb.schemas.errors import CorruptionError
from memdb.schemas.recording import Tombstone
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.units import Table

NOWHERE = -1
_NO_LIMIT = (1 << 63) - 1


@dataclass
class Truth:
    """One recording as its segments have it."""

    id: str
    files: list[SegmentContents]  # of this recording, in order of their sequence
    told: list[Record] = field(default_factory=list)  # events that an old catalog knows
    told_units: int = 0  # that an old catalog knows, at least
    told_forgotten_ns: int | None = None
    notes: list[str] = field(default_factory=list)  # what could not be settled

    @cached_property
    def forgotten_at_ns(self) -> int | None:
        """When all of the recording was forgotten, None if it was not. Any one that says so is enough."""
        obeyed = [file for file in self.files if file in self.standing or file in self.obeyed]
        moments = [meta_int(stone, "at_ns") for file in obeyed for stone in file.tombstones(whole=True)]
        return min(moments, default=self.told_forgotten_ns)

    # Which files count

    @cached_property
    def replaced(self) -> list[SegmentContents]:
        """Files that a sealed rewriting replaced, and that were not removed yet."""
        names = {name for file in self.files if file.sealed for name in file.replaces}
        return [file for file in self.files if file.name in names]

    @cached_property
    def standing(self) -> list[SegmentContents]:
        """The files that count."""
        gone = {file.name for file in self.replaced}
        counting = [file for file in self.files if file.role == STREAM or file.sealed]
        counting = [file for file in counting if file.name not in gone]
        known = {number for file in counting for number in file.units["number"].tolist()}
        # Of a file that cannot say what it is nothing counts but units that stand nowhere else: it may be torn.
        return [
            file for file in counting if not _is_nameless(file) or not known.issuperset(_lost_numbers(file))
        ]

    @cached_property
    def obeyed(self) -> list[SegmentContents]:
        """Forgettings whose seal is damaged, or was never written though all else is: they are carried out.

        One that ends where a record ends, before its second tombstone, was begun and never acknowledged.
        """
        unsealed = [file for file in self.files if file.role == FORGET and not file.sealed]
        stones = [(file, file.tombstones(whole=False) + file.tombstones(whole=True)) for file in unsealed]
        return [file for file, found in stones if found and (file.holes or len(found) > 1)]

    @cached_property
    def spare(self) -> list[SegmentContents]:
        """Files that do not count, but whose copies of committed units are good to mend from."""
        unfinished = (FORGET, IMPORT)
        others = [file for file in self.files if file not in self.standing]
        return [file for file in others if file.sealed or file.role not in unfinished or file in self.obeyed]

    # What they say of the recording

    @cached_property
    def headers(self) -> list[Record]:
        return [file.header for file in self.files if file.header is not None]

    @cached_property
    def spec(self) -> RecordingSpec | None:
        """As the newest header has it that can be read; None where none can."""
        for header in reversed(self.headers):
            try:
                return spec_of(header)
            except CorruptionError as error:
                self.notes.append(str(error))
        return None

    @cached_property
    def created_ns(self) -> int:
        known: list[int] = []
        for header in self.headers:
            with suppress(CorruptionError):
                known.append(meta_int(header, "created_ns"))
        return min(known, default=0)

    @cached_property
    def kv_from_unit(self) -> int:
        return max((file.kv_from_unit for file in self.files if file.sealed), default=0)

    @cached_property
    def events(self) -> dict[EventKey, Record]:
        """Gaps, epochs, ends and tombstones of spans. Those that only a spare file has are among them."""
        found: dict[EventKey, Record] = {(event.kind, event.number): event for event in self.told}
        streams = [file for file in self.standing if file.role == STREAM]
        sealed = [file for file in self.standing if file.role != STREAM]
        for file in (*self.spare, *streams, *sealed):
            for event in file.events:
                if event.meta.get("whole") is not True:
                    key = event.kind, event.number
                    found[key] = wider(found.get(key), event)
        believed, doubted = believed_events(found, self.lost_bytes)
        for event in doubted:
            self.notes.append(
                f"the number of {event.kind.name.lower()} {event.number} cannot be, and is not believed"
            )
        return without_joined(believed)

    @cached_property
    def lost_bytes(self) -> int:
        """How much of the recording may be missing."""
        return lost_bytes(self.files)

    @cached_property
    def standing_events(self) -> dict[EventKey, Record]:
        """The events that stand in files that count."""
        found: dict[EventKey, Record] = {}
        for file in self.standing:
            for event in file.events:
                key = event.kind, event.number
                found[key] = wider(found.get(key), event)
        return found

    @cached_property
    def joined(self) -> set[int]:
        """The numbers of tombstones in whose place another one stands."""
        stones = [event for key, event in self.events.items() if key[0] is Kind.TOMBSTONE]
        return {number for stone in stones for number in range(meta_int(stone, "first"), stone.number)}

    def event_count(self, kind: Kind) -> int:
        return 1 + max((number for found, number in self.events if found is kind), default=-1)

    @cached_property
    def tombstones(self) -> list[Tombstone]:
        keys = EVENTS[Kind.TOMBSTONE][1]
        stones = sorted(key for key in self.events if key[0] is Kind.TOMBSTONE)
        return [Tombstone(key[1], *(meta_int(self.events[key], name) for name in keys[:4])) for key in stones]

    # Units

    @cached_property
    def limits(self) -> dict[str, int]:
        """Of each stream file the number at which a later one goes on: what stands behind never counted."""
        limits: dict[str, int] = {}
        limit: int = _NO_LIMIT
        for file in reversed([file for file in self.standing if file.role == STREAM]):
            limits[file.name] = limit
            if not _is_nameless(file):
                limit = min([limit, *file.units["number"].tolist(), *_lost_numbers(file)])
        return limits

    @cached_property
    def found(self) -> Table:
        """(units in files that count,) FOUND_DTYPE with the place of the file in `files`."""
        return self._table(self.standing, self.limits)

    @cached_property
    def copies(self) -> Table:
        """The same for every file whose units may be read, those that count and the spare ones."""
        return self._table([*self.standing, *self.spare], {})

    def _table(self, files: Iterable[SegmentContents], limits: dict[str, int]) -> Table:
        places = {file.name: place for place, file in enumerate(self.files)}
        tables = [np.zeros(0, PLACED_DTYPE)]
        for file in files:
            counting = file.units[file.units["number"] < limits.get(file.name, _NO_LIMIT)]
            table = np.zeros(len(counting), PLACED_DTYPE)
            for name in FOUND_DTYPE.names or ():
                table[name] = counting[name]
            table["file"] = places[file.name]
            tables.append(table)
        joined = np.concatenate(tables)
        return joined[np.lexsort([joined[name] for name in ("file", "revision", "number")])]

    @cached_property
    def unit_count(self) -> int:
        """How many units there are: up to the last that is whole, or that something later speaks of.

        A damaged unit at the very end of a stream file may be one that was never acknowledged: it is left out,
        and the next ingest writes it again.
        """
        bounds = [self.told_units]
        bounds += [count for event in self.events.values() for count in counts_of(event)]
        # A rewriting holds all that its sources held: they are asked only where it is damaged itself.
        asked = [*self.standing, *(file for file in self.spare if file not in self.replaced)]
        if any(file.holes for file in self.standing if file.role != STREAM):
            asked += self.replaced
        for file in asked:
            limit = self.limits.get(file.name, _NO_LIMIT)
            last = max((event.offset for event in file.events), default=-1)
            all_sure = file.role != STREAM
            sure = file.units[(file.units["whole"] == 1) | (file.units["offset"] < last) | all_sure]
            bounds.append(1 + int(sure["number"][sure["number"] < limit].max(initial=-1)))
            lost = [
                hole.unit for hole in file.holes if hole.unit is not None and (all_sure or hole.start < last)
            ]
            bounds += [number + 1 for number in lost if number < limit]
        believed = believed_count(bounds, units_there(self.files), self.lost_bytes, told=self.told_units)
        if believed < max(bounds):
            self.notes.append(f"a record speaks of {max(bounds)} units: there can have been {believed}")
        return believed

    @cached_property
    def chosen(self) -> Table:
        """(unit_count,) PLACED_DTYPE: the copy of each unit that counts; its file is NOWHERE where there is none."""
        table = np.zeros(self.unit_count, PLACED_DTYPE)
        table["file"] = NOWHERE
        found = self.found[(self.found["number"] >= 0) & (self.found["number"] < self.unit_count)]
        table[found["number"]] = found  # the last one stays: the highest revision, of the latest file
        table["number"] = np.arange(self.unit_count)
        return table

    def copies_of(self, number: int) -> Table:
        """Every copy of a unit, the highest revision last."""
        first, last = self.copies["number"].searchsorted([number, number + 1])
        found: Table = self.copies[first:last]
        return found

    def covered(self) -> npt.NDArray[np.intp]:
        """The numbers of units that a tombstone means, of those that are there."""
        mask = np.zeros(self.unit_count, bool)
        units = self.chosen
        for stone in self.tombstones:
            overlap = (units["start_ns"] < stone.end_ns) & (units["end_ns"] > stone.start_ns)
            mask |= overlap & (units["number"] < stone.below_unit)
        return np.flatnonzero(mask & (units["file"] != NOWHERE))

    def blindly_forgotten(self) -> set[int]:
        """Units that a forgetting touched of which no tombstone can be read, and no later copy is there."""
        lost: set[int] = set()
        for file in self.files:
            if file.role != FORGET or not file.holes or file.tombstones(whole=False):
                continue
            numbers = [*file.units["number"].tolist(), *_lost_numbers(file)]
            for number in range(min(numbers, default=0), min(max(numbers, default=-1) + 1, self.unit_count)):
                place = int(self.chosen["file"][number])
                if place == NOWHERE or self.files[place].sequence < file.sequence:
                    lost.add(number)
        return lost

    def end_bytes(self, file: SegmentContents) -> int:
        """Up to where a file that counts is committed: behind its last record that counts."""
        if file.role != STREAM:
            return file.seals[-1].end
        limit = min(self.limits[file.name], self.unit_count)
        ends: list[int] = [event.end for event in file.events]
        ends += file.units["end"][file.units["number"] < limit].tolist()
        if file.holes and self._last_before(file, limit) < limit - 1:
            ends.append(file.holes[-1].end)  # what is lost there was acknowledged: more came after it
        return max([file.header.end if file.header else 0, *ends])

    def _last_before(self, file: SegmentContents, limit: int) -> int:
        """The last unit that stream files up to this one have, of those below a number; -1 for none."""
        earlier = [one for one in self.standing if one.role == STREAM and one.sequence <= file.sequence]
        numbers = np.concatenate([one.units["number"] for one in earlier])
        return int(numbers[numbers < limit].max(initial=-1))


PLACED_DTYPE = np.dtype([*((name, "<i8") for name in FOUND_DTYPE.names or ()), ("file", "<i8")])


def _is_nameless(file: SegmentContents) -> bool:
    """Whether nothing that could be read of a file says who wrote it."""
    return file.header is None and not file.seals and not len(file.units)


def _lost_numbers(file: SegmentContents) -> list[int]:
    return [hole.unit for hole in file.holes if hole.unit is not None]
