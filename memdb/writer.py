"""The writer of a recording: one commit after another, each safe before it is acknowledged."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from memdb.applying import STREAM, SegmentRow
from memdb.catalog import Catalog
from memdb.codecs.planes import element_bytes
from memdb.contents import check_unit, encode_unit, husk
from memdb.locks import FileLock, commit_lock
from memdb.quota import Quota, batch_bytes
from memdb.records import Buffer, Kind, Record, encode
from memdb.schemas.errors import StoreError, StoreFull
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.recording import Gap, Tombstone
from memdb.schemas.rows import RecordingRow
from memdb.schemas.units import Table, Unit
from memdb.segments import SEGMENT_BYTES_MAX, SegmentWriter, segment_files, segment_name

SEGMENT_NS_MAX = 86_400_000_000_000  # of media time, in one file
AHEAD_BYTES = 1 << 20  # a part of this size is written while its record is still being hashed
_WIDTHS_UNITS_MAX = 1024  # that are looked through for the last scale widths

# Makes the buffers of a record and the record, given where it begins and the footer hash before it.
_Encode = Callable[[int, bytes], tuple[list[Buffer], Record]]


class RecordingWriter:
    """Appends to one recording and alone may. Made by `Store.writer`.

    The order of a commit: bytes and footers, one fdatasync, one SQLite transaction, and only then the return.
    Whatever fails between ends the writer: every later call raises StoreError. What is whole on the disk by
    then comes back when the next writer opens.
    """

    def __init__(
        self,
        catalog: Catalog,
        folder: Path,
        lock: FileLock,
        recording: RecordingRow,
        segment: OwnSegment | None = None,
        *,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
    ) -> None:
        """`segment` is the one that made the recording, if this writer did; else one is made when needed."""
        self.recording = recording  # as it was when the writer opened
        self._row = recording
        self._catalog = catalog
        self._folder = folder
        self._file_lock = lock
        self._commit_lock = commit_lock(folder.parent, recording.id)
        self._segment_bytes_max = segment_bytes_max
        self._segment = segment
        self._broken = ""
        self._quota = Quota(folder.parent)
        self._lock = threading.RLock()
        self._scale_widths = _last_scale_widths(catalog, recording)
        self._tombstones = len(recording.tombstones)  # that this writer has taken note of
        self.units_bytes = 0  # of the records of units that this writer committed

    @property
    def next_unit(self) -> int:
        return self._row.units

    @property
    def watermark_ns(self) -> int:
        return self._row.watermark_ns

    def tombstones(self) -> tuple[Tombstone, ...]:
        """The spans of the recording that were forgotten up to now, by whatever process.

        Raises StoreError where all of it was forgotten.
        """
        with self._lock:
            if self._catalog.tombstones(self._row.id) > self._tombstones:
                self._take_note()
            elif self._catalog.is_forgotten(self._row.id):
                raise StoreError(f"recording {self._row.name!r} was forgotten while it was written")
            return self._row.tombstones

    def append(self, units: Sequence[Unit], *, tombstones_seen: int | None = None) -> int:
        """Commit units as one. Returns the commit id of the last of them.

        Their numbers go on where the recording ends, and neither their starts nor their ends go back in time.
        `tombstones_seen`: how many spans had been forgotten when the encoder took in these units (None: as many
        as when the writer opened); what is forgotten since is left out of them, under the same numbers. Raises
        StoreError for units that do not go on, StoreFull for such as do not fit, and then nothing was written.
        """
        self._require_room(units)
        with self._lock, FileLock(self._commit_lock, wait=True):
            seen = len(self.recording.tombstones) if tombstones_seen is None else tombstones_seen
            # First of all: a recording that was forgotten has no rows to check.
            since = self.tombstones()[seen:]
            self._check(units)
            units = [self._without_forgotten(unit, since) for unit in units]
            fingerprint = self._row.spec.encoding_fingerprint

            def encoder(unit: Unit) -> _Encode:
                return lambda offset, previous: encode_unit(
                    unit,
                    offset=offset,
                    previous=previous,
                    encoding_fingerprint=fingerprint,
                    ahead=self._ahead,
                )

            self._end_long_segment(units[-1].end_ns)
            self._commit([encoder(unit) for unit in units])
            if self._segment is not None and self._segment.since_ns is None:
                self._segment.since_ns = units[0].start_ns
            for unit in units:
                if unit.kv is not None:
                    self._scale_widths |= _scale_widths(unit.kv.slices)
            return self._row.last_commit

    def gap(self, start_ns: int, end_ns: int, reason: str) -> None:
        """Record that the source gave nothing in a span. A gap that is recorded already is passed over."""
        gap = Gap(start_ns, end_ns, reason)
        with self._lock:
            if end_ns <= start_ns:
                raise StoreError(f"a gap from {start_ns} to {end_ns} ns spans nothing")
            if gap not in self._row.gaps:
                meta = {"start_ns": start_ns, "end_ns": end_ns, "reason": reason}
                self._commit([self._event(Kind.GAP, len(self._row.gaps), meta)])

    def epoch(self, number: int, first_unit: int, reason: str) -> None:
        """Record that units from `first_unit` on were encoded from a fresh window.

        The numbers grow. An epoch that is recorded already is passed over, whatever the reason.
        """
        with self._lock:
            known = self._row.epochs
            if any((epoch.number, epoch.first_unit) == (number, first_unit) for epoch in known):
                return
            if known and (number <= known[-1].number or first_unit < known[-1].first_unit):
                raise StoreError(f"epoch {number} from unit {first_unit} on cannot follow {known[-1]}")
            meta: dict[str, object] = {"epoch": number, "first_unit": first_unit, "reason": reason}
            self._commit([self._event(Kind.EPOCH, len(known), meta)])

    def end(self, media_end_ns: int) -> None:
        """Record that the source ended. Units may follow (a growing file): then the end no longer counts."""
        with self._lock:
            if self._row.end_ns != media_end_ns:
                meta: dict[str, object] = {"media_end_ns": media_end_ns, "units": self._row.units}
                self._commit([self._event(Kind.END, self._catalog.end_count(self._row.id), meta)])

    def scale_widths(self) -> dict[int, int]:
        """Layer to bytes of a scale in the last units: the width, once raised, stays. {} at the start."""
        with self._lock:
            return dict(self._scale_widths)

    def close(self) -> None:
        """Free the recording and empty the WAL. What was acknowledged is safe without."""
        with self._lock, ExitStack() as freed:  # whatever fails: a lock that is held on bars everybody
            freed.callback(self._file_lock.close)
            freed.callback(self._catalog.close)
            if self._segment is not None:
                segment, self._segment = self._segment, None
                segment.close()
            if not self._broken:
                self._broken = "it is closed"
                self._catalog.database.checkpoint()

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_room(self, units: Sequence[Unit]) -> None:
        """On the disk and in the store: by forgetting what is oldest, where the policy says so."""

        def make_room(size_bytes: int) -> None:
            from memdb.oldest import make_room

            make_room(self._folder.parent, size_bytes, own=self._row.id, move_on=self._move_on)

        with self._lock:
            self._quota.require(batch_bytes(units), make_room)

    def _move_on(self) -> None:
        """Something was forgotten to make room: leave the file in hand to compaction."""
        if self.tombstones() and self._segment is None:
            self._next_segment()

    def _check(self, units: Sequence[Unit]) -> None:
        if not units:
            raise StoreError("nothing to append")
        expected, start_ns, end_ns = self._row.units, 0, self._row.watermark_ns
        if expected:
            start_ns = self._catalog.unit(self._row.id, expected - 1).start_ns
        for unit in units:
            if unit.number != expected:
                raise StoreError(f"unit {unit.number} cannot follow {expected} units of {self._row.name!r}")
            if unit.start_ns < start_ns or unit.end_ns < end_ns:
                raise StoreError(f"unit {unit.number} goes back in time, to {unit.start_ns} ns")
            check_unit(unit)
            expected, start_ns, end_ns = expected + 1, unit.start_ns, unit.end_ns

    def _event(self, kind: Kind, number: int, meta: dict[str, object]) -> _Encode:
        return lambda offset, previous: encode(kind, number, meta, offset=offset, previous=previous)

    def _commit(self, encoders: Sequence[_Encode]) -> None:
        """Write, make safe, index: all of it, or the writer ends."""
        if self._broken:
            raise StoreError(f"the writer of {self._row.name!r} ended: {self._broken}: open another")
        refused = False
        try:
            if self._segment is None or self._segment.end_bytes >= self._segment_bytes_max:
                self._next_segment()
            assert self._segment is not None
            try:
                buffers, records = _encode_all(encoders, self._segment)
            except StoreError:  # refused: what was written ahead lies behind the end, where nothing counts
                self._segment.drop_ahead()
                refused = True
                raise
            self._segment.append(buffers)
            self._segment.sync("a unit's bytes, before it is committed")
            self._row = self._catalog.apply(self._row.id, self._segment.row(records[-1]), records)
            self.units_bytes += sum(record.length for record in records if record.kind is Kind.UNIT)
        except BaseException as error:
            if refused:
                raise
            self._broken = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError):
                kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
                raise kind(
                    f"cannot write to segments/: {error.strerror}: what was acknowledged is safe; check "
                    "the disk, then run the same ingest again"
                ) from error
            raise

    def _ahead(self, offset: int, buffer: Buffer) -> None:
        assert self._segment is not None
        self._segment.ahead(offset, buffer)

    def _without_forgotten(self, unit: Unit, since: Sequence[Tombstone]) -> Unit:
        """A unit that was in hand when something was forgotten: what of it overlaps is left out."""
        spec = self._row.spec
        for tombstone in since:
            if unit.start_ns < tombstone.end_ns and unit.end_ns > tombstone.start_ns:
                size = element_bytes(spec.recipe.codec, spec.dtype)
                unit = husk(unit, tombstone.start_ns, tombstone.end_ns, size)
        return unit

    def _take_note(self) -> None:
        """Something was forgotten: go on in a new file, so that compaction can have the one in hand."""
        self._row = self._catalog.by_id(self._row.id)
        self._tombstones = len(self._row.tombstones)
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _end_long_segment(self, end_ns: int) -> None:
        """A file of more than a day would keep what it holds from ageing: nobody else touches the one in hand."""
        segment = self._segment
        if (
            segment is not None
            and segment.since_ns is not None
            and end_ns - segment.since_ns > SEGMENT_NS_MAX
        ):
            segment.close()
            self._segment = None

    def _next_segment(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        self._segment = begin_segment(self._catalog, self._folder, self._row)


class OwnSegment(SegmentWriter):
    """The segment of a writer, with the footer hash that its next record repeats."""

    def __init__(self, folder: Path, recording_id: str, sequence: int, role: str = STREAM) -> None:
        super().__init__(folder, segment_name(recording_id, sequence))
        self.recording_id = recording_id
        self.sequence = sequence
        self.role = role
        self.footer_hash = b""
        self.since_ns: int | None = None  # media time of the first unit in it, for its writer
        self._ahead: list[tuple[Buffer, Future[int]]] = []
        self._thread: ThreadPoolExecutor | None = None

    @classmethod
    def next(cls, folder: Path, recording_id: str, role: str = STREAM) -> OwnSegment:
        """A new file behind all that there are. Raises StoreError."""
        while True:
            known = segment_files(folder).get(recording_id, [])
            try:
                return cls(folder, recording_id, 1 + max((found for found, _ in known), default=-1), role)
            except FileExistsError:
                continue  # somebody else who writes this recording was faster

    def ahead(self, offset: int, buffer: Buffer) -> None:
        """Begin to write a big part at its place while its record is still being made: `append` goes around it."""
        if len(buffer) >= AHEAD_BYTES:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="memdb-ahead")
            self._ahead.append((buffer, self._thread.submit(self._file.write_early, buffer, offset)))

    def append(self, buffers: Sequence[Buffer]) -> None:
        """Write at the end what is not there yet. Raises OSError."""
        ahead, self._ahead = self._ahead, []
        for _, future in ahead:
            future.result()
        there = {id(buffer) for buffer, _ in ahead}
        rest: list[Buffer] = []
        for buffer in buffers:
            if id(buffer) not in there:
                rest.append(buffer)
                continue
            super().append(rest)
            self.end_bytes += len(buffer)
            rest = []
        super().append(rest)

    def drop_ahead(self) -> None:
        """Wait for what was begun; it does not count."""
        wait([future for _, future in self._ahead])
        self._ahead = []

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        super().close()

    def row(self, last: Record) -> SegmentRow:
        """Its row once `last` is its last record."""
        self.footer_hash = last.footer_hash
        return SegmentRow(self.recording_id, self.sequence, self.name, last.end, last.footer_hash, self.role)


def begin_segment(catalog: Catalog, folder: Path, recording: RecordingRow) -> OwnSegment:
    """A new segment file with its header, on the disk and in the catalog. The first makes the recording."""
    segment = OwnSegment.next(folder, recording.id)
    try:
        buffers, header = segment_header(catalog.store_id, recording, segment)
        segment.append(buffers)
        segment.sync_new("a new segment's header, before it is committed", "the name of a new segment")
        catalog.apply(recording.id, segment.row(header), [header])
    except BaseException:
        segment.close()
        raise
    return segment


def segment_header(
    store_id: str, recording: RecordingRow, segment: OwnSegment
) -> tuple[list[Buffer], Record]:
    """What a segment says of itself, in its first record."""
    meta: dict[str, object] = {
        "format": FORMAT_VERSION,
        "store_id": store_id,
        "recording_id": recording.id,
        "created_ns": recording.created_ns,
        "spec": recording.spec.as_json(),
        "role": segment.role,
    }
    return encode(Kind.HEADER, segment.sequence, meta, offset=0, previous=b"")


def _encode_all(encoders: Sequence[_Encode], segment: OwnSegment) -> tuple[list[Buffer], list[Record]]:
    buffers: list[Buffer] = []
    records: list[Record] = []
    offset, previous = segment.end_bytes, segment.footer_hash
    for encoder in encoders:
        pieces, record = encoder(offset, previous)
        buffers += pieces
        records.append(record)
        offset, previous = record.end, record.footer_hash
    return buffers, records


def _scale_widths(slices: Table) -> dict[int, int]:
    return dict(zip(slices["layer"].tolist(), slices["scale_bytes"].tolist(), strict=True))


def _last_scale_widths(catalog: Catalog, recording: RecordingRow) -> dict[int, int]:
    """Those of the last unit that has any: not of one that is forgotten, or that ageing gave another codec.

    Where there is none for long, widths begin anew: each unit says its own.
    """
    last = recording.units - 1
    for number in range(last, max(-1, recording.kv_from_unit - 1, last - _WIDTHS_UNITS_MAX), -1):
        row = catalog.unit(recording.id, number)
        if len(row.slices) and row.codec in ("", recording.spec.recipe.codec):
            return _scale_widths(row.slices)
    return {}
