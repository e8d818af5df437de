"""Committing: records that lie safely in a segment become rows of the catalog, in one transaction.

The same function serves a writer that goes on, a forgetting or a rewriting, and whoever brings back what a
killed process left: it can be called again with the same records and changes nothing then.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from memdb.records import Kind, Record, canonical_ascii, meta_int, meta_str
from memdb.schemas.errors import CorruptionError, StoreError
from memdb.schemas.rows import ALL_PPM, NOT_WHAT_IT_SAYS, Part, RecordingSpec, UnitRow
from memdb.schemas.units import BLOCK_DTYPE

if TYPE_CHECKING:
    from memdb.catalog import Catalog
    from memdb.database import Database, Value

logger = logging.getLogger(__name__)

# Roles of a segment: who wrote it. All but streams count once they are sealed.
STREAM, FORGET, REWRITE, REPAIR, IMPORT = "stream", "forget", "rewrite", "repair", "import"
_BYTES_COLUMN = {
    Part.CAPTION: "captions_bytes",
    Part.VECTOR: "captions_bytes",
    Part.KEYFRAME: "keyframes_bytes",
    Part.KEYS: "keys_bytes",
    Part.KV: "kv_bytes",
    Part.KEEP: "keep_sets_bytes",
    Part.HELD: "keep_sets_bytes",
    Part.EMBEDDINGS: "keys_bytes",
}
# Kinds of record with a table of their own: the table, and its columns after recording and number.
EVENTS: dict[Kind, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    Kind.GAP: ("gaps", ("start_ns", "end_ns"), ("reason",)),
    Kind.EPOCH: ("epochs", ("epoch", "first_unit"), ("reason",)),
    Kind.END: ("ends", ("media_end_ns", "units"), ()),
    Kind.TOMBSTONE: ("tombstones", ("start_ns", "end_ns", "below_unit", "at_ns", "first"), ()),
}
TOMBSTONES_MAX = 1 << 20  # of a recording: each is counted in memory
TABLES = (
    "units",
    "gaps",
    "epochs",
    "ends",
    "tombstones",
    "segments",
    "replaced",
)  # that refer to a recording


@dataclass(frozen=True)
class SegmentRow:
    """A segment file as far as it is committed."""

    recording: str  # id
    sequence: int
    name: str  # file name in segments/
    end_bytes: int  # end of the last committed record
    footer_hash: bytes  # of that record
    role: str = STREAM
    units: int = 0  # records of units in it, whether they count still or not


@dataclass
class RecordingState:
    """A row of `recordings`: the counts grow within a commit."""

    id: str
    name: str
    created_ns: int
    spec: str  # JSON
    units: int = 0
    start_ns: int = 0
    watermark_ns: int = 0
    last_commit: int = 0
    segments: int = 0
    gaps: int = 0
    epochs: int = 0
    ends: int = 0
    kv_bytes: int = 0
    keys_bytes: int = 0
    captions_bytes: int = 0
    keyframes_bytes: int = 0
    tombstones: int = 0
    replaced: int = 0
    generation: int = 0
    kv_from_unit: int = 0
    keep_sets_bytes: int = 0


def apply(catalog: Catalog, recording_id: str, segment: SegmentRow, records: Sequence[Record]) -> None:
    """Commit records that lie safely in `segment`. `segment` is its row afterwards, its units uncounted.

    A header makes the recording where there is none. Units go on where the recording ends, or are a later
    revision of one that is there; what is there already is passed over. Raises CorruptionError for records
    that make no sense, StoreError for a recording that was forgotten.
    """
    database = catalog.database
    with database.writing():
        _Applying(catalog, database, recording_id, segment).run(records)


class _Applying:
    def __init__(self, catalog: Catalog, database: Database, recording_id: str, segment: SegmentRow) -> None:
        self._catalog, self._database = catalog, database
        self._id, self._segment = recording_id, segment
        self._state = catalog.state(recording_id)
        self._last_commit = catalog.last_commit()

    def run(self, records: Sequence[Record]) -> None:
        if self._catalog.is_forgotten(self._id):
            raise StoreError("the recording was forgotten, and takes nothing more: begin another")
        for record in records:
            if self._state is None:
                self._state = self._new_recording(record)
            elif record.kind is Kind.UNIT:
                self._put_unit(self._state, record)
            elif record.kind in EVENTS:
                self._add_event(self._state, record)
            elif record.kind is Kind.SEAL:
                self._seal(self._state, record)
        state, file = self._state, f"segments/{self._segment.name}"
        if state is None:
            raise CorruptionError(f"{file} has no header", file=file)
        own = "WHERE recording = ? AND sequence = ?"
        known = self._database.select("segments", own, (self._id, self._segment.sequence))
        before = SegmentRow(*cast("tuple[Any, ...]", known[0])).units if known else 0
        state.segments += not known
        units = before + sum(record.kind is Kind.UNIT for record in records)
        self._database.upsert("recordings", astuple(state))
        self._database.upsert("segments", astuple(replace(self._segment, units=units)))
        self._database.upsert("meta", ("last_commit", self._last_commit))

    def _new_recording(self, header: Record) -> RecordingState:
        spec = spec_of(header)
        text = canonical_ascii(spec.as_json()).decode()
        state = RecordingState(self._id, self._free_name(spec.name), meta_int(header, "created_ns"), text)
        self._database.insert("recordings", astuple(state))  # before the rows that refer to it
        self._database.upsert("meta", ("recordings", self._catalog.count_of("recordings") + 1))
        return state

    def _free_name(self, name: str) -> str:
        """The name itself, but for a recording that comes back when another one has it by now."""
        names = {row[1] for row in self._database.select("recordings", "")}
        free, number = name, 1
        while free in names:
            number += 1
            free = f"{name[:120]}-{number}"
        if free != name:
            logger.warning(
                "a recording %r came back, and there is another of that name: it is %r now", name, free
            )
        return free

    def _put_unit(self, state: RecordingState, record: Record) -> None:
        file = f"segments/{self._segment.name}"
        if record.number > state.units:
            if self._segment.role == STREAM:
                raise CorruptionError(
                    f"{file}: unit {record.number} stands where {state.units} should", file=file
                )
            logger.warning("%s: unit %d is not known and is passed over", file, record.number)
        elif record.number == state.units:
            self._last_commit += 1
            row = self._row(record, self._last_commit)
            self._database.insert("units", unit_values(row))
            if record.number == 0:
                state.start_ns = row.start_ns
            state.units, state.watermark_ns, state.last_commit = record.number + 1, row.end_ns, row.commit_id
            count_bytes(state, row, 1)
        elif revision_of(record) > 0:
            known = self._catalog.unit(self._id, record.number)
            if revision_of(record) > known.revision:
                row = self._row(record, known.commit_id)
                self._database.upsert("units", unit_values(row))
                count_bytes(state, known, -1)
                count_bytes(state, row, 1)

    def _row(self, record: Record, commit_id: int) -> UnitRow:
        return unit_row(record, recording_id=self._id, segment=self._segment.name, commit_id=commit_id)

    def _add_event(self, state: RecordingState, record: Record) -> None:
        if record.kind is Kind.TOMBSTONE:
            self._add_tombstone(state, record)
            return
        table = EVENTS[record.kind][0]
        count: int = getattr(state, table)
        if record.number < count:
            return  # there already
        self._database.insert(table, event_values(state.id, record))
        setattr(state, table, count + 1)

    def _add_tombstone(self, state: RecordingState, stone: Record) -> None:
        """One that stands for several takes the place of those that are known."""
        first, last = meta_int(stone, "first"), stone.number
        file = f"segments/{self._segment.name}"
        if not 0 <= first <= last < TOMBSTONES_MAX:
            raise CorruptionError(f"{file}: there is no tombstone {last} in the place of {first}", file=file)
        where = "WHERE recording = ? AND number >= ?"
        rows = self._database.select("tombstones", where, (state.id, first))
        known = [(cast("int", row[1]), cast("int", row[-1])) for row in rows]  # number and first
        if any(low <= first and last <= high for high, low in known):
            return  # there already
        replaced = [(high, low) for high, low in known if low <= last]
        if any(low < first or high > last for high, low in replaced):
            raise CorruptionError(f"{file}: tombstone {last} stands for a part of another", file=file)
        self._database.delete(
            "tombstones", "WHERE recording = ? AND number BETWEEN ? AND ?", (state.id, first, last)
        )
        self._database.insert("tombstones", event_values(state.id, stone))
        state.tombstones += last - first + 1 - sum(high - low + 1 for high, low in replaced)

    def _seal(self, state: RecordingState, record: Record) -> None:
        """What a rewriting replaces waits for its removal from now on."""
        for name in meta_names(record, "replaces"):
            rows = self._database.select("segments", "WHERE recording = ? AND name = ?", (state.id, name))
            if rows:
                sequence = rows[0][1]
                self._database.delete(
                    "segments", "WHERE recording = ? AND sequence = ?", (state.id, sequence)
                )
                self._database.upsert("replaced", (state.id, sequence, name))
                state.segments -= 1
                state.replaced += 1
        state.kv_from_unit = max(state.kv_from_unit, meta_int(record, "kv_from_unit"))


def counts_of(event: Record) -> list[int]:
    """How many units there were, as far as an event says. Raises CorruptionError."""
    name = {Kind.END: "units", Kind.EPOCH: "first_unit", Kind.TOMBSTONE: "below_unit"}.get(event.kind)
    return [] if name is None or event.meta.get("whole") is True else [meta_int(event, name)]


def event_values(recording_id: str, record: Record) -> tuple[Value, ...]:
    """The row of an event. Raises CorruptionError where its meta is not that of its kind."""
    _, integers, texts = EVENTS[record.kind]
    values = [meta_int(record, name) for name in integers], [meta_str(record, name) for name in texts]
    return recording_id, record.number, *values[0], *values[1]


def forget_recording(catalog: Catalog, recording_id: str, at_ns: int) -> None:
    """Take a recording out of the catalog, with all that belongs to it, for good."""
    database = catalog.database
    with database.writing():
        if not catalog.is_forgotten(recording_id):
            database.insert("forgotten", (recording_id, at_ns))
            database.upsert("meta", ("forgotten", catalog.count_of("forgotten") + 1))
        _drop_rows(catalog, recording_id)


def drop_empty(catalog: Catalog, recording_id: str) -> None:
    """Take a recording without units out of the catalog, with all that belongs to it."""
    with catalog.database.writing():
        state = catalog.state(recording_id)
        if state is None or state.units:
            raise StoreError("only a recording without units can be dropped")
        _drop_rows(catalog, recording_id)


def removed(catalog: Catalog, recording_id: str, names: Sequence[str]) -> None:
    """Files that waited for their removal are gone."""
    with catalog.database.writing():
        state = catalog.state(recording_id)
        if state is None:
            return
        for name in names:
            where = "WHERE recording = ? AND name = ?"
            if catalog.database.select("replaced", where, (recording_id, name)):
                catalog.database.delete("replaced", where, (recording_id, name))
                state.replaced -= 1
        catalog.database.upsert("recordings", astuple(state))


def new_generation(catalog: Catalog, recording_id: str, generation: int) -> None:
    """Let the key pages of a generation count from now on."""
    with catalog.database.writing():
        state = catalog.state(recording_id)
        if state is not None:
            state.generation = generation
            catalog.database.upsert("recordings", astuple(state))


def _drop_rows(catalog: Catalog, recording_id: str) -> None:
    database = catalog.database
    if catalog.state(recording_id) is None:
        return
    for table in TABLES:
        database.delete(table, "WHERE recording = ?", (recording_id,))
    database.delete("recordings", "WHERE id = ?", (recording_id,))
    database.upsert("meta", ("recordings", catalog.count_of("recordings") - 1))


def count_bytes(state: RecordingState, row: UnitRow, sign: int) -> None:
    """Add the bytes of a unit's parts to its recording's, or take them off (`sign` -1)."""
    for part, span in row.parts.items():
        column = _BYTES_COLUMN[part]
        setattr(state, column, getattr(state, column) + sign * span.length)


def unit_values(row: UnitRow) -> list[Value]:
    return [getattr(row, field.name) for field in fields(row)]


def unit_row(record: Record, *, recording_id: str, segment: str, commit_id: int) -> UnitRow:
    """The row of a unit's record. Raises CorruptionError where its meta or its tables are not a unit's."""
    caption_tokens = record.meta.get("caption_tokens")
    digest = meta_hex(record, "digest")
    row = UnitRow(
        recording_id=recording_id,
        number=record.number,
        commit_id=commit_id,
        segment=segment,
        offset=record.offset,
        length=record.length,
        start_ns=meta_int(record, "start_ns"),
        end_ns=meta_int(record, "end_ns"),
        epoch=meta_int(record, "epoch"),
        digest=digest,
        layers=meta_int(record, "layers"),
        block_count=len(record.blocks) // BLOCK_DTYPE.itemsize,
        caption_tokens=None if caption_tokens is None else meta_int(record, "caption_tokens"),
        parts_table=record.parts,
        blocks_table=record.blocks,
        slices_table=record.slices,
        revision=revision_of(record),
        codec=meta_str(record, "codec") if "codec" in record.meta else "",
        first_digest=meta_hex(record, "first_digest") if "first_digest" in record.meta else digest,
        kept_ppm=meta_int(record, "kept_ppm") if "kept_ppm" in record.meta else ALL_PPM,
    )
    try:
        row.check()
    except CorruptionError as error:
        file = f"segments/{segment}"
        what = str(error).removeprefix(f"{error.file}: the row of ")
        raise CorruptionError(f"{file}: the record of {what}", file=file) from None
    return row


def revision_of(record: Record) -> int:
    """0 for a unit as it was first written, also by format 1, which had no revisions."""
    return meta_int(record, "revision") if "revision" in record.meta else 0


def spec_of(header: Record) -> RecordingSpec:
    """The recording that a segment's header describes."""
    spec = header.meta.get("spec")
    try:
        return RecordingSpec.from_json(cast("dict[str, object]", spec))
    except NOT_WHAT_IT_SAYS as error:
        raise CorruptionError(f"a segment's header describes no recording: {error!s:.200}") from None


def role_of(header: Record) -> str:
    """Who wrote a segment. Format 1 knew one role only."""
    return meta_str(header, "role") if "role" in header.meta else STREAM


def meta_hex(record: Record, key: str) -> bytes:
    """Bytes that stand in a record's meta as hexadecimal digits. Raises CorruptionError where there are none."""
    try:
        return bytes.fromhex(meta_str(record, key))
    except ValueError:
        raise CorruptionError(f"the record at byte {record.offset} has no bytes {key!r}") from None


def meta_names(record: Record, key: str) -> list[str]:
    names = record.meta.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptionError(f"the record at byte {record.offset} has no list {key!r}")
    return names
