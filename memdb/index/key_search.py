"""Search in the representative keys of a recording, layer by layer; the indexes stay for the next."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from memdb.index import KEY_INDEXES
from memdb.index.exact import Allowed, KeyIndex, Keys, Sim, best_of
from memdb.index.key_table import KeyTable
from memdb.index.pages import page_name
from memdb.schemas.errors import UsageError
from memdb.schemas.search import KeyHits
from memdb.timely import DEADLINE_S, Patience

INDEX_BYTES_MAX = 2 << 30
STRETCH_BYTES = 16 << 20
STREAM_THREADS = 2  # one reads while the other searches


def search_keys(
    keys: Keys,
    query: npt.NDArray[np.float32],
    k: int,
    *,
    sim: Sim = "dot",
    allowed: Allowed = None,
    backend: str = "exact",
) -> KeyHits:
    """The k keys of (n, d) fp16 that score best for a query (d,), best first; equal scores by row.

    `allowed` is a slice of rows, a mask (n,) or None for all. Every backend of KEY_INDEXES gives the same
    answer.
    """
    return backend_named(backend).build(keys, sim=sim).search(query, k, allowed)


def default_backend() -> str:
    """faiss where it is installed, else the exact search in NumPy, which gives the same rows."""
    return "faiss" if find_spec("faiss") is not None else "exact"


def backend_named(name: str) -> type[KeyIndex]:
    if name not in KEY_INDEXES:
        raise UsageError(f"unknown key index {name!r}: choose one of {', '.join(KEY_INDEXES)}")
    return KEY_INDEXES[name]


class KeySearch:
    """A key table with one index a layer, built when a layer is first asked for and extended as units arrive.

    So many layers stay as `bytes_max` has room for. Questions ask for all of them in turn, so that of more the one
    that was used longest ago would always be the next: the others are read, searched and let go, stretch by stretch,
    at every question.
    """

    def __init__(
        self,
        table: KeyTable,
        *,
        backend: str = "faiss",
        sim: Sim = "dot",
        bytes_max: int = INDEX_BYTES_MAX,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.table = table
        self._backend = backend_named(backend)
        self._sim: Sim = sim
        self._bytes_max = bytes_max
        self._patience = Patience(deadline_s)
        self._indexes: dict[int, KeyIndex] = {}
        self._generation = table.generation

    def search(
        self,
        layer: int,
        query: npt.NDArray[np.float32],
        k: int,
        *,
        start_ns: int | None = None,
        end_ns: int | None = None,
        rows: npt.NDArray[np.bool_] | None = None,
    ) -> KeyHits:
        """The k blocks that `layer` holds and that score best for its query (H*D,): rows of `table.blocks`.

        Only blocks that overlap `[start_ns, end_ns)`, and only those of the mask `rows` (n,) where one is
        given. Raises CorruptionError where the disk does not give the keys in time.
        """
        index = self._index(layer)
        if index is None:
            return self._stream(layer, query, k, self._allowed(layer, start_ns, end_ns, rows))
        # Asked for after the keys were read, which may have found some damaged.
        return index.search(query, k, self._allowed(layer, start_ns, end_ns, rows))

    def _allowed(
        self, layer: int, start_ns: int | None, end_ns: int | None, rows: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.bool_]:
        allowed = self.table.holds(layer)
        if start_ns is not None or end_ns is not None:
            allowed = allowed & self.table.span(start_ns, end_ns)
        return allowed if rows is None else allowed & rows

    def _index(self, layer: int) -> KeyIndex | None:
        """The index of a layer with all rows; None where there is no room for it."""
        if self._generation != self.table.generation:  # other rows: see KeyTable
            self._generation = self.table.generation
            self._indexes.clear()
        index = self._indexes.get(layer)
        missing = len(self.table) - (index.count if index is not None else 0)
        if index is not None and not missing:
            return index
        row_bytes = self.table.key_size * self._backend.value_bytes
        while index is not None and self._bytes() + missing * row_bytes > self._bytes_max:
            self._indexes.popitem()  # the recording outgrew the room: the layer that came last goes
            index = self._indexes.get(layer)
        if index is None:
            missing = len(self.table)
            if self._bytes() + missing * row_bytes > self._bytes_max:
                return None
            # Layers are asked for in order: while one is indexed, the disk reads the next.
            if layer and layer - 1 in self._indexes:
                self.table.prefetch(layer + 1)
            index = self._backend.build(np.zeros((0, self.table.key_size), np.float16), sim=self._sim)
        self._indexes.pop(layer, None)  # whatever is left of it after a failure counts for nothing
        self._indexes[layer] = self._filled(index, layer)
        return index

    def _filled(self, index: KeyIndex, layer: int) -> KeyIndex:
        """The index with the rows that it misses, read straight into its own memory."""
        first, room = index.count, index.room(len(self.table) - index.count)
        for start, end in self.table.stretches(self._stretch_rows()):
            start = max(start, first)
            if start < end:
                self._read(index, layer, start, end, room[start - first : end - first])
        index.take()
        return index

    def _read(self, index: KeyIndex, layer: int, first: int, last: int, out: Keys) -> None:
        """Keys into the room of an index, in time; a read that comes later still finds the index there."""

        def read(index: KeyIndex = index) -> None:
            self.table.read_rows(layer, first, last, out)

        self._patience.wait_for(read, file=page_name(self.table.recording_id, self.table.generation))

    def _stream(
        self, layer: int, query: npt.NDArray[np.float32], k: int, allowed: npt.NDArray[np.bool_]
    ) -> KeyHits:
        """The same without an index that stays: every stretch is read, verified and searched, a few at a time."""

        def best_in(stretch: tuple[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
            first, last = stretch
            lost = self.table.lost_units(layer)
            index = self._backend.build(np.zeros((0, self.table.key_size), np.float16), sim=self._sim)
            self._read(index, layer, first, last, index.room(last - first))
            index.take()
            own = allowed[first:last]
            if self.table.lost_units(layer) != lost:  # the read found damage
                own = own & self.table.holds(layer)[first:last]
            rows, scores = index.best(query, k, own)
            return rows + first, scores

        found = (np.zeros(0, np.int64), np.zeros(0))
        with ThreadPoolExecutor(STREAM_THREADS) as threads:
            for own in threads.map(best_in, self.table.stretches(self._stretch_rows())):
                rows, scores = (np.concatenate(pair) for pair in zip(found, own, strict=True))
                found = best_of(rows, scores, k)
        return KeyHits(found[0], found[1].astype(np.float32))

    def _stretch_rows(self) -> int:
        return max(1, STRETCH_BYTES // max(1, self.table.key_size * self._backend.value_bytes))

    def _bytes(self) -> int:
        return sum(index.count * self.table.key_size * index.value_bytes for index in self._indexes.values())
