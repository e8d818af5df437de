"""Blocks by per-layer top-k with the question's own queries (ReKV, arXiv 2503.00540, stage 7, internal)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from memdb.index.exact import Sim
from memdb.index.key_search import KeySearch
from memdb.query.retrieve.beside import TakesCaptions
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockTopK(TakesCaptions):
    """`blocks`: r, blocks a layer. `group`: runs of this many neighbours are ranked and taken together, or of fewer
    where a budget leaves no room for that many.

    `sim`: dot as in the released code, cos as in the paper.

    `newest_now`: a question of kind `now` reads the newest blocks and captions, whatever resembles it. Ours: no paper
    asks about this moment, and keys cannot tell which of the frames that fit a question is the last one.
    """

    blocks: int = 64
    group: int = 1
    sim: str = "dot"
    newest_now: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("retrieve.blocks", self.blocks, 1)
        at_least("retrieve.group", self.group, 1)
        if self.sim not in ("dot", "cos"):
            raise RecipeError(f"retrieve.sim = {self.sim!r}: choose dot or cos")
        if self.blocks % self.group:
            raise RecipeError(
                f"retrieve.blocks = {self.blocks} is no multiple of retrieve.group = {self.group}"
            )

    @property
    def similarity(self) -> Sim:
        return cast(Sim, self.sim)

    def select(
        self,
        search: KeySearch,
        layer: int,
        query: npt.NDArray[np.float32],
        allowed: npt.NDArray[np.bool_],
        blocks: int,
    ) -> Rows:
        """Rows of the key table, ascending (time order), at most `blocks` of the rows in `allowed` (n,).

        query (H*D,): the folded mean query of this layer. All rows are taken where they are no more than asked.
        """
        candidates = np.flatnonzero(allowed & search.table.holds(layer))
        if len(candidates) <= blocks:
            return candidates
        if self.group == 1:
            return np.sort(search.search(layer, query, blocks, rows=allowed).rows)
        hits = search.search(layer, query, len(candidates), rows=allowed)
        scores = np.full(len(search.table), np.nan, np.float32)
        scores[hits.rows] = hits.scores
        return in_runs(scores[candidates], candidates, self.group, blocks)


def in_runs(scores: npt.NDArray[np.float32], rows: Rows, group: int, blocks: int) -> Rows:
    """The best runs of `group` neighbours, never more than `blocks` >= 1 rows: a plan may leave less than a run."""
    group = min(group, blocks)
    return grouped(scores, rows, group, blocks // group)


def grouped(scores: npt.NDArray[np.float32], rows: Rows, group: int, runs: int) -> Rows:
    """The rows of the best `runs` runs of `group` neighbours, by mean score; a shorter tail run counts as one."""
    starts = np.arange(0, len(rows), group)
    means = np.add.reduceat(scores.astype(np.float64), starts) / np.diff(np.append(starts, len(rows)))
    best = np.sort(np.argsort(-means, kind="stable")[:runs])
    taken = (starts[best][:, None] + np.arange(group)).ravel()
    inside: Rows = rows[taken[taken < len(rows)]]
    return inside


def newest(search: KeySearch, layer: int, allowed: npt.NDArray[np.bool_], blocks: int) -> Rows:
    """The last `blocks` rows that the layer holds: mode `recent`, and the control that memory must beat."""
    return np.flatnonzero(allowed & search.table.holds(layer))[-blocks:]
