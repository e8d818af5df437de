"""`memdb backup`: a whole copy of a store that others read and write meanwhile, as of one moment.

    states     the newest that are whole, first: what they belong to is in the catalog by then
    catalog    copied in one read transaction: the moment of the backup
    segments   pinned, so that no compaction removes them, and copied up to where the catalog has them
    derived    key pages and caption tables are made anew in the copy

All of it is synced and verified under another name beside the target, and gets its name at last: the target
appears whole or not at all. The copy is a store of its own with the same id: it is read, asked and gone on with
like any other. What is forgotten afterwards stays in it.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from memdb import policy_seal
from memdb.applying import SegmentRow
from memdb.catalog import Catalog
from memdb.database import CATALOG
from memdb.derived import rebuild_derived
from memdb.files import File, make_folder, replace, sync_folder, unlink
from memdb.folder import POLICY, TRUTH
from memdb.locks import FileLock, is_held, many_files
from memdb.room import UPKEEP_RESERVE_BYTES, refused, require
from memdb.schemas.errors import CorruptionError, UsageError
from memdb.schemas.rows import RecordingRow
from memdb.schemas.times import to_s
from memdb.segments import OpenSegment, SegmentGone, reading
from memdb.state import read_state, recording_of, state_files
from memdb.store import Store
from memdb.verify import Problem, verify_path

logger = logging.getLogger(__name__)

_LOCK = "backup.lock"
_CHUNK_BYTES = 4 << 20
_SECTOR_BYTES = 4096
_TRIES = 5
Progress = Callable[[int, int], None]  # bytes copied and verified, bytes in all


@dataclass(frozen=True)
class BackedUp:
    """A recording as it is in the copy."""

    name: str
    units: int
    watermark_s: float


@dataclass
class BackupReport:
    path: str
    recordings: list[BackedUp] = field(default_factory=list)
    bytes: int = 0  # of segments, states and catalog
    problems: list[Problem] = field(default_factory=list)  # damage, which the store has too
    notes: list[str] = field(default_factory=list)


def backup(
    store: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: Progress | None = None
) -> BackupReport:
    """Copy the store in one directory into another, which is missing or empty. Others go on meanwhile.

    Damage in the store goes into the copy, and is reported. Raises UsageError, StoreFull, StoreError.
    """
    source, path = Path(store).absolute(), Path(target).absolute()
    _check_target(source, path)
    with Store.open(source) as opened, many_files():
        try:
            with _beside(path) as copy:
                run = _Backup(opened, copy, progress)
                run.copy()
                run.check()
                replace(copy, path)
                sync_folder(path.parent, "the name of a backup")
        except OSError as error:
            raise refused(error, f"cannot write {path}") from error
    unlink(path / "locks" / _LOCK)
    run.report.path = str(path)
    logger.info("%s holds %d recordings of %s", path, len(run.report.recordings), source)
    return run.report


def _check_target(source: Path, target: Path) -> None:
    if source in (target, *target.parents) or target in source.parents:
        raise UsageError(f"{target} and the store {source} lie in each other: name another folder")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no folder: make it first")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is no folder: name a new one")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty: name a new folder")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder that becomes the target; gone with all in it where that fails. Removes what kills left."""
    for left in sorted(target.parent.iterdir()):
        if left.name.startswith(f"{target.name}.tmp-") and not is_held(left / "locks" / _LOCK):
            shutil.rmtree(left)
    copy = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        make_folder(copy)
        for name in TRUTH:
            make_folder(copy / name)
        with FileLock(copy / "locks" / _LOCK):
            yield copy
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


