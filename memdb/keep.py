"""Upkeep beside a running ingest: now and then one file of its recording is aged, or freed of what was forgotten.

It runs in a thread of its own, so that no frame waits for it, and whatever goes wrong in it is a warning: the
next step, or memdb compact, does it again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from memdb.age import Ager, clock_was_wrong
from memdb.catalog import Catalog
from memdb.clock import believe, doubt
from memdb.database import CATALOG
from memdb.locks import FileLock, rewrite_lock
from memdb.policy import Age, read_policy
from memdb.schemas.errors import Interrupted, LockedError, MemdbError
from memdb.schemas.rows import RecordingRow
from memdb.segments import SEGMENT_BYTES_MAX
from memdb.store import Store
from memdb.upkeep import CompactProgress, RecordingCompacted, Upkeep, come_forward

logger = logging.getLogger(__name__)

EVERY_S = 60.0


@dataclass
class Seen:
    """What was seen of a recording when nothing was left to do: only what came since is looked at again."""

    since_ns: int | None = None
    ages: tuple[Age, ...] = ()
    tombstones: int = 0

    def all_done(self, ages: tuple[Age, ...], now_ns: int, tombstones: int) -> None:
        self.since_ns, self.ages, self.tombstones = now_ns if ages else None, ages, tombstones


def keep_one(
    store: Store,
    recording_id: str,
    seen: Seen,
    *,
    now_ns: int,
    stop: threading.Event | None = None,
    segment_bytes_max: int = SEGMENT_BYTES_MAX,
) -> RecordingCompacted:
    """One step of upkeep of a recording: at most one file is written anew. What was done, and what is left.

    Ended by `stop` in the middle of a file, that counts for nothing. Raises MemdbError, OSError.
    """
    catalog = Catalog(store.path / CATALOG, write=True)
    try:
        row = catalog.by_id(recording_id)
        done = RecordingCompacted(row.name)
        ages = _ages(store, catalog, row, now_ns, done)
        ager = Ager(store, row, ages, now_ns)
        due = ager.due(catalog, since_ns=seen.since_ns if ages == seen.ages else None)
        if not due and len(row.tombstones) == seen.tombstones:
            seen.all_done(ages, now_ns, seen.tombstones)
            return done

        def go_on(_: CompactProgress) -> None:
            if stop is not None and stop.is_set():
                raise Interrupted("the ingest ends")

        with FileLock(rewrite_lock(store.path, recording_id)):
            come_forward(store, catalog, recording_id)
            upkeep = Upkeep(
                store,
                catalog,
                recording_id,
                done,
                change=ager.change,
                progress=go_on,
                segment_bytes_max=segment_bytes_max,
            )
            if not upkeep.write_anew(due, steps_max=1):
                seen.all_done(ages, now_ns, len(row.tombstones))
        return done
    finally:
        catalog.close()


def _ages(
    store: Store, catalog: Catalog, row: RecordingRow, now_ns: int, done: RecordingCompacted
) -> tuple[Age, ...]:
    """The steps of the policy; none where the clock cannot be believed."""
    ages = read_policy(store.path).ages
    if not ages:
        return ()
    doubted = doubt(catalog, now_ns)
    if doubted or clock_was_wrong(row):
        done.left.append(doubted or f"{row.name} is not aged: the clock was wrong when it was begun")
        return ()
    believe(catalog, now_ns)
    return ages


class Keeper:
    """Call it after every commit of an ingest: it starts a step in the background where one is due."""

    def __init__(
        self,
        store: Store,
        recording_id: str,
        *,
        every_s: float | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._path, self._id = store.path, recording_id
        self._every_s, self._clock_ns = EVERY_S if every_s is None else every_s, clock_ns
        self._next_s = time.monotonic() + self._every_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen = Seen()
        self._told: set[str] = set()

    def __call__(self, flush: bool) -> None:
        """`flush`: the ingest ends, or makes everything safe: a step in hand is given up."""
        if self._thread is not None and (flush or not self._thread.is_alive()):
            if flush:
                self._stop.set()
            self._thread.join()
            self._thread = None
            self._stop.clear()
        if self._thread is None and not flush and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._every_s
            self._thread = threading.Thread(target=self._step, name="memdb-keep", daemon=True)
            self._thread.start()

    def _step(self) -> None:
        try:
            with Store.open(self._path, write=True) as store:
                done = keep_one(store, self._id, self._seen, now_ns=self._clock_ns(), stop=self._stop)
            for left in done.left:
                self._tell(left)
        except (Interrupted, LockedError):
            pass  # another time
        except (MemdbError, OSError) as error:
            self._tell(str(error))

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s", what)
