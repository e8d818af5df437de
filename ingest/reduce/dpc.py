"""Density peaks over the k nearest neighbours (DPC-kNN), for many frames at once, each with points of its own.

A point's density is high where its neighbours are near; its delta is the distance to a point of higher density. A
centre has much of both. The densest point has none above it, and takes the largest distance that there is.

The released code of StreamingTOM (arXiv 2510.18269) looks for the nearest point of *lower* density: `released`. It
picks other points in nearly every case.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

KINDS = ("textbook", "released")
JITTER = 1e-6  # largest addition to a density, so that equal ones have an order


def distances(frames: Tensor, *, kind: str = "textbook") -> Tensor:
    """Distances between the tokens of each frame, frames (F, N, E) -> (F, N, N): L2 over sqrt(E).

    From inner products in fp64, which leave no noise beside the differences; a frame at a time, so that it has the same
    bits whatever frames stand beside it. The released code does it in fp32, in whichever way torch chooses.
    """
    if kind == "released":
        points = frames.float()
        apart: Tensor = torch.cdist(points, points)
    else:
        inner = torch.stack([points @ points.T for points in frames.double()])  # (F, N, N)
        squares = inner.diagonal(dim1=1, dim2=2)  # (F, N)
        apart = (squares[:, :, None] + squares[:, None, :] - 2 * inner).clamp(min=0).sqrt()
    return apart / math.sqrt(frames.shape[-1])


def jitter(seed: int, number: int, tokens: int) -> Tensor:
    """(N,) fp64 in [0, 1e-6): of one frame of one recording, wherever batches are cut and whatever the device."""
    key = [seed % (1 << 64), number]
    draws = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64))).random(tokens)
    return torch.from_numpy(draws * JITTER)


def centres(
    distance: Tensor,
    points: Tensor,
    counts: Tensor,
    neighbours: int,
    noise: Tensor,
    *,
    kind: str = "textbook",
) -> Tensor:
    """Which tokens are centres, (F, N) bool: `counts` (F,) of those in `points` (F, N) bool, at most all.

    distance (F, N, N), noise (F, N). A point is its own first neighbour, as in the released code, and of n points
    there are at most n - 1. Equal scores: the earlier token wins. Densities are fp64, because those of tokens that
    are alike differ by less than fp32 can tell; the released code has fp32.
    """
    precision = torch.float32 if kind == "released" else torch.float64
    both = points[:, :, None] & points[:, None, :]  # (F, N, N)
    among = distance.masked_fill(~both, torch.inf)
    near = among.topk(min(neighbours, distance.shape[-1]), largest=False).values.to(precision)  # (F, N, k)
    size = (points.sum(-1) - 1).clamp(1, near.shape[-1])[:, None, None]  # neighbours that there are
    own = torch.arange(near.shape[-1], device=near.device) < size
    density = (-near.square().masked_fill(~own, 0).sum(-1) / size[..., 0]).exp() + noise.to(precision)
    row, column = density[:, :, None], density[:, None, :]
    above = both & ((row > column) if kind == "released" else (column > row))
    largest = distance.masked_fill(~both, 0).amax((1, 2))[:, None, None]
    delta = torch.where(above, distance, largest).amin(-1)
    return top(density * delta, points, counts)


def top(scores: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """The `counts` (F,) highest scores (F, N) among some tokens, (F, N) bool. Equal scores: the earlier token wins."""
    order = scores.masked_fill(~among, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    chosen = torch.zeros_like(among).scatter(1, order, ranks < counts[:, None])
    return chosen & among