class _Backup:
    def __init__(self, store: Store, copy: Path, progress: Progress | None) -> None:
        self._store, self._copy, self._progress = store, copy, progress
        self.report = BackupReport("")
        self._done_bytes = self._all_bytes = 0

    def copy(self) -> None:
        """All that is the truth, and safe on the disk."""
        self._states()
        with ExitStack() as pinned:
            rows, segments = self._snapshot(pinned)
            self._check_room(segments)
            for row, segment in segments:
                self._segment(row, segment)
        self._drop_states(rows)
        self._policy()
        with File(self._copy / CATALOG, new=False) as file:
            file.sync("the catalog of a backup")
        sync_folder(self._copy / "segments", "the names of a backup's segments")
        sync_folder(self._copy / "state", "the names of a backup's states")
        sync_folder(self._copy, "the names of a backup's catalog and folders")
        for found in rows:
            self.report.recordings.append(BackedUp(found.name, found.units, to_s(found.watermark_ns)))

    def check(self) -> None:
        """Read the copy once more, then make its derived data."""
        checked = verify_path(self._copy, progress=lambda done, _: self._told(self._all_bytes + done))
        self.report.problems = checked.problems
        self.report.notes += rebuild_derived(self._copy)
        for suffix in ("-wal", "-shm"):  # empty ones, that readers leave
            unlink(self._copy / f"{CATALOG}{suffix}")

    # The moment

    def _snapshot(
        self, pinned: ExitStack
    ) -> tuple[list[RecordingRow], list[tuple[SegmentRow, OpenSegment | None]]]:
        """The catalog as of one moment, and its segments, which nobody removes while they are pinned.

        A segment that a compaction removed in between means another moment; one that stays away is lost.
        """
        for tries in range(_TRIES):
            path = self._copy / CATALOG
            unlink(path)
            catalog = self._store.catalog
            with self._store.snapshot():
                rows = catalog.recordings()  # the first look makes the moment: the copy comes after it
                named = [segment for row in rows for segment in catalog.segments(row.id)]
                catalog.database.copy_to(path)
            with ExitStack() as opened:
                segments: list[tuple[SegmentRow, OpenSegment | None]] = []
                try:
                    for row in named:
                        segments.append((row, self._pin(opened, row, last=tries == _TRIES - 1)))
                except SegmentGone:
                    continue
                pinned.push(opened.pop_all())
            return rows, segments
        raise AssertionError("the last try passes over what is lost")

    def _pin(self, opened: ExitStack, row: SegmentRow, *, last: bool) -> OpenSegment | None:
        try:
            return opened.enter_context(reading(self._store.segments_path, row.name))
        except CorruptionError as error:
            if isinstance(error, SegmentGone) and not last:
                raise
            self.report.notes.append(str(error))
            return None

    def _check_room(self, segments: list[tuple[SegmentRow, OpenSegment | None]]) -> None:
        """Derived data takes less than the keys in the segments, and is counted as a tenth of them."""
        self._all_bytes = sum(row.end_bytes for row, segment in segments if segment is not None)
        require(
            self._copy.parent,
            self._all_bytes + self._all_bytes // 10,
            reserve_bytes=UPKEEP_RESERVE_BYTES,
            what=f"a backup in {self._copy.parent}",
        )
        self.report.bytes += self._all_bytes + (self._copy / CATALOG).stat().st_size

    # Files

    def _segment(self, row: SegmentRow, segment: OpenSegment | None) -> None:
        if segment is None:
            return
        with File(self._copy / "segments" / row.name) as file:
            for start in range(0, row.end_bytes, _CHUNK_BYTES):
                length = min(_CHUNK_BYTES, row.end_bytes - start)
                data = self._read(segment, start, length)
                file.write([data], start)
                self._done_bytes += length
                self._told(self._done_bytes)
            file.sync("a segment of a backup")

    def _read(self, segment: OpenSegment, start: int, length: int) -> bytes:
        """Bytes of a segment. Sectors that cannot be read become zeros: the rest is worth having."""
        try:
            return _pread(segment.fd, length, start)
        except OSError as error:
            self.report.notes.append(f"{segment.file}: cannot be read at byte {start}: {error.strerror}")
        pieces = []
        for at in range(start, start + length, _SECTOR_BYTES):
            size = min(_SECTOR_BYTES, start + length - at)
            try:
                pieces.append(_pread(segment.fd, size, at))
            except OSError:
                pieces.append(bytes(size))
        return b"".join(pieces)

    def _states(self) -> None:
        """Every state that is whole at this moment. A writer at work may replace one just now."""
        for path in state_files(self._store.path / "state"):
            try:
                read_state(path)
                data = path.read_bytes()
            except (CorruptionError, FileNotFoundError) as error:
                logger.info("left out: %s", error)
                continue
            with File(self._copy / "state" / path.name) as file:
                file.write([data], 0)
                file.sync("a state of a backup")
            self.report.bytes += len(data)

    def _drop_states(self, rows: list[RecordingRow]) -> None:
        """Those that do not fit the catalog's moment: something was forgotten since, or they are torn."""
        known = {row.id: row for row in rows}
        for path in state_files(self._copy / "state"):
            row = known.get(recording_of(path))
            try:
                state = read_state(path)
                fits = (
                    row is not None
                    and state.unit <= row.units
                    and state.tombstones <= len(row.tombstones)
                    and not state.holds_forgotten(row.tombstones)
                )
            except CorruptionError:
                fits = False
            if not fits:
                unlink(path)

    def _policy(self) -> None:
        """As it is by now: one that was set since the catalog was copied is admitted in the copy, too."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                unlink(self._copy / POLICY)
                data = (self._store.path / POLICY).read_bytes()
                with File(self._copy / POLICY) as file:
                    file.write([data], 0)
                    file.sync("the policy of a backup")
            there, known = (
                policy_seal.seal_there(self._copy),
                policy_seal.admitted(self._store.catalog.database),
            )
            if not known:
                return
            if there in known:
                catalog = Catalog(self._copy / CATALOG, write=True)
                try:
                    policy_seal.admit(catalog.database, [there])
                    catalog.database.checkpoint()
                finally:
                    catalog.close()
                return

    def _told(self, done_bytes: int) -> None:
        if self._progress is not None:
            self._progress(min(done_bytes, 2 * self._all_bytes), 2 * self._all_bytes)


def _pread(fd: int, length: int, offset: int) -> bytes:
    """As many bytes as there are of these. Raises OSError."""
    pieces = []
    while length and (piece := os.pread(fd, length, offset)):
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return b"".join(pieces)
