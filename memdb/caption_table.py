"""The caption table of one encoder in LanceDB: what it finds, and nothing of what it holds, is used.

LanceDB syncs nothing and checks no bytes, so that the table is a derived index: it gives which units match
and how well, and texts and vectors are read from the segments. A row's words are those of memdb/bm25.py.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from memdb.schemas.errors import CorruptionError, MissingDependency

FOLDER = "captions.lance"

_FRAGMENTS_MAX = 50  # each version lists every fragment: unbounded, appends grow quadratic
_TIME_INDEX_ROWS = 4096  # below, scanning the start times is as fast as an index over them
_KEEP_VERSIONS = timedelta(minutes=5)  # a reader may still be in one
_TRIES = 6
_RETRY_S = 0.02

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class CaptionEntry:
    """One row of the table."""

    recording_id: str
    unit: int
    commit_id: int
    start_ns: int
    end_ns: int
    words: str
    vector: npt.NDArray[np.float32]  # (E,); one without direction is found by its words only


@dataclass(frozen=True)
class Match:
    """A row that was found. Higher scores are better; they compare within one search only."""

    commit_id: int
    recording_id: str
    unit: int
    score: float


class CaptionTable:
    """An open table. Other processes' commits are seen by every call.

    Calls raise CorruptionError where LanceDB fails in a way that a retry does not cure.
    """

    def __init__(self, table: Any, file: str) -> None:
        """Use `open` or `create`."""
        self._table = table
        self._file = file

    @classmethod
    def open(cls, store_path: Path, encoder: str) -> CaptionTable | None:
        """The table of an encoder, None where there is none. Changes nothing. Raises MissingDependency."""
        name, file = table_name(encoder), table_file(encoder)
        if not (store_path / file).is_dir():
            return None
        connection = _connect(store_path)
        with _typed(file):
            return cls(connection.open_table(name), file)

    @classmethod
    def create(cls, store_path: Path, encoder: str, entries: Sequence[CaptionEntry]) -> CaptionTable:
        """A new table with its first rows and its index of words."""
        name, file = table_name(encoder), table_file(encoder)
        connection = _connect(store_path)
        with _typed(file):
            table = cls(connection.create_table(name, _arrow(entries)), file)
            table._index_words()
        return table

    @property
    def vector_size(self) -> int:
        """E."""
        with _typed(self._file):
            return int(self._table.schema.field("vector").type.list_size)

    def last_commit(self) -> int:
        """The largest commit id in the table: it holds every caption of its encoder up to there."""
        with _typed(self._file):
            commits = self._table.search().select(["commit_id"]).to_arrow().column("commit_id").to_numpy()
        return int(commits.max(initial=0))

    def add(self, entries: Sequence[CaptionEntry]) -> int:
        """Append rows that are not yet there, in order of commit, as one version. Returns how many those
        were.

        Whether they are there is asked again before every try: a try that failed may have come through.
        """

        def attempt() -> int:
            last = self.last_commit()
            fresh = [entry for entry in entries if entry.commit_id > last]
            if fresh:
                self._table.add(_arrow(fresh))
            return len(fresh)

        return self._retrying(attempt)

    def maintain(self) -> None:
        """Make missing indexes; merge fragments and drop old versions once there are many."""
        with _typed(self._file):
            indexed = {column for index in self._table.list_indices() for column in index.columns}
            stats = self._table.stats()
        if "words" not in indexed:  # its making was cut short
            self._retrying(self._index_words)
        if "start_ns" not in indexed and stats["num_rows"] >= _TIME_INDEX_ROWS:
            self._retrying(self._index_times)
        if stats["fragment_stats"]["num_fragments"] >= _FRAGMENTS_MAX:
            self._retrying(lambda: self._table.optimize(cleanup_older_than=_KEEP_VERSIONS))

    def nearest(self, vector: npt.NDArray[np.float32], limit: int, where: str) -> list[Match]:
        """The rows whose vectors have the largest cosine with (E,), best first."""
        with _typed(self._file):
            query = self._table.search(vector, query_type="vector").distance_type("cosine")
            query = query.where(f"directed AND {where}").limit(limit)
            return _matches(query, "_distance", lambda distance: 1.0 - distance)

    def matching(self, words: Sequence[str], limit: int, where: str) -> list[Match]:
        """The rows that hold at least one of the words, best first."""
        from lancedb.query import MatchQuery

        with _typed(self._file):
            query = self._table.search(MatchQuery(" ".join(words), "words"), query_type="fts").where(where)
            return _matches(query.limit(limit), "_score", float)

    def _index_words(self) -> None:
        from lancedb.index import FTS

        config = FTS(
            base_tokenizer="whitespace",
            max_token_length=None,
            lower_case=False,
            stem=False,
            remove_stop_words=False,
            ascii_folding=False,
        )
        self._table.create_index("words", config=config)

    def _index_times(self) -> None:
        from lancedb.index import BTree

        self._table.create_index("start_ns", config=BTree())

    def _retrying(self, attempt: Callable[[], _T]) -> _T:
        """Try again after a conflict of commits. The handle goes on failing until it is refreshed."""
        with _typed(self._file):
            for tries in range(_TRIES):
                try:
                    return attempt()
                except Exception as error:
                    if "conflict" not in str(error).lower() or tries == _TRIES - 1:
                        raise
                    _log.debug("commit conflict in %s, trying again: %s", self._file, error)
                time.sleep(_RETRY_S * 2**tries)
                self._table.checkout_latest()
        raise AssertionError("unreachable")


def table_name(encoder: str) -> str:
    """The name of the table of an encoder of caption vectors: one table an encoder."""
    return f"captions_{hashlib.blake2b(encoder.encode(), digest_size=8).hexdigest()}"


def table_file(encoder: str) -> str:
    """Where the table lies, relative to the store."""
    return f"{FOLDER}/{table_name(encoder)}.lance"


def drop_table(store_path: Path, encoder: str) -> None:
    """Remove a table, whole or damaged. It is made again from the segments."""
    shutil.rmtree(store_path / table_file(encoder), ignore_errors=True)


def _connect(store_path: Path) -> Any:
    os.environ.setdefault("LANCE_LOG", "error")  # read once, when the library is loaded
    try:
        import lancedb
    except ImportError:
        raise MissingDependency("the caption table needs LanceDB: pip install lancedb pyarrow") from None
    with _typed(FOLDER):
        return lancedb.connect(str(store_path / FOLDER), read_consistency_interval=timedelta(0))


def _arrow(entries: Sequence[CaptionEntry]) -> Any:
    import pyarrow as pa

    vectors = np.ascontiguousarray([entry.vector for entry in entries], np.float32)  # (rows, E)
    # A vector of length 0, or one that is not finite, has no cosine: it is left out of searches by vector.
    directed = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    vectors[~directed] = 0
    return pa.table(
        {
            "recording_id": pa.array([entry.recording_id for entry in entries], pa.string()),
            "unit": pa.array([entry.unit for entry in entries], pa.int64()),
            "commit_id": pa.array([entry.commit_id for entry in entries], pa.int64()),
            "start_ns": pa.array([entry.start_ns for entry in entries], pa.int64()),
            "end_ns": pa.array([entry.end_ns for entry in entries], pa.int64()),
            "words": pa.array([entry.words for entry in entries], pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            "directed": pa.array(directed),
        }
    )


def _matches(query: Any, column: str, score_of: Callable[[float], float]) -> list[Match]:
    rows = query.select(["commit_id", "recording_id", "unit", column]).to_arrow().to_pylist()
    found = [Match(row["commit_id"], row["recording_id"], row["unit"], score_of(row[column])) for row in rows]
    return sorted(found, key=lambda match: (-match.score, match.commit_id))


@contextmanager
def _typed(file: str) -> Iterator[None]:
    """Whatever LanceDB raises comes out as CorruptionError: it has one type of error for every trouble."""
    try:
        yield
    except (CorruptionError, MissingDependency):
        raise
    except Exception as error:
        raise CorruptionError(f"{file} cannot be used: {_one_line(error)}", file=file) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a panic in Rust becomes; it is no Exception
            raise
        raise CorruptionError(f"{file} is damaged: {_one_line(error)}", file=file) from error


def _one_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
