"""Upkeep beside a running ingest: now and then one file of its recording is aged, or freed of what was forgotten.

It runs in a thread of its own, so that no frame waits for it, and whatever goes wrong in it is a warning: the
next step, or memdb compact, does it again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from memdb.age import Ager, clock_was_wrong
from memdb.catalog import Catalog
from memdb.clock import believe, doubt
from memdb.database import CATALOG
from memdb.locks import FileLock, rewrite_lock
from memdb.policy import read_policy
from memdb.schemas.errors import Interrupted, LockedError, MemdbError
from memdb.segments import SEGMENT_BYTES_MAX
from memdb.store import Store
from memdb.upkeep import CompactProgress, RecordingCompacted, Upkeep, come_forward

logger = logging.getLogger(__name__)

EVERY_S = 60.0


def keep_one(
    store: Store,
    recording_id: str,
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
        ager: Ager | None = None
        if ages := read_policy(store.path).ages:
            doubted = doubt(catalog, now_ns)
            if doubted or clock_was_wrong(row):
                done.left.append(doubted or f"{row.name} is not aged: the clock was wrong when it was begun")
            else:
                believe(catalog, now_ns)
                ager = Ager(store, row, ages, now_ns)

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
                ager=ager,
                progress=go_on,
                segment_bytes_max=segment_bytes_max,
            )
            upkeep.write_anew(steps_max=1)
        return done
    finally:
        catalog.close()


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
                done = keep_one(store, self._id, now_ns=self._clock_ns(), stop=self._stop)
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
