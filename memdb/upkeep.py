"""The upkeep of one recording, step by step: clean up, write segments anew, make key pages anew.

Whoever calls this holds the recording's rewrite lock. Each step is whole when it returns, so that it may end
after any of them: a compaction does them all, a running ingest one now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from memdb.catalog import Catalog
from memdb.index.pages import page_path
from memdb.index.rebuild import is_due, rebuild
from memdb.locks import FileLock, commit_lock
from memdb.rewrite import Change, rewrite
from memdb.roll_forward import roll_forward
from memdb.room import UPKEEP_RESERVE_BYTES, require
from memdb.schemas.errors import CorruptionError, StoreFull
from memdb.store import Store
from memdb.survey import Due, Held, groups, survey
from memdb.sweep import remove_invalid_states, remove_pages, remove_replaced, remove_unfinished

SCRUB = "scrub"  # in the catalog's meta: 1 while its file may hold what was removed


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


Progress = Callable[[CompactProgress], None]


def come_forward(store: Store, catalog: Catalog, recording_id: str) -> None:
    """Commit what a killed process sealed: before that, nobody can say what counts."""
    with FileLock(commit_lock(store.path, recording_id), wait=True):
        roll_forward(catalog, store.segments_path, recording_id)


class Upkeep:
    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        recording_id: str,
        done: RecordingCompacted,
        *,
        change: Change | None = None,
        progress: Progress | None = None,
        segment_bytes_max: int,
    ) -> None:
        """`done` is told what was done, and what is left. `change` ages units as they are written anew."""
        self._store, self._catalog, self._id, self._done = store, catalog, recording_id, done
        self._change, self._progress, self._bytes_max = change, progress, segment_bytes_max
        self._name = catalog.by_id(recording_id).name
        self._open: Held | None = None  # the file in a writer's hand

    def clean_up(self) -> None:
        """Remove what counts no more already."""
        remove_invalid_states(self._store, self._catalog.by_id(self._id))
        self._remove_old_pages()
        self._done.left += remove_unfinished(self._store, self._catalog, self._id)
        remove_replaced(self._store, self._catalog, self._id)

    def write_anew(self, due: dict[str, Due], *, steps_max: int | None = None) -> int:
        """Write what is due anew, at most so many files of it; how many. Their sources go at once, or are left.

        `due`: what ageing would change, see `Ager.due`.
        """
        found = survey(self._store, self._catalog, self._id, due)
        waiting = groups(found.held, bytes_max=self._bytes_max)[:steps_max]
        sizes = [sum(held.kept_bytes for held in group) for group in waiting]
        for at, group in enumerate(waiting):
            self._write(group, sum(sizes[:at]), sum(sizes))
        self._open = found.open_segment
        return len(waiting)

    def tell_left(self) -> None:
        """Try once more to remove what was written anew, and tell what is left, and why."""
        self._done.left += remove_replaced(self._store, self._catalog, self._id)
        if self._open is not None and self._open.has_dead_bytes:
            self._done.left.append(
                f"segments/{self._open.row.name} is being written: run it again after the next batch"
            )

    def make_pages_anew(self) -> None:
        """If they hold what was forgotten, or much that is out of date."""
        row = self._catalog.by_id(self._id)
        try:
            if is_due(self._store, self._catalog, row):
                rebuild(self._store, self._catalog, row)
                self._remove_old_pages()
        except StoreFull as error:
            self._done.left.append(str(error))

    def _write(self, group: list[Held], before_bytes: int, total_bytes: int) -> None:
        """One step: write a group anew, commit, remove."""
        written = before_bytes

        def told(size: int) -> None:
            nonlocal written
            written += size
            if self._progress is not None:
                self._progress(CompactProgress(self._name, min(written, total_bytes), total_bytes))

        told(0)
        size = sum(held.kept_bytes for held in group)
        try:
            what = f"writing {len(group)} segments anew"
            require(self._store.path, size, reserve_bytes=UPKEEP_RESERVE_BYTES, what=what)
            will_scrub(self._catalog)
            result = rewrite(
                self._store,
                self._catalog,
                self._id,
                group,
                bytes_max=self._bytes_max,
                change=self._change,
                told=told,
            )
        except (StoreFull, CorruptionError) as error:
            self._done.left.append(str(error))
            return
        told(before_bytes + size - written)
        self._done.segments += result.segments
        self._done.aged_units += result.changed
        remove_replaced(self._store, self._catalog, self._id)

    def _remove_old_pages(self) -> None:
        """Those of other generations than the one that counts."""
        counting = page_path(self._store, self._id, self._catalog.by_id(self._id).generation).name
        remove_pages(self._store, lambda owner, name: owner == self._id and name != counting)


def will_scrub(catalog: Catalog) -> None:
    """Note, before anything is removed, that the catalog's file is to be written anew: a kill forgets nothing."""
    rows = catalog.database.select("meta", "WHERE key = ?", (SCRUB,))
    if not rows or not rows[0][1]:
        with catalog.database.writing():
            catalog.database.upsert("meta", (SCRUB, 1))
