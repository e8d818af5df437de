"""Temporal redundancy of keys and norms of values (InfiniPot-V, arXiv 2506.15745, NeurIPS 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.retain.base import Bounded, best_first
from memdb.retain.view import LayerView
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least, share

KERNELS = (7, 5, 3, 1)  # sides of the pooling, from flat maps to spiky ones
STEP = 2.0**-16  # of TaR scores: rounding noise of equal content must not decide between tokens


@dataclass(frozen=True)
class TarVan(Bounded):
    """Half of the budget goes to what changed at its place, half to what carries much.

    TaR: a past token whose key resembles the key of the same patch in the newest frames says nothing new; its score
    is the negative mean cosine. VaN: the norm of a token's value, averaged over its neighbours with a window that
    is wide where the layer's norms are alike.

    `tar`: alpha, the share of the budget for TaR; the newest frames count into it (released code: 0.5). `recent`:
    the newest frames as a share of the memory before it is thinned (released code: 0.25), kept whole, and never
    more than TaR's share. `pooling`: three rising limits of the coefficient of variation of a layer's norms, below
    which the window is 7, 5 or 3; ours, since no source gives them; "none" switches pooling off. `exempt`: tokens
    that stand for no single patch have no such redundancy; the newest of them stay, up to this share of the budget
    (ours), the others compete by their norms.

    Differs from the released code, which is `code_choice` below: the place of a token is its true frame and patch
    in every round, keys are unrotated (rotation alone spreads the scores of a static film over 0.4), the set is one
    for all KV heads (scores are averaged over them), averages are over the neighbours that are there, and of equal
    scores the newest frame wins, in it the lowest patch. Scores count in steps of 2^-16.
    """

    tar: float = 0.5
    recent: float = 0.25
    pooling: str = "0.2,0.4,0.6"
    exempt: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        share("retain.tar", self.tar)
        share("retain.recent", self.recent)
        at_least("retain.exempt", self.exempt, 0)
        at_least("1 - retain.exempt", 1 - self.exempt, 0)
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
        frame_tokens = view.grid[0] * view.grid[1]
        if self.budget_tokens < self.tokens_min(frame_tokens):
            raise RecipeError(
                f"retain.budget_tokens = {self.budget_tokens} holds no recent frame of {frame_tokens} tokens: "
                f"give at least {self.tokens_min(frame_tokens)}"
            )
        frames = self.recent_frames(view.tokens, frame_tokens)
        merged, age = view.merged, frame_age(view)
        recent = ~merged & (age < frames)  # (T,)
        redundancy = tar_scores(view, age, frames)
        norms = van_scores(view, age, self.limits())

        changed = best_first(redundancy, view.frame, torch.where(recent, 0, torch.where(merged, 2, 1)))
        taken = torch.zeros_like(merged)
        taken[changed[: self.tar_tokens]] = True  # the recent ones among them
        newest = best_first(view.frame, view.frame, (~merged).long())  # merged ones first
        spared = torch.zeros_like(merged)
        spared[newest[: int(self.exempt * self.budget_tokens)]] = True

        # Recent, exempt, changed, then whatever has the largest norm.
        tier = torch.full_like(view.frame, 3)
        tier[taken & ~merged] = 2
        tier[spared & merged] = 1
        tier[recent] = 0
        return best_first(torch.where(tier == 2, redundancy, norms), view.frame, tier)


def frame_age(view: LayerView) -> Tensor:
    """(T,) how many distinct frames are newer than a token's, among those with whole patches; merged ones last."""
    frame = view.frame.masked_fill(view.merged, -1)
    newest, order = torch.sort(frame, descending=True, stable=True)
    steps = torch.cat((newest.new_zeros(1), (newest[1:] != newest[:-1]).long())).cumsum(0)  # (T,)
    return torch.empty_like(steps).scatter_(0, order, steps)


def patch_number(view: LayerView) -> Tensor:
    """(T,) raster numbers of the patches; 0 for merged ones, who have none."""
    return (view.patch[:, 0] * view.grid[1] + view.patch[:, 1]).masked_fill(view.merged, 0)


def tar_scores(view: LayerView, age: Tensor, frames: int) -> Tensor:
    """(T,) -mean cosine of each key with those of its patch in the newest `frames`, in steps of 2^-16.

    The mean of cosines is one product with the mean of unit keys, gathered once a patch: O(H T D). Infinity where
    no recent frame has the patch: there is nothing that it could repeat. `age` (T,) of frame_age.
    """
    T = view.tokens
    P = view.grid[0] * view.grid[1]
    unit = F.normalize(view.k.float(), dim=-1)  # (H, T, D)
    patch = patch_number(view)

    # Which token stands at (recent frame, patch); the last slot takes everything else.
    slot = torch.where(~view.merged & (age < frames), age * P + patch, frames * P)
    table = torch.full((frames * P + 1,), -1, device=age.device)
    table.scatter_reduce_(0, slot, torch.arange(T, device=age.device), "amax")
    table = table[:-1].view(frames, P)
    there = table >= 0  # (F, P)
    seen = unit[:, table.clamp(min=0)] * there[..., None]  # (H, F, P, D)
    count = there.sum(0)  # (P,)
    mean = seen.sum(1) / count.clamp(min=1)[:, None]  # (H, P, D)

    score = -(unit * mean[:, patch]).sum(-1).mean(0)  # (T,)
    score = (score / STEP).round() * STEP
    return score.masked_fill(count[patch] == 0, math.inf)


