"""Activate all: the memory as it was after a commit is the context (InfiniPot-V 2506.15745, StreamMem 2508.15717).

Nothing is ranked. A keep set says which stored tokens a layer holds and at which positions; here they become rows of
the key table and places within what those rows hold. What was forgotten since, or is outside the span of the
question, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb.query.retrieve.topk import Rows
from memdb.schemas.keep import Ids, KeepSet, block_ids, split_ids, token_ids
from memdb.schemas.params import at_least, share
from memdb.schemas.units import BlockKind, Table


@dataclass(frozen=True, eq=False)
class Activated:
    """What of one layer's memory may be used, block by block."""

    rows: Rows  # (blocks,) of the key table, ascending
    counts: Ids  # (blocks,): tokens of each
    tokens: Ids  # (tokens,): which token of its block each is
    positions: Ids  # (tokens,)

    def of(self, rows: Rows) -> Activated:
        """Those of some of its rows alone."""
        there = np.isin(self.rows, rows)
        mine = np.repeat(there, self.counts)
        return Activated(self.rows[there], self.counts[there], self.tokens[mine], self.positions[mine])

    def in_order(self, block_tokens: Ids) -> tuple[Ids, Ids]:
        """Places and positions, both (tokens,), in the order of positions, which is the encoder's.

        Places: where the tokens lie once its rows' blocks, of so many tokens each, are joined.
        """
        begins = np.cumsum(block_tokens) - block_tokens
        places = np.repeat(begins, self.counts) + self.tokens
        order = np.argsort(self.positions, kind="stable")
        return places[order], self.positions[order]


@dataclass(frozen=True)
class ActivateAll:
    """`blocks`: the newest frames that mode `recent` takes. `caption_tokens` and `relevance`: see CaptionMMR."""

    blocks: int = 64
    caption_tokens: int = 0
    relevance: float = 0.5

    def __post_init__(self) -> None:
        at_least("retrieve.blocks", self.blocks, 1)
        at_least("retrieve.caption_tokens", self.caption_tokens, 0)
        share("retrieve.relevance", self.relevance)

    def activate(self, table: Table, allowed: npt.NDArray[np.bool_], keep: KeepSet) -> list[Activated]:
        """What a keep set names among the rows of the key table in `allowed` (n,), a layer each."""
        known = block_ids(token_ids(table["unit"].astype(np.int64), table["block"].astype(np.int64), 0))
        return [
            self._layer(known, table["tokens"].astype(np.int64), allowed, ids, positions)
            for ids, positions in zip(keep.ids, keep.positions, strict=True)
        ]

    @staticmethod
    def _layer(known: Ids, sizes: Ids, allowed: npt.NDArray[np.bool_], ids: Ids, at: Ids) -> Activated:
        if not len(known):
            ids, at = ids[:0], at[:0]
        row = np.minimum(np.searchsorted(known, block_ids(ids)), max(0, len(known) - 1))
        tokens = split_ids(ids)[2]
        usable = (known[row] == block_ids(ids)) & allowed[row] & (tokens < sizes[row])
        rows, counts = np.unique(row[usable], return_counts=True)
        return Activated(rows.astype(np.int64), counts.astype(np.int64), tokens[usable], at[usable])


def newest_frames(table: Table, allowed: npt.NDArray[np.bool_], blocks: int) -> Rows:
    """The rows of the newest frames, of whatever the memory kept of them: for mode `recent`."""
    return np.flatnonzero(allowed & (table["kind"] == BlockKind.FRAME))[-blocks:]


def whole(rows: Rows, table: Table, starts: Sequence[int]) -> Activated:
    """All tokens of some rows; `starts`: the position of each row's first token."""
    counts = table["tokens"][rows].astype(np.int64)
    tokens = np.concatenate([np.zeros(0, np.int64), *(np.arange(count) for count in counts)])
    return Activated(rows, counts, tokens, np.repeat(np.asarray(starts, np.int64), counts) + tokens)
