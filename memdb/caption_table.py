"""The caption table of one encoder in LanceDB: what it finds, and nothing of what it holds, is used.

It gives which units match and how well; texts and vectors are read from the segments. LanceDB syncs nothing
and checks no bytes, so that memdb/table_manifest.py says which folder, which version and which files count.
A row's words are those of memdb/bm25.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memdb.schemas.errors import CorruptionError, MissingDependency
from memdb.table_files import FOLDER

_TIME_INDEX_ROWS = 4096  # below, scanning the start times is as fast as an index over them
_COPY_ROWS = 4096  # of a batch while a table is copied
# What a full disk, a full quota and a limit on the size of files say, by their numbers.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, eq=False)
class CaptionEntry:
    """One row of the table."""

    recording_id: str
    unit: int
    start_ns: int
    end_ns: int
    words: str
    vector: npt.NDArray[np.float32]  # (E,); one without direction is found by its words only


@dataclass(frozen=True)
class Match:
    """A row that was found. Higher scores are better; they compare within one search only."""

    recording_id: str
    unit: int
    score: float


class CaptionTable:
    """An open table: one version of it for searches, the newest for whoever adds.

    Calls raise CorruptionError where LanceDB fails, and OSError where it is for want of space.
    """

    def __init__(self, table: Any, folder: str) -> None:
        """Use `open`, `create` or `copy`."""
        self._table = table
        self.folder = folder

    @classmethod
    def open(cls, store_path: Path, folder: str, version: int | None = None) -> CaptionTable:
        """A version of a table, by default the newest. Changes nothing. Raises MissingDependency."""
        # A connection of its own: none of LanceDB's caches outlives a table that was found wanting.
        connection = _connect(store_path)
        with _typed(folder):
            return cls(connection.open_table(Path(folder).stem, version=version), folder)

    @classmethod
    def create(cls, store_path: Path, folder: str, entries: Sequence[CaptionEntry]) -> CaptionTable:
        """A new table with its first rows, without indexes."""
        connection = _connect(store_path)
        with _typed(folder):
            return cls(connection.create_table(Path(folder).stem, _arrow(entries)), folder)

    def copy(self, store_path: Path, folder: str) -> CaptionTable:
        """The same rows as a new table: in one piece, without any trace of earlier versions."""
        connection = _connect(store_path)
        with _typed(folder):
            rows = self._table.count_rows()
            batches = self._table.search().limit(rows).to_batches(_COPY_ROWS)
            table = connection.create_table(Path(folder).stem, batches)
            if table.count_rows() != rows:
                raise CorruptionError(f"{FOLDER}/{folder} holds fewer rows than it should", file=FOLDER)
            return type(self)(table, folder)

    @property
    def version(self) -> int:
        with _typed(self.folder):
            return int(self._table.version)

    def rows(self) -> int:
        with _typed(self.folder):
            return int(self._table.count_rows())

    def add(self, entries: Sequence[CaptionEntry]) -> None:
        """Append rows as one version."""
        with _typed(self.folder):
            self._table.add(_arrow(entries))

    def make_indexes(self) -> None:
        """Index what is there: rows that are added later are found all the same, one by one."""
        from lancedb.index import FTS, BTree

        words = FTS(
            base_tokenizer="whitespace",
            max_token_length=None,
            lower_case=False,
            stem=False,
            remove_stop_words=False,
            ascii_folding=False,
        )
        with _typed(self.folder):
            self._table.create_index("words", config=words)
            if self._table.count_rows() >= _TIME_INDEX_ROWS:
                self._table.create_index("start_ns", config=BTree())

    def nearest(self, vector: npt.NDArray[np.float32], limit: int, where: str) -> list[Match]:
        """The rows whose vectors have the largest cosine with (E,), best first."""
        with _typed(self.folder):
            query = self._table.search(vector, query_type="vector").distance_type("cosine")
            query = query.where(f"directed AND {where}" if where else "directed").limit(limit)
            return _matches(query, "_distance", lambda distance: 1.0 - distance)

    def matching(self, words: Sequence[str], limit: int, where: str) -> list[Match]:
        """The rows that hold at least one of the words, best first."""
        from lancedb.query import MatchQuery

        with _typed(self.folder):
            query = self._table.search(MatchQuery(" ".join(words), "words"), query_type="fts").limit(limit)
            return _matches(query.where(where) if where else query, "_score", float)


def table_name(encoder: str) -> str:
    """What the table of an encoder of caption vectors is called, and its files begin with."""
    return f"captions_{hashlib.blake2b(encoder.encode(), digest_size=8).hexdigest()}"


def manifest_file(encoder: str) -> str:
    """Where its manifest lies, relative to the store."""
    return f"{FOLDER}/{table_name(encoder)}.manifest"


def new_folder(encoder: str) -> str:
    """A folder in captions.lance for a table that is made. No name comes twice: readers know tables by it."""
    return f"{table_name(encoder)}-{secrets.token_hex(8)}.lance"


def _connect(store_path: Path) -> Any:
    os.environ.setdefault("LANCE_LOG", "error")  # read once, when the library is loaded
    try:
        import lancedb
    except ImportError:
        raise MissingDependency("the caption table needs LanceDB: pip install lancedb pyarrow") from None
    with _typed(""):
        return lancedb.connect(str(store_path / FOLDER))


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
            "start_ns": pa.array([entry.start_ns for entry in entries], pa.int64()),
            "end_ns": pa.array([entry.end_ns for entry in entries], pa.int64()),
            "words": pa.array([entry.words for entry in entries], pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            "directed": pa.array(directed),
        }
    )


def _matches(query: Any, column: str, score_of: Callable[[float], float]) -> list[Match]:
    rows = query.select(["recording_id", "unit", column]).to_arrow().to_pylist()
    found = [Match(row["recording_id"], row["unit"], score_of(row[column])) for row in rows]
    return sorted(found, key=lambda match: -match.score)


@contextmanager
def _typed(folder: str) -> Iterator[None]:
    """Whatever LanceDB raises comes out as CorruptionError, or as OSError where the disk is full.

    It has one type of error for every trouble; a full disk can be told by the words only.
    """
    file = f"{FOLDER}/{folder}".rstrip("/")
    try:
        yield
    except (CorruptionError, MissingDependency):
        raise
    except Exception as error:
        number = no_space(error)
        if number:
            raise OSError(number, os.strerror(number), file) from error
        raise CorruptionError(f"{file} cannot be used: {_one_line(error)}", file=file) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a panic in Rust becomes; it is no Exception
            raise
        raise CorruptionError(f"{file} is damaged: {_one_line(error)}", file=file) from error


def no_space(error: BaseException) -> int:
    """The number of the system's error where the trouble is want of space, else 0."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return error.errno
    text = str(error)
    return next(
        (number for number in _NO_SPACE if f"os error {number})" in text or os.strerror(number) in text), 0
    )


def _one_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
