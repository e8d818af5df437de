"""A bounded memory as the store has it: the keep set that a moment of a recording goes by."""

from __future__ import annotations

from dataclasses import dataclass

from memdb.schemas.errors import CorruptionError
from memdb.schemas.keep import KeepSet
from memdb.schemas.rows import Part, RecordingRow, UnitRow
from memdb.store import Store


@dataclass(frozen=True, eq=False)
class Remembered:
    """What was remembered after a unit. `unit`: its number, -1 where nothing tells of a memory."""

    unit: int
    keep: KeepSet | None
    bad: tuple[str, ...] = ()  # keep sets of later units that are damaged


def remembered(store: Store, recording: RecordingRow, at_ns: int | None = None) -> Remembered:
    """The memory at the watermark, or as of a moment: of the last unit that had ended by then and tells of one.

    A unit that was forgotten, lost its KV to ageing, or is damaged tells of none: then the one before it does. The
    memory is a little older then, and holds nothing that it should not.
    """
    last = recording.units
    if at_ns is not None:
        last = store.catalog.first_unit(recording, lambda unit: _end_ns(recording, unit) > at_ns)
    bad: list[str] = []
    for number in range(last - 1, recording.kv_from_unit - 1, -1):
        row = store.unit(recording.id, number)
        if Part.KEEP not in row.parts:
            continue
        try:
            keep = store.read_keep(row)
            if keep is not None and len(keep.ids) == recording.spec.model.shape.layers:
                return Remembered(number, keep, tuple(bad))
            bad.append(f"{recording.name}: the keep set of unit {number} is of another model")
        except CorruptionError as error:
            bad.append(f"{recording.name}: {error}")
    return Remembered(-1, None, tuple(bad))


def _end_ns(recording: RecordingRow, unit: UnitRow) -> int:
    """The last slot may reach beyond the film: as of its end, everything of it was seen."""
    return unit.end_ns if recording.end_ns is None else min(unit.end_ns, recording.end_ns)
