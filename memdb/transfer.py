"""One recording as one file: `memdb export --format memdb`, and `memdb import` into another store.

    HEADER   role export, with the recording's spec: recipe, encoding, model fingerprint
    ...      gaps, epochs, ends, tombstones
    ...      every unit as it is, in order; what was forgotten is in none of them
    SEAL     how many units there are

It is a sealed segment in itself, so that every byte stands under a checksum. An import writes it anew as a
segment of the store that takes it in, unit by unit, each verified on the way; nothing counts before all of it
was right. The content stays as it is, bit for bit: the digest is the same. Encoder states do not travel: an
ingest that goes on with a film encodes it again from its beginning, compares, and goes on where it ends.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from memdb.applying import EVENTS, IMPORT, SegmentRow, apply
from memdb.catalog import Catalog
from memdb.contents import encode_unit
from memdb.database import CATALOG
from memdb.derived import index
from memdb.digest import check_digest, digests_of
from memdb.events import known_events
from memdb.files import File, sync_folder, unlink
from memdb.files import replace as rename
from memdb.locks import FileLock, rewrite_lock, writer_lock
from memdb.records import Buffer, Kind, Record, encode, meta_int, read_record
from memdb.roll_forward import lost_recording, roll_forward
from memdb.room import RESERVE_BYTES, refused, require
from memdb.schemas.errors import CorruptionError, ModelMismatch, StoreError, UsageError
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.recording import check_name
from memdb.schemas.rows import RecordingRow, RecordingSpec, UnitRow
from memdb.schemas.times import to_s
from memdb.schemas.units import Unit
from memdb.sealed import read_unit
from memdb.segments import SegmentGone, reading
from memdb.store import Store
from memdb.transfer_file import EXPORT, Event, TransferFile
from memdb.writer import OwnSegment, segment_header

logger = logging.getLogger(__name__)

_TRIES = 5
_RECORDS_MAX = 512  # of one transaction
Progress = Callable[[int, int], None]  # units done, units in all; or bytes, of an import


@dataclass(frozen=True)
class ExportReport:
    recording: str
    units: int
    bytes: int
    out: str


@dataclass
class ImportReport:
    recording: str
    units: int
    watermark_s: float
    bytes: int  # of its segment
    notes: list[str] = field(default_factory=list)


# Export


def export_recording(store: Path, name: str, out: Path, *, progress: Progress | None = None) -> ExportReport:
    """Write a recording as of this moment into one file, whole or not at all. Others go on meanwhile.

    Raises UnknownRecording, CorruptionError where something of it is damaged, UsageError, StoreFull.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise UsageError(f"cannot write {out}: it is no place for a file: name another file with --out")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with Store.open(store) as opened:
            row, size = _export(opened, name, temporary, progress)
        rename(temporary, out)
        sync_folder(out.parent, "the name of an exported recording")
    except OSError as error:
        raise refused(error, f"cannot write {out}") from error
    finally:
        with suppress(OSError):
            unlink(temporary)
    return ExportReport(row.name, row.units, size, str(out))


def _export(store: Store, name: str, temporary: Path, progress: Progress | None) -> tuple[RecordingRow, int]:
    """The recording as it was written, and the bytes. Begun anew where something was forgotten on the way.

    No long look into the catalog: that would keep others from emptying its WAL.
    """
    for _ in range(_TRIES):
        row = store.recording(name)
        unlink(temporary)
        with File(temporary) as file:
            size = _Export(store, row, file, progress).run()
            if len(store.recording_by_id(row.id).tombstones) > len(row.tombstones):
                continue
            file.sync("an exported recording")
            return row, size
    raise StoreError(f"spans of {name!r} are being forgotten all the while: export it again later")


