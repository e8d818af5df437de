"""Captions by maximal marginal relevance (Carbonell and Goldstein 1998, as rLiVS uses it, arXiv 2510.17364)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from memdb.fusion import RANK_CONSTANT
from memdb.query.retrieve.beside import TakesCaptions

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CaptionMMR(TakesCaptions):
    """Captions alone."""

    caption_tokens: int = field(default=10_000, kw_only=True)


def mmr_order(
    vectors: Floats, query: Floats, relevance: float, relevant: Floats | None = None
) -> Iterator[tuple[int, float]]:
    """Rows of `vectors` (n, E) in MMR order, each with its cosine to `query` (E,); ties go to the lower row.

    score = relevance * cos(q, c) - (1 - relevance) * max cos(c, chosen); the maximum is 0 before the first pick,
    so that one is the most relevant. `relevant` (n,): what counts in place of cos(q, c). The maxima are kept and
    updated by one product a pick: O(n * picks).
    """
    unit = _directions(vectors)
    cosine = unit @ _directions(query)
    wanted = cosine if relevant is None else relevant
    nearest: Floats | None = None
    left = np.ones(len(vectors), bool)
    for _ in range(len(vectors)):
        score = relevance * wanted if nearest is None else relevance * wanted - (1 - relevance) * nearest
        pick = int(np.argmax(np.where(left, score, -np.inf)))
        left[pick] = False
        yield pick, float(cosine[pick])
        likeness = unit @ unit[pick]
        nearest = likeness if nearest is None else np.maximum(nearest, likeness)


def joined_relevance(vectors: Floats, query: Floats, matches: npt.NDArray[np.float64]) -> Floats:
    """(n,) relevance by meaning and by words: the mean of two reciprocal ranks, 1 for what is first by both.

    By meaning: cosine of `vectors` (n, E) with `query` (E,). By words: `matches` (n,), BM25, of which 0 is no match
    and has no rank. Equals share a rank, cosines to six digits, since the same caption twice need not have the same one
    to the last bit. A rank of r counts (k + 1) / (k + r), as fusion of lists does.
    """
    cosine = np.round(_directions(vectors) @ _directions(query), 6)
    by_words = np.where(matches > 0, _reciprocal(matches), 0)
    return ((_reciprocal(cosine) + by_words) / 2).astype(np.float32)


def _reciprocal(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(n,): (k + 1) / (k + rank), where a rank is one more than how many score higher."""
    higher = len(scores) - np.searchsorted(np.sort(scores), scores, side="right")
    return np.asarray((RANK_CONSTANT + 1) / (RANK_CONSTANT + 1 + higher))


def _directions(x: Floats) -> Floats:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12), np.float32)


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
