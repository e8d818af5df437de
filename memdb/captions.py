"""The caption tier's search: by vector, by words, or both, over every acknowledged caption.

The table of memdb/caption_table.py answers up to the last commit in it, and an exact scan of the segments
for what came after, so that a search sees the newest caption however far the index lags. Vectors are
compared by cosine; the score of whatever is returned is computed from the vector in its segment, so that it
does not matter which of the two found it. Words are ranked by BM25, the table's and the tail's apart, and
lists are merged by rank.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memdb.bm25 import bm25, words_of
from memdb.caption_table import CaptionEntry, CaptionTable, Match, drop_table, table_file
from memdb.fusion import reciprocal_rank
from memdb.locks import FileLock
from memdb.schemas.errors import (
    CorruptionError,
    LockedError,
    MissingDependency,
    ModelMismatch,
    UnknownRecording,
    UsageError,
)
from memdb.schemas.search import CaptionHit, CaptionHits, How

if TYPE_CHECKING:
    from memdb.schemas.rows import UnitRow
    from memdb.store import Store

BATCH_ROWS = 32  # fewer wait for more, unless flushed
TAIL_UNITS_MAX = 512  # the writer keeps the tail below; more is worth a warning

_ADD_ROWS_MAX = 2048
_KEPT_CAPTIONS_MAX = 8192
_QUERY_WORDS_MAX = 256
_SPARE = 16  # rows asked of the table beyond the limit at first
_COSINE_SLACK = 1e-5  # more than fp32 can be wrong in a cosine
_FUSED_DEPTH_MIN = 64  # how deep each list goes into a merge by rank

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Filter:
    """Which captions a search may find."""

    recordings: dict[str, int]  # id -> its last commit
    all_recordings: bool
    start_ns: int | None
    end_ns: int | None
    before_commit: int | None

    def takes(self, row: UnitRow) -> bool:
        return (
            row.recording_id in self.recordings
            and (self.before_commit is None or row.commit_id < self.before_commit)
            and (self.end_ns is None or row.start_ns < self.end_ns)
            and (self.start_ns is None or row.end_ns > self.start_ns or row.start_ns >= self.start_ns)
        )

    def sql(self, last_commit: int) -> str:
        """The same for the table, up to the commit from which on the tail is scanned."""
        last = last_commit if self.before_commit is None else min(last_commit, self.before_commit - 1)
        terms = [f"commit_id <= {last}"]
        if self.end_ns is not None:
            terms.append(f"start_ns < {self.end_ns}")
        if self.start_ns is not None:
            terms.append(f"(end_ns > {self.start_ns} OR start_ns >= {self.start_ns})")
        if not self.all_recordings:
            assert all(set(name) <= set("0123456789abcdef") for name in self.recordings)
            terms.append(f"recording_id IN ({', '.join(repr(name) for name in sorted(self.recordings))})")
        return " AND ".join(terms)


@dataclass(frozen=True, eq=False)
class _Found:
    """A caption that matched, with its row of the catalog. It sorts by commit."""

    row: UnitRow
    score: float

    @property
    def commit_id(self) -> int:
        return self.row.commit_id


class CaptionIndex:
    """The caption tables of a store, one an encoder. Searches change nothing on disk. Thread-safe."""

    def __init__(self, store_path: Path) -> None:
        self._path = Path(store_path)
        self._lock = threading.Lock()
        self._tables: dict[str, CaptionTable] = {}
        self._kept: dict[tuple[str, int], tuple[list[str], npt.NDArray[np.float32]]] = {}

    # Writing

    def index_captions(self, store: Store, encoder: str, *, flush: bool = False) -> int:
        """Bring an encoder's table up to the store once BATCH_ROWS captions wait, or on `flush`.

        Returns the captions added; 0 at once where another process is at it. Only writers call it. A table
        that cannot be used is dropped and made anew. Raises MissingDependency, CorruptionError.
        """
        try:
            lock = FileLock(self._path / "locks" / "derived.lock", held_message="")
        except LockedError:
            return 0
        with lock:
            try:
                return self._index(store, encoder, flush)
            except CorruptionError as error:
                if not error.file.startswith(table_file(encoder)):
                    raise
                _log.warning("%s; it is made anew from the segments", error)
                self._forget_table(encoder)
                drop_table(self._path, encoder)
                return self._index(store, encoder, flush=True)

    def _index(self, store: Store, encoder: str, flush: bool) -> int:
        table = self._table(encoder)
        # Every commit up to here can be read, so that no row is passed over that a later commit overtook.
        last = store.last_commit()
        recordings = _recordings(store, encoder)
        after = table.last_commit() if table else 0
        rows = [row for row in _rows_after(store, recordings, after) if row.commit_id <= last]
        if not rows or (len(rows) < BATCH_ROWS and not flush):
            return 0
        added = 0
        for start in range(0, len(rows), _ADD_ROWS_MAX):
            entries = self._entries(store, rows[start : start + _ADD_ROWS_MAX], table)
            if not entries:
                continue
            if table is None:
                table = CaptionTable.create(self._path, encoder, entries)
                added += len(entries)
            else:
                added += table.add(entries)
        if table is not None:
            table.maintain()
        return added

    def _entries(
        self, store: Store, rows: Sequence[UnitRow], table: CaptionTable | None
    ) -> list[CaptionEntry]:
        entries: list[CaptionEntry] = []
        size = table.vector_size if table is not None else None
        for row in rows:
            read = self._read(store, row)
            if read is None:
                continue
            words, vector = read
            size = size or len(vector)
            if len(vector) != size:
                _log.warning("unit %d of %s has a vector of another size", row.number, row.recording_id)
                continue
            entries.append(
                CaptionEntry(
                    row.recording_id,
                    row.number,
                    row.commit_id,
                    row.start_ns,
                    row.end_ns,
                    " ".join(words),
                    vector,
                )
            )
        return entries

    # Searching

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
        words = list(dict.fromkeys(words_of(text or "")))[:_QUERY_WORDS_MAX]
        query = None if vector is None else _query_vector(vector)
        known = _recordings(store, encoder)
        chosen = {name: last for name, last in known.items() if recordings is None or name in set(recordings)}
        if not chosen or (query is None and not words):
            return CaptionHits()
        allowed = _Filter(chosen, len(chosen) == len(known), start_ns, end_ns, before_commit)
        return _Search(self, store, encoder, allowed, words, query, limit).run()

    def _table(self, encoder: str) -> CaptionTable | None:
        with self._lock:
            if encoder not in self._tables:
                table = CaptionTable.open(self._path, encoder)
                if table is None:
                    return None
                self._tables[encoder] = table
            return self._tables[encoder]

    def _forget_table(self, encoder: str) -> None:
        with self._lock:
            self._tables.pop(encoder, None)

    def _read(self, store: Store, row: UnitRow) -> tuple[list[str], npt.NDArray[np.float32]] | None:
        """A caption's words and vector from its segment, kept for the next search; None where damaged."""
        key = (row.recording_id, row.number)
        kept = self._kept.get(key)
        if kept is None:
            try:
                caption = store.read_caption(row)
            except CorruptionError as error:
                _log.warning("a caption is left out of the search: %s", error)
                return None
            kept = words_of(caption.text), np.asarray(caption.vector, np.float32)
            if len(self._kept) >= _KEPT_CAPTIONS_MAX:
                self._kept.clear()
            self._kept[key] = kept
        return kept


