"""What the released code of InfiniPot-V keeps (arXiv 2506.15745): a kernel to compare with, not a retainer.

Its sets differ from head to head, and the place of a token is lost after the first round, so nothing that is stored
can follow it; `tar_van` is what recipes use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.retain.tar_van import KERNELS
from memdb.schemas.errors import RecipeError


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
    stable: bool = True,
) -> Tensor:
    """What the released code keeps: k and v (H, T, D) as cached, rotated -> (H, frames_kept * frame_tokens).

    A set for each KV head. Tokens count as frames by their order, whatever they were before the last round; the
    TaR share is what rounding half to even leaves; TaR's tokens and the recent ones get the maximum over all heads
    plus one, then the largest norms win. With `pooling`, by quarter of the layers: 7 in three dimensions, 5 in two,
    3 in one (across the borders of frames), none; zeros around the map count. All in the dtype of the cache.
    `stable`: of equals the lowest index stays; else whichever torch's topk picks on this device, as in the original
    (in half precision equal norms are common). Raises RecipeError where the original fails.
    """
    if not 0 <= tar <= 1:
        raise RecipeError(f"tar = {tar} is no share: give 0 (norms alone) to 1")
    if min(frame_tokens, frames_kept) < 1:
        raise RecipeError(
            f"{frames_kept} frames of {frame_tokens} tokens are no budget: give at least 1 of each"
        )
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
        forced = _code_tar(k, frame_tokens, int(frames * recent), past, stable)
        norms = norms.scatter(1, forced, norms.max().item() + 1)
    return _highest(norms, budget, stable)


def _code_tar(k: Tensor, frame_tokens: int, recent: int, past: int, stable: bool) -> Tensor:
    """Per head, `past` tokens by TaR and all tokens of the `recent` newest frames: (H, kept), ascending."""
    H, T, D = k.shape
    unit = (k / (k.norm(dim=-1, keepdim=True) + 1e-9)).view(H, -1, frame_tokens, D)
    new, old = unit[:, -recent:], unit[:, :-recent]  # (H, F, N, D)
    likeness = (new[:, :, None] * old[:, None]).sum(-1).mean(1)  # (H, F_old, N)
    chosen = _highest(-likeness.reshape(H, -1), past, stable)
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
    if T // frames % rows:
        raise RecipeError(
            f"a frame of {T // frames} tokens has no {rows} rows: give the rows of the patch map"
        )
    grid = norms.view(H, frames, rows, -1)
    side = min(KERNELS[quarter], *grid.shape[1:])
    side -= 1 - side % 2  # odd
    if side < 2:
        return norms
    pool = F.avg_pool3d if quarter == 0 else F.avg_pool2d
    return pool(grid, side, stride=1, padding=side // 2).reshape(H, T)


def _highest(score: Tensor, count: int, stable: bool) -> Tensor:
    """Per row of (H, T), the indices of the `count` highest, ascending."""
    if stable:
        order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count]
    else:
        order = score.topk(count, dim=1).indices
    return order.sort(1).values
