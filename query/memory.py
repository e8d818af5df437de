"""The memory of a recording as a question may use it: of its moment, inside its span, without what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memdb.memory import remembered
from memdb.query.retrieve.all import Activated, activate
from memdb.query.scope import Opened
from memdb.schemas.keep import KeepSet, token_ids
from memdb.schemas.plan import MemorySize
from memdb.schemas.units import BlockKind
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
            tokens=max((len(own.places) for own in self.layers), default=0),
            read_bytes=0 if pieces is None else int(pieces.table["raw_bytes"].sum()),
        )


def memory_of(store: Store, opened: Opened) -> Memory:
    """The memory at the watermark, or as of the question's moment."""
    found = remembered(store, opened.row, opened.at_ns)
    if found.keep is None:
        return Memory([], found.bad)
    return Memory(activate(opened.kv.table.blocks, opened.blocks, found.keep, opened.kv.held()), found.bad)


def newest_of(store: Store, opened: Opened, layers: int, blocks: int) -> Memory:
    """The newest frames, of whatever the memory kept of them, in every layer: mode `recent`."""
    table = opened.kv.table.blocks
    rows = np.flatnonzero(opened.blocks & (table["kind"] != BlockKind.PROTOTYPE))[-blocks:]
    ids, positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for unit in np.unique(table["unit"][rows]).tolist():
        stands = store.unit(opened.row.id, unit).blocks["position"]
        for row in table[rows[table["unit"][rows] == unit]]:
            tokens = np.arange(int(row["tokens"]))
            ids.append(token_ids(unit, int(row["block"]), tokens))
            positions.append(int(stands[int(row["block"])]) + tokens)
    newest = KeepSet((np.concatenate(ids),) * layers, (np.concatenate(positions),) * layers)
    return Memory(activate(table, opened.blocks, newest, opened.kv.held()))
