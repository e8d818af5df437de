"""What must be in a store: a plain account of what was acknowledged, kept apart from memdb's code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from memdb.digest import recording_hash, unit_digest
from memdb.schemas.units import Unit
from tools.trust.script import AGEING, OPEN_END, Op
from tools.trust.units import UNIT_NS, Stream, forgotten_from, make_unit, without_kv

STATES_KEPT = 2
WINDOW_UNITS = 2  # of the stub's encoder: what its state holds of the stream
_FOREVER_NS = (1 << 63) - 1


Fate = Literal["whole", "aged", "lost", "blank"]


@dataclass(frozen=True)
class Span:
    start_ns: int
    end_ns: int
    below_unit: int  # units at the time


@dataclass
class Kept:
    """A recording as it must be."""

    stream: Stream
    units: int = 0
    spans: list[Span] = field(default_factory=list)  # forgotten
    gaps: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)  # first units
    end_units: int | None = None  # units by the last end
    states: dict[int, int] = field(default_factory=dict)  # unit to spans seen
    aged_below: int = 0  # units below have no KV any more
    may_be_aged_below: int = 0
    wounded: set[int] = field(default_factory=set)  # units whose bytes were damaged: a repair may lose them
    has_no_catalog: bool = False  # that could say which blocks there were
    found: dict[int, Fate] = field(default_factory=dict)  # what was seen of those of which two things may be

    def spans_of(self, number: int) -> tuple[Span, ...]:
        return tuple(
            span
            for span in self.spans
            if number < span.below_unit
            and number * UNIT_NS < span.end_ns
            and (number + 1) * UNIT_NS > span.start_ns
        )

    def remembered(self, number: int) -> Unit:
        """What forgetting left of a unit, whatever ageing and damage took."""
        return _unit_left(self.stream, number, self.spans_of(number))

    def unit(self, number: int) -> Unit:
        unit = self.remembered(number)
        match self._fate(number):
            case "aged":
                return without_kv(unit)
            case "lost":
                return replace(without_kv(unit), caption=None, keyframe=None)
            case "blank":
                return replace(without_kv(unit), caption=None, keyframe=None, blocks=unit.blocks[:0])
        return unit

    def digest_of(self, number: int) -> bytes:
        if self._fate(number) == "whole":
            return _digest_left(self.stream, number, self.spans_of(number))
        return unit_digest(self.unit(number))

    def fates(self, number: int) -> list[Fate]:
        """What a unit may be: of one that was found already, the same."""
        if number in self.found:
            return [self.found[number]]
        fates: list[Fate] = [] if number < self.aged_below else ["whole"]
        if number < max(self.aged_below, self.may_be_aged_below):
            fates.append("aged")
        if number in self.wounded:
            fates.append("lost")
            if self.has_no_catalog:
                fates.append("blank")
        return fates

    def settle(self, number: int, digest: bytes) -> bool:
        """Whether a unit may have this digest; what it is from then on."""
        before = self.found.get(number)
        for fate in self.fates(number):
            self.found[number] = fate
            if self.digest_of(number) == digest:
                return True
        if before is None:
            self.found.pop(number, None)
        return False

    def wound(self, number: int) -> None:
        self.wounded.add(number)
        self.found.pop(number, None)

    def _may_age(self, ages: bool) -> None:
        if ages:
            self.may_be_aged_below = self.units
            self.found = {number: fate for number, fate in self.found.items() if fate != "whole"}

    def _fate(self, number: int) -> Fate:
        return self.found.get(number, "aged" if number < self.aged_below else "whole")

    @property
    def digest(self) -> str:
        return recording_hash([self.digest_of(number) for number in range(self.units)])

    def states_left(self) -> dict[int, int]:
        """Those that hold nothing forgotten."""
        return {
            unit: seen
            for unit, seen in self.states.items()
            if all(reach_ns(unit) >= span.end_ns for span in self.spans[seen:])
        }


@lru_cache(maxsize=4096)
def _unit_left(stream: Stream, number: int, spans: tuple[Span, ...]) -> Unit:
    unit = make_unit(stream, number)
    for span in spans:
        unit = forgotten_from(stream, unit, span.start_ns, span.end_ns)
    return unit


@lru_cache(maxsize=65536)
def _digest_left(stream: Stream, number: int, spans: tuple[Span, ...]) -> bytes:
    return unit_digest(_unit_left(stream, number, spans))


def reach_ns(unit: int) -> int:
    """How far back the state that belongs to a unit number reaches."""
    return max(0, unit - WINDOW_UNITS) * UNIT_NS


@lru_cache(maxsize=65536)
def running_hash(stream: Stream, units: int) -> bytes:
    """Of the first digests of all units before `units`: what a state of the stub holds."""
    if units == 0:
        return hashlib.blake2b(str(stream).encode(), digest_size=16).digest()
    first = _digest_left(stream, units - 1, ())
    return hashlib.blake2b(running_hash(stream, units - 1) + first, digest_size=16).digest()


def clear_caches() -> None:
    """For processes that watch their own memory."""
    for cached in (_unit_left, _digest_left, running_hash):
        cached.cache_clear()


@dataclass
class Model:
    """All recordings that must be there, by name; `bare`: compacted since the last forgetting."""

    kept: dict[str, Kept] = field(default_factory=dict)
    gone: list[Kept] = field(default_factory=list)  # recordings that were forgotten as a whole
    bare: bool = True
    ages: bool = False  # the policy is that KV goes
    policy: int = 0  # which one was set
    copies: dict[str, Model] = field(default_factory=dict)  # backups, as the store was
    exports: dict[str, Kept] = field(default_factory=dict)  # files, and the recordings in them as they were
    hurt: bool = False  # damaged, and not repaired yet

    def after(self, op: Op) -> Model:
        """The model once the operation was acknowledged."""
        copy = deepcopy(self)
        copy._apply(op, op.count)
        return copy

    def outcomes(self, op: Op | None) -> Iterator[Model]:
        """What may be there while an operation is under way. Units of one append come back as a row of records."""
        yield self
        if op is None:
            return
        if op.kind in ("append", "die"):
            assert op.stream is not None
            known = self.kept.get(op.stream.name)
            before = known.units if known else 0
            if known and known.stream != op.stream:  # that held nothing, is dropped and begun anew
                copy = deepcopy(self)
                del copy.kept[op.stream.name]
                yield copy
            for count in range(max(0, before - op.first) + 1, op.count + 1):
                copy = deepcopy(self)
                copy._apply(op, count)
                yield copy
        elif (
            op.kind == "wound" and op.count
        ):  # a repair without the catalog may not know that there was such a unit
            yield from (
                self._halfway(op),
                replace(self._halfway(op), kept=self.after(op).kept),
                self.after(op),
            )
        elif op.kind in ("compact", "wound"):  # some of it may have been done
            yield self.after(op)
            yield self._halfway(op)
        else:
            yield self.after(op)

    def lose_catalog(self) -> None:
        """The catalog is gone: a file that its repair leaves out may be torn, and a damaged unit has no row."""
        self.hurt = True
        for kept in self.kept.values():
            kept.has_no_catalog = True
            kept.found = {number: fate for number, fate in kept.found.items() if number not in kept.wounded}

    def _halfway(self, op: Op) -> Model:
        copy = deepcopy(self)
        if op.kind == "compact":
            for kept in copy.kept.values():
                kept._may_age(self.ages)
        elif op.stream is not None and op.stream.name in copy.kept:
            copy.hurt = True
            copy.kept[op.stream.name].wound(op.first)
        return copy

    def _apply(self, op: Op, count: int) -> None:
        self._apply_to_all(op)
        if op.stream is None:
            return
        name = op.stream.name
        if op.kind == "forget_all":
            if name in self.kept:
                self.gone.append(self.kept.pop(name))
                self.bare = False
            return
        if name not in self.kept or (self.kept[name].stream != op.stream and not self.kept[name].units):
            self.kept[name] = Kept(op.stream)
        kept = self.kept[name]
        if op.kind in ("append", "die"):
            kept.units = max(kept.units, op.first + count)
        elif op.kind == "state":
            kept.states[kept.units] = len(kept.spans)
            kept.states = {unit: kept.states[unit] for unit in sorted(kept.states)[-STATES_KEPT:]}
        elif op.kind == "gap" and kept.units not in kept.gaps:
            kept.gaps.append(kept.units)
        elif op.kind in ("begin", "epoch") and kept.units not in kept.epochs:
            kept.epochs.append(kept.units)
        elif op.kind == "end":
            kept.end_units = kept.units
        elif op.kind == "wound":
            self.hurt = True  # the damaged record stays where it is until it is compacted
            if op.count:
                kept.units = op.first
                kept.states = {unit: seen for unit, seen in kept.states.items() if unit <= op.first}
            else:
                kept.wound(op.first)
        elif op.kind == "import":
            copy = deepcopy(kept)
            copy.states = {}
            self.kept.setdefault(op.why, copy)
        elif op.kind == "forget":
            self.bare = False
            end_ns = _FOREVER_NS if op.end_ns == OPEN_END else op.end_ns
            kept.spans.append(Span(op.start_ns, end_ns, kept.units))
            kept.states = kept.states_left()

    def _apply_to_all(self, op: Op) -> None:
        """What is about the store."""
        if op.kind == "compact":
            for kept in self.kept.values():
                kept._may_age(self.ages)
                if self.ages and not op.count:
                    kept.aged_below = kept.units
            self.bare = self.bare or not op.count
            self.hurt = self.hurt and bool(op.count)
        elif op.kind == "policy":
            self.policy, self.ages = op.count, op.count == AGEING
        elif op.kind == "export" and op.stream is not None:
            self.exports.setdefault(op.why, deepcopy(self.kept[op.stream.name]))
        elif op.kind == "backup":
            self.copies.setdefault(op.why, replace(deepcopy(self), copies={}, exports={}))
