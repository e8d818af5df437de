"""The memory of a recording as a question may use it: of its moment, inside its span, without what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memdb.memory import remembered
from memdb.query.retrieve.all import ActivateAll, Activated, newest_frames, whole
from memdb.query.scope import Opened
from memdb.schemas.plan import MemorySize
from memdb.store import Store


@dataclass(frozen=True, eq=False)
class Memory:
    """What one recording's layers hold, and what could not be told. Layers may hold different tokens and counts."""

    layers: Sequence[Activated]
    bad: tuple[str, ...] = ()

    def size(self, opened: Opened) -> MemorySize:
        """What a read of it takes, before compression."""
        rows = [own.rows for own in self.layers]
        pieces = opened.kv.pieces(range(len(rows)), rows) if rows else None
        return MemorySize(
            blocks=max((len(own.rows) for own in self.layers), default=0),
            tokens=max((len(own.tokens) for own in self.layers), default=0),
            read_bytes=0 if pieces is None else int(pieces.table["raw_bytes"].sum()),
        )


def memory_of(store: Store, opened: Opened, method: ActivateAll) -> Memory:
    found = remembered(store, opened.row, opened.at_ns)
    if found.keep is None:
        return Memory([], found.bad)
    return Memory(method.activate(opened.kv.table.blocks, opened.blocks, found.keep), found.bad)


def newest_of(store: Store, opened: Opened, layers: int, blocks: int) -> Memory:
    """The newest frames whole, in every layer: mode `recent`."""
    table = opened.kv.table.blocks
    rows = newest_frames(table, opened.blocks, blocks)
    stands = {
        number: store.unit(opened.row.id, number).blocks["position"]
        for number in np.unique(table["unit"][rows]).tolist()
    }
    starts = [int(stands[int(row["unit"])][int(row["block"])]) for row in table[rows]]
    return Memory([whole(rows, table, starts)] * layers)
