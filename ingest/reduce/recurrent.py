"""Recurrent tokens: what past clips' captions looked at, carried into the next clip (rLiVS, arXiv 2510.17364).

While a caption is decoded, the attention of its rows over the clip's visual tokens is averaged over heads, a few
layers and rows; the top share of the clip's tokens is kept in a queue of the last clips. The kept tokens are
projector outputs, i.e. inputs of the language model, not KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from memdb.ingest.reduce.base import Reducer
from memdb.models.cache import AttentionProbe
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least, share


@dataclass(frozen=True)
class Recurrent(Reducer):
    """`clips`: length of the queue. `share`: of a clip's tokens that is kept, 196 of 3,136 in the paper.

    `layers`: the layers whose attention counts, as relative depths, so that they carry over to other models;
    the paper's 4, 8, 13 and 19 of 28 by default.
    """

    clips: int = 16
    share: float = 0.0625
    layers: str = "4/28,8/28,13/28,19/28"

    def __post_init__(self) -> None:
        at_least("clips", self.clips, 0)
        share("share", self.share)
        self.layer_indices(28)

    def layer_indices(self, L: int) -> list[int]:
        """The layers of a model of `L` layers, ascending, each once."""
        try:
            depths = [Fraction(part) for part in self.layers.split(",")]
        except (ValueError, ZeroDivisionError):
            depths = []
        if not depths or not all(0 <= depth < 1 for depth in depths):
            raise RecipeError(f"layers = {self.layers!r}: give relative depths below 1, such as '4/28,8/28'")
        return sorted({int(depth * L) for depth in depths})

    def probe(self, L: int, start: int, stop: int) -> AttentionProbe:
        """Listens to the attention on the clip's tokens, which stand at the places [start, stop)."""
        return AttentionProbe(self.layer_indices(L), start, stop)

    def select(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """The tokens (T, E) that got the most attention (T,), in their original order: (k, E).

        Equal attention: the earlier token wins.
        """
        count = min(len(tokens), max(1, round(self.share * len(tokens))))
        order = torch.sort(attention, descending=True, stable=True).indices[:count]
        return tokens[order.sort().values]

    def remember(self, queue: Sequence[Tensor], chosen: Tensor) -> list[Tensor]:
        """The queue with the newest clip's tokens, the oldest dropped."""
        return [*queue, chosen][-self.clips :] if self.clips else []
