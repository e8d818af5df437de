"""A catalog made anew from what the segments say: rows as commits would have made them, in one global order.

Commit ids are given by when a unit was seen: its recording's beginning on the wall clock and its time in it. So
they are the same whenever the same segments are read, and grow with the numbers of a recording's units.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from memdb.applying import EVENTS, RecordingState, SegmentRow, count_bytes, unit_values
from memdb.catalog import Catalog
from memdb.records import Kind, canonical_ascii, meta_int, meta_str
from memdb.salvage import record_at, row_at
from memdb.schemas.errors import CorruptionError
from memdb.schemas.fingerprint import ModelIdentity
from memdb.schemas.rows import RecordingSpec, model_as_json
from memdb.truth import Truth

_ROWS_MAX = 1024  # of one transaction


@dataclass(frozen=True)
class Known:
    """A recording that has a place in the catalog."""

    truth: Truth  # with every unit in a file that counts
    spec: RecordingSpec
    name: str
    created_ns: int
    generation: int


def fill(
    catalog: Catalog,
    folder: Path,
    model: ModelIdentity | None,
    recordings: Sequence[Known],
    forgotten: Mapping[str, int],
) -> None:
    """Fill a catalog that holds nothing. `folder` is segments/. Raises CorruptionError, StoreError."""
    database = catalog.database
    states = {known.truth.id: _state(known) for known in recordings}
    with database.writing():
        if model is not None:
            database.upsert("meta", ("model", canonical_ascii(model_as_json(model)).decode()))
        for recording_id, at_ns in sorted(forgotten.items()):
            database.insert("forgotten", (recording_id, at_ns))
        database.upsert("meta", ("forgotten", len(forgotten)))
        database.upsert("meta", ("recordings", len(recordings)))
        for known in recordings:
            _put_files(catalog, folder, known, states[known.truth.id])
    last_commit = 0
    rows = heapq.merge(*map(_places, recordings))
    while batch := [place for _, place in zip(range(_ROWS_MAX), rows, strict=False)]:
        with database.writing():
            for _, recording_id, number, name, offset in batch:
                last_commit += 1
                row = row_at(folder, recording_id, name, offset, last_commit)
                database.insert("units", unit_values(row))
                state = states[recording_id]
                if number == 0:
                    state.start_ns = row.start_ns
                state.watermark_ns, state.last_commit = row.end_ns, last_commit
                count_bytes(state, row, 1)
    with database.writing():
        for state in states.values():
            database.upsert("recordings", astuple(state))
        database.upsert("meta", ("last_commit", last_commit))


def check(catalog: Catalog) -> None:
    """Read it all once more before anybody relies on it. Raises CorruptionError."""
    for recording in catalog.recordings():
        catalog.segments(recording.id)
        catalog.replaced(recording.id)
        for _ in catalog.units(recording.id, 0, recording.units):
            pass
    catalog.forgotten()
    if catalog.database.execute("PRAGMA integrity_check") != [("ok",)]:
        raise CorruptionError("the catalog that was made is damaged: check the disk, then run it again")


def _state(known: Known) -> RecordingState:
    truth = known.truth
    spec = canonical_ascii(known.spec.as_json()).decode()
    counts = {table: truth.event_count(kind) for kind, (table, _, _) in EVENTS.items()}
    return RecordingState(
        truth.id,
        known.name,
        known.created_ns,
        spec,
        units=truth.unit_count,
        segments=len(truth.standing),
        replaced=len(truth.replaced),
        generation=known.generation,
        kv_from_unit=truth.kv_from_unit,
        **counts,
    )


def _put_files(catalog: Catalog, folder: Path, known: Known, state: RecordingState) -> None:
    """The recording with its segments and events; its units come later."""
    database, truth = catalog.database, known.truth
    database.insert("recordings", astuple(state))
    for file in truth.standing:
        end = truth.end_bytes(file)
        # Holes count: whatever lies there is dead, and compaction is to write the file anew without it.
        units = int((file.units["offset"] < end).sum()) + sum(hole.start < end for hole in file.holes)
        row = SegmentRow(truth.id, file.sequence, file.name, end, _footer_hash(folder, truth, file.name, end))
        database.insert("segments", (*astuple(row)[:5], file.role, units))
    for file in truth.replaced:
        database.insert("replaced", (truth.id, file.sequence, file.name))
    for (kind, number), record in sorted(truth.events.items()):
        table, integers, texts = EVENTS[Kind(kind)]
        values = [meta_int(record, name) for name in integers] + [meta_str(record, name) for name in texts]
        database.insert(table, (truth.id, number, *values))


def _footer_hash(folder: Path, truth: Truth, name: str, end: int) -> bytes:
    """Of the record that ends there: whoever goes on in the catalog's view compares with it."""
    [file] = [file for file in truth.standing if file.name == name]
    records = [*file.events, *file.seals, *([file.header] if file.header else [])]
    for record in records:
        if record.end == end:
            return record.footer_hash
    for found in file.units[file.units["end"] == end]:
        return record_at(folder, name, int(found["offset"])).footer_hash
    return b""


def _places(known: Known) -> Iterator[tuple[int, str, int, str, int]]:
    """When each unit was seen, its recording and number, and where its record stands."""
    truth = known.truth
    names = [file.name for file in truth.files]
    latest = 0
    for found in truth.chosen:
        latest = max(latest, known.created_ns + int(found["end_ns"]))
        yield latest, truth.id, int(found["number"]), names[int(found["file"])], int(found["offset"])
