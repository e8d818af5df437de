"""A store: one directory that remembers recordings.

segments/        the truth: append-only files of records (memdb/segments.py)
catalog.sqlite   the index of the truth (memdb/catalog.py)
state/           encoder states (memdb/state.py)
captions.lance/  keys/   derived from the truth by their owners
locks/           flock files (memdb/locks.py)
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from memdb.applying import STREAM, drop_empty
from memdb.catalog import Catalog
from memdb.contents import (
    caption_from,
    digests_from,
    embeddings_from,
    keep_from,
    keys_from,
    stored_element_bytes,
)
from memdb.database import CATALOG
from memdb.digest import TIERS, check_digest, recording_hash
from memdb.files import unlink
from memdb.folder import FOLDERS as FOLDERS
from memdb.folder import open_folder
from memdb.locks import FileLock, is_held, writer_lock
from memdb.network import check_locks_hold
from memdb.records import read_body, read_record
from memdb.roll_forward import carry_out_forgettings, empty_ones, lost_recording, roll_forward, see_beyond
from memdb.schemas.errors import (
    CorruptionError,
    EncodingMismatch,
    LockedError,
    ModelMismatch,
    SourceMismatch,
    StoreError,
    UnknownRecording,
    UsageError,
)
from memdb.schemas.fingerprint import ModelIdentity
from memdb.schemas.keep import KeepSet
from memdb.schemas.recording import check_name
from memdb.schemas.rows import Part, RecordingRow, RecordingSpec
from memdb.schemas.rows import UnitRow as UnitRow
from memdb.schemas.units import Caption
from memdb.segments import SEGMENT_BYTES_MAX, SegmentGone, reading, segment_files
from memdb.state import StateFiles
from memdb.timely import Patience, read_timely
from memdb.writer import OwnSegment, RecordingWriter, begin_segment

logger = logging.getLogger(__name__)
_LOOK_S = 0.5
_TRIES = 5


class Store:
    """An open store, usable by several threads. One opened for reading changes nothing on disk."""

    def __init__(self, path: Path, catalog: Catalog, *, write: bool) -> None:
        """Use `Store.open`."""
        self.path = path
        self.store_id = catalog.store_id
        self._catalog = catalog
        self._write = write
        self._patience = Patience()
        self._looked_s = time.monotonic()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = False, write: bool = False) -> Store:
        """Open the store in a directory; with `create` make it first where the directory is missing or empty.

        Raises NotAStore, FormatVersionError, CorruptionError, StoreError.
        """
        folder = open_folder(path, create=create)
        if write:
            check_locks_hold(folder)
            carry_out = partial(carry_out_forgettings, store_path=folder)
            return cls(folder, Catalog(folder / CATALOG, write=True, on_open=carry_out), write=True)
        see = partial(see_beyond, store_path=folder)
        return cls(folder, Catalog(folder / CATALOG, write=False, on_open=see), write=False)

    def close(self) -> None:
        """Close. Writers are closed by whoever opened them."""
        self._catalog.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def segments_path(self) -> Path:
        return self.path / "segments"

    @property
    def catalog(self) -> Catalog:
        """For verify and stats, which look at every row."""
        return self._catalog

    # The model

    @property
    def model(self) -> ModelIdentity | None:
        return self._catalog.model()

    def bind_model(self, identity: ModelIdentity) -> None:
        """Make this the store's model, or check that it is. The first that was bound stays."""
        bound = self._catalog.bind_model(identity) if self._write else self._catalog.model()
        if bound is not None and bound.fingerprint != identity.fingerprint:
            way = f"use --model {bound.spec}, or another store"
            if bound.spec == identity.spec:  # the same name, other weights
                way = "use another store, or the memdb or checkpoint that it was made with"
            raise ModelMismatch(
                f"the store was made with the model {bound.spec!r} ({bound.fingerprint[:12]}), not with "
                f"{identity.spec!r} ({identity.fingerprint[:12]}): {way}"
            )

    # Recordings

    def recordings(self) -> list[RecordingRow]:
        """All recordings by name."""
        self._look_beyond()
        return self._catalog.recordings()

    def _look_beyond(self) -> None:
        """For readers: see what a writer made safe and died before it committed, also while this is open."""
        now_s = time.monotonic()
        if not self._write and not self._catalog.database.in_transaction and now_s - self._looked_s > _LOOK_S:
            self._catalog.database.reopen_if_replaced()
            see_beyond(self._catalog, self.path)
            self._looked_s = now_s

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything that is read of the catalog inside is of one moment. Keep it short."""
        self._look_beyond()
        with self._catalog.database.reading():
            yield

    def recording(self, name: str) -> RecordingRow:
        """Raises UnknownRecording, which lists the names that there are."""
        rows = self.recordings()
        for row in rows:
            if row.name == name:
                return row
        names = ", ".join(repr(row.name) for row in rows) or "none yet"
        raise UnknownRecording(f"no recording is named {name!r}: there are {names}")

    def recording_by_id(self, recording_id: str) -> RecordingRow:
        return self._catalog.by_id(recording_id)

    def state(self, recording_id: str) -> StateFiles:
        """The saved encoder states of a recording."""
        spec = self._catalog.by_id(recording_id).spec
        return StateFiles(self.path / "state", recording_id, spec.encoding_fingerprint)

    def is_written(self, recording_id: str) -> bool:
        """Whether a writer has the recording open, in any process."""
        return is_held(writer_lock(self.path, recording_id))

    # Units

    def units(
        self,
        recording_id: str,
        *,
        start_ns: int | None = None,
        end_ns: int | None = None,
        first: int | None = None,
        last: int | None = None,
    ) -> list[UnitRow]:
        """Units that overlap `[start_ns, end_ns)` and are numbered `first` to `last`, both included."""
        recording = self._catalog.by_id(recording_id)
        low = max(0, first or 0)
        high = recording.units if last is None else min(recording.units, last + 1)
        if start_ns is not None:
            low = max(low, self._catalog.first_unit(recording, lambda unit: unit.end_ns > start_ns))
        if end_ns is not None:
            high = min(high, self._catalog.first_unit(recording, lambda unit: unit.start_ns >= end_ns))
        return list(self._catalog.units(recording_id, low, high))

    def unit(self, recording_id: str, number: int) -> UnitRow:
        recording = self._catalog.by_id(recording_id)
        if not 0 <= number < recording.units:
            raise UsageError(
                f"recording {recording.name!r} has {recording.units} units, none is number {number}"
            )
        return self._catalog.unit(recording_id, number)

    def units_without_kv(self, recording: RecordingRow) -> list[int]:
        """Numbers of the units, from where ageing came to, that hold no slice; their rows are not checked."""
        return self._catalog.units_without_kv(recording)

    def units_after(
        self,
        commit_id: int,
        *,
        recording_id: str | None = None,
        captions_only: bool = False,
        limit: int | None = None,
    ) -> list[UnitRow]:
        """Units with a larger commit id, in order of commit. Each unit has a commit id of its own."""
        recordings = [self._catalog.by_id(recording_id)] if recording_id else self._catalog.recordings()
        rows = self._catalog.units_after(commit_id, recordings)
        return list(islice((row for row in rows if row.has_caption or not captions_only), limit))

    def last_commit(self) -> int:
        """The commit id of the last unit, of whatever recording; 0 without."""
        return self._catalog.last_commit()

    # Parts

    def read_caption(self, row: UnitRow) -> Caption:
        """The caption of a unit that has one, verified. Raises CorruptionError."""
        row, said = self._part(row, Part.CAPTION)
        if said is None:
            raise StoreError(f"unit {row.number} has no caption")
        return caption_from(row, said, self._part(row, Part.VECTOR)[1] or b"")

    def read_keyframe(self, row: UnitRow) -> bytes | None:
        """The JPEG of a unit, verified. Raises CorruptionError."""
        return self._part(row, Part.KEYFRAME)[1]

    def read_keys(self, row: UnitRow) -> npt.NDArray[np.float16] | None:
        """(L, blocks, H*D) representative keys of a unit, verified. Raises CorruptionError."""
        row, data = self._part(row, Part.KEYS)
        return None if data is None else keys_from(row, data)

    def read_embeddings(self, row: UnitRow) -> npt.NDArray[np.float16] | None:
        """(blocks, E) of a unit's frames, verified; None where there are none. Raises CorruptionError."""
        row, data = self._part(row, Part.EMBEDDINGS)
        return None if data is None else embeddings_from(row, data)

    def read_keep(self, row: UnitRow) -> KeepSet | None:
        """What a bounded memory held after a unit, verified; None where that is not told. Raises CorruptionError."""
        row, data = self._part(row, Part.KEEP)
        return None if data is None else keep_from(row, data)

    def read_held(self, row: UnitRow) -> KeepSet | None:
        """Which of their tokens a unit's slices hold, verified; None for all of them. Raises CorruptionError."""
        row, data = self._part(row, Part.HELD)
        return None if data is None else keep_from(row, data)

    def gathered_units(self, recording: RecordingRow) -> dict[int, int]:
        """Number to revision of the units of which ageing left some tokens only."""
        return self._catalog.gathered_units(recording)

    def _part(self, row: UnitRow, part: Part) -> tuple[UnitRow, bytes | None]:
        """A part of a unit, and the unit's row: as it is now where its file is gone and it was moved since."""
        try:
            return row, self._read_part(row, part)
        except SegmentGone as gone:
            try:
                now = self.unit(row.recording_id, row.number)
            except UsageError:  # it is forgotten
                raise gone from None
            if now.segment == row.segment or (part is Part.CAPTION and part not in now.parts):
                raise
            return now, self._read_part(now, part)

    def _read_part(self, row: UnitRow, part: Part) -> bytes | None:
        span = row.parts.get(part)
        if span is None:
            return None
        with reading(self.segments_path, row.segment) as segment:
            data = read_timely(
                self._patience, segment.fd, span.offset, span.length, segment.size_bytes, file=segment.file
            )
        if xxhash.xxh3_64_intdigest(data) != span.xxh3:
            raise CorruptionError(
                f"{segment.file}: the {part.name.lower()} of unit {row.number} is damaged", file=segment.file
            )
        return data

    # Writing

    def writer(
        self,
        spec: RecordingSpec,
        *,
        now_ns: int | None = None,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
    ) -> RecordingWriter:
        """Begin a recording, or go on with the one of this name. Rolls forward what a killed writer left.

        Raises LockedError where another writer has it, EncodingMismatch, SourceMismatch, ModelMismatch.
        """
        check_name(spec.name)
        if not self._write:
            raise StoreError("the store is open for reading: open it with write=True")
        self.bind_model(spec.model)
        catalog = Catalog(self.path / CATALOG, write=True)
        lock: FileLock | None = None
        try:
            # Names are looked up and made under one lock, held for a moment.
            with FileLock(self.path / "locks" / "names.lock", wait=True):
                recording_id, found, lock = self._take(catalog, spec)
                first: OwnSegment | None = None
                if found is None:
                    created_ns = time.time_ns() if now_ns is None else now_ns
                    begun = RecordingRow.begun(recording_id, spec, created_ns)
                    first = begin_segment(catalog, self.segments_path, begun)
                    found = catalog.by_id(recording_id)
            _check_same(found, spec)
            return RecordingWriter(
                catalog, self.segments_path, lock, found, first, segment_bytes_max=segment_bytes_max
            )
        except BaseException:
            if lock is not None:
                lock.close()
            catalog.close()
            raise

    def _take(self, catalog: Catalog, spec: RecordingSpec) -> tuple[str, RecordingRow | None, FileLock]:
        """The recording of this name under its lock, brought up to its segments; None and a new id where it is free."""
        tried: set[str] = set()
        while True:
            found = catalog.find(spec.name)
            known_id = found.id if found else lost_recording(catalog, self.segments_path, spec.name, tried)
            recording_id = known_id or uuid.uuid4().hex
            held = f"another process writes {spec.name!r}: wait for it, or name another recording"
            lock = FileLock(writer_lock(self.path, recording_id), held_message=held)
            try:
                roll_forward(catalog, self.segments_path, recording_id)
                found = catalog.find(spec.name)
                if found is not None and not found.units and found.spec != spec:
                    # Begun and never filled, perhaps with a slip in the settings: nothing is lost, the name is free.
                    _forget_empty(catalog, self.segments_path, found)
                    found = None
            except BaseException:
                lock.close()
                raise
            if found is not None or known_id is None:
                self._drop_empty_ones(catalog, spec.name, recording_id)
                return recording_id, found, lock
            lock.close()  # what had the name is gone: it is another's by now, or free
            tried.add(known_id)

    def _drop_empty_ones(self, catalog: Catalog, name: str, but: str) -> None:
        """Files of recordings that were begun under this name, held nothing and were begun anew.

        A power cut may bring them back before the folder was synced; once the name is free they would be recordings.
        """
        for recording_id in list(empty_ones(catalog, self.segments_path, name)):
            if recording_id == but:
                continue
            with suppress(LockedError), FileLock(writer_lock(self.path, recording_id)):
                for _, file in segment_files(self.segments_path).get(recording_id, []):
                    unlink(self.segments_path / file)


