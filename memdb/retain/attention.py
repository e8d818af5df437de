"""Attention of a few probe rows, beside the fused kernel that encodes: never a whole attention matrix.

StreamMem (arXiv 2508.15717) asks with the chat template, LiveVLM (arXiv 2505.15269) with the last visual tokens.
Both average over heads and rows of one softmax over everything that the layer holds, old and new tokens together,
so that their scores can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 32  # of a long probe, so that its scores never stand in memory together


def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Probe rows q (Hq, r, D) on keys k (H, T, D), both rotated or both not -> probabilities (Hq, r, T) in fp32.

    `mask` (r, n): True where a row sees one of the last n keys; it sees all before them. None where the probe stands
    behind all keys. The query heads of a group stand beside each other as further rows of their KV head, so no key is
    repeated.
    """
    Hq, r, D = q.shape
    H, T, _ = k.shape
    rows = q.float().reshape(H, Hq // H * r, D) * scale
    scores = torch.bmm(rows, k.float().transpose(1, 2)).view(Hq, r, T)
    if mask is not None:
        scores[..., T - mask.shape[1] :].masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1)


def importance(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """What each key receives, (T,) in fp32: the mean over heads and rows of `attention_rows`. It sums to 1."""
    Hq, r, _ = q.shape
    k = k.float()
    total = torch.zeros(k.shape[1], device=k.device)  # (T,)
    for start in range(0, r, ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        seen = None if mask is None else mask[some]
        total += attention_rows(q[:, some], k, scale, seen).sum((0, 1))
    return total / (Hq * r)