class _Export:
    """Writes a recording's records one after another."""

    def __init__(self, store: Store, row: RecordingRow, file: File, progress: Progress | None) -> None:
        self._store, self._row, self._file, self._progress = store, row, file, progress
        self._end_bytes = 0
        self._footer_hash = b""

    def run(self) -> int:
        """The bytes written."""
        row = self._row
        meta: dict[str, object] = {
            "format": FORMAT_VERSION,
            "store_id": self._store.store_id,
            "recording_id": row.id,
            "created_ns": row.created_ns,
            "spec": row.spec.as_json(),
            "role": EXPORT,
        }
        self._record(Kind.HEADER, 0, meta)
        for kind, events in self._events().items():
            for number, event in events:
                self._record(kind, number, event)
        for unit_row in self._store.catalog.units(row.id, 0, row.units):
            unit, unit_row = self._unit(unit_row)
            self._write(*_encoded(unit, unit_row, row.spec, self._end_bytes, self._footer_hash))
            if self._progress is not None:
                self._progress(unit_row.number + 1, row.units)
        self._record(Kind.SEAL, row.units, _seal(row.units, row.kv_from_unit, EXPORT))
        return self._end_bytes

    def _events(self) -> dict[Kind, list[tuple[int, dict[str, object]]]]:
        """Gaps, epochs, ends and tombstones as records hold them. Those that came since are left out."""
        row = self._row
        found: dict[Kind, list[tuple[int, dict[str, object]]]] = {kind: [] for kind in EVENTS}
        with self._store.snapshot():
            events = known_events(self._store.catalog, row.id)
        known = {Kind.GAP: len(row.gaps), Kind.EPOCH: len(row.epochs), Kind.TOMBSTONE: len(row.tombstones)}
        for event in events:
            _, integers, texts = EVENTS[event.kind]
            if event.kind is Kind.END and meta_int(event, "units") > row.units:
                continue
            if event.number < known.get(event.kind, event.number + 1):
                meta = {name: event.meta[name] for name in (*integers, *texts)}
                found[event.kind].append((event.number, meta))
        return found

    def _unit(self, row: UnitRow) -> tuple[Unit, UnitRow]:
        """A unit, verified, where it is now: a compaction may have moved it since its row was read."""
        for _ in range(_TRIES):
            try:
                unit = read_unit(self._store.segments_path, self._row, row)
            except SegmentGone:
                row = self._store.catalog.unit(self._row.id, row.number)
                continue
            check_digest(row, digests_of(unit))
            return unit, row
        raise CorruptionError(
            f"segments/{row.segment} is lost: run memdb verify to see what else is",
            file=f"segments/{row.segment}",
        )

    def _record(self, kind: Kind, number: int, meta: dict[str, object]) -> None:
        self._write(*encode(kind, number, meta, offset=self._end_bytes, previous=self._footer_hash))

    def _write(self, buffers: list[Buffer], record: Record) -> None:
        self._end_bytes = self._file.write(buffers, self._end_bytes)
        self._footer_hash = record.footer_hash


def _encoded(
    unit: Unit, row: UnitRow, spec: RecordingSpec, offset: int, previous: bytes
) -> tuple[list[Buffer], Record]:
    """A unit's record elsewhere: the same revision of the same content."""
    return encode_unit(
        unit,
        offset=offset,
        previous=previous,
        encoding_fingerprint=spec.encoding_fingerprint,
        written={
            "revision": row.revision,
            "codec": row.codec,
            "first_digest": row.first_digest.hex(),
            "kept_ppm": row.kept_ppm,
        },
    )


def _seal(units: int, kv_from_unit: int, role: str) -> dict[str, object]:
    return {"replaces": [], "kv_from_unit": kv_from_unit, "role": role, "units": units}


# Import


def import_recording(
    store: Store, path: Path, *, recording: str | None = None, progress: Progress | None = None
) -> ImportReport:
    """Take an exported recording into a store that is open for writing, under its own name or another.

    Raises UsageError for a name that is taken and for what is no export, CorruptionError where any byte of it
    is not what was written, FormatVersionError, ModelMismatch, StoreFull, StoreError.
    """
    with TransferFile(path) as source:
        name = check_name(recording if recording is not None else source.spec.name)
        _check_model(store, source.spec, path)
        catalog = Catalog(store.path / CATALOG, write=True)
        try:
            _check_free(store, catalog, name)
            require(store.path, source.size_bytes, reserve_bytes=RESERVE_BYTES, what=f"importing {path}")
            return _Import(store, catalog, source, replace(source.spec, name=name), progress).run()
        except OSError as error:
            raise refused(error, f"cannot import {path}") from error
        finally:
            catalog.close()


