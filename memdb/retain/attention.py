"""Attention of a few probe rows, beside the fused kernel that encodes: never a whole attention matrix.

StreamMem (arXiv 2508.15717) asks with the chat template, LiveVLM (arXiv 2505.15269) with the last visual tokens.
Both average over heads and rows of one softmax over everything that the layer holds, old and new tokens together,
so that their scores can be compared.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

ROWS_AT_ONCE = 32  # of a long probe, so that its scores never stand in memory together
SCORES_BYTES = 512 << 20  # on a GPU, for which a few rows are little work: as many as this holds
# Products of two numbers of half precision are exact in fp32. So a GPU needs no copy of the keys in fp32: its matrix
# units read them as they are and sum in fp32.
_SUMS_WIDE = hasattr(torch.ops.aten.baddbmm, "dtype")  # torch 2.8


def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Probe rows q (Hq, r, D) on keys k (H, T, D), both rotated or both not -> probabilities (Hq, r, T) in fp32.

    `mask` (r, n): True where a row sees one of the last n keys; it sees all before them. None where the probe stands
    behind all keys. The query heads of a group stand beside each other as further rows of their KV head, so no key is
    repeated.
    """
    Hq, r, D = q.shape
    H, T, _ = k.shape
    rows = q.reshape(H, Hq // H * r, D)
    if _as_they_are(q, k):
        # Added to itself, times 0, which is not read: of anything else the product would make a copy first.
        out, keys = torch.empty(H, rows.shape[1], T, device=k.device), k.transpose(1, 2)
        torch.baddbmm(out, rows, keys, out_dtype=torch.float32, beta=0, alpha=scale, out=out)
        scores = out.view(Hq, r, T)
    else:
        scores = torch.bmm(rows.float() * scale, k.float().transpose(1, 2)).view(Hq, r, T)
    if mask is not None:
        scores[..., T - mask.shape[1] :].masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1)


def importance(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """What each key receives, (T,) in fp32: the mean over heads and rows of `attention_rows`. It sums to 1."""
    Hq, r, _ = q.shape
    T, at_once = k.shape[1], ROWS_AT_ONCE
    if _as_they_are(q, k):
        at_once = max(at_once, SCORES_BYTES // (4 * Hq * T))
    else:
        k = k.float()
    parts: list[Tensor] = []  # (T,)
    for start in range(0, r, at_once):
        some = slice(start, start + at_once)
        seen = None if mask is None else mask[some]
        parts.append(_summed(attention_rows(q[:, some], k, scale, seen), Hq * r))
    total = sum(parts[1:], parts[0])
    return total if k.is_cuda else total / (Hq * r)


def _summed(paid: Tensor, count: int) -> Tensor:
    """paid (Hq, r, T) -> (T,). On a GPU by `count` already: a product reads the numbers faster than its sums do."""
    if not paid.is_cuda:
        return paid.sum((0, 1))
    rows = paid.flatten(0, 1)
    return torch.mv(rows.t(), _equal_shares(len(rows), 1 / count, rows.device))


@lru_cache(maxsize=8)
def _equal_shares(rows: int, share: float, device: torch.device) -> Tensor:
    """The same for every layer of every chunk."""
    return torch.full((rows,), share, device=device)


def _as_they_are(q: Tensor, k: Tensor) -> bool:
    """Whether queries and keys are multiplied without being widened first."""
    halves = q.dtype == k.dtype and k.dtype in (torch.bfloat16, torch.float16)
    return _SUMS_WIDE and halves and q.is_cuda and k.is_cuda
