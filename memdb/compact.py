"""Compaction: what was forgotten, replaced or left half done goes from the disk, a step at a time.

For each recording, under its rewrite lock: files that count no more are removed; segments that hold dead bytes,
or of which ageing changes enough, are written anew; key pages that hold what was forgotten are made anew. Then
captions.lance and the catalog are rid of it. One step is one sealed file: a kill costs that step, and the next
run goes on. Readers and writers go on all the while; what they have open stays until the next run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from memdb.captions import CaptionIndex
from memdb.catalog import Catalog
from memdb.database import CATALOG
from memdb.index.pages import page_path
from memdb.index.rebuild import is_due, rebuild
from memdb.locks import FileLock, commit_lock, rewrite_lock
from memdb.rewrite import rewrite
from memdb.roll_forward import roll_forward
from memdb.room import UPKEEP_RESERVE_BYTES, refused, require, used_bytes
from memdb.schemas.errors import CorruptionError, LockedError, StoreFull
from memdb.segments import SEGMENT_BYTES_MAX, segment_files
from memdb.store import Store
from memdb.survey import Held, groups, survey
from memdb.sweep import (
    make_removals_safe,
    remove_forgotten,
    remove_invalid_states,
    remove_pages,
    remove_replaced,
    remove_strangers,
    remove_unfinished,
    size_of,
)

logger = logging.getLogger(__name__)

_SCRUB = "scrub"  # in the catalog's meta: 1 while its file may hold what was removed


@dataclass(frozen=True)
class CompactProgress:
    recording: str
    done_bytes: int  # of what is written anew
    total_bytes: int


@dataclass
class RecordingCompacted:
    recording: str  # "" for one that was forgotten
    freed_bytes: int = 0
    segments: int = 0  # written
    aged_units: int = 0
    left: list[str] = field(default_factory=list)  # what could not be removed or written anew, and why


@dataclass
class CompactReport:
    recordings: list[RecordingCompacted]
    freed_bytes: int = 0  # of the whole store
    left: list[str] = field(default_factory=list)  # beside the recordings


Progress = Callable[[CompactProgress], None]


def compact(
    store: Store, *, progress: Progress | None = None, segment_bytes_max: int = SEGMENT_BYTES_MAX
) -> CompactReport:
    """Remove what counts no more. `store` is open for writing. Run it again for what is left.

    Raises StoreFull where the disk fills up in the middle, StoreError where it fails; nothing is lost by it.
    """
    before = used_bytes(store.path)
    report = CompactReport([])
    catalog = Catalog(store.path / CATALOG, write=True)
    try:
        run = _Compaction(store, catalog, report, progress, segment_bytes_max)
        for recording_id in sorted({*segment_files(store.segments_path), *_known(catalog)}):
            run.recording(recording_id)
        remove_strangers(store, catalog)
        run.captions()
        run.scrub()
        make_removals_safe(store)
    except OSError as error:
        raise refused(error, "cannot compact") from error
    finally:
        catalog.close()
    report.freed_bytes = before - used_bytes(store.path)
    return report


def _known(catalog: Catalog) -> list[str]:
    return [row.id for row in catalog.recordings()] + catalog.forgotten()


class _Compaction:
    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        report: CompactReport,
        progress: Progress | None,
        segment_bytes_max: int,
    ) -> None:
        self._store, self._catalog, self._report = store, catalog, report
        self._progress, self._bytes_max = progress, segment_bytes_max

    def recording(self, recording_id: str) -> None:
        """All steps of one recording. Damage and locks of others end them, and are reported."""
        store, catalog = self._store, self._catalog
        row = next((row for row in catalog.recordings() if row.id == recording_id), None)
        done = RecordingCompacted(row.name if row else "")
        before = size_of(store, recording_id)
        try:
            with FileLock(
                rewrite_lock(store.path, recording_id), held_message="another process forgets or compacts it"
            ):
                with FileLock(commit_lock(store.path, recording_id), wait=True):
                    roll_forward(catalog, store.segments_path, recording_id)
                if catalog.is_forgotten(recording_id):
                    self._will_scrub()
                    done.left += remove_forgotten(store, catalog, recording_id)
                elif catalog.state(recording_id) is not None:
                    self._steps(recording_id, done)
        except (CorruptionError, LockedError) as error:
            done.left.append(str(error))
        done.freed_bytes = before - size_of(store, recording_id)
        if row is not None or done.freed_bytes or done.left:
            self._report.recordings.append(done)

    def _steps(self, recording_id: str, done: RecordingCompacted) -> None:
        store, catalog = self._store, self._catalog
        row = catalog.by_id(recording_id)
        done.recording = row.name
        remove_invalid_states(store, row)
        self._remove_old_pages(recording_id)
        done.left += remove_unfinished(store, catalog, recording_id)
        left = remove_replaced(store, catalog, recording_id)
        found = survey(store, catalog, recording_id, {})
        waiting = groups(found.held, bytes_max=self._bytes_max)
        sizes = [sum(held.kept_bytes for held in group) for group in waiting]
        at = 0
        for group, size in zip(waiting, sizes, strict=True):
            self._tell(row.name, at, sum(sizes))
            left = self._rewrite(recording_id, row.name, group, done, at, sum(sizes)) or left
            at += size
        done.left += left
        self._pages(recording_id, done)
        if found.open_segment is not None and found.open_segment.has_dead_bytes:
            done.left.append(
                f"segments/{found.open_segment.row.name} is being written: run it again after the next batch"
            )

    def _rewrite(
        self, recording_id: str, name: str, group: list[Held], done: RecordingCompacted, at: int, total: int
    ) -> list[str]:
        """One step: write a group anew, commit, remove. What is left of the files."""
        store, catalog = self._store, self._catalog
        written = at

        def told(size: int) -> None:
            nonlocal written
            written += size
            self._tell(name, written, total)

        try:
            size = sum(held.kept_bytes for held in group)
            require(
                store.path,
                size,
                reserve_bytes=UPKEEP_RESERVE_BYTES,
                what=f"writing {len(group)} segments anew",
            )
            self._will_scrub()
            result = rewrite(store, catalog, recording_id, group, told=told)
        except (StoreFull, CorruptionError) as error:
            done.left.append(str(error))
            return []
        done.segments += 1
        done.aged_units += result.changed
        return remove_replaced(store, catalog, recording_id)

    def _pages(self, recording_id: str, done: RecordingCompacted) -> None:
        row = self._catalog.by_id(recording_id)
        try:
            if is_due(self._store, self._catalog, row):
                rebuild(self._store, self._catalog, row)
                self._remove_old_pages(recording_id)
        except StoreFull as error:
            done.left.append(str(error))

    def _remove_old_pages(self, recording_id: str) -> None:
        """Those of other generations than the one that counts."""
        counting = page_path(self._store, recording_id, self._catalog.by_id(recording_id).generation).name
        remove_pages(self._store, lambda owner, name: owner == recording_id and name != counting)

    def _tell(self, name: str, done_bytes: int, total_bytes: int) -> None:
        if self._progress is not None:
            self._progress(CompactProgress(name, min(done_bytes, total_bytes), total_bytes))

    def _will_scrub(self) -> None:
        """Note, before anything is removed, that the catalog's file is to be written anew: a kill forgets nothing."""
        with self._catalog.database.writing():
            self._catalog.database.upsert("meta", (_SCRUB, 1))

    def captions(self) -> None:
        """Rid captions.lance of captions that there are not any more."""
        captions = CaptionIndex(self._store.path)
        if captions.holds_forgotten(self._store):
            with FileLock(self._store.path / "locks" / "derived.lock", wait=True):
                captions.purge(self._store)

    def scrub(self) -> None:
        """Rid the catalog's own file of removed rows."""
        rows = self._catalog.database.select("meta", "WHERE key = ?", (_SCRUB,))
        if not rows or not rows[0][1]:
            return
        path = self._store.path / CATALOG
        size = path.stat().st_size
        try:
            require(
                self._store.path,
                2 * size,
                reserve_bytes=UPKEEP_RESERVE_BYTES,
                what="writing the catalog anew",
            )
        except StoreFull as error:
            self._report.left.append(str(error))
            return
        if not self._catalog.database.scrub():
            self._report.left.append(f"{CATALOG}: a reader holds an older state of it: run it again")
            return
        with self._catalog.database.writing():
            self._catalog.database.upsert("meta", (_SCRUB, 0))
        self._catalog.database.checkpoint()
