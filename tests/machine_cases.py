"""What the state machine knows of a store: the account of tools/trust, and what ageing made of each unit."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache

from memdb.age_kv import converted, thinned
from memdb.digest import unit_digest
from memdb.policy import CODECS, Age, Policy
from memdb.schemas.rows import ALL_PPM
from memdb.schemas.units import Unit
from tools.trust.look import Seen
from tools.trust.model import Kept, Model, Span
from tools.trust.script import OPEN_END, Op
from tools.trust.units import UNIT_NS, Stream, forgotten_from, make_unit, spec, without_kv

_WIDTHS = ("raw", *CODECS)  # of codecs, the widest first
FOREVER_NS = (1 << 63) - 1
LATE_NS = 86_400 * 10**9  # ageing may come a day late


@dataclass
class Grown(Kept):
    """A recording whose units may have been aged: by unit, the steps that changed it."""

    ages: dict[int, tuple[Age, ...]] = field(default_factory=dict)

    def unit(self, number: int) -> Unit:
        return _unit(self.stream, number, self.ages.get(number, ()), self.spans_of(number))

    def digest_of(self, number: int) -> bytes:
        return _digest(self.stream, number, self.ages.get(number, ()), self.spans_of(number))

    def due(self, number: int, policy: Policy, now_ns: int) -> tuple[Age, ...]:
        """The steps that a unit has taken once all that are due are done."""
        taken = self.ages.get(number, ())
        started_ns = spec(self.stream).started_at_ns or 0
        due = [age for age in policy.ages if started_ns + (number + 1) * UNIT_NS + age.after_ns <= now_ns]
        if taken and taken[-1].captions_only:
            return taken
        if any(age.captions_only for age in due):
            return (*taken, due[-1])
        for age in due:
            if age != _what_changes(self.stream.codec, taken, age):
                age = _what_changes(self.stream.codec, taken, age)
            if age.codec or age.keep_ppm < ALL_PPM:
                taken = (*taken, age)
        return taken


def _level(codec: str, taken: tuple[Age, ...]) -> tuple[str, int]:
    codecs = [codec, *(age.codec for age in taken if age.codec)]
    return codecs[-1], min([ALL_PPM, *(age.keep_ppm for age in taken)])


def _what_changes(codec: str, taken: tuple[Age, ...], age: Age) -> Age:
    """The part of a step that still changes something."""
    own, kept_ppm = _level(codec, taken)
    narrower = age.codec if age.codec and _WIDTHS.index(age.codec) > _WIDTHS.index(own) else ""
    return replace(age, codec=narrower, keep_ppm=age.keep_ppm if age.keep_ppm < kept_ppm else ALL_PPM)


@lru_cache(maxsize=4096)
def _unit(stream: Stream, number: int, ages: tuple[Age, ...], spans: tuple[Span, ...]) -> Unit:
    unit = make_unit(stream, number)
    for at, age in enumerate(ages):
        unit = _aged(stream, unit, *_level(stream.codec, ages[:at]), age)
    for span in spans:
        unit = forgotten_from(stream, unit, span.start_ns, span.end_ns)
    return unit


def _aged(stream: Stream, unit: Unit, codec: str, kept_ppm: int, age: Age) -> Unit:
    if age.captions_only:
        return without_kv(unit)
    if age.codec:
        unit, codec = converted(unit, spec(stream), codec, age.codec), age.codec
    if age.keep_ppm < ALL_PPM:
        unit = thinned(unit, spec(stream), codec, age.retainer, kept_ppm, age.keep_ppm)
    return unit


@lru_cache(maxsize=16384)
def _digest(stream: Stream, number: int, ages: tuple[Age, ...], spans: tuple[Span, ...]) -> bytes:
    return unit_digest(_unit(stream, number, ages, spans))


@dataclass
class Book(Model):
    """All recordings that must be there, and the policy. `kept` holds only `Grown`."""

    policies: tuple[Policy, ...] = (Policy(),)  # one; two while it is not known which a killed process left

    def grown(self) -> dict[str, Grown]:
        found = {}
        for name, kept in self.kept.items():
            assert isinstance(kept, Grown)
            found[name] = kept
        return found

    def _apply(self, op: Op, count: int) -> None:
        if op.stream is not None and op.kind != "forget_all" and op.stream.name not in self.kept:
            self.kept[op.stream.name] = Grown(op.stream)
        super()._apply(op, count)

    def with_late(self, late: Op) -> Book:
        """Once a repair carried out a forgetting that a kill had stopped. `late.first`: the units at that time."""
        copy = deepcopy(self)
        assert late.stream is not None
        kept = copy.kept.get(late.stream.name)
        if kept is None or kept.stream != late.stream:
            return copy
        if late.kind == "forget_all":
            copy.gone.append(copy.kept.pop(late.stream.name))
        else:
            end_ns = FOREVER_NS if late.end_ns == OPEN_END else late.end_ns
            kept.spans.append(Span(late.start_ns, end_ns, late.first))
            kept.states = kept.states_left()
        return copy

    def take_ages(self, seen: dict[str, Seen], now_ns: int, *, done: bool) -> None:
        """What a compaction aged, as far as it may have; `done`: what is a day late must be."""
        for name, kept in self.grown().items():
            units = seen[name].units if name in seen else []
            for number, digest in enumerate(units[: kept.units]):
                late = kept.due(number, self.policies[0], now_ns - LATE_NS)
                due = kept.due(number, self.policies[0], now_ns)
                before = kept.ages.get(number, ())
                kept.ages[number] = due
                if digest != kept.digest_of(number) and not (done and late != before):
                    kept.ages[number] = before
