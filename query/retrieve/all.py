"""Activate all: the memory as it was after a commit is the context (InfiniPot-V 2506.15745, StreamMem 2508.15717).

Nothing is ranked. A keep set says which stored tokens a layer holds and at which positions; here they become rows of
the key table and places within what is stored of those rows. What was forgotten since, was left out by ageing, or is
outside the span of the question, is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb.query.retrieve.beside import TakesCaptions
from memdb.query.retrieve.topk import Rows
from memdb.schemas.keep import Ids, KeepSet, block_ids, first_ids, split_ids, token_ids
from memdb.schemas.params import at_least
from memdb.schemas.units import Table


@dataclass(frozen=True, eq=False)
class Activated:
    """What of one layer's memory may be used, block by block."""

    rows: Rows  # (blocks,) of the key table, ascending
    sizes: Ids  # (blocks,): tokens that are stored of each
    counts: Ids  # (blocks,): tokens that are used of each
    places: Ids  # (tokens,): the place of each among what is stored of its block
    positions: Ids  # (tokens,)

    def of(self, rows: Rows) -> Activated:
        """Those of some of its rows alone."""
        there = np.isin(self.rows, rows)
        mine = np.repeat(there, self.counts)
        return Activated(
            self.rows[there], self.sizes[there], self.counts[there], self.places[mine], self.positions[mine]
        )

    def rows_in_order(self) -> Rows:
        """The row of each token (tokens,), in the same order as `in_order`."""
        return np.repeat(self.rows, self.counts)[np.argsort(self.positions, kind="stable")]

    def in_order(self) -> tuple[Ids, Ids]:
        """Places and positions, both (tokens,), in the order of positions, which is the encoder's.

        Places: where the tokens lie once what is stored of its rows is joined.
        """
        begins = np.cumsum(self.sizes) - self.sizes
        places = np.repeat(begins, self.counts) + self.places
        order = np.argsort(self.positions, kind="stable")
        return places[order], self.positions[order]


@dataclass(frozen=True)
class ActivateAll(TakesCaptions):
    """`blocks`: the newest frames that mode `recent` takes."""

    blocks: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("retrieve.blocks", self.blocks, 1)


def activate(
    table: Table, allowed: npt.NDArray[np.bool_], keep: KeepSet, held: Mapping[int, KeepSet]
) -> list[Activated]:
    """What a keep set names among the rows of the key table in `allowed` (n,), a layer each.

    held: of units of which some tokens are stored only, which those are.
    """
    known = block_ids(token_ids(table["unit"].astype(np.int64), table["block"].astype(np.int64), 0))
    sizes, gathered = table["tokens"].astype(np.int64), np.array(sorted(held), np.int64)
    found = []
    for layer, (ids, positions) in enumerate(zip(keep.ids, keep.positions, strict=True)):
        if not len(known):
            ids, positions = ids[:0], positions[:0]
        row = np.minimum(np.searchsorted(known, block_ids(ids)), max(0, len(known) - 1))
        usable = (known[row] == block_ids(ids)) & allowed[row] & (split_ids(ids)[2] < sizes[row])
        row, ids, positions = row[usable], ids[usable], positions[usable]
        stored = np.concatenate(
            [np.zeros(0, np.int64), *(held[number].ids[layer] for number in gathered.tolist())]
        )
        there, places, stored_of = _places(ids, sizes[row], gathered, stored)
        rows, first, counts = np.unique(row[there], return_index=True, return_counts=True)
        found.append(
            Activated(
                rows.astype(np.int64),
                stored_of[there][first],
                counts.astype(np.int64),
                places[there],
                positions[there],
            )
        )
    return found


def _places(ids: Ids, sizes: Ids, gathered: Ids, stored: Ids) -> tuple[npt.NDArray[np.bool_], Ids, Ids]:
    """Of each token whether it is stored, its place among what is stored of its block, and how much that is.

    sizes (tokens,): of its whole block. gathered: units of which `stored` (ascending ids) is all that there is.
    """
    units, _, tokens = split_ids(ids)
    thin = np.isin(units, gathered)
    at, (begin, end) = (
        np.searchsorted(stored, ids),
        (np.searchsorted(stored, edge) for edge in first_ids(ids)),
    )
    there = ~thin
    there[at < len(stored)] |= stored[at[at < len(stored)]] == ids[at < len(stored)]
    return there, np.where(thin, at - begin, tokens), np.where(thin, end - begin, sizes)
