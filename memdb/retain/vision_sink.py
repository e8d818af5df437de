"""Vision sink buckets (LiveVLM, version 2 of arXiv 2505.15269, DAC 2026; version 1 is another method)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memdb.retain.base import Bounded, best_first, front
from memdb.retain.view import LayerView
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least, share_or_none


@dataclass(frozen=True)
class VisionSink(Bounded):
    """Attention has sinks, and a plain top-k crowds around them; buckets along the stream keep the rest of it.

    Tokens are scored by what an observation window of the newest visual tokens pays them. The best R stay wherever
    they stand. The stream is cut into N = M / B stretches of equal length by original position, and the other
    tokens, best first, fill stretches that hold fewer than B.

    With `short_frames` the window is of the short-term pool, and what it pays the long-term one counts here. Its
    softmax is the model's own, over everything that is in view, and not over the long-term tokens alone (ours).

    `budget_tokens`: M. `bucket_tokens`: B (paper: 1). `top`: R as a share of M (ours, 0.5: the paper names a ratio
    and no value). Where the walk ends before M, because old stretches have few tokens left, the best of the
    remaining fill it (ours). Of equal scores the newest frame stays. There is no public code to differ from.
    """

    hears: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    budget_tokens: int = 12_288
    bucket_tokens: int = 1
    top: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("retain.bucket_tokens", self.bucket_tokens, 1)
        share_or_none("retain.top", self.top)
        if self.budget_tokens % self.bucket_tokens:
            raise RecipeError(
                f"retain.budget_tokens = {self.budget_tokens} is no multiple of "
                f"retain.bucket_tokens = {self.bucket_tokens}: stretches would differ in size"
            )

    def order(self, view: LayerView) -> Tensor:
        assert view.importance is not None, "vision sink buckets need the importance of an observation window"
        best = best_first(view.importance, view.frame)
        top = int(self.top * self.budget_tokens)
        return sink_order(
            best, view.position, self.budget_tokens // self.bucket_tokens, self.bucket_tokens, top
        )


def buckets(position: Tensor, count: int) -> Tensor:
    """0-based stretches (..., T) of positions (..., T), of `count` over [0, the last position].

    Counted from 1 as in the paper it is ceil(p * count / P): the 256th of 1,000 is in the third of 10.
    """
    P = position.amax(-1, keepdim=True) + 1
    return ((position + 1) * count + P - 1) // P - 1


def sink_order(best: Tensor, position: Tensor, count: int, capacity: int, top: int) -> Tensor:
    """Indices (..., T) in the order in which they are taken: the top, those that find room, the others.

    best (..., T): indices by falling score. A token finds room iff the top tokens of its stretch and the better ones
    before it are fewer than `capacity`: the walk from token to token, without the walk.
    """
    stretch = buckets(position, count).gather(-1, best)  # (..., T) in order of the score
    crowned, rest = stretch[..., :top], stretch[..., top:]
    held = stretch.new_zeros(*stretch.shape[:-1], count)
    held.scatter_add_(-1, crowned, torch.ones_like(crowned))
    along, by_stretch = torch.sort(rest, dim=-1, stable=True)  # stretch after stretch, the best of each first
    first = torch.searchsorted(along, along)  # where each one's stretch begins
    before = torch.arange(rest.shape[-1], device=best.device) - first
    room = held.gather(-1, along) + before < capacity
    taken = torch.empty_like(room).scatter_(-1, by_stretch, room)  # in order of the score again
    return torch.cat((best[..., :top], front(best[..., top:], taken)), -1)
