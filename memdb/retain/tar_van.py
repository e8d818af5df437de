"""Temporal redundancy of keys and norms of values (InfiniPot-V, arXiv 2506.15745, NeurIPS 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.retain.base import Bounded, best_first
from memdb.retain.view import LayerView, rows
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import LARGEST, at_least, share, share_or_none

KERNELS = (7, 5, 3, 1)  # sides of the pooling, from flat maps to spiky ones
STEP = 2.0**-16  # of TaR scores: rounding noise of equal content must not decide between tokens


@dataclass(frozen=True)
class TarVan(Bounded):
    """Half of the budget goes to what changed at its place, half to what carries much.

    TaR: a past token whose key resembles the key of the same patch in the newest frames says nothing new; its score
    is the negative mean cosine. VaN: the norm of a token's value, averaged over its neighbours with a window that
    is wide where the layer's norms are alike.

    `tar`: alpha, the share of the budget for TaR; the newest frames count into it (released code: 0.5). `recent`: the
    newest frames as a share of the memory before it is thinned (released code: 0.25), kept whole, and never more than
    TaR's share. `pooling`: three rising limits of the coefficient of variation of a layer's norms, below which the
    window is 7, 5 or 3; ours, since no source gives them; "none" switches pooling off. `exempt`: tokens that stand for
    no single patch have no such redundancy; the last of them stay, up to this share of the budget (ours), of a frame
    that does not fit whole its last tokens; the others compete by their norms. `budget_frames`: the budget in whole
    frames, as the released code has it, where `budget_tokens` is not named; 0 for none. It becomes tokens when the
    recipe meets the frames of a model, of as many tokens as the reducer leaves them.

    Differs from the released code, which is in `tar_van_code`: the place of a token is its true frame and patch
    in every round, keys are unrotated (rotation alone spreads the scores of a static film over 0.4), the set is one
    for all KV heads (scores are averaged over them), averages are over the neighbours that are there, and of equal
    scores the newest frame wins, in it the lowest patch. Scores count in steps of 2^-16. It thins the memory after
    every block; the released code knows where the film ends, and leaves its last block whole.
    """

    tar: float = 0.5
    recent: float = 0.25
    pooling: str = "0.2,0.4,0.6"
    exempt: float = 0.25
    budget_frames: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        share("retain.tar", self.tar)
        at_least("retain.tar", self.tar, 1 / LARGEST)  # a budget is divided by it
        share("retain.recent", self.recent)
        share_or_none("retain.exempt", self.exempt)
        at_least("retain.budget_frames", self.budget_frames, 0)
        self.limits()

    @property
    def tar_tokens(self) -> int:
        return self.budget_tokens - round((1 - self.tar) * self.budget_tokens)

    def limits(self) -> list[float]:
        """The limits of the coefficient of variation; none where nothing is pooled."""
        if self.pooling == "none":
            return []
        try:
            found = [float(part) for part in self.pooling.split(",")]
        except ValueError:
            found = []
        if len(found) != len(KERNELS) - 1 or not all(map(math.isfinite, found)) or found != sorted(found):
            raise RecipeError(
                f"retain.pooling = {self.pooling!r}: give three rising numbers such as '0.2,0.4,0.6', or 'none'"
            )
        return found

    def tokens_min(self, frame_tokens: int) -> int:
        """One whole recent frame fits into TaR's share."""
        return math.ceil(frame_tokens / self.tar)

    def recent_frames(self, tokens: int, frame_tokens: int) -> int:
        """How many of the newest frames stay whole when `tokens` are in the memory; one at least."""
        return max(1, min(int(self.recent * tokens / frame_tokens), self.tar_tokens // frame_tokens))

    def order(self, view: LayerView) -> Tensor:
        assert not self.budget_frames, "it becomes tokens when the recipe meets a model"
        frame_tokens = view.frame_tokens
        if self.budget_tokens < self.tokens_min(frame_tokens):
            raise RecipeError(
                f"retain.budget_tokens = {self.budget_tokens} holds no recent frame of {frame_tokens} tokens: "
                f"give at least {self.tokens_min(frame_tokens)}"
            )
        frames = self.recent_frames(view.tokens, frame_tokens)
        merged, age = view.merged, frame_age(view)
        recent = ~merged & (age < frames)  # (..., T)
        redundancy = tar_scores(view, age, frames)
        norms = van_scores(view, age, self.limits())

        # The recent ones are the first of TaR's share.
        changed = best_first(redundancy, view.frame, torch.where(recent, 0, torch.where(merged, 2, 1)))
        taken = _marked(changed[..., : self.tar_tokens], view.tokens)
        behind = merged.sum(-1, keepdim=True) - merged.cumsum(-1)  # merged ones that are newer
        spared = merged & (behind < int(self.exempt * self.budget_tokens))

        # Recent, exempt (the newest first), changed, then whatever has the largest norm.
        tier = torch.where(
            merged, torch.where(spared, 1, 3), torch.where(recent, 0, torch.where(taken, 2, 3))
        )
        score = torch.where(tier == 2, redundancy, torch.where(tier == 3, norms, 0.0))
        return best_first(score, view.frame, tier)


def frame_age(view: LayerView) -> Tensor:
    """(..., T) how many distinct frames are newer than a token's, of those with whole patches; merged ones last."""
    frame = view.frame.masked_fill(view.merged, -1)
    newest, order = torch.sort(frame, dim=-1, descending=True, stable=True)
    steps = F.pad((newest[..., 1:] != newest[..., :-1]).long(), (1, 0)).cumsum(-1)  # (..., T)
    return torch.empty_like(steps).scatter_(-1, order, steps)


def patch_number(view: LayerView) -> Tensor:
    """(..., T) raster numbers of the patches; 0 for merged ones, who have none."""
    return (view.patch[..., 0] * view.grid[1] + view.patch[..., 1]).masked_fill(view.merged, 0)


def tar_scores(view: LayerView, age: Tensor, frames: int) -> Tensor:
    """(..., T) -mean cosine of each key with those of its patch in the newest `frames`, in steps of 2^-16.

    The mean of cosines is one product with the mean of unit keys, gathered once a patch: O(H T D). Infinity where
    no recent frame has the patch: there is nothing that it could repeat. `age` (..., T) of frame_age.
    """
    *lead, T = view.position.shape
    P = view.grid[0] * view.grid[1]
    patch = patch_number(view)

    # Which token stands at (recent frame, patch); the last slot takes everything else.
    slot = torch.where(~view.merged & (age < frames), age * P + patch, frames * P)
    table = torch.full((*lead, frames * P + 1), -1, device=age.device)
    table = table.scatter_(-1, slot, torch.arange(T, device=age.device).expand_as(slot))[..., :-1]
    there, at = table >= 0, table.clamp(min=0)
    length = lengths(view.k).clamp(min=1e-12)  # (..., H, T)
    # By an infinite length what is not there becomes nothing.
    long = rows(length[..., None], at).masked_fill(~there[..., None, :, None], math.inf)
    recent = (rows(view.k, at) / long).transpose(-3, -2)  # (..., F*P, H, D)
    count = there.view(*lead, frames, P, 1, 1).sum(-4)  # (..., P, 1, 1)
    recent = recent.view(*lead, frames, P, *recent.shape[-2:])
    mean = (recent.sum(-4) / count.clamp(min=1)).transpose(-3, -2)  # (..., H, P, D)
    likeness = rows(mean, patch).mul_(view.k).sum(-1) / length  # (..., H, T)
    score = (-likeness.mean(-2) / STEP).round() * STEP
    return score.masked_fill(count[..., 0, 0].gather(-1, patch) == 0, math.inf)


def lengths(x: Tensor) -> Tensor:
    """x (..., D) -> (...) L2 norms, accumulated in fp32 without a copy of x in fp32."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norms


def van_scores(view: LayerView, age: Tensor, limits: list[float]) -> Tensor:
    """(..., T) norms of the values, mean over KV heads, pooled as each layer's variation wants it."""
    norms = lengths(view.v).mean(-2)  # (..., T)
    if not limits:
        return norms
    return pooled(norms, view, age, pool_sides(norms, ~view.merged, limits)[..., None])


def pool_sides(norms: Tensor, whole: Tensor, limits: list[float]) -> Tensor:
    """(...) the side of the pooling window of each layer: wide where norms (..., T) vary little against their mean.

    Over the tokens that are `whole` (..., T). Where there are none nothing is pooled.
    """
    count = whole.sum(-1).clamp(min=1)
    mean = (norms * whole).sum(-1) / count
    variance = ((norms - mean[..., None]).square() * whole).sum(-1) / count
    variation = variance.sqrt() / mean.clamp(min=1e-12)  # (...)
    side = torch.full(variation.shape, KERNELS[0], device=norms.device)
    for limit, kernel in zip(limits, KERNELS[1:], strict=True):  # limits rise
        side = side.masked_fill(variation >= limit, kernel)
    return side


def pooled(norms: Tensor, view: LayerView, age: Tensor, side: int | Tensor) -> Tensor:
    """(..., T) mean over the neighbours of the same frame that are there, `side` patches wide and high.

    A merged token has no neighbours and keeps its own norm. side: one of `KERNELS`, or a layer each (..., 1). All are
    computed, whichever are wanted: to ask a GPU takes longer.
    """
    height, width = view.grid
    *lead, T = norms.shape
    side = torch.as_tensor(side, device=norms.device)
    frames = int(age.max()) + 1 if view.frames is None else view.frames
    slot = torch.where(view.merged, frames * height * width, age * (height * width) + patch_number(view))

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(*lead, frames * height * width + 1).scatter_(-1, slot, values)[..., :-1]

    maps = torch.stack((spread(norms), spread(torch.ones_like(norms))))  # (2, ..., F*h*w)
    found = maps
    for kernel in KERNELS[:-1]:
        sums = F.avg_pool2d(
            maps.reshape(-1, 1, height, width), kernel, stride=1, padding=kernel // 2, divisor_override=1
        )
        found = torch.where(side == kernel, sums.view(maps.shape), found)
    place = slot.masked_fill(view.merged, 0)
    total, count = found.gather(-1, place.expand(2, *lead, T))
    return torch.where(view.merged | (side == 1), norms, total / count.clamp(min=1))


def _marked(places: Tensor, tokens: int) -> Tensor:
    """(..., T) True at the places (..., n)."""
    mask = torch.zeros(*places.shape[:-1], tokens, dtype=torch.bool, device=places.device)
    return mask.scatter_(-1, places, True)
