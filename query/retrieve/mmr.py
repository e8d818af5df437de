"""Captions by maximal marginal relevance (Carbonell and Goldstein 1998, as rLiVS uses it, arXiv 2510.17364)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb.schemas.params import at_least, share_or_none

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CaptionMMR:
    """`caption_tokens`: the budget. `relevance`: lambda, the weight of relevance against novelty (paper: 0.5)."""

    caption_tokens: int = 10_000
    relevance: float = 0.5

    def __post_init__(self) -> None:
        at_least("retrieve.caption_tokens", self.caption_tokens, 0)
        share_or_none("retrieve.relevance", self.relevance)


def mmr_order(vectors: Floats, query: Floats, relevance: float) -> Iterator[tuple[int, float]]:
    """Rows of `vectors` (n, E) in MMR order, each with its cosine to `query` (E,); ties go to the lower row.

    score = relevance * cos(q, c) - (1 - relevance) * max cos(c, chosen); the maximum is 0 before the first pick,
    so that one is the most relevant. The maxima are kept and updated by one product a pick: O(n * picks).
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = unit @ (query / max(float(np.linalg.norm(query)), 1e-12))
    nearest: Floats | None = None
    left = np.ones(len(vectors), bool)
    for _ in range(len(vectors)):
        score = relevance * cosine if nearest is None else relevance * cosine - (1 - relevance) * nearest
        pick = int(np.argmax(np.where(left, score, -np.inf)))
        left[pick] = False
        yield pick, float(cosine[pick])
        likeness = unit @ unit[pick]
        nearest = likeness if nearest is None else np.maximum(nearest, likeness)


def within_budget(
    order: Iterator[tuple[int, float]], tokens: Sequence[int], budget: int
) -> list[tuple[int, float]]:
    """Picks until the next would bring the sum of tokens to the budget; all of them where all fit into it.

    It stops at the first that does not fit and does not go on behind it, as the paper does.
    """
    if sum(tokens) <= budget:
        return list(order)
    picks, used = [], 0
    for row, score in order:
        if used + tokens[row] >= budget:
            break
        used += tokens[row]
        picks.append((row, score))
    return picks