def van_scores(view: LayerView, age: Tensor, limits: list[float]) -> Tensor:
    """(T,) norms of the values, mean over KV heads, pooled as the layer's variation wants it."""
    norms = view.v.float().norm(dim=-1).mean(0)  # (T,)
    if not limits:
        return norms
    kernel = pool_side(norms[~view.merged], limits)
    return norms if kernel == 1 else pooled(norms, view, age, kernel)


def pool_side(norms: Tensor, limits: list[float]) -> int:
    """The side of the pooling window: wide where the norms (n,) vary little against their mean."""
    if not len(norms):
        return 1
    variation = float(norms.std(correction=0) / norms.mean().clamp(min=1e-12))
    return KERNELS[sum(variation >= limit for limit in limits)]


def pooled(norms: Tensor, view: LayerView, age: Tensor, kernel: int) -> Tensor:
    """(T,) mean over the neighbours of the same frame that are there, `kernel` patches wide and high.

    A merged token has no neighbours and keeps its own norm.
    """
    rows, columns = view.grid
    merged = view.merged
    frames = int(age.max()) + 1
    slot = torch.where(merged, frames * rows * columns, age * (rows * columns) + patch_number(view))

    def spread(values: Tensor) -> Tensor:
        flat = values.new_zeros(frames * rows * columns + 1).scatter_(0, slot, values)
        flat = flat[:-1].view(frames, 1, rows, columns)
        return F.avg_pool2d(flat, kernel, stride=1, padding=kernel // 2, divisor_override=1).flatten()

    sums, counts = spread(norms), spread(torch.ones_like(norms))
    inside = slot.masked_fill(merged, 0)
    return torch.where(merged, norms, sums[inside] / counts[inside].clamp(min=1))


# The released code


def code_choice(
    k: Tensor,
    v: Tensor,
    frame_tokens: int,
    frames_kept: int,
    *,
    tar: float = 0.5,
    recent: float = 0.25,
    pooling: bool = False,
    rows: int = 14,
    layer: int = 0,
    layers: int = 1,
) -> Tensor:
    """What the released code keeps: k and v (H, T, D) as cached, rotated -> (H, frames_kept * frame_tokens).

    A set for each KV head. Tokens count as frames by their order, whatever they were before the last round; the
    TaR share is what rounding half to even leaves; TaR's tokens and the recent ones get the maximum over all heads
    plus one, then the largest norms win. With `pooling`, by quarter of the layers: 7 in three dimensions, 5 in two,
    3 in one (across the borders of frames), none; zeros around the map count. Of equals the lowest index stays,
    where the original leaves it to the device. Raises RecipeError where the original fails.
    """
    H, T, _ = k.shape
    frames, left = divmod(T, frame_tokens)
    if left:
        raise RecipeError(f"{T} tokens are no whole frames of {frame_tokens}: give whole frames")
    if frames <= frames_kept:
        return torch.arange(T, device=k.device).expand(H, T)
    budget = frames_kept * frame_tokens
    norms = v.norm(dim=-1)  # (H, T)
    if pooling:
        norms = _code_pooled(norms, frames, rows, layer, layers)
    if tar > 0:
        past = budget - round((1 - tar) * frames_kept * frame_tokens) - int(frames * recent) * frame_tokens
        if int(frames * recent) < 1 or past < 0:
            raise RecipeError(
                f"{int(frames * recent)} recent of {frames} frames do not go with a TaR share of {tar}: "
                "give a larger recent share, or a larger share for TaR"
            )
        forced = _code_tar(k, frame_tokens, int(frames * recent), past)
        norms = norms.scatter(1, forced, norms.max().item() + 1)
    return _highest(norms, budget)


def _code_tar(k: Tensor, frame_tokens: int, recent: int, past: int) -> Tensor:
    """Per head, `past` tokens by TaR and all tokens of the `recent` newest frames: (H, kept), ascending."""
    H, T, D = k.shape
    unit = (k / (k.norm(dim=-1, keepdim=True) + 1e-9)).view(H, -1, frame_tokens, D)
    new, old = unit[:, -recent:], unit[:, :-recent]  # (H, F, N, D)
    likeness = (new[:, :, None] * old[:, None]).sum(-1).mean(1)  # (H, F_old, N)
    chosen = _highest(-likeness.reshape(H, -1), past)
    newest = torch.arange(T - recent * frame_tokens, T, device=k.device).expand(H, -1)
    return torch.cat((chosen, newest), 1)


def _code_pooled(norms: Tensor, frames: int, rows: int, layer: int, layers: int) -> Tensor:
    """norms (H, T), pooled by the quarter of the network that the layer is in."""
    quarter = layer // max(1, layers // 4)
    if quarter > 3:
        raise RecipeError(
            f"layer {layer} of {layers} is in no quarter of the released code: switch pooling off"
        )
    H, T = norms.shape
    if quarter == 3:
        return norms
    if quarter == 2:
        return F.avg_pool1d(norms, 3, stride=1, padding=1)
    grid = norms.view(H, frames, rows, -1)
    side = min(KERNELS[quarter], *grid.shape[1:])
    side -= 1 - side % 2  # odd
    if side < 2:
        return norms
    pool = F.avg_pool3d if quarter == 0 else F.avg_pool2d
    return pool(grid, side, stride=1, padding=side // 2).reshape(H, T)


def _highest(score: Tensor, count: int) -> Tensor:
    """Per row of (H, T), the indices of the `count` highest, ascending; of equals the lowest."""
    return torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count].sort(1).values
