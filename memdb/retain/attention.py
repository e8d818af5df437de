"""Attention of a few probe rows, beside the fused kernel that encodes: never a whole attention matrix.

StreamMem (arXiv 2508.15717) asks with the chat template, LiveVLM (arXiv 2505.15269) with the last visual tokens.
Both average over heads and rows of one softmax over everything that the layer holds, old and new tokens together,
so that their scores can be compared.
"""

from __future__ import annotations

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
    if multiplies_wide(q, k):
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
    if multiplies_wide(q, k):
        at_once = max(at_once, SCORES_BYTES // (4 * Hq * T))
    else:
        k = k.float()
    total = torch.zeros(T, device=k.device)  # (T,)
    for start in range(0, r, at_once):
        some = slice(start, start + at_once)
        seen = None if mask is None else mask[some]
        total += attention_rows(q[:, some], k, scale, seen).sum((0, 1))
    return total / (Hq * r)


class Listener:
    """The `importance` of one layer after another, as a forward comes to them.

    On a GPU layers wait for each other and are heard together: of a few rows of one layer it has too little to do.
    As many as `SCORES_BYTES` holds of their scores and their keys, and only such that hold equally many keys.
    """

    def __init__(self) -> None:
        self._heard: list[Tensor] = []  # (T,) a layer
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._terms: tuple[float, Tensor | None] = 1.0, None

    def hear(self, q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> None:
        """As in `importance`; scale and mask are the same in all layers of a size."""
        bytes_each = 4 * q.shape[0] * q.shape[1] * k.shape[1] + k.numel() * k.element_size()
        if not multiplies_wide(q, k) or bytes_each > SCORES_BYTES:
            self._answer()
            self._heard.append(importance(q, k, scale, mask))
            return
        full = bytes_each * (len(self._waiting) + 1) > SCORES_BYTES
        if full or (self._waiting and self._waiting[0][1].shape != k.shape):
            self._answer()
        self._waiting.append((q, k))
        self._terms = scale, mask

    def heard(self) -> list[Tensor]:
        """(T,) of every layer so far."""
        self._answer()
        return self._heard

    def _answer(self) -> None:
        if not self._waiting:
            return
        # (L * Hq, r, D) and (L * H, T, D)
        q, k = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        paid = attention_rows(q, k, *self._terms).view(len(self._waiting), -1, k.shape[1])  # (L, Hq * r, T)
        self._heard += (paid.sum(1) / paid.shape[1]).unbind()
        self._waiting = []


def multiplies_wide(q: Tensor, k: Tensor) -> bool:
    """Whether numbers of half precision are multiplied as they are and summed in fp32, without a wide copy."""
    halves = q.dtype == k.dtype and k.dtype in (torch.bfloat16, torch.float16)
    return _SUMS_WIDE and halves and q.is_cuda and k.is_cuda
