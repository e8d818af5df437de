"""Frames by their likeness to the question in a space of both (ReKV, arXiv 2503.00540, stage 7, external).

One list of frames serves all layers, where internal retrieval (see topk) lets each layer ask with its own queries. So
no layer has a budget of its own either (rule R14), and a frame that a layer does not hold is left out of that layer.
The order is that of cosines; ReKV divides them by a temperature, which changes no order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb.query.retrieve.beside import TakesCaptions
from memdb.query.retrieve.topk import Rows, in_runs
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class External(TakesCaptions):
    """`blocks`: r, blocks in every layer. `group`: as in BlockTopK."""

    blocks: int = 64
    group: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("retrieve.blocks", self.blocks, 1)
        at_least("retrieve.group", self.group, 1)
        if self.blocks % self.group:
            raise RecipeError(
                f"retrieve.blocks = {self.blocks} is no multiple of retrieve.group = {self.group}"
            )

    def select(self, vectors: Floats, query: Floats, allowed: npt.NDArray[np.bool_], blocks: int) -> Rows:
        """Rows of `vectors` (n, E), ascending, at most `blocks` of those in `allowed` (n,); of equals the earlier.

        query (E,). All rows are taken where they are no more than asked.
        """
        candidates = np.flatnonzero(allowed)
        if len(candidates) <= blocks:
            return candidates
        own = vectors[candidates].astype(np.float64)
        lengths = np.maximum(np.linalg.norm(own, axis=1) * np.linalg.norm(query.astype(np.float64)), 1e-12)
        cosines = (own @ query.astype(np.float64) / lengths).astype(np.float32)
        if self.group > 1:
            return in_runs(cosines, candidates, self.group, blocks)
        return np.sort(candidates[np.argsort(-cosines, kind="stable")[:blocks]])
