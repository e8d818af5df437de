"""One search of the caption tier: the table's part, an exact scan of the rest, and how they become one list.

The table gives places and scores only. What is found counts if the catalog still has a caption there, and the
table is asked for more until as many as wanted are left: what was forgotten takes nobody's place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memdb.bm25 import bm25
from memdb.caption_indexer import TAIL_UNITS_MAX
from memdb.caption_rows import KeptCaptions, LiveRows, Place, Said, captions_between
from memdb.caption_table import Match
from memdb.fusion import reciprocal_rank
from memdb.live_table import LiveTable
from memdb.schemas.errors import CorruptionError, ModelMismatch
from memdb.schemas.search import CaptionHit, CaptionHits, How

if TYPE_CHECKING:
    from memdb.schemas.rows import RecordingRow, UnitRow
    from memdb.store import Store

_SPARE = 16  # rows asked of the table beyond the limit at first
_GROWTH = 4
_COSINE_SLACK = 1e-5  # more than fp32 can be wrong in a cosine
_STONES_TOLD_MAX = 32  # spans that the table is told to leave out
_FUSED_DEPTH_MIN = 64  # how deep each list goes into a merge by rank

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filter:
    """Which captions a search may find."""

    recordings: Mapping[str, RecordingRow]
    start_ns: int | None = None
    end_ns: int | None = None
    before_commit: int | None = None

    def takes(self, row: UnitRow) -> bool:
        return (
            row.recording_id in self.recordings
            and (self.before_commit is None or row.commit_id < self.before_commit)
            and (self.end_ns is None or row.start_ns < self.end_ns)
            and (self.start_ns is None or row.end_ns > self.start_ns or row.start_ns >= self.start_ns)
        )

    def sql(self, tabled: Collection[str]) -> str:
        """As much of the same as a table can tell that has captions of the recordings `tabled`.

        It knows no commits, which are counted anew when a catalog is, and not all that was forgotten: what it
        is not told, the catalog says of each row.
        """
        terms = []
        if self.end_ns is not None:
            terms.append(f"start_ns < {_told(self.end_ns)}")
        if self.start_ns is not None:
            start_ns = _told(self.start_ns)
            terms.append(f"(end_ns > {start_ns} OR start_ns >= {start_ns})")
        assert all(set(name) <= set("0123456789abcdef") for name in self.recordings)
        if not set(tabled) <= set(self.recordings):
            terms.append(f"recording_id IN ({', '.join(repr(name) for name in sorted(self.recordings))})")
        stones = [(row.id, stone) for row in self.recordings.values() for stone in row.tombstones]
        stones.sort(key=lambda found: found[1].start_ns - found[1].end_ns)  # the longest first
        terms += [
            f"NOT (recording_id = '{name}' AND unit < {stone.below_unit} "
            f"AND start_ns < {stone.end_ns} AND end_ns > {stone.start_ns})"
            for name, stone in stones[:_STONES_TOLD_MAX]
        ]
        return " AND ".join(terms)


def _told(ns: int) -> int:
    """A time as a table can be asked for it, in 64 bits: no caption lies beyond."""
    return max(-(1 << 63), min(ns, (1 << 63) - 1))


@dataclass(frozen=True, eq=False)
class _Found:
    """A caption that matched, with its row of the catalog."""

    row: UnitRow
    score: float

    @property
    def commit_id(self) -> int:
        return self.row.commit_id


class CaptionSearch:
    """One search. It may be run again with another table, or with none."""

    def __init__(
        self,
        store: Store,
        kept: KeptCaptions,
        encoder: str,
        allowed: Filter,
        words: Sequence[str],
        query: npt.NDArray[np.float32] | None,
        limit: int,
    ) -> None:
        """`query` (E,) ranks by cosine where there is one, `words` by BM25 where there are any."""
        self._store, self._kept, self._encoder = store, kept, encoder
        self._allowed, self._words, self._query, self._limit = allowed, words, query, limit
        both = bool(words) and query is not None
        self._depth = max(4 * limit, _FUSED_DEPTH_MIN) if both else limit
        self._rows = LiveRows(store)
        self.warnings: list[str] = []

    def run(self, live: LiveTable | None) -> CaptionHits:
        """Raises CorruptionError where the table cannot be used, ModelMismatch."""
        tail = self._tail(live)
        by_vector = self._by_vector(live, tail) if self._query is not None else None
        by_text = self._by_text(live, tail) if self._words else None
        hits = _merged(by_vector, by_text)[: self._limit]
        indexed = live.manifest.last_commit if live else 0
        return CaptionHits(tuple(hits), indexed, len(tail), tuple(self.warnings))

    def warn(self, what: str) -> None:
        if what not in self.warnings:
            _log.warning("%s", what)
            self.warnings.append(what)

    def _tail(self, live: LiveTable | None) -> list[UnitRow]:
        """The captions that the table does not have: those that came after, and those it could not read."""
        done = live.manifest.units if live else {}
        recordings = self._allowed.recordings.values()
        tail = [row for row in captions_between(self._store, recordings, done) if self._allowed.takes(row)]
        if len(tail) > TAIL_UNITS_MAX and not self.warnings:
            self.warn(f"{len(tail)} captions are not indexed yet and were searched one by one")
        unread = live.manifest.unread if live else ()
        return tail + [row for place in unread if (row := self._row(place)) is not None]

    def _row(self, place: Place) -> UnitRow | None:
        """The catalog's row of a place: it decides what exists, where it stands, and whether it is asked for."""
        row = self._rows[place]
        return row if row is not None and self._allowed.takes(row) else None

    def _said(self, row: UnitRow) -> Said | None:
        """A caption's words and vector; None where it was forgotten meanwhile, or is damaged, which is told."""
        try:
            return self._kept.read(self._store, row)
        except CorruptionError as error:
            self.warn(f"a caption is left out: {error}")
            return None

    def _by_vector(self, live: LiveTable | None, tail: Sequence[UnitRow]) -> list[_Found]:
        """By cosine, table and tail in one list."""
        query = self._query
        assert query is not None
        rows = list(tail)
        if live is not None:
            table, size = live.table, live.manifest.vector_size
            where = self._allowed.sql(live.manifest.units)
            if len(query) != size:
                raise ModelMismatch(
                    f"the question's vector has {len(query)} values, the captions' have {size}: "
                    f"encode the question with {self._encoder!r}"
                )
            rows += [
                found.row
                for found in self._surviving(
                    lambda wanted: table.nearest(query, wanted, where),
                    slack=_COSINE_SLACK,
                    counts=lambda row: self._said(row) is not None,
                )
            ]
        found: list[_Found] = []
        for row in rows:
            said = self._said(row)
            if said is None:
                continue
            if len(said[1]) != len(query):
                self.warn(f"unit {row.number} of {row.recording_id} has a vector of another size")
                continue
            score = cosine(said[1], query)
            if score is not None:
                found.append(_Found(row, score))
        return sorted(found, key=lambda hit: (-hit.score, hit.commit_id))[: self._depth]

    def _by_text(self, live: LiveTable | None, tail: Sequence[UnitRow]) -> list[list[_Found]]:
        """By words: the table's list and the tail's, each by its own BM25."""
        lists: list[list[_Found]] = []
        if live is not None:
            table, where = live.table, self._allowed.sql(live.manifest.units)
            lists.append(self._surviving(lambda wanted: table.matching(self._words, wanted, where)))
        read = [(row, self._said(row)) for row in tail]
        texts = [(row, said[0]) for row, said in read if said is not None]
        scores = bm25(self._words, [words for _, words in texts]).tolist()
        lists.append([_Found(row, score) for (row, _), score in zip(texts, scores, strict=True)])
        return [
            sorted((hit for hit in hits if hit.score > 0), key=lambda hit: (-hit.score, hit.commit_id))[
                : self._depth
            ]
            for hits in lists
        ]

    def _surviving(
        self,
        search: Callable[[int], list[Match]],
        *,
        slack: float = 0.0,
        counts: Callable[[UnitRow], bool] = lambda row: True,
    ) -> list[_Found]:
        """The best `depth` rows that still count, and all that score like the last of them.

        Equals are ordered by the caller. The request grows until so many are left, or the table has no more.
        """
        wanted = self._depth + _SPARE
        while True:
            matches = search(wanted)
            self._rows.look_up((match.recording_id, match.unit) for match in matches)
            alive: list[_Found] = []
            edge = -np.inf
            for match in matches:
                if match.score < edge:
                    break
                row = self._row((match.recording_id, match.unit))
                if row is not None and counts(row):
                    alive.append(_Found(row, match.score))
                    if len(alive) == self._depth:
                        edge = match.score - slack
            if len(matches) < wanted or matches[-1].score < edge:
                return alive
            wanted *= _GROWTH


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float | None:
    """In fp64. None where a vector has no direction: its length is 0 or not finite."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / lengths if 0 < lengths < np.inf else None


def _merged(by_vector: list[_Found] | None, by_text: list[list[_Found]] | None) -> list[CaptionHit]:
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
