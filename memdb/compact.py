"""Compaction: what was forgotten, replaced or left half done goes from the disk, and what is old is aged.

For each recording, under its rewrite lock: files that count no more are removed; segments that hold dead bytes,
or of which ageing changes enough, are written anew; key pages that hold what was forgotten are made anew. Then
captions.lance and the catalog are rid of it. One step is one sealed file: a kill costs that step, and the next
run goes on. Readers and writers go on all the while; what they have open stays until the next run.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from memdb.age import Ager, clock_was_wrong
from memdb.captions import CaptionIndex
from memdb.catalog import Catalog
from memdb.clock import believe, doubt
from memdb.database import CATALOG
from memdb.locks import FileLock, rewrite_lock
from memdb.policy import Age, read_policy
from memdb.room import UPKEEP_RESERVE_BYTES, refused, require, used_bytes
from memdb.schemas.errors import CorruptionError, LockedError, StoreFull
from memdb.schemas.rows import RecordingRow
from memdb.segments import SEGMENT_BYTES_MAX, segment_files
from memdb.store import Store
from memdb.sweep import make_removals_safe, remove_forgotten, remove_strangers, remove_unfinished, size_of
from memdb.upkeep import (
    SCRUB,
    CompactProgress,
    Progress,
    RecordingCompacted,
    Upkeep,
    come_forward,
    will_scrub,
)

__all__ = ["CompactProgress", "CompactReport", "Progress", "RecordingCompacted", "compact"]

logger = logging.getLogger(__name__)


@dataclass
class CompactReport:
    recordings: list[RecordingCompacted]
    freed_bytes: int = 0  # of the whole store
    left: list[str] = field(default_factory=list)  # beside the recordings


def compact(
    store: Store,
    *,
    now_ns: int | None = None,
    age_now: bool = False,
    progress: Progress | None = None,
    segment_bytes_max: int = SEGMENT_BYTES_MAX,
    only: str | None = None,
) -> CompactReport:
    """Remove what counts no more, and age what the store's policy says. Run it again for what is left.

    `store` is open for writing. `now_ns` is the wall clock; `age_now` confirms that it is right where ageing
    would doubt it, see memdb/clock.py. `only`: the id of a recording to free the bytes of, and no more than that;
    what is left of it in captions.lance and the catalog goes with the next whole compaction.

    Raises StoreFull where the disk fills up in the middle, StoreError where it fails, CorruptionError where the
    policy is damaged; nothing is lost by any of them.
    """
    before = used_bytes(store.path)
    report = CompactReport([])
    catalog = Catalog(store.path / CATALOG, write=True)
    try:
        run = _Compaction(store, catalog, report, progress, segment_bytes_max)
        if only is None:
            run.look_at_clock(time.time_ns() if now_ns is None else now_ns, age_now)
        for recording_id in sorted({*segment_files(store.segments_path), *_known(catalog)}):
            if only in (None, recording_id):
                run.recording(recording_id)
        if only is None:
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
        self._ages: tuple[Age, ...] = ()
        self._now_ns, self._confirmed = 0, False

    def look_at_clock(self, now_ns: int, confirmed: bool) -> None:
        """What the policy says of ages, if the clock may be believed."""
        ages = read_policy(self._store.path).ages
        if not ages:
            return
        doubted = "" if confirmed else doubt(self._catalog, now_ns)
        if doubted:
            self._report.left.append(doubted)
            return
        believe(self._catalog, now_ns, confirmed=confirmed)
        self._ages, self._now_ns, self._confirmed = ages, now_ns, confirmed

    def recording(self, recording_id: str) -> None:
        """All steps of one recording. Damage and locks of others end them, and are reported."""
        store, catalog = self._store, self._catalog
        row = next((row for row in catalog.recordings() if row.id == recording_id), None)
        done = RecordingCompacted(row.name if row else "")
        before = size_of(store, recording_id)
        held = "another process forgets or compacts it: run it again"
        try:
            with FileLock(rewrite_lock(store.path, recording_id), held_message=held):
                come_forward(store, catalog, recording_id)
                if catalog.is_forgotten(recording_id):
                    will_scrub(catalog)
                    done.left += remove_forgotten(store, catalog, recording_id)
                elif catalog.state(recording_id) is not None:
                    self._steps(recording_id, done)
                else:  # an import that died, or a recording that was never begun
                    done.left += remove_unfinished(store, catalog, recording_id)
        except (CorruptionError, LockedError) as error:
            done.left.append(str(error))
        done.freed_bytes = before - size_of(store, recording_id)
        if row is not None or done.freed_bytes or done.left:
            self._report.recordings.append(done)

    def _steps(self, recording_id: str, done: RecordingCompacted) -> None:
        row = self._catalog.by_id(recording_id)
        done.recording = row.name
        ager = self._ager(row, done)
        upkeep = Upkeep(
            self._store,
            self._catalog,
            recording_id,
            done,
            change=ager.change if ager else None,
            progress=self._progress,
            segment_bytes_max=self._bytes_max,
        )
        upkeep.clean_up()
        upkeep.write_anew(ager.due(self._catalog) if ager else {})
        upkeep.tell_left()
        upkeep.make_pages_anew()

    def _ager(self, row: RecordingRow, done: RecordingCompacted) -> Ager | None:
        if not self._ages:
            return None
        if clock_was_wrong(row) and not self._confirmed:
            done.left.append(
                "not aged: the clock was wrong when it was begun: confirm with memdb compact --age-now"
            )
            return None
        return Ager(self._store, row, self._ages, self._now_ns)

    def captions(self) -> None:
        """Rid captions.lance of captions that there are not any more."""
        captions = CaptionIndex(self._store.path)
        # Under the lock also the question: an indexer may be about to publish what was forgotten a moment ago.
        with FileLock(self._store.path / "locks" / "derived.lock", wait=True):
            if captions.holds_forgotten(self._store):
                captions.purge(self._store)

    def scrub(self) -> None:
        """Rid the catalog's own file of removed rows."""
        rows = self._catalog.database.select("meta", "WHERE key = ?", (SCRUB,))
        if not rows or not rows[0][1]:
            return
        size = (self._store.path / CATALOG).stat().st_size
        try:
            what = "writing the catalog anew"
            require(self._store.path, 2 * size, reserve_bytes=UPKEEP_RESERVE_BYTES, what=what)
        except StoreFull as error:
            self._report.left.append(str(error))
            return
        if not self._catalog.database.scrub():
            self._report.left.append(f"{CATALOG}: a reader holds an older state of it: run it again")
            return
        with self._catalog.database.writing():
            self._catalog.database.upsert("meta", (SCRUB, 0))
        self._catalog.database.checkpoint()
