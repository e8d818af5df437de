"""Ageing: what a policy makes of a unit whose end lies so long ago.

Age is wall clock: the start of the recording plus the media time of the unit's end, against now. A unit takes
every step of the policy that is due, in the policy's order, each once: its row says which codec it has, and
what share of its tokens was kept. So the outcome does not depend on when ageing ran, or how often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from memdb.catalog import Catalog
from memdb.database import CATALOG
from memdb.digest import check_digest, digests_of
from memdb.memory import remembered
from memdb.policy import CODECS, Age
from memdb.rewrite import Changed
from memdb.schemas.errors import CodecError, CorruptionError
from memdb.schemas.keep import KeepSet
from memdb.schemas.rows import ALL_PPM, RecordingRow, UnitRow
from memdb.schemas.times import NS_PER_S
from memdb.schemas.units import Unit
from memdb.sealed import empty_husk, read_unit
from memdb.store import Store
from memdb.survey import Due

_WIDTHS = ("raw", "fp16", "bf16", *CODECS)  # of codecs, the widest first
GATHERED_PPM = ALL_PPM - 1  # says that of a unit only those tokens are left that its memory held
LATE_NS = 86_400 * NS_PER_S  # ageing may come so much too late: files are written anew as a whole
# Whoever began a recording before memdb was written had a clock that was wrong.
_FIRST_NS = 1_735_689_600_000_000_000  # 2025-01-01


@dataclass(frozen=True)
class Step:
    """A step of the policy, with the media time up to which units have reached it."""

    age: Age
    until_ns: int


class Ager:
    """Ages the units of one recording as of one moment."""

    def __init__(self, store: Store, recording: RecordingRow, ages: tuple[Age, ...], now_ns: int) -> None:
        self._store, self._row, self._now_ns = store, recording, now_ns
        began_ns = wall_clock_ns(recording)
        if recording.spec.recipe.has_memory:
            # Keep sets name tokens by their place in a block: nothing but what they name thins those.
            ages = tuple(
                replace(age, retainer="", keep_ppm=GATHERED_PPM if age.memory_only else ALL_PPM)
                for age in ages
            )
        reached = [Step(age, now_ns - age.after_ns - began_ns) for age in ages]
        self._steps = [step for step in reached if step.until_ns > recording.start_ns]
        self._own_codec = recording.spec.recipe.codec

    @property
    def idle(self) -> bool:
        """Whether no unit is old enough for anything."""
        return not self._steps or not self._row.spec.recipe.keeps_kv

    def due(self, catalog: Catalog, *, since_ns: int | None = None) -> dict[str, Due]:
        """By segment, how many of its units would change, and how many are a day late.

        `since_ns`: when somebody looked last and left nothing that was a day late: units that were older than
        that already are not looked at again.
        """
        if self.idle:
            return {}
        passed_ns = None if since_ns is None else max(0, self._now_ns - since_ns) + LATE_NS
        found: dict[str, Due] = {}
        for name, units, late in self._rows(catalog, passed_ns):
            known = found.get(name, Due())
            found[name] = Due(known.units + units, known.late_units + late)
        return found

    def _rows(self, catalog: Catalog, passed_ns: int | None) -> Iterator[tuple[str, int, int]]:
        """Segment name, due units, late ones: of each stretch of units that reached the same steps."""
        stop = self._first_after(catalog, self._steps[0].until_ns)
        for at, step in enumerate(self._steps):  # the youngest first: it reached furthest
            older = self._steps[at + 1 : at + 2]
            bounds = [one.until_ns for one in older]
            if passed_ns is not None:
                bounds.append(step.until_ns - passed_ns)
            first = max([self._row.kv_from_unit, *(self._first_after(catalog, bound) for bound in bounds)])
            yield from self._due_between(catalog, first, stop, self._steps[: at + 1])
            stop = self._first_after(catalog, older[0].until_ns) if older else 0

    def _first_after(self, catalog: Catalog, moment_ns: int) -> int:
        """The first unit that ends behind a moment of media time."""
        return catalog.first_unit(self._row, lambda unit: unit.end_ns > moment_ns)

    def _due_between(
        self, catalog: Catalog, first: int, stop: int, steps: Sequence[Step]
    ) -> Iterator[tuple[str, int, int]]:
        """Of units `first` to before `stop`, which have reached these steps and no others."""
        late_values: list[int | str] = []
        late = " OR ".join(f"(end_ns <= ? AND {self._sql(step, late_values, LATE_NS)})" for step in steps)
        values: list[int | str] = []
        due = " OR ".join(f"(end_ns <= ? AND {self._sql(step, values, 0)})" for step in steps)
        rows = catalog.database.execute(
            f"SELECT segment, count(*), sum({late}) FROM units WHERE recording = ? "  # noqa: S608
            f"AND number BETWEEN ? AND ? AND length(slices) > 0 AND ({due}) GROUP BY segment",
            [*late_values, self._row.id, first, stop - 1, *values],
        )
        return ((str(name), int(count or 0), int(late or 0)) for name, count, late in rows)

    def change(self, row: UnitRow) -> Changed | None:
        """The unit as it is to be from now on; None where nothing is due. Raises CorruptionError."""
        if not len(row.slices):
            return None
        due = [step.age for step in self._steps if row.end_ns <= step.until_ns]
        if any(age.captions_only for age in due):
            return Changed(self._without_kv(row), row.codec, row.kept_ppm)
        codec, kept_ppm = row.codec or self._own_codec, row.kept_ppm
        unit: Unit | None = None
        for age in due:
            if not self._changes(age, codec, kept_ppm):
                continue
            unit = unit or self._read(row)
            try:
                unit, codec, kept_ppm = self._step(unit, age, codec, kept_ppm)
            except CodecError as error:
                file = f"segments/{row.segment}"
                raise CorruptionError(
                    f"{file}: unit {row.number} cannot be aged: {error}", file=file
                ) from None
        return None if unit is None else Changed(unit, "" if codec == self._own_codec else codec, kept_ppm)

    def _step(self, unit: Unit, age: Age, codec: str, kept_ppm: int) -> tuple[Unit, str, int]:
        from memdb.age_kv import converted, gathered, thinned  # torch

        if age.codec and _wider(codec, age.codec):
            unit, codec = converted(unit, self._row.spec, codec, age.codec), age.codec
        if age.keep_ppm < kept_ppm and age.memory_only:
            unit, kept_ppm = gathered(unit, self._row.spec, codec, self._memory), GATHERED_PPM
        elif age.keep_ppm < kept_ppm:
            unit = thinned(unit, self._row.spec, codec, age.retainer, kept_ppm, age.keep_ppm)
            kept_ppm = age.keep_ppm
        return unit, codec, kept_ppm

    @cached_property
    def _memory(self) -> KeepSet:
        """What the memory holds now: a token that is not in it never comes back. Raises CorruptionError."""
        found = remembered(self._store, self._store.recording_by_id(self._row.id))
        if found.keep is None or found.bad:
            why = found.bad[0] if found.bad else f"{self._row.name} tells of no memory"
            raise CorruptionError(f"{why}: nothing is gathered by it", file=CATALOG)
        return found.keep

    def _read(self, row: UnitRow) -> Unit:
        unit = read_unit(self._store.segments_path, self._row, row)
        check_digest(row, digests_of(unit))
        return unit

    def _without_kv(self, row: UnitRow) -> Unit:
        """Caption and key frame of a unit. Its KV is not read: where that is damaged, it goes all the same."""
        husk = empty_husk(row)
        caption = self._store.read_caption(row) if row.has_caption else None
        return replace(husk, caption=caption, keyframe=self._store.read_keyframe(row))

    def _changes(self, age: Age, codec: str, kept_ppm: int) -> bool:
        return bool(age.codec and _wider(codec, age.codec)) or age.keep_ppm < kept_ppm

    def _sql(self, step: Step, values: list[int | str], late_ns: int) -> str:
        """What `_changes` says, for the catalog; its parameters go to `values`, behind the time that is asked for."""
        values.append(step.until_ns - late_ns)
        age = step.age
        if age.captions_only:
            return "1"
        wider = [name for name in _WIDTHS if age.codec and _wider(name, age.codec)]
        wider += [""] if self._own_codec in wider else []
        values += [*wider, age.keep_ppm]
        return f"(codec IN ({', '.join('?' * len(wider))}) OR kept_ppm > ?)"


def due_now(store: Store, ages: tuple[Age, ...], now_ns: int) -> dict[str, int]:
    """Recording to how many of its units a compaction would age at this moment."""
    found: dict[str, int] = {}
    with store.snapshot():  # a recording that is listed may be forgotten before it is looked at
        for row in store.recordings():
            due = Ager(store, row, ages, now_ns).due(store.catalog).values()
            found[row.name] = sum(one.units for one in due)
    return {name: units for name, units in found.items() if units}


def wall_clock_ns(recording: RecordingRow) -> int:
    """The moment of media time 0: as it was given or seen, else when the recording was begun."""
    started_ns = recording.spec.started_at_ns
    return recording.created_ns if started_ns is None else started_ns


def clock_was_wrong(recording: RecordingRow) -> bool:
    """Whether the clock cannot have been right when the recording was begun, so that its age is not known."""
    own_ns = wall_clock_ns(recording) if recording.spec.live else recording.created_ns
    return min(own_ns, recording.created_ns) < _FIRST_NS


def _wider(codec: str, than: str) -> bool:
    """Whether a codec takes more bytes than another."""
    return codec in _WIDTHS and _WIDTHS.index(codec) < _WIDTHS.index(than)
