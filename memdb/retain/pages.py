"""Pages of retained tokens and their keys (LiveVLM's PaR, version 2 of arXiv 2505.15269)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.index.mean_key import fold
from memdb.schemas.params import at_least, share_or_none


@dataclass(frozen=True)
class Pages:
    """A question reads pages of neighbouring survivors instead of all of them.

    `page_tokens`: C, retained tokens a page, in order of position (paper: 16); the last page may be shorter.
    `ratio`: the share of pages that are read (paper: 0.4); 0 reads none, 1 all. The count is rounded up (ours).
    The score of a page is the product of the question's mean query with the mean of the page's unrotated keys,
    heads folded by sum (ours: the paper says "pooled attention score"). Equal scores: the earlier page.
    """

    page_tokens: int = 16
    ratio: float = 0.4

    def __post_init__(self) -> None:
        at_least("retrieve.page_tokens", self.page_tokens, 1)
        share_or_none("retrieve.ratio", self.ratio)

    def choose(self, q: Tensor, keys: Tensor) -> Tensor:
        """Page numbers, ascending. q (Hq, r, D) unrotated queries of a question; keys (pages, H, D)."""
        best = torch.sort(page_scores(q, keys), descending=True, stable=True).indices
        return best[: self.count(len(keys))].sort().values

    def count(self, pages: int) -> int:
        """How many of so many pages are read."""
        return math.ceil(round(self.ratio * pages, 9))  # 0.1 * 30 is a little more than 3


def page_keys(k: Tensor, page_tokens: int) -> Tensor:
    """Unrotated keys k (H, T, D) of retained tokens in order of position -> means (pages, H, D) in fp32.

    Rotated keys of scattered positions would cancel out: 16 equal ones leave about half of their length.
    """
    H, T, D = k.shape
    pages = -(-T // page_tokens)
    padded = torch.nn.functional.pad(k.float(), (0, 0, 0, pages * page_tokens - T))
    sums = padded.view(H, pages, page_tokens, D).sum(2)  # (H, pages, D)
    sizes = torch.full((pages, 1), page_tokens, device=k.device)
    sizes[-1:] -= pages * page_tokens - T
    return (sums / sizes).transpose(0, 1)


def page_scores(q: Tensor, keys: Tensor) -> Tensor:
    """q (Hq, r, D), keys (pages, H, D) -> (pages,) in fp32."""
    return keys.float().flatten(1) @ fold(q, keys.shape[1])


def page_places(pages: Tensor, tokens: int, page_tokens: int) -> Tensor:
    """Indices, ascending, of the tokens on `pages` (ascending), of `tokens` retained ones."""
    places = (pages[:, None] * page_tokens + torch.arange(page_tokens, device=pages.device)).flatten()
    return places[places < tokens]
