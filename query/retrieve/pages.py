"""Pages of a long-term memory beside the whole short-term one (LiveVLM's PaR, version 2 of arXiv 2505.15269).

Layer by layer the question's own mean query is compared with the mean unrotated key of every 16 neighbouring
survivors; the best 40 % of the pages are read on, with everything that is newer than the long-term pool.

The index is made when a question comes, from what is stored of the keep set of its moment: pages are cut anew with
every commit, and kept with each they would be 22 MB of a 7B (768 pages in 28 layers). What it costs: a question reads
every block of which something is remembered, as `all` does, where page keys at hand would spare up to 60 % of that, and
passes once over the keys. A block is read whole, under its checksum, until a policy with keep = "memory" has gathered
what is left of it; then the read is the memory itself. The context is the smaller one in both.

A codec that rounds would make keys of rounded tokens, so a recipe takes only those that do not (R12). Ageing may narrow
the codec of old units all the same: then page keys are of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.query.retrieve.beside import TakesCaptions
from memdb.retain.pages import Pages, page_keys, page_places
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class MemoryPages(Pages, TakesCaptions):
    """`blocks`: the newest frames that mode `recent` takes."""

    blocks: int = 64

    def __post_init__(self) -> None:
        Pages.__post_init__(self)
        TakesCaptions.__post_init__(self)
        at_least("retrieve.blocks", self.blocks, 1)

    def pick(self, q: Tensor, k: Tensor, long: int) -> Tensor:
        """Places (picked,), ascending, of the tokens of one layer that the question reads on.

        q (Hq, r, D): the question's queries. k (H, T, D): the layer's keys in order of position, of which the first
        `long` are long-term. Both unrotated.
        """
        pages = self.choose(q, page_keys(k[:, :long], self.page_tokens))
        short = torch.arange(long, k.shape[1], device=k.device)
        return torch.cat((page_places(pages, long, self.page_tokens), short))

    def tokens_max(self, long: int, short: int) -> int:
        """How many tokens `pick` may give of so many in each pool."""
        return min(long, self.count(-(-long // self.page_tokens)) * self.page_tokens) + short
