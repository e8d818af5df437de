"""Search in the representative keys of a recording, layer by layer; the indexes stay for the next."""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from memdb.index import KEY_INDEXES
from memdb.index.exact import Allowed, KeyIndex, Keys, Sim
from memdb.index.key_table import KeyTable
from memdb.schemas.errors import UsageError
from memdb.schemas.search import KeyHits

INDEX_BYTES_MAX = 2 << 30


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

    Indexes of layers that were not asked for lately are dropped once all take more than `bytes_max`.
    """

    def __init__(
        self, table: KeyTable, *, backend: str = "faiss", sim: Sim = "dot", bytes_max: int = INDEX_BYTES_MAX
    ) -> None:
        self.table = table
        self._backend = backend_named(backend)
        self._sim: Sim = sim
        self._bytes_max = bytes_max
        self._indexes: OrderedDict[int, KeyIndex] = OrderedDict()
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
        given.
        """
        index = self._index(layer)
        allowed = self.table.holds(
            layer
        )  # asked for after the keys were read, which may have found some damaged
        if start_ns is not None or end_ns is not None:
            allowed = allowed & self.table.span(start_ns, end_ns)
        if rows is not None:
            allowed = allowed & rows
        return index.search(query, k, allowed)

    def _index(self, layer: int) -> KeyIndex:
        if self._generation != self.table.generation:  # other rows: see KeyTable
            self._generation = self.table.generation
            self._indexes.clear()
        index = self._indexes.pop(layer, None)
        if index is None:
            # Layers are asked for in order: while one is indexed, the disk reads the next.
            if layer and layer - 1 in self._indexes and layer + 1 not in self._indexes:
                self.table.prefetch(layer + 1)
            index = self._backend.build(self.table.read_rows(layer), sim=self._sim)
        elif index.count < len(self.table):
            index.extend(self.table.read_rows(layer, index.count))
        self._indexes[layer] = index
        while len(self._indexes) > 1 and self._bytes() > self._bytes_max:
            self._indexes.popitem(last=False)
        return index

    def _bytes(self) -> int:
        return sum(index.count * self.table.key_size * index.value_bytes for index in self._indexes.values())
