"""Ageing: what a policy makes of a unit whose end lies so long ago.

Age is wall clock: the start of the recording plus the media time of the unit's end, against now. A unit takes
every step of the policy that is due, in the policy's order, each once: its row says which codec it has, and
what share of its tokens was kept. So the outcome does not depend on when ageing ran, or how often.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memdb.catalog import Catalog
from memdb.digest import check_digest, digests_of
from memdb.policy import CODECS, Age
from memdb.rewrite import Changed
from memdb.schemas.errors import CodecError, CorruptionError
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.times import NS_PER_S
from memdb.schemas.units import Unit
from memdb.sealed import empty_husk, read_unit
from memdb.store import Store
from memdb.survey import Due

_WIDTHS = ("raw", "fp16", "bf16", *CODECS)  # of codecs, the widest first
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
        self._store, self._row = store, recording
        began_ns = wall_clock_ns(recording)
        reached = [Step(age, now_ns - age.after_ns - began_ns) for age in ages]
        self._steps = [step for step in reached if step.until_ns > recording.start_ns]
        self._own_codec = recording.spec.recipe.codec

    @property
    def idle(self) -> bool:
        """Whether no unit is old enough for anything."""
        return not self._steps or not self._row.spec.recipe.keeps_kv

    def due(self, catalog: Catalog) -> dict[str, Due]:
        """By segment, how many of its units would change, and how many are a day late."""
        if self.idle:
            return {}
        units, late = self._due_units(catalog, 0), self._due_units(catalog, LATE_NS)
        return {name: Due(count, late.get(name, 0)) for name, count in units.items()}

    def _due_units(self, catalog: Catalog, late_ns: int) -> dict[str, int]:
        terms: list[str] = []
        values: list[int | str] = []
        for step in self._steps:
            terms.append(f"(end_ns <= ? AND {self._sql(step.age, values, step.until_ns - late_ns)})")
        rows = catalog.database.execute(
            "SELECT segment, count(*) FROM units WHERE recording = ? AND number BETWEEN ? AND ? "  # noqa: S608
            f"AND length(slices) > 0 AND ({' OR '.join(terms)}) GROUP BY segment",
            [self._row.id, self._row.kv_from_unit, self._last_unit(catalog), *values],
        )
        return {str(name): int(count or 0) for name, count in rows}

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
        from memdb.age_kv import converted, thinned  # torch

        if age.codec and _wider(codec, age.codec):
            unit, codec = converted(unit, self._row.spec, codec, age.codec), age.codec
        if age.keep_ppm < kept_ppm:
            unit = thinned(unit, self._row.spec, codec, age.retainer, kept_ppm, age.keep_ppm)
            kept_ppm = age.keep_ppm
        return unit, codec, kept_ppm

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

    def _sql(self, age: Age, values: list[int | str], until_ns: int) -> str:
        """What `_changes` says, for the catalog; its parameters go to `values`."""
        values.append(until_ns)
        if age.captions_only:
            return "1"
        wider = [name for name in _WIDTHS if age.codec and _wider(name, age.codec)]
        wider += [""] if self._own_codec in wider else []
        values += [*wider, age.keep_ppm]
        return f"(codec IN ({', '.join('?' * len(wider))}) OR kept_ppm > ?)"

    def _last_unit(self, catalog: Catalog) -> int:
        """The last unit that has reached any step."""
        latest = max(step.until_ns for step in self._steps)
        return catalog.first_unit(self._row, lambda unit: unit.end_ns > latest) - 1


def due_now(store: Store, ages: tuple[Age, ...], now_ns: int) -> dict[str, int]:
    """Recording to how many of its units a compaction would age at this moment."""
    found: dict[str, int] = {}
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
