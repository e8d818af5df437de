"""The caption tier's search: by vector, by words, or both, over every acknowledged caption.

A table answers for the units that are in it (memdb/caption_table.py, kept up by memdb/caption_indexer.py),
and an exact scan of the segments for what came after, so that a search sees the newest caption however far the
index lags (memdb/caption_search.py). Vectors are compared by cosine; the score of whatever is returned is
computed from the vector in its segment, so that it does not matter which of the two found it. Words are
ranked by BM25, the table's and the tail's apart, and lists are merged by rank.

The table is derived: it is used while every one of its files is what its manifest says, and nothing that it
holds is ever given out. Where it cannot be used, all is scanned, with a warning, and the next indexer makes it
anew from the segments.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memdb.bm25 import bm25, words_of
from memdb.caption_indexer import BATCH_ROWS as BATCH_ROWS
from memdb.caption_indexer import TAIL_UNITS_MAX as TAIL_UNITS_MAX
from memdb.caption_indexer import CaptionIndexer
from memdb.caption_purge import holds_forgotten, purge
from memdb.caption_rows import KeptCaptions, LiveRows, Place, recordings_of
from memdb.caption_search import CaptionSearch, Filter
from memdb.live_table import LiveTables
from memdb.locks import FileLock
from memdb.schemas.errors import CorruptionError, LockedError, MissingDependency, StoreFull, UsageError
from memdb.schemas.search import CaptionHits
from memdb.table_files import FOLDER

if TYPE_CHECKING:
    from memdb.store import Store

_QUERY_WORDS_MAX = 256
_TRYING_SHARE = 0.05  # of the time, at most, goes into attempts to index that fail

_log = logging.getLogger(__name__)


class CaptionIndex:
    """The caption tables of a store, one an encoder. Searches change nothing on disk. Thread-safe."""

    def __init__(self, store_path: Path) -> None:
        self._path = Path(store_path)
        self._tables = LiveTables(self._path)
        self._indexer = CaptionIndexer(self._path)
        self._kept = KeptCaptions()
        self._rest_until_s = 0.0  # monotonic

    # Writing

    def index_captions(self, store: Store, encoder: str, *, flush: bool = False) -> int:
        """Bring an encoder's table up to the store once BATCH_ROWS captions wait, or on `flush`.

        Returns the captions added; 0 at once where another process is at it. Only writers call it. A table
        that cannot be used is dropped and made anew. Where the disk is full or refuses, that is a warning, for
        searches need no table: a later call tries again, sooner or later as the attempt was cheap or dear, at
        once on `flush`. Raises MissingDependency, and CorruptionError for damage to the truth.
        """
        if not flush and time.monotonic() < self._rest_until_s:
            return 0
        try:
            lock = FileLock(self._path / "locks" / "derived.lock", held_message="")
        except LockedError:
            return 0
        began_s = time.monotonic()
        with lock:
            try:
                return self._index(store, encoder, flush)
            except (OSError, StoreFull) as error:
                trouble: Exception = error
            except CorruptionError as error:
                if not _is_derived(error):
                    raise
                trouble = error
        now_s = time.monotonic()
        self._rest_until_s = now_s + (now_s - began_s) / _TRYING_SHARE
        _log.warning("captions are kept but not indexed: %s; a later call tries again", trouble)
        return 0

    def _index(self, store: Store, encoder: str, flush: bool) -> int:
        try:
            return self._indexer.index(store, encoder, flush=flush)
        except CorruptionError as error:
            if not _is_derived(error):
                raise
            _log.warning("%s; it is made anew from the segments", error)
            self._tables.forget(encoder)
            return self._indexer.make_anew(store, encoder)

    def holds_forgotten(self, store: Store) -> bool:
        """Whether a file of captions.lance may hold a caption that the catalog has no more: purge then."""
        return holds_forgotten(store)

    def purge(self, store: Store) -> None:
        """Rid captions.lance of all that was forgotten. The caller holds the lock of derived data.

        Afterwards no file there holds text, words or vector of a caption that the catalog has no more; up to a
        power cut, against which the caller syncs the folder. Tables without any are left as they are. Raises
        OSError where files cannot be removed.
        """
        purge(store, self._indexer)

    # Searching

    def matches(
        self, store: Store, text: str, places: Sequence[Place]
    ) -> tuple[npt.NDArray[np.float64], int]:
        """(n,) how well the words of a text match captions, by recording id and unit, by BM25 over these; and how many
        of them are damaged, which match nothing, as what is forgotten does. Read from the segments, exactly.
        """
        words = _query_words(text)
        if not words:
            return np.zeros(len(places)), 0
        self._kept.drop_forgotten(store.recordings())
        rows = LiveRows(store)
        rows.look_up(places)
        said: list[Sequence[str]] = []
        damaged = 0
        for place in places:
            row = rows[place]
            try:
                found = None if row is None else self._kept.read(store, row)
            except CorruptionError as error:
                _log.info("a caption is not searched by its words: %s", error)
                found, damaged = None, damaged + 1
            said.append([] if found is None else found[0])
        return bm25(words, said), damaged

    def search(
        self,
        store: Store,
        encoder: str,
        *,
        text: str | None = None,
        vector: npt.ArrayLike | None = None,
        recordings: Collection[str] | None = None,
        start_ns: int | None = None,
        end_ns: int | None = None,
        limit: int = 10,
        before_commit: int | None = None,
    ) -> CaptionHits:
        """The captions of an encoder that match best, best first; of equals the one committed first.

        `vector` (E,) ranks by cosine, `text` by the words that it holds, both by reciprocal ranks (k = 60). A
        caption whose vector has no direction is found by its words only.
        `recordings` are ids; only captions that overlap `[start_ns, end_ns)`, and only those committed before
        `before_commit`, are found. Without a vector and without a word in `text` nothing is. A table that is
        missing or cannot be used costs time and a warning, never a caption. Raises UsageError, ModelMismatch.
        """
        if limit < 1:
            raise UsageError(f"a search for {limit} captions: give a limit of at least 1")
        words = _query_words(text or "")
        query = None if vector is None else _query_vector(vector)
        rows = store.recordings()
        self._kept.drop_forgotten(rows)
        known = recordings_of(rows, encoder)
        chosen = {name: row for name, row in known.items() if recordings is None or name in set(recordings)}
        if not chosen or (query is None and not words):
            return CaptionHits()
        allowed = Filter(chosen, start_ns, end_ns, before_commit)
        return self._run(
            encoder, lambda: CaptionSearch(store, self._kept, encoder, allowed, words, query, limit)
        )

    def _run(self, encoder: str, make: Callable[[], CaptionSearch]) -> CaptionHits:
        """With the table; with what is there now, where it changed under the search; else without."""
        try:
            return self._with_table(encoder, make())
        except (CorruptionError, MissingDependency, OSError):
            # Another process may have put a new table in its place just then.
            self._tables.forget(encoder)
        try:
            return self._with_table(encoder, make())
        except (CorruptionError, MissingDependency, OSError) as error:
            self._tables.forget(encoder)
            search = make()
            search.warn(f"captions were searched one by one: {error}")
            return search.run(None)

    def _with_table(self, encoder: str, search: CaptionSearch) -> CaptionHits:
        live = self._tables.get(encoder)
        found = search.run(live)
        if live is not None:
            self._tables.confirm(encoder, live)
        return found


def _query_words(text: str) -> list[str]:
    """Each once, and not more of them than a question has use for."""
    return list(dict.fromkeys(words_of(text)))[:_QUERY_WORDS_MAX]


def _is_derived(error: CorruptionError) -> bool:
    return error.file.startswith(FOLDER)


def _query_vector(vector: npt.ArrayLike) -> npt.NDArray[np.float32] | None:
    """None for a vector without direction: it says as little as no vector."""
    query = np.ascontiguousarray(vector, np.float32)
    if query.ndim != 1 or not np.isfinite(query).all():
        raise UsageError("the vector of a search must be one row of finite numbers")
    return query if query.any() else None