def recording_digest(store: Store, name: str, tier: str = "all") -> str:
    """The digest of a recording's content, computed anew from the bytes on disk: hex.

    `kv` ignores captions and key frames, `captions` ignores KV and key frames. Each unit is compared with the
    digest with which it was committed. Raises CorruptionError, UnknownRecording, UsageError.
    """
    if tier not in TIERS:
        raise UsageError(f"unknown tier {tier!r}: choose one of {', '.join(TIERS)}")
    for left in reversed(range(_TRIES)):
        recording = store.recording(name)
        try:
            before = _content_marks(store, recording.id)
            found = _digest(store, recording, tier)
            if not left or _content_marks(store, recording.id) == before:
                return found
        except (SegmentGone, UnknownRecording):  # compacted or forgotten meanwhile
            if not left:
                raise
        except CorruptionError:
            # Rows that are not there, if nothing is damaged, are those of a recording that is gone.
            if not left or recording.id in {row.id for row in store.recordings()}:
                raise
    raise AssertionError("not reached")


def _digest(store: Store, recording: RecordingRow, tier: str) -> str:
    digests: list[bytes] = []
    for row in store.catalog.units(recording.id, 0, recording.units):
        with reading(store.segments_path, row.segment) as segment:
            record = read_record(segment.fd, row.offset, segment.size_bytes, file=segment.file)
            body = read_body(segment.fd, record, segment.size_bytes, file=segment.file)
        found = digests_from(row, body, stored_element_bytes(recording.spec, row))
        check_digest(row, found)
        digests.append(found.of(tier))
    return recording_hash(digests)


