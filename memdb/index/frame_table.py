"""The embeddings of a recording's frames, read from its segments as questions ask for them, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memdb.schemas.errors import CorruptionError, StoreError
from memdb.schemas.units import Table

if TYPE_CHECKING:
    from memdb.store import Store


@dataclass(frozen=True, eq=False)
class Embedded:
    """Of every row of a key table: its vector, and whether there is one."""

    vectors: npt.NDArray[np.float32]  # (n, E), zero where there is none
    there: npt.NDArray[np.bool_]  # (n,)
    problems: list[str]


class FrameTable:
    """One part a unit, verified when it is read. It holds nothing of a unit of which everything is forgotten.

    No pages: at a frame every two seconds an hour is 1,800 vectors, 2 MB at E = 512, and they are read once.
    """

    def __init__(self, store: Store, recording_id: str) -> None:
        self._store, self._recording_id = store, recording_id
        self._known: dict[int, npt.NDArray[np.float16]] = {}  # unit -> (blocks, E)

    def of(self, blocks: Table) -> Embedded:
        """The embeddings of the blocks of a key table that have tokens left."""
        wanted = {int(unit) for unit in np.unique(blocks["unit"][blocks["tokens"] > 0])}
        self._known = {number: vectors for number, vectors in self._known.items() if number in wanted}
        problems = self._read(wanted - self._known.keys())
        sizes = {vectors.shape[1] for vectors in self._known.values()}
        if len(sizes) > 1:
            raise StoreError(
                f"embeddings of {sorted(sizes)} numbers stand in one recording: run memdb verify, then ingest it again"
            )
        vectors = np.zeros((len(blocks), max(sizes, default=0)), np.float32)
        there = np.zeros(len(blocks), bool)
        for at, (unit, block) in enumerate(
            zip(blocks["unit"].tolist(), blocks["block"].tolist(), strict=True)
        ):
            own = self._known.get(unit)
            if own is not None and block < len(own):
                vectors[at], there[at] = own[block], True
        return Embedded(vectors, there & (blocks["tokens"] > 0), problems)

    def _read(self, missing: set[int]) -> list[str]:
        problems: list[str] = []
        if not missing:
            return problems
        for row in self._store.units(self._recording_id, first=min(missing)):
            if row.number not in missing:
                continue
            try:
                found = self._store.read_embeddings(row)
            except CorruptionError as error:
                problems.append(str(error))
                continue
            if found is not None:
                self._known[row.number] = found
        return problems