class _Search:
    """One search: the table's part, the tail's part, and how they become one list."""

    def __init__(
        self,
        index: CaptionIndex,
        store: Store,
        encoder: str,
        allowed: _Filter,
        words: list[str],
        query: npt.NDArray[np.float32] | None,
        limit: int,
    ) -> None:
        self._index, self._store, self._encoder = index, store, encoder
        self._allowed, self._words, self._query, self._limit = allowed, words, query, limit
        both = bool(words) and query is not None
        self._depth = max(4 * limit, _FUSED_DEPTH_MIN) if both else limit
        self._warnings: list[str] = []

    def run(self) -> CaptionHits:
        try:
            return self._run(self._index._table(self._encoder))
        except (CorruptionError, MissingDependency) as error:
            # Another process may have made the table anew, or dropped the version that was open.
            self._index._forget_table(self._encoder)
            try:
                return self._run(self._index._table(self._encoder))
            except (CorruptionError, MissingDependency):
                self._index._forget_table(self._encoder)
                self._warn(f"captions were searched one by one: {error}")
                return self._run(None)

    def _run(self, table: CaptionTable | None) -> CaptionHits:
        indexed = table.last_commit() if table else 0
        late = _rows_after(self._store, self._allowed.recordings, indexed)
        tail = [row for row in late if self._allowed.takes(row)]
        if len(tail) > TAIL_UNITS_MAX and not self._warnings:
            self._warn(f"{len(tail)} captions are not indexed yet and were searched one by one")
        where = self._allowed.sql(indexed)
        by_vector = self._by_vector(table, where, tail) if self._query is not None else None
        by_text = self._by_text(table, where, tail) if self._words else None
        hits = _merge(by_vector, by_text)[: self._limit]
        return CaptionHits(tuple(hits), indexed, len(tail), tuple(self._warnings))

    def _by_vector(self, table: CaptionTable | None, where: str, tail: list[UnitRow]) -> list[_Found]:
        """By cosine, table and tail in one list."""
        query = self._query
        assert query is not None
        rows = list(tail)
        if table is not None:
            if len(query) != table.vector_size:
                raise ModelMismatch(
                    f"the question's vector has {len(query)} values, the captions' have {table.vector_size}: "
                    f"encode the question with {self._encoder!r}"
                )
            nearest = _with_ties(
                lambda wanted: table.nearest(query, wanted, where), self._depth, slack=_COSINE_SLACK
            )
            rows += self._rows(nearest)
        found: list[_Found] = []
        for row in rows:
            read = self._index._read(self._store, row)
            if read is None:
                continue
            if len(read[1]) != len(query):
                self._warn(f"unit {row.number} of {row.recording_id} has a vector of another size")
                continue
            score = cosine(read[1], query)
            if score is not None:
                found.append(_Found(row, score))
        return sorted(found, key=lambda hit: (-hit.score, hit.commit_id))[: self._depth]

    def _by_text(self, table: CaptionTable | None, where: str, tail: list[UnitRow]) -> list[list[_Found]]:
        """By words: the table's list and the tail's, each by its own BM25."""
        lists: list[list[_Found]] = []
        if table is not None:
            matching = _with_ties(
                lambda wanted: table.matching(self._words, wanted, where), self._depth, slack=0
            )
            scores = {match.commit_id: match.score for match in matching}
            rows = self._rows(matching, self._depth)
            lists.append([_Found(row, scores[row.commit_id]) for row in rows])
        read = [(row, self._index._read(self._store, row)) for row in tail]
        texts = [(row, kept[0]) for row, kept in read if kept is not None]
        ranked = [
            _Found(row, float(score))
            for (row, _), score in zip(texts, bm25(self._words, [words for _, words in texts]), strict=True)
            if score > 0
        ]
        lists.append(sorted(ranked, key=lambda hit: (-hit.score, hit.commit_id))[: self._depth])
        return lists

    def _rows(self, matches: Sequence[Match], limit: int | None = None) -> list[UnitRow]:
        """The catalog's rows of what the table found: the catalog decides what exists and where it stands."""
        return list(islice(self._each_row(matches), limit))

    def _each_row(self, matches: Sequence[Match]) -> Iterator[UnitRow]:
        for match in matches:
            try:
                row = self._store.unit(match.recording_id, match.unit)
            except (UnknownRecording, UsageError):
                continue
            if row.commit_id == match.commit_id and row.has_caption and self._allowed.takes(row):
                yield row

    def _warn(self, what: str) -> None:
        if what not in self._warnings:
            _log.warning("%s", what)
            self._warnings.append(what)


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float | None:
    """In fp64. None where a vector has no direction: its length is 0 or not finite."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / lengths if 0 < lengths < np.inf else None


def _with_ties(search: Callable[[int], list[Match]], limit: int, *, slack: float) -> list[Match]:
    """The best `limit` matches and all that score like the last of them: equals are then ordered by us."""
    wanted = limit + _SPARE
    while True:
        found = search(wanted)
        if len(found) <= limit:
            return found
        edge = found[limit - 1].score - slack
        if len(found) < wanted or found[-1].score < edge:
            return [match for match in found if match.score >= edge]
        wanted *= 4


def _merge(by_vector: list[_Found] | None, by_text: list[list[_Found]] | None) -> list[CaptionHit]:
    if by_text is None:
        return [_hit(found.row, found.score, "vector") for found in by_vector or []]
    lists = by_text if by_vector is None else [by_vector, *by_text]
    rows = {found.commit_id: found.row for ranked in lists for found in ranked}
    in_vector = {found.commit_id for found in by_vector or []}
    in_text = {found.commit_id for ranked in by_text for found in ranked}
    hits: list[CaptionHit] = []
    for commit_id, score in reciprocal_rank([[found.commit_id for found in ranked] for ranked in lists]):
        how: How = "vector" if commit_id not in in_text else "both" if commit_id in in_vector else "text"
        hits.append(_hit(rows[commit_id], score, how))
    return hits


def _hit(row: UnitRow, score: float, how: How) -> CaptionHit:
    return CaptionHit(row.recording_id, row.number, row.start_ns, row.end_ns, score, how)


def _recordings(store: Store, encoder: str) -> dict[str, int]:
    """The recordings whose captions this encoder turned into vectors, with their last commits."""
    return {row.id: row.last_commit for row in store.recordings() if row.spec.caption_encoder == encoder}


def _rows_after(store: Store, recordings: dict[str, int], commit_id: int) -> list[UnitRow]:
    """Rows with captions that were committed after `commit_id`, in order of commit."""
    rows: list[UnitRow] = []
    for recording_id, last in recordings.items():
        if last > commit_id:
            rows += store.units_after(commit_id, recording_id=recording_id, captions_only=True)
    return sorted(rows, key=lambda row: row.commit_id)


def _query_vector(vector: npt.ArrayLike) -> npt.NDArray[np.float32] | None:
    """None for a vector without direction: it says as little as no vector."""
    query = np.ascontiguousarray(vector, np.float32)
    if query.ndim != 1 or not np.isfinite(query).all():
        raise UsageError("the vector of a search must be one row of finite numbers")
    return query if query.any() else None