def _content_marks(store: Store, recording_id: str) -> list[str]:
    """The files with which units changed that were there: where others come, a digest may be of no one moment."""
    return [row.name for row in store.catalog.segments(recording_id) if row.role != STREAM]


def _check_same(found: RecordingRow, spec: RecordingSpec) -> None:
    """Whether a recording may go on with this spec."""
    known = found.spec
    if known.encoding_fingerprint != spec.encoding_fingerprint or known.recipe.write != spec.recipe.write:
        raise EncodingMismatch(
            f"recording {found.name!r} was encoded in another way (recipe {known.recipe.name!r}, codec "
            f"{known.recipe.codec!r}, {known.sample_fps:g} frames/s, seed {known.seed}, {known.dtype}): "
            "give the same settings, or another --recording"
        )
    if known.source != spec.source and not (known.live or spec.live):
        raise SourceMismatch(
            f"recording {found.name!r} was made from another film ({known.source_name!r}, "
            f"{known.source.size_bytes} bytes): give that one, or another --recording"
        )


def _forget_empty(catalog: Catalog, folder: Path, found: RecordingRow) -> None:
    """Drop a recording without units: its rows, then its files, which without rows would only bring it back.

    So may a power cut, until the folder is synced for the recording that takes the name: it is dropped again.
    """
    drop_empty(catalog, found.id)
    catalog.database.checkpoint()  # a lost WAL must not bring back rows whose files are gone
    for _, name in segment_files(folder).get(found.id, []):
        unlink(folder / name)
    for state in StateFiles(folder.parent / "state", found.id, "").files():
        unlink(state)
    logger.info("recording %s held nothing and is begun anew", found.name)
