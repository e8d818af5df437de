"""What the chat template looks at, and one prototype a frame (StreamMem, arXiv 2508.15717)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memdb.models.transfers import sent
from memdb.models.window import LayerKV
from memdb.retain.base import Bounded, best_first, front
from memdb.retain.prototypes import Prototypes, prototypes
from memdb.retain.view import LayerView
from memdb.schemas.params import share_or_none


@dataclass(frozen=True)
class Template(Bounded):
    """A question will come after the user's turn ends, so the tokens that end it ask first, on its behalf.

    Old memory and new tokens are scored together by the attention of those tokens and compete for the budget; each
    frame also leaves a prototype, the mean of its tokens weighted by that attention. `budget_tokens` is M / L of
    the paper, and holds prototypes too.

    `prototype_share`: prototypes stay without competing up to this share of the budget; beyond it those that the
    template pays least compete like any token (ours: the paper says nothing of their later life). Of equal
    importance the newest frame stays. There is no public code to differ from.
    """

    hears: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    prototype_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        share_or_none("retain.prototype_share", self.prototype_share)

    def order(self, view: LayerView) -> Tensor:
        assert view.importance is not None, "template retention needs the importance of a probe"
        spared = int(self.prototype_share * self.budget_tokens)
        return prune_order(view.importance, view.prototype, view.frame, spared)

    def prototypes_of(
        self, fresh: LayerKV, heard: Sequence[Tensor], frame: Sequence[int], start: int
    ) -> Prototypes:
        paid = torch.stack([own[-len(frame) :] for own in heard])  # (L, C)
        number, position = sent(
            torch.tensor((list(frame), list(range(start, start + len(frame))))), fresh.k.device
        )
        return prototypes(fresh.k, fresh.v, paid, number, position, sorted(set(frame)))


def prune_order(importance: Tensor, prototype: Tensor, frame: Tensor, spared: int) -> Tensor:
    """Indices (..., T), best first: the `spared` best prototypes, then everything by importance.

    importance (..., T), prototype (..., T) bool, frame (..., T) int64.
    """
    order = best_first(importance, frame)
    ours = prototype.gather(-1, order)
    return front(order, ours & (ours.cumsum(-1) <= spared))
