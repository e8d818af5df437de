"""The memory of a recording as a question may use it: of its moment, inside its span, without what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memdb.memory import remembered
from memdb.models.window import LayerKV
from memdb.query.retrieve.all import Activated, activate
from memdb.query.retrieve.pages import MemoryPages
from memdb.query.retrieve.topk import Rows
from memdb.query.scope import Opened
from memdb.query.session import Session
from memdb.query.stored import Readings, StoredKV
from memdb.retain import RETAINERS
from memdb.retain.base import Bounded
from memdb.retain.pools import short_from
from memdb.schemas.keep import KeepSet, token_ids
from memdb.schemas.params import build
from memdb.schemas.plan import MemorySize
from memdb.schemas.units import BlockKind
from memdb.store import Store


@dataclass(frozen=True, eq=False)
class Memory:
    """What one recording's layers hold, and what could not be told. Layers may hold different tokens and counts.

    `short_from`: the position from which on tokens are of the short-term pool.
    """

    layers: Sequence[Activated]
    bad: tuple[str, ...] = ()
    short_from: int = 0

    def size(self, opened: Opened, pages: MemoryPages | None = None) -> MemorySize:
        """What a question takes of it, before compression: all of it, or pages that its own queries choose."""
        rows = [own.rows for own in self.layers]
        pieces = opened.kv.pieces(range(len(rows)), rows) if rows else None
        tokens = [len(own.positions) for own in self.layers]
        if pages is not None:
            long = [int((own.positions < self.short_from).sum()) for own in self.layers]
            tokens = [pages.tokens_max(old, held - old) for old, held in zip(long, tokens, strict=True)]
        return MemorySize(
            blocks=max((len(own.rows) for own in self.layers), default=0),
            tokens=max(tokens, default=0),
            read_bytes=0 if pieces is None else int(pieces.table["raw_bytes"].sum()),
            chosen=pages is not None,
        )


def memory_of(store: Store, opened: Opened, room: int | None = None) -> Memory:
    """The memory at the watermark, or as of the question's moment: what the last unit that had ended left of it, and
    behind that the frames of the unit that was open then, which nothing had thinned yet. Of these a compaction may have
    left some tokens since, and the oldest go where there is no `room` for that many tokens.
    """
    found, rows = remembered(store, opened.row, opened.at_ns), _rows_of_the_open_unit(store, opened)
    keep, layers = found.keep, opened.row.spec.model.shape.layers
    table, held = opened.kv.table.blocks, opened.kv.held()
    own = [] if keep is None else activate(table, opened.blocks, keep, held)
    if room is not None:
        tokens = table["tokens"][rows].astype(np.int64)
        spare = room - max((len(layer.positions) for layer in own), default=0)
        rows = rows[np.cumsum(tokens[::-1])[::-1] <= spare]
    if len(rows):
        came = _tokens_of(store, opened, rows, layers)
        own = activate(table, opened.blocks, came if keep is None else keep.followed_by(came), held)
    return Memory(own, found.bad, 0 if keep is None else _short_from(store, opened, found.unit))


def _rows_of_the_open_unit(store: Store, opened: Opened) -> Rows:
    """Frames that had come by the question's moment in a unit that ended later; none at the watermark."""
    table = opened.kv.table.blocks
    rows = np.flatnonzero(opened.blocks & (table["kind"] != BlockKind.PROTOTYPE))
    if opened.at_ns is None or not len(rows):
        return rows[:0]
    newest = int(table["unit"][rows].max())
    ended = opened.clipped(store.unit(opened.row.id, newest).end_ns) <= opened.at_ns
    return rows[:0] if ended else rows[table["unit"][rows] == newest]


def _short_from(store: Store, opened: Opened, unit: int) -> int:
    """Where the short-term pool began after a unit: age is counted from the unit's end, whatever was forgotten."""
    retain = build("retain", opened.row.spec.recipe.retain, RETAINERS)
    short_frames = retain.short_frames if isinstance(retain, Bounded) else 0
    blocks, size = store.unit(opened.row.id, unit).blocks, frame_tokens(opened)
    frames = blocks[blocks["kind"] != BlockKind.PROTOTYPE]
    return short_from(int(frames["position"].max()) + size, short_frames, size)


def frame_tokens(opened: Opened) -> int:
    """Of each frame of the stream: all are of the same size."""
    blocks = opened.kv.table.blocks
    return int(blocks["tokens"][blocks["kind"] != BlockKind.PROTOTYPE].max(initial=1))


def read_tokens(
    session: Session, kv: StoredKV, layer: int, own: Activated, readings: Readings
) -> tuple[LayerKV | None, Activated]:
    """Keys and values (H, tokens, D) of one layer's tokens in the order of positions, and what of them was whole."""
    model = session.model
    found, rows = kv.read(layer, own.rows, model.device, model.dtype, readings, own.sizes)
    own = own if rows is own.rows else own.of(rows)
    if found is not None:
        at = torch.from_numpy(own.in_order()[0]).to(found.k.device)
        found = LayerKV(found.k[:, at], found.v[:, at])
    return found, own


def newest_of(store: Store, opened: Opened, layers: int, blocks: int) -> Memory:
    """The newest frames, of whatever the memory kept of them, in every layer: mode `recent`."""
    table = opened.kv.table.blocks
    rows = np.flatnonzero(opened.blocks & (table["kind"] != BlockKind.PROTOTYPE))[-blocks:]
    newest = _tokens_of(store, opened, rows, layers)
    return Memory(activate(table, opened.blocks, newest, opened.kv.held()))


def _tokens_of(store: Store, opened: Opened, rows: Rows, layers: int) -> KeepSet:
    """All tokens of these frames, in every layer, where the encoder saw them."""
    table = opened.kv.table.blocks
    ids, positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for unit in np.unique(table["unit"][rows]).tolist():
        stands = store.unit(opened.row.id, unit).blocks["position"]
        for row in table[rows[table["unit"][rows] == unit]]:
            tokens = np.arange(int(row["tokens"]))
            ids.append(token_ids(unit, int(row["block"]), tokens))
            positions.append(int(stands[int(row["block"])]) + tokens)
    return KeepSet((np.concatenate(ids),) * layers, (np.concatenate(positions),) * layers)