def _check_model(store: Store, spec: RecordingSpec, path: Path) -> None:
    known = store.model
    if known is not None and known.fingerprint != spec.model.fingerprint:
        raise ModelMismatch(
            f"{path} was made with the model {spec.model.spec!r} ({spec.model.fingerprint[:12]}), the store with "
            f"{known.spec!r} ({known.fingerprint[:12]}): import it into another store"
        )


def _check_free(store: Store, catalog: Catalog, name: str) -> None:
    """Raises UsageError where a recording has the name, also one that a killed process left just before its end.

    Raises LockedError where another import brings one of that name.
    """
    taken = f"the store has a recording {name!r}: import it under another --recording"
    with FileLock(store.path / "locks" / "names.lock", wait=True):
        if catalog.find(name) is not None:
            raise UsageError(taken)
        lost = lost_recording(catalog, store.segments_path, name)
        if lost is not None:
            busy = f"another process brings a recording {name!r} into the store: import it under another name"
            with FileLock(writer_lock(store.path, lost), held_message=busy):
                roll_forward(catalog, store.segments_path, lost)
        if catalog.find(name) is not None:
            raise UsageError(taken)


class _Import:
    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        source: TransferFile,
        spec: RecordingSpec,
        progress: Progress | None,
    ) -> None:
        self._store, self._catalog, self._source = store, catalog, source
        self._row = RecordingRow.begun(uuid.uuid4().hex, spec, source.created_ns)
        self._progress = progress

    def run(self) -> ImportReport:
        store, row = self._store, self._row
        with (
            FileLock(writer_lock(store.path, row.id)),
            FileLock(rewrite_lock(store.path, row.id)),
        ):
            segment = OwnSegment(store.segments_path, row.id, 0, IMPORT)
            try:
                self._write(segment)
                segment.sync_new("an imported recording, before it is committed", "the name of an import")
                with FileLock(store.path / "locks" / "names.lock", wait=True):
                    if self._catalog.find(row.name) is not None:
                        raise UsageError(
                            f"the store has a recording {row.name!r} by now: import it under another"
                        )
                    store.bind_model(row.spec.model)
                    self._commit(segment.name)
            except BaseException:
                if self._catalog.state(row.id) is None:
                    unlink(
                        store.segments_path / segment.name
                    )  # nothing of it counts: its room is free at once
                raise
            finally:
                segment.close()
            notes: list[str] = []
            index(store, row.id, row.spec.caption_encoder, notes)
        done = self._catalog.by_id(row.id)
        logger.info("%s: %d units came in", done.name, done.units)
        return ImportReport(done.name, done.units, to_s(done.seen_until_ns), segment.end_bytes, notes)

    def _write(self, segment: OwnSegment) -> None:
        """All of the file as a segment of this store, each unit verified. It does not count before its seal."""

        def put(buffers: list[Buffer], record: Record) -> None:
            segment.append(buffers)
            segment.footer_hash = record.footer_hash

        def place() -> tuple[int, bytes]:
            return segment.end_bytes, segment.footer_hash

        put(*segment_header(self._catalog.store_id, self._row, segment))
        for item in self._source.items():
            offset, previous = place()
            if isinstance(item, Event):
                put(*encode(item.kind, item.number, item.meta, offset=offset, previous=previous))
            else:
                row, unit = item
                put(*_encoded(unit, row, self._row.spec, offset, previous))
            if self._progress is not None:
                self._progress(self._source.read_bytes, self._source.size_bytes)
        meta = _seal(self._source.units, self._source.kv_from_unit, IMPORT)
        for _ in range(2):  # the only copy of the recording must not hang on one record
            offset, previous = place()
            put(*encode(Kind.SEAL, self._source.units, meta, offset=offset, previous=previous))

    def _commit(self, name: str) -> None:
        """A part of the records at a time, so that others who write need not wait long."""
        records = _records(self._store, name)
        while part := list(islice(records, _RECORDS_MAX)):
            last = part[-1]
            row = SegmentRow(self._row.id, 0, name, last.end, last.footer_hash, IMPORT)
            apply(self._catalog, self._row.id, row, part)


def _records(store: Store, name: str) -> Iterator[Record]:
    offset = 0
    with reading(store.segments_path, name) as segment:
        while offset < segment.size_bytes:
            record = read_record(segment.fd, offset, segment.size_bytes, file=segment.file)
            yield record
            offset = record.end
