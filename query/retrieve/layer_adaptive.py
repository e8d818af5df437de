"""Blocks in two passes: as many to each layer as its scores ask for (StreamKV, arXiv 2511.07278, stage 7).

In the first pass every layer brings back r blocks, and says how it scores all that it holds. SelectKV shares L * r
blocks out among the layers: few to one whose scores stand out, many to one that is undecided. In the second pass the
question is read again, and each layer brings back its own number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from memdb.index.exact import Sim
from memdb.index.key_search import KeySearch
from memdb.query.retrieve.beside import TakesCaptions
from memdb.query.retrieve.topk import Rows
from memdb.retain.select_kv import MODES, exact_counts
from memdb.retain.select_kv_code import RETRIEVE_MAX, code_retrieve_counts
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerAdaptive(TakesCaptions):
    """`blocks`: r, blocks a layer on average, at most 128 (the most that any layer is given).

    `mode`: how SelectKV counts, see there. `fixed` and `paper` score by cosine and give out exactly L * r; `code`
    scores by dot product and may miss the total. `band`: every layer gets r (1 - band) to r (1 + band) blocks, at
    least one (its script: 0.5; the paper names none). `local_blocks`: of a layer's blocks so many are the newest
    ones whatever they score (its script: 8).
    """

    blocks: int = 64
    mode: str = "fixed"
    band: float = 0.5
    local_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("retrieve.blocks", self.blocks, 1)
        at_least("retrieve.band", self.band, 0)
        at_least("retrieve.local_blocks", self.local_blocks, 0)
        if self.blocks > RETRIEVE_MAX:
            raise RecipeError(
                f"retrieve.blocks = {self.blocks}: no layer is given more than {RETRIEVE_MAX}, so give at most that"
            )
        if self.mode not in MODES:
            raise RecipeError(f"retrieve.mode = {self.mode!r}: choose one of {', '.join(MODES)}")

    @property
    def similarity(self) -> Sim:
        return "dot" if self.mode == "code" else "cos"

    @property
    def spread(self) -> float:
        """How many times the average the longest layer may hold."""
        return 1 + self.band

    def scores(
        self,
        search: KeySearch,
        layer: int,
        query: Floats,
        allowed: npt.NDArray[np.bool_],
        scale: float,
    ) -> Floats:
        """How a layer scores every block that it holds among those `allowed` (n,), in time order.

        query (H*D,): its folded mean query. `scale`: see `cosine_scale`; a dot product needs none.
        """
        held = np.flatnonzero(allowed & search.table.holds(layer))
        if not len(held):
            return np.zeros(0, np.float32)
        hits = search.search(layer, query, len(held), rows=allowed)
        found = np.zeros(len(search.table), np.float32)
        found[hits.rows] = hits.scores
        return found[held] * np.float32(scale if self.similarity == "cos" else 1)

    def counts(self, scores: Sequence[Floats], blocks: int) -> list[int]:
        """Blocks a layer from its scores (held,), `blocks` on average; 0 for one that holds none."""
        there = [layer for layer, own in enumerate(scores) if len(own)]
        rows = [torch.from_numpy(scores[layer]) for layer in there]
        counts = [0] * len(scores)
        if not rows:
            return counts
        if self.mode == "code":
            found = code_retrieve_counts(rows, blocks, self.band)
        else:
            low = max(1, math.ceil(round(blocks * (1 - self.band), 9)))
            high = min(RETRIEVE_MAX, math.floor(round(blocks * (1 + self.band), 9)))
            total, fixed = blocks * len(rows), self.mode == "fixed"
            found = exact_counts(rows, total, z_scores=fixed, low=low, high=high)
        for layer, count in zip(there, found, strict=True):
            counts[layer] = count
        return counts

    def select(
        self, search: KeySearch, layer: int, query: Floats, allowed: npt.NDArray[np.bool_], blocks: int
    ) -> Rows:
        """Rows of the key table, ascending (time order), `blocks` of those in `allowed` (n,) or all where fewer.

        The newest `local_blocks` of them are always among these, the others are the best of what is older.
        """
        held = np.flatnonzero(allowed & search.table.holds(layer))
        if len(held) <= blocks:
            return held
        local = min(self.local_blocks, blocks)
        older, newest = held[: len(held) - local], held[len(held) - local :]
        if blocks == local:
            return newest
        mask = np.zeros(len(search.table), bool)
        mask[older] = True
        best = search.search(layer, query, blocks - local, rows=mask).rows
        return np.concatenate((np.sort(best), newest))


def cosine_scale(q: torch.Tensor, query: Floats) -> float:
    """From a cosine with the folded query (H*D,) to one of whole vectors (Hq*D,), every key repeated over its group.

    q (Hq, T, D): the queries that were folded. Within a layer the two rank alike; between layers they do not.
    """
    group = q.shape[0] * q.shape[2] // len(query)
    length = float(q.float().mean(1).norm()) * math.sqrt(group)
    return float(np.linalg.norm(query)) / max(length, 1e-12)
