"""Groups by per-layer cosine, as many as fit into a budget of tokens (StreamingTOM, arXiv 2510.18269, stage 7).

The query is the mean of the question's unrotated queries, folded over the heads that share a key head. The paper folds
by mean, we by sum as everywhere: of a cosine that makes no difference. Only groups that are chosen are dequantised.

Where it differs: the released code rotates its keys a second time in the pass that retrieves; ours stand where they
stand when the question is answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from memdb.index.exact import Sim
from memdb.index.key_search import KeySearch
from memdb.query.retrieve.beside import TakesCaptions
from memdb.query.retrieve.topk import Rows
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class GroupTopK(TakesCaptions):
    """`budget_tokens`: k is the number of groups that it takes to hold so many tokens."""

    similarity: ClassVar[Sim] = "cos"

    budget_tokens: int = 12_544

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("retrieve.budget_tokens", self.budget_tokens, 1)

    def groups(self, group_tokens: int) -> int:
        """k for groups of so many tokens: 251 for 12,544 and 50."""
        return -(-self.budget_tokens // max(1, group_tokens))

    def select(
        self,
        search: KeySearch,
        layer: int,
        query: npt.NDArray[np.float32],
        allowed: npt.NDArray[np.bool_],
        blocks: int,
    ) -> Rows:
        """Rows of the key table, ascending and each once, `blocks` of the rows in `allowed` (n,); all where fewer.

        query (H*D,): the folded mean query of this layer.
        """
        candidates = np.flatnonzero(allowed & search.table.holds(layer))
        if len(candidates) <= blocks:
            return candidates
        return np.sort(search.search(layer, query, blocks, rows=allowed).rows)
