"""Attention of a few probe rows, beside the fused kernel that encodes: never a whole attention matrix.

StreamMem (arXiv 2508.15717) asks with the chat template, LiveVLM (arXiv 2505.15269) with the last visual tokens.
Both average over heads and rows of one softmax over everything that the layer holds, old and new tokens together,
so that their scores can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 32  # of a long probe, so that its scores never stand in memory together


def attention_rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Probe rows q (Hq, r, D) on keys k (H, T, D), both rotated or both not -> probabilities (Hq, r, T) in fp32.

    The query heads of a group stand beside each other as further rows of their KV head, so no key is repeated.
    No mask: the probe stands behind all keys.
    """
    Hq, r, D = q.shape
    H, T, _ = k.shape
    rows = q.reshape(H, Hq // H * r, D).float()  # (H, Hq/H * r, D)
    scores = torch.bmm(rows, k.float().transpose(1, 2)).mul_(scale)  # (H, Hq/H * r, T)
    return scores.softmax(-1).view(Hq, r, T)


def importance(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What each key receives, (T,) in fp32: the mean over heads and rows of `attention_rows`. It sums to 1."""
    Hq, r, _ = q.shape
    total = torch.zeros(k.shape[1], device=k.device)  # (T,)
    for start in range(0, r, ROWS_AT_ONCE):
        total += attention_rows(q[:, start : start + ROWS_AT_ONCE], k, scale).sum((0, 1))
    return total / (Hq * r)
