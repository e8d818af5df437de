"""What the chat template looks at, and one prototype a frame (StreamMem, arXiv 2508.15717)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from memdb.retain.base import Bounded, best_first, front
from memdb.retain.view import LayerView, sent
from memdb.schemas.params import at_least


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
        at_least("retain.prototype_share", self.prototype_share, 0)
        at_least("1 - retain.prototype_share", 1 - self.prototype_share, 0)

    def order(self, view: LayerView) -> Tensor:
        assert view.importance is not None, "template retention needs the importance of a probe"
        spared = int(self.prototype_share * self.budget_tokens)
        return prune_order(view.importance, view.prototype, view.frame, spared)


def prune_order(importance: Tensor, prototype: Tensor, frame: Tensor, spared: int) -> Tensor:
    """Indices (..., T), best first: the `spared` best prototypes, then everything by importance.

    importance (..., T), prototype (..., T) bool, frame (..., T) int64.
    """
    order = best_first(importance, frame)
    ours = prototype.gather(-1, order)
    return front(order, ours & (ours.cumsum(-1) <= spared))


@dataclass(frozen=True, eq=False)
class Prototypes:
    """One token a frame, unrotated, ascending by frame; to be rotated once, at `position`."""

    k: Tensor  # (..., H, F, D)
    v: Tensor  # (..., H, F, D)
    position: Tensor  # (..., F) int64
    frame: Tensor  # (F,) int64
    mass: Tensor  # (..., F) fp32, the importance that its tokens had together

    def layer(self, number: int) -> Prototypes:
        """Those of one layer, of several."""
        return replace(
            self, k=self.k[number], v=self.v[number], position=self.position[number], mass=self.mass[number]
        )


def prototypes(
    k: Tensor,
    v: Tensor,
    importance: Tensor,
    frame: Tensor,
    position: Tensor,
    numbers: Sequence[int] | None = None,
) -> Prototypes:
    """The prototype of each frame: the mean of its keys and values, weighted by importance.

    k and v (..., H, T, D) of the new tokens, of one layer or of several; keys must be unrotated, because the mean of
    keys rotated to different places is short (0.80 of its length over one frame of equal ones). importance (..., T);
    frame and position (T,). Weights sum to 1 in a frame; a frame that received nothing weighs all its tokens alike.
    A prototype stands at the rounded weighted mean of its tokens' positions, half up (ours). numbers: of the frames,
    ascending, so that a device need not be asked which there are.
    """
    frames = (
        torch.unique(frame) if numbers is None else sent(torch.tensor(numbers), frame.device)
    )  # (F,) ascending
    member = frame == frames[:, None]  # (F, T)
    weight = importance[..., None, :].double() * member  # (..., F, T)
    mass = weight.sum(-1, keepdim=True)  # (..., F, 1)
    alike = member / member.sum(-1, keepdim=True)
    weight = torch.where(mass > 0, weight / mass.clamp(min=1e-300), alike.double())

    def mean(x: Tensor) -> Tensor:  # (..., H, T, D) -> (..., H, F, D), one rounding to x's dtype
        return torch.matmul(weight[..., None, :, :].float(), x.float()).to(x.dtype)

    place = ((weight * position).sum(-1) + 0.5).floor().long()
    return Prototypes(mean(k), mean(v), place, frames, mass[..., 0].float())
