"""One token a frame that stands for it: the mean of its keys and values, weighted by what a probe paid them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memdb.models.transfers import sent
from memdb.retain.attention import multiplies_wide


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
    frames = torch.unique(frame) if numbers is None else sent(torch.tensor(numbers), frame.device)  # (F,)
    member = frame == frames[:, None]  # (F, T)
    weight = importance[..., None, :].double() * member  # (..., F, T)
    mass = weight.sum(-1, keepdim=True)  # (..., F, 1)
    alike = member / member.sum(-1, keepdim=True)
    weight = torch.where(mass > 0, weight / mass.clamp(min=1e-300), alike.double())

    def mean(x: Tensor) -> Tensor:  # (..., H, T, D) -> (..., H, F, D), one rounding to x's dtype
        rows = x.transpose(-3, -2)  # (..., T, H, D), which is how an encoder's lies in memory
        found = _weighted(weight.float(), rows.flatten(-2)).to(x.dtype)  # (..., F, H * D)
        return found.view(*found.shape[:-1], *rows.shape[-2:]).transpose(-3, -2)

    place = ((weight * position).sum(-1) + 0.5).floor().long()
    return Prototypes(mean(k), mean(v), place, frames, mass[..., 0].float())


def _weighted(weight: Tensor, rows: Tensor) -> Tensor:
    """weight (..., F, T) in fp32, rows (..., T, n) -> (..., F, n) in fp32.

    Rows of half precision are multiplied as they are where a GPU can: by a weight's rounding and by the rest of it,
    which together have twice the digits.
    """
    if not multiplies_wide(rows, rows) or rows.ndim != 3:
        return torch.matmul(weight, rows.float())
    rounded = weight.to(rows.dtype)
    parts = torch.cat((rounded, (weight - rounded.float()).to(rows.dtype)), -2)  # (..., 2F, T)
    both = torch.bmm(parts, rows, out_dtype=torch.float32)
    return both[:, : weight.shape[1]] + both[:, weight.shape[1] :]
