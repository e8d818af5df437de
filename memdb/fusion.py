"""Merging ranked lists by rank alone: reciprocal rank fusion (Cormack, Clarke and Büttcher 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

RANK_CONSTANT = 60


class _Sortable(Protocol):
    def __hash__(self) -> int: ...
    def __lt__(self, other: Self, /) -> bool: ...


Item = TypeVar("Item", bound=_Sortable)


def reciprocal_rank(lists: Sequence[Sequence[Item]], *, k: int = RANK_CONSTANT) -> list[tuple[Item, float]]:
    """Items of all lists, best first, with the sum over lists of 1 / (k + rank), ranks from 1.

    Equal sums are ordered by the items themselves. An item counts once a list, at its best rank.

    >>> [item for item, _ in reciprocal_rank([["a", "b"], ["b", "c"]])]
    ['b', 'a', 'c']
    """
    scores: dict[Item, float] = {}
    for ranked in lists:
        for rank, item in enumerate(dict.fromkeys(ranked), start=1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (k + rank)
    return sorted(scores.items(), key=lambda found: (-found[1], found[0]))
